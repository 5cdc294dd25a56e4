//! Laws of Inception on random weights, and its files. Its numbers are checked by golden files.

mod common;

use cm_model::{Bundle, TensorMap};
use cm_net::inception::{CLASSES, POOLED, SPATIAL, convert};
use cm_net::{Error, Inception, ModelFile};
use common::{rel, wave};
use tch::{Device, Kind, Tensor};

fn random() -> Inception {
    tch::set_num_threads(1);
    Inception::random(3, Device::Cpu).unwrap()
}

#[test]
fn images_are_seen_one_by_one_and_grey_is_three_equal_colours() {
    let inception = random();
    let images = wave(&[2, 3, 20, 24]);
    let seen = inception.forward(&images).unwrap();
    assert_eq!(seen.pooled.size(), [2, POOLED]);
    assert_eq!(seen.spatial.size(), [2, SPATIAL]);
    assert_eq!((seen.logits.size(), seen.logits_unbiased.size()), (vec![2, CLASSES], vec![2, CLASSES]));
    assert!(seen.pooled.min().double_value(&[]) >= 0.0, "features come from a ReLU");
    let bias = inception.params().get("fc.bias").unwrap();
    assert!(rel(&(&seen.logits_unbiased + bias), &seen.logits) < 1e-6);
    let alone = inception.forward(&images.narrow(0, 1, 1)).unwrap();
    assert!(rel(&alone.pooled, &seen.pooled.narrow(0, 1, 1)) < 1e-5);
    assert!(rel(&alone.spatial, &seen.spatial.narrow(0, 1, 1)) < 1e-5);

    let grey = wave(&[1, 1, 16, 16]);
    let colour = inception.forward(&grey.expand([-1, 3, -1, -1], false)).unwrap();
    assert!(rel(&inception.forward(&grey).unwrap().pooled, &colour.pooled) < 1e-5);
    for shape in [&[1, 2, 8, 8][..], &[3, 8, 8], &[0, 3, 8, 8]] {
        let images = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert!(inception.forward(&images).unwrap_err().to_string().contains("images for Inception"));
    }
}

/// The network up to the 1×1 convolution of Mixed_6d, written out once more, layer by layer, from the description of the
/// network of 2015 and the names of its weights.
struct ByHand<'a>(&'a TensorMap);

impl ByHand<'_> {
    /// Convolution, normalisation by the moments that the weights hold, ReLU.
    fn conv(&self, name: &str, x: &Tensor, stride: i64, padding: [i64; 2]) -> Tensor {
        let of = |part: &str| &self.0[&format!("{name}.{part}")];
        let column = |part: &str| of(part).view([1, -1, 1, 1]);
        let x = x.conv2d(of("conv.weight"), None::<&Tensor>, [stride, stride], padding, [1, 1], 1);
        let deviation = (column("bn.running_var") + 1e-3).sqrt();
        ((x - column("bn.running_mean")) / deviation * column("bn.weight") + column("bn.bias")).clamp_min(0.0)
    }

    /// Convolutions that keep the size, the kernels' heights and widths being odd.
    fn row(&self, block: &str, names: &[&str], x: &Tensor) -> Tensor {
        names.iter().fold(x.shallow_clone(), |x, name| {
            let name = format!("{block}.{name}");
            let size = self.0[&format!("{name}.conv.weight")].size();
            self.conv(&name, &x, 1, [(size[2] - 1) / 2, (size[3] - 1) / 2])
        })
    }

    /// The mean of the neighbours that are there: a sum over nine, divided by how many of them lie inside.
    fn pooled(&self, block: &str, x: &Tensor) -> Tensor {
        let sum = |x: &Tensor| x.avg_pool2d([3, 3], [1, 1], [1, 1], false, true, 1);
        self.row(block, &["branch_pool"], &(sum(x) / sum(&x.ones_like())))
    }

    fn five(&self, block: &str, x: &Tensor) -> Tensor {
        let branches = [
            self.row(block, &["branch1x1"], x),
            self.row(block, &["branch5x5_1", "branch5x5_2"], x),
            self.row(block, &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x),
            self.pooled(block, x),
        ];
        Tensor::cat(&branches, 1)
    }

    fn six_a(&self, x: &Tensor) -> Tensor {
        let double = self.row("Mixed_6a", &["branch3x3dbl_1", "branch3x3dbl_2"], x);
        let branches = [
            self.conv("Mixed_6a.branch3x3", x, 2, [0, 0]),
            self.conv("Mixed_6a.branch3x3dbl_3", &double, 2, [0, 0]),
            x.max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false),
        ];
        Tensor::cat(&branches, 1)
    }

    fn six(&self, block: &str, x: &Tensor) -> Tensor {
        let double =
            ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"];
        let branches = [
            self.row(block, &["branch1x1"], x),
            self.row(block, &["branch7x7_1", "branch7x7_2", "branch7x7_3"], x),
            self.row(block, &double, x),
            self.pooled(block, x),
        ];
        Tensor::cat(&branches, 1)
    }

    /// `mixed_6/conv` `[B, 192, 17, 17]` of images of 299×299.
    fn mixed_6_conv(&self, images: &Tensor) -> Tensor {
        let shrink = |x: Tensor| x.max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false);
        let x = self.conv("Conv2d_1a_3x3", images, 2, [0, 0]);
        let x = self.conv("Conv2d_2a_3x3", &x, 1, [0, 0]);
        let x = shrink(self.conv("Conv2d_2b_3x3", &x, 1, [1, 1]));
        let x = self.conv("Conv2d_3b_1x1", &x, 1, [0, 0]);
        let x = shrink(self.conv("Conv2d_4a_3x3", &x, 1, [0, 0]));
        let x = ["Mixed_5b", "Mixed_5c", "Mixed_5d"].iter().fold(x, |x, block| self.five(block, &x));
        let x = self.six_a(&x);
        let x = ["Mixed_6b", "Mixed_6c"].iter().fold(x, |x, block| self.six(block, &x));
        self.row("Mixed_6d", &["branch1x1"], &x)
    }
}

#[test]
fn spatial_features_are_seven_channels_of_mixed_6_conv_pixel_by_pixel() {
    let mut weights: TensorMap =
        random().params().iter().map(|(name, tensor)| (name.into(), tensor.shallow_clone())).collect();
    // Moments and biases of a trained network are no zeros and ones.
    for (name, tensor) in &mut weights {
        let by = match name.rsplit_once(".bn.") {
            Some((_, "running_mean" | "bias")) => 0.1,
            Some((_, "running_var" | "weight")) => 0.3,
            _ => continue,
        };
        *tensor = &*tensor + wave(&tensor.size()) * by;
    }
    let network = Inception::from_tensors(&weights, Device::Cpu).unwrap();
    // Of this size nothing is resized.
    let images = wave(&[2, 3, 299, 299]);
    let spatial = network.forward(&images).unwrap().spatial;
    let by_hand = ByHand(&weights).mixed_6_conv(&images);
    assert_eq!(by_hand.size(), [2, 192, 17, 17]);
    // As the evaluator of guided-diffusion reads them: channels last, the first seven, one pixel behind the other.
    let expected = by_hand.permute([0, 2, 3, 1]).narrow(3, 0, 7).reshape([2, SPATIAL]);
    assert!(expected.std(false).double_value(&[]) > 0.0);
    let difference = rel(&spatial, &expected);
    assert!(difference < 1e-4, "{difference}");
}

#[test]
fn files_hold_the_network_strictly() {
    let network = random();
    let state =
        || -> TensorMap { network.params().iter().map(|(n, t)| (n.into(), t.shallow_clone())).collect() };
    let weights = state();
    // 23,885,392 numbers of the published network, the moments of 94 normalisations among them.
    assert_eq!(state().values().map(Tensor::numel).sum::<usize>(), 23_885_392);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inception.safetensors");
    let mut published = state();
    // Newer versions of PyTorch count training steps.
    published.insert("Conv2d_1a_3x3.bn.num_batches_tracked".into(), Tensor::from(0i64));
    convert(published).unwrap().write(&path).unwrap();
    let loaded = Inception::load(&path, Device::Cpu).unwrap();
    assert!(
        loaded.params().iter().all(|(name, tensor)| tensor.equal(&weights[name]) && !tensor.requires_grad())
    );
    assert!(ModelFile::read(&path).unwrap_err().to_string().contains("weights of inception"));

    let mut wrong = state();
    wrong.remove("fc.bias");
    wrong.insert("AuxLogits.fc.weight".into(), wave(&[2, 2]));
    wrong.insert("Mixed_6a.branch3x3.bn.running_var".into(), wave(&[3]));
    let text = convert(wrong).unwrap_err().to_string();
    for words in ["'fc.bias' [1008] is missing", "'AuxLogits.fc.weight' is not", "[3], expected [384]"] {
        assert!(text.contains(words) && !text.contains('\n'), "{text}");
    }

    let mut bundle = Bundle::read(&path).unwrap();
    bundle.tensors.remove("fc.weight");
    bundle.write(&path).unwrap();
    assert!(matches!(Inception::load(&path, Device::Cpu), Err(Error::Weights { .. })));
    let key = bundle.metadata.keys().next().unwrap().clone();
    for (text, says) in [
        (r#"{"format":1,"kind":"lpips","net":"alex","version":"0.1"}"#, "something else"),
        (r#"{"format":1,"kind":"inception","version":"2020-01-01"}"#, "2020-01-01"),
    ] {
        bundle.metadata.insert(key.clone(), text.into());
        bundle.write(&path).unwrap();
        let error = Inception::load(&path, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("--as inception"), "{error}");
    }
    bundle.metadata.clear();
    bundle.write(&path).unwrap();
    assert!(Inception::load(&path, Device::Cpu).unwrap_err().to_string().contains("no description"));
}
