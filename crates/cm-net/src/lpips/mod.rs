//! LPIPS: how far apart two images look, by the features that a classifier sees in them.
//!
//! `d(a, b) = Σ_l mean_hw Σ_c w_lc (â_lchw − b̂_lchw)²`, where `â_l` are the features of layer l, scaled at each pixel
//! to length 1 over their channels, and `w` are weights that were fitted to people's judgements (version 0.1).
//!
//! The networks are the feature parts of VGG-16, AlexNet and SqueezeNet 1.1 under torchvision's names. Their weights
//! come from a file that [`convert`] makes of torchvision's; the weights `w` are bundled (see `ATTRIBUTION.md` beside
//! them). Nothing here is ever trained.
//!
//! # Source
//! Zhang et al. 2018 (arXiv 1801.03924). The reading [`LpipsReading::Piq`] is that of the released code of Song et
//! al. 2023 (arXiv 2303.01469).

mod features;
mod file;
mod form;

use cm_model::torch::autocast::Autocast;
use cm_model::{Cast, ImageDistance, ImageShape, Params, ParamsBuilder, TensorMap};
use features::Features;
use tch::{Device, Kind, Tensor};

pub use cm_model::{LpipsNet, LpipsReading, LpipsSpec};
pub use file::{bundled_lins, convert};
pub use form::{Form, PixelRange, Pooling};

use crate::Result;

/// Is added to the length of a pixel's features before they are divided by it.
const EPS: f64 = 1e-10;

/// Checks that LPIPS as `spec` says can measure images of `shape`.
///
/// # Errors
/// [`crate::Error::ImagesForLpips`] if they are too small for the network, or neither grey nor RGB.
pub fn check(spec: LpipsSpec, shape: ImageShape) -> Result<()> {
    Form::of(spec.reading).check(spec.net, shape.channels, shape.height, shape.width)
}

/// A network with its weights, ready to measure; see the [module](self).
#[derive(Debug)]
pub struct Lpips {
    net: LpipsNet,
    form: Form,
    features: Features,
    /// `[1, C, 1, 1]` for each layer.
    lins: Vec<Tensor>,
    /// The form's constants, `[1, 3, 1, 1]`.
    mean: Tensor,
    std: Tensor,
    params: Params,
}

impl Lpips {
    fn build(spec: LpipsSpec, builder: ParamsBuilder) -> Result<Self> {
        let (net, root, form) = (spec.net, builder.root(), Form::of(spec.reading));
        let features = Features::new(net, &root)?;
        let lins = bundled_lins(net)?;
        let lins = lins.iter().map(|(name, lin)| root.buffer(name, lin)).collect::<cm_model::Result<_>>()?;
        let params = builder.finish();
        params.set_requires_grad(false);
        let [mean, std] = [form.mean, form.std].map(|values| column(values, params.device()));
        Ok(Self { net, form, features, lins, mean, std, params })
    }

    /// A network with the weights `tensors`: torchvision's `features.*` and the heads `lin<i>`, in any float dtype.
    ///
    /// # Errors
    /// [`cm_model::Error::Weights`] with every difference.
    pub fn from_tensors(tensors: &TensorMap, spec: LpipsSpec, device: Device) -> Result<Self> {
        let lpips = Self::build(spec, ParamsBuilder::unset(device))?;
        lpips.params.load(tensors, Cast::Floats)?;
        Ok(lpips)
    }

    /// A network with random weights and the true heads: it costs what a trained one costs, and its distances have
    /// no meaning for people.
    ///
    /// # Errors
    /// None but a fault in the bundled heads.
    pub fn random(spec: LpipsSpec, seed: u64, device: Device) -> Result<Self> {
        Self::build(spec, ParamsBuilder::new(seed, device))
    }

    /// The same weights in another form.
    #[must_use]
    pub fn with_form(self, form: Form) -> Self {
        let [mean, std] = [form.mean, form.std].map(|values| column(values, self.params.device()));
        Self { form, mean, std, ..self }
    }

    /// The network.
    #[must_use]
    pub fn net(&self) -> LpipsNet {
        self.net
    }

    /// The form that images are measured in.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    /// The network's weights and the heads.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The distance of each pair of images, with gradients to both.
    ///
    /// # Shapes
    /// `a`, `b`: `[B, 1 or 3, H, W]` in the range [`Form::given`]; the result is `[B]` float32.
    ///
    /// # Errors
    /// [`crate::Error::ImagesForLpips`] and [`cm_model::Error::Shape`] for images that do not fit the network or each other.
    pub fn distance(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.check(a, b)?;
        Ok(self.between(a, b))
    }

    /// What each layer adds to the distance.
    ///
    /// # Shapes
    /// As [`Lpips::distance`]; the result is `[layers, B]`.
    ///
    /// # Errors
    /// As [`Lpips::distance`].
    pub fn per_layer(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.check(a, b)?;
        Ok(self.layers(a, b))
    }

    fn check(&self, a: &Tensor, b: &Tensor) -> Result<()> {
        let size = a.size();
        let [_, channels, height, width] = size[..] else {
            let expected = "[B, 1 or 3, H, W]".to_owned();
            return Err(
                cm_model::Error::Shape { what: "images for LPIPS".into(), expected, got: size }.into()
            );
        };
        if b.size() != size {
            let what = "the second images for LPIPS".to_owned();
            return Err(cm_model::Error::Shape { what, expected: format!("{size:?}"), got: b.size() }.into());
        }
        self.form.check(self.net, channels, height, width)
    }

    fn layers(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let _f32 = Autocast::enter(self.params.device(), None);
        let taps = |images| {
            let pixels = self.form.pixels(images);
            self.features.taps(&((pixels - &self.mean) / &self.std), self.form.pooling)
        };
        let (a, b) = (taps(a), taps(b));
        let layers = std::iter::zip(a, b).zip(&self.lins).map(|((a, b), lin)| {
            let gap = (unit(&a) - unit(&b)).square();
            gap.mean_dim([2, 3].as_slice(), false, Kind::Float).mv(&lin.view(-1))
        });
        Tensor::stack(&layers.collect::<Vec<_>>(), 0)
    }
}

impl ImageDistance for Lpips {
    fn between(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.layers(a, b).sum_dim_intlist([0].as_slice(), false, Kind::Float)
    }
}

/// Features divided by their length over the channels. The gradient is finite where all are 0 as well.
///
/// The references take the square root of a sum there, whose gradient is NaN at 0. It does them no harm, because the
/// ReLU that the features come from lets no gradient of a 0 through, whatever it is; libtorch's norm has the gradient
/// 0 there.
fn unit(features: &Tensor) -> Tensor {
    features / (features.norm_scalaropt_dim(2, [1].as_slice(), true) + EPS)
}

fn column(values: [f64; 3], device: Device) -> Tensor {
    Tensor::from_slice(&values).to_kind(Kind::Float).to_device(device).view([1, 3, 1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last pixel's features are all 0.
    #[test]
    fn unit_features_have_length_one_and_a_finite_gradient_at_zero() {
        let features = Tensor::from_slice(&[3.0f32, 1e-3, 0.0, 4.0, 0.0, 0.0]).view([1, 2, 3, 1]);
        let features = features.set_requires_grad(true);
        let unit = unit(&features);
        let lengths =
            Vec::<f64>::try_from(unit.norm_scalaropt_dim(2, [1].as_slice(), false).view(-1)).unwrap();
        assert!((lengths[0] - 1.0).abs() < 1e-6 && lengths[2] == 0.0, "{lengths:?}");
        unit.sum(Kind::Float).backward();
        assert_eq!(features.grad().isfinite().all().int64_value(&[]), 1, "{}", features.grad());
    }
}
