use std::collections::BTreeMap;
use std::path::Path;

use cm_model::torch::optim::{OptimKind, Optimizer, StepOptions};
use cm_model::{Bundle, Cast, Init, ParamPath, Params, ParamsBuilder};
use cm_schedule::rng::{Purpose, Stream, permutation};
use tch::{Device, Kind, Tensor};

use crate::{Error, FeatureNet, Result, Seen};

/// How the classifier is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassifierSpec {
    /// Passes over the training images.
    pub epochs: u32,
    /// Images a step.
    pub batch: usize,
    /// Learning rate at the start; it falls to 0 along a cosine.
    pub lr: f64,
    /// Seed of start, order and shifts.
    pub seed: u64,
}

impl Default for ClassifierSpec {
    /// On the bundled digits these reach 98–99 % on held-out images in a few seconds of one core.
    fn default() -> Self {
        Self { epochs: 20, batch: 64, lr: 3e-3, seed: 0 }
    }
}

/// A small convolutional classifier for the data set at hand: two 3×3 convolutions, a 2×2 mean pool, one more
/// convolution, and two linear layers.
#[derive(Debug)]
pub struct Classifier {
    params: Params,
    layers: Layers,
}

#[derive(Debug)]
struct Layers {
    convs: Vec<(Tensor, Tensor)>,
    linears: Vec<(Tensor, Tensor)>,
}

const WIDTH: [i64; 3] = [32, 48, 64];
const HIDDEN: i64 = 128;

impl Classifier {
    /// Trains a classifier on `images` `[N, C, H, W]` in [-1, 1] with one label each in `0..num_classes`.
    ///
    /// # Errors
    /// [`Error::Input`] if images and labels do not fit together.
    pub fn train(images: &Tensor, labels: &[i64], num_classes: i64, spec: ClassifierSpec) -> Result<Self> {
        let size = images.size();
        if size.len() != 4 || size[0] as usize != labels.len() || labels.is_empty() {
            return Err(Error::Input {
                what: "labelled images",
                expected: "[N ≥ 1, C, H, W] with one label each".into(),
                got: format!("{size:?} with {} labels", labels.len()),
            });
        }
        if let Some(bad) = labels.iter().find(|l| !(0..num_classes).contains(*l)) {
            let expected = format!("0 to {}", num_classes - 1);
            return Err(Error::Input { what: "label", expected, got: bad.to_string() });
        }
        let builder = ParamsBuilder::new(spec.seed, Device::Cpu);
        let layers = Layers::build(&builder.root(), &size, num_classes)?;
        let classifier = Self { params: builder.finish(), layers };
        classifier.fit(images, &Tensor::from_slice(labels), spec)?;
        Ok(classifier)
    }

    fn fit(&self, images: &Tensor, labels: &Tensor, spec: ClassifierSpec) -> Result<()> {
        let params: Vec<(&str, &Tensor)> = self.params.trainable().collect();
        let mut optimizer = Optimizer::new(OptimKind::adam(), &params)?;
        let count = images.size()[0] as u32;
        let steps_per_epoch = (count as usize).div_ceil(spec.batch);
        let total = (spec.epochs as usize * steps_per_epoch) as f64;
        for epoch in 0..spec.epochs {
            let order: Vec<i64> =
                permutation(spec.seed, u64::from(epoch), count).iter().map(|&i| i64::from(i)).collect();
            for (index, rows) in order.chunks(spec.batch).enumerate() {
                let step = epoch as usize * steps_per_epoch + index;
                let rows = Tensor::from_slice(rows);
                let batch = shifted(&images.index_select(0, &rows), spec.seed, step as u32);
                let logits = self.layers.logits(&batch);
                let loss = logits.cross_entropy_for_logits(&labels.index_select(0, &rows));
                loss.f_backward()?;
                let lr = spec.lr * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / total).cos());
                optimizer.step(&StepOptions::new(lr), &params, &[])?;
            }
        }
        Ok(())
    }

    /// Trains a classifier without labels: it learns to tell by how many quarter turns an image was turned, which takes
    /// an eye for what the images show (Gidaris et al. 2018, arXiv 1803.07728).
    ///
    /// # Errors
    /// [`Error::Input`] unless the images `[N, C, H, W]` are square.
    pub fn train_on_rotations(images: &Tensor, spec: ClassifierSpec) -> Result<Self> {
        let (turned, labels) = rotations(images)?;
        Self::train(&turned, &labels, 4, spec)
    }

    /// Writes the weights with what is needed to read them again, and `about`, which says where they come from.
    ///
    /// # Errors
    /// [`cm_model::Error::Io`] if the file cannot be written.
    pub fn save(&self, path: &Path, about: &str) -> Result<()> {
        let metadata = BTreeMap::from([
            (KIND_KEY.to_owned(), KIND.to_owned()),
            (ABOUT_KEY.to_owned(), about.to_owned()),
        ]);
        Ok(Bundle { tensors: self.params.snapshot(), metadata }.write(path)?)
    }

    /// Reads what [`Classifier::save`] wrote, for images `[C, H, W]` of the shape that it was trained on. Returns what was
    /// said about it too.
    ///
    /// # Errors
    /// [`cm_model::Error::File`] for a file of anything else or for other images; [`cm_model::Error::Io`].
    pub fn load(path: &Path, shape: [i64; 3]) -> Result<(Self, String)> {
        let Bundle { tensors, metadata } = Bundle::read(path)?;
        let refuse = |problem: String| cm_model::Error::File { path: path.into(), problem };
        let about = match (metadata.get(KIND_KEY), metadata.get(ABOUT_KEY)) {
            (Some(kind), Some(about)) if kind == KIND => about.clone(),
            _ => return Err(refuse("no classifier that `cm eval` trained".into()).into()),
        };
        let classes = tensors.get("linear1.bias").and_then(|bias| bias.size().first().copied()).unwrap_or(0);
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let layers = Layers::build(&builder.root(), &[1, shape[0], shape[1], shape[2]], classes.max(1))?;
        let classifier = Self { params: builder.finish(), layers };
        classifier.params.load(&tensors, Cast::Never).map_err(|error| {
            refuse(format!("a classifier of images of another shape than {shape:?} ({error})"))
        })?;
        Ok((classifier, about))
    }

    /// Probabilities `[N, classes]`.
    ///
    /// # Errors
    /// [`Error::Torch`] if the images do not fit the classifier.
    pub fn probabilities(&self, images: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        Ok(self.layers.f_logits(images)?.softmax(-1, Kind::Float))
    }

    /// Share of images whose most probable class is their label.
    ///
    /// # Errors
    /// [`Error::Torch`] if the images do not fit the classifier.
    pub fn accuracy(&self, images: &Tensor, labels: &[i64]) -> Result<f64> {
        let guess = self.probabilities(images)?.argmax(-1, false);
        let right = guess.eq_tensor(&Tensor::from_slice(labels)).to_kind(Kind::Double);
        Ok(right.mean(Kind::Double).double_value(&[]))
    }

    /// [`Classifier::accuracy`] of one that was trained on rotations.
    ///
    /// # Errors
    /// [`Error::Input`] unless the images are square; [`Error::Torch`] if they do not fit the classifier.
    pub fn accuracy_on_rotations(&self, images: &Tensor) -> Result<f64> {
        let (turned, labels) = rotations(images)?;
        self.accuracy(&turned, &labels)
    }
}

const KIND_KEY: &str = "kind";
const KIND: &str = "classifier";
const ABOUT_KEY: &str = "about";

/// Features are those before the last layer, 128 numbers an image.
impl FeatureNet for Classifier {
    fn see(&self, images: &Tensor) -> Result<Seen> {
        let _no_grad = tch::no_grad_guard();
        let images = images.f_to_device(Device::Cpu)?;
        let (weight, bias) = &self.layers.linears[1];
        let (mut features, mut logits) = (Vec::new(), Vec::new());
        for chunk in images.f_split(CHUNK, 0)? {
            let hidden = self.layers.f_hidden(&chunk)?;
            logits.push(hidden.f_linear(weight, Some(bias))?);
            features.push(hidden);
        }
        Ok(Seen { features: Tensor::f_cat(&features, 0)?, spatial: None, logits: Tensor::f_cat(&logits, 0)? })
    }

    fn features(&self) -> u64 {
        HIDDEN as u64
    }

    fn spatial_features(&self) -> Option<u64> {
        None
    }
}

/// Images that are evaluated together.
const CHUNK: i64 = 256;

/// All images by 0, 1, 2 and 3 quarter turns, with the number of turns.
fn rotations(images: &Tensor) -> Result<(Tensor, Vec<i64>)> {
    let size = images.size();
    if size.len() != 4 || size[2] != size[3] {
        let expected = "square images [N, C, S, S]".into();
        return Err(Error::Input { what: "images to turn", expected, got: format!("{size:?}") });
    }
    let turned: Vec<Tensor> = (0..4).map(|turns| images.rot90(turns, [2, 3])).collect();
    let labels = (0..4).flat_map(|turns| std::iter::repeat_n(turns, size[0] as usize)).collect();
    Ok((Tensor::f_cat(&turned, 0)?, labels))
}

impl Layers {
    fn build(root: &ParamPath<'_>, size: &[i64], num_classes: i64) -> Result<Self> {
        let layer = |name: String, shape: &[i64]| -> Result<(Tensor, Tensor)> {
            let path = root.sub(name);
            // √2 keeps the variance through a ReLU.
            let weight = path.param("weight", shape, Init::KaimingNormal { scale: 2f64.sqrt() })?;
            Ok((weight, path.param("bias", &shape[..1], Init::Zeros)?))
        };
        let mut convs = Vec::new();
        let mut channels = size[1];
        for (index, &width) in WIDTH.iter().enumerate() {
            convs.push(layer(format!("conv{index}"), &[width, channels, 3, 3])?);
            channels = width;
        }
        let flat = channels * (size[2] / 2) * (size[3] / 2);
        let linears =
            vec![layer("linear0".into(), &[HIDDEN, flat])?, layer("linear1".into(), &[num_classes, HIDDEN])?];
        Ok(Self { convs, linears })
    }

    fn f_logits(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.f_hidden(x)?.f_linear(&self.linears[1].0, Some(&self.linears[1].1))?)
    }

    fn f_hidden(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.shallow_clone();
        for (index, (weight, bias)) in self.convs.iter().enumerate() {
            h = h.f_conv2d(weight, Some(bias), [1, 1], [1, 1], [1, 1], 1)?.relu();
            if index == 1 {
                h = h.f_avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None::<i64>)?;
            }
        }
        Ok(h.flatten(1, -1).f_linear(&self.linears[0].0, Some(&self.linears[0].1))?.relu())
    }

    fn logits(&self, x: &Tensor) -> Tensor {
        self.f_logits(x).expect("shapes were fixed when the layers were built")
    }
}

/// The batch moved by up to one pixel in each direction, the same for all of a step: a small set overfits less.
fn shifted(batch: &Tensor, seed: u64, step: u32) -> Tensor {
    let stream = Stream { seed, purpose: Purpose::Augment, step, sample: 0 };
    let (dy, dx) = (stream.below(0, 3) as i64, stream.below(1, 3) as i64);
    let size = batch.size();
    // Outside of a digit is black, −1, not the 0 of the padding: pad the image moved up by one.
    let padded = (batch + 1.0).constant_pad_nd([1, 1, 1, 1]) - 1.0;
    padded.narrow(2, dy, size[2]).narrow(3, dx, size[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bright left halves against bright right halves, with noise.
    fn halves(count: i64, seed: i64) -> (Tensor, Vec<i64>) {
        tch::manual_seed(seed);
        let labels: Vec<i64> = (0..count).map(|i| i % 2).collect();
        let images = Tensor::randn([count, 1, 8, 8], (Kind::Float, Device::Cpu)) * 0.3 - 0.5;
        for (index, &label) in labels.iter().enumerate() {
            let _ = images.get(index as i64).narrow(2, label * 4, 4).g_add_scalar_(1.0);
        }
        (images, labels)
    }

    #[test]
    fn two_separable_classes_are_learnt_and_probabilities_sum_to_one() {
        let (images, labels) = halves(256, 0);
        let spec = ClassifierSpec { epochs: 4, ..Default::default() };
        let classifier = Classifier::train(&images, &labels, 2, spec).unwrap();
        let (test, truth) = halves(128, 1);
        assert!(classifier.accuracy(&test, &truth).unwrap() > 0.97);
        let sums =
            classifier.probabilities(&test).unwrap().sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
        assert!((sums - 1.0).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn features_are_what_the_logits_are_made_of_and_a_file_brings_them_back() {
        let (images, labels) = halves(64, 2);
        let spec = ClassifierSpec { epochs: 1, ..Default::default() };
        let classifier = Classifier::train(&images, &labels, 2, spec).unwrap();
        let seen = classifier.see(&images).unwrap();
        assert_eq!((seen.features.size(), seen.logits.size()), (vec![64, HIDDEN], vec![64, 2]));
        assert_eq!((classifier.features(), classifier.spatial_features()), (HIDDEN as u64, None));
        let probabilities = classifier.probabilities(&images).unwrap();
        assert!((seen.logits.softmax(-1, Kind::Float) - probabilities).abs().max().double_value(&[]) < 1e-6);

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("classifier.safetensors");
        classifier.save(&path, "halves").unwrap();
        let (loaded, about) = Classifier::load(&path, [1, 8, 8]).unwrap();
        assert_eq!(about, "halves");
        assert!(loaded.see(&images).unwrap().features.equal(&seen.features));
        let other = Classifier::load(&path, [3, 8, 8]).unwrap_err().to_string();
        assert!(other.contains("another shape") && !other.contains('\n'), "{other}");
        Bundle::default().write(&path).unwrap();
        assert!(Classifier::load(&path, [1, 8, 8]).unwrap_err().to_string().contains("no classifier"));
    }

    /// Bright left halves: a quarter turn is told by which side is bright.
    #[test]
    fn images_without_labels_teach_by_their_turns() {
        let (images, labels) = halves(400, 3);
        let left: Vec<i64> = (0..400).filter(|&i| labels[i as usize] == 0).collect();
        let images = images.index_select(0, &Tensor::from_slice(&left));
        let spec = ClassifierSpec { epochs: 6, ..Default::default() };
        let classifier = Classifier::train_on_rotations(&images, spec).unwrap();
        assert!(classifier.accuracy_on_rotations(&images).unwrap() > 0.95);
        assert!(Classifier::train_on_rotations(&images.narrow(2, 0, 4), spec).is_err());
    }

    #[test]
    fn labels_out_of_range_are_refused() {
        let (images, _) = halves(4, 0);
        let error = Classifier::train(&images, &[0, 1, 2, 0], 2, ClassifierSpec::default()).unwrap_err();
        assert!(error.to_string().contains("expected 0 to 1, got 2"), "{error}");
    }
}
