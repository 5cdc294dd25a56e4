//! Models of one parameter on Gaussian data, and expectations over such data without drawing any.

use cm_model::{Cond, GaussianOracle, ImageShape, Init, Mode, Params, ParamsBuilder, Sigma};
use cm_schedule::{KarrasGrid, Weighting};
use tch::{Device, Kind, Tensor};

use super::closed_form::root;
use crate::testing::LEVELS;
use crate::{Example, Losses, Pairs, Trainable};

/// The standard deviation of the data.
pub(super) const DATA_STD: f64 = 0.5;

/// Four pixels that do not depend on each other: room for all signs of an image and its noise.
pub(super) const SHAPE: ImageShape = ImageShape { channels: 1, height: 2, width: 2 };

/// The exact denoiser of the data.
pub(super) const ORACLE: GaussianOracle =
    GaussianOracle { data_std: DATA_STD, shape: SHAPE, sigma_range: LEVELS.range };

/// What a [`Gaussian`] computes.
#[derive(Clone, Copy)]
pub(super) enum Form {
    /// f(x, σ) = x √((s² + ε²)/(s² + σ²)).
    Consistency,
    /// D(x; σ) = x s²/(s² + σ²).
    Denoiser,
}

/// The consistency function or the denoiser of data N(0, s²), with s as its only parameter.
pub(super) struct Gaussian {
    params: Params,
    form: Form,
}

impl Gaussian {
    pub(super) fn new(form: Form, std: f64) -> Self {
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let _ = builder.root().param("std", &[1], Init::Zeros).unwrap();
        let model = Self { params: builder.finish(), form };
        model.set(std);
        model
    }

    fn weight(&self) -> &Tensor {
        self.params.get("std").unwrap()
    }

    pub(super) fn std(&self) -> f64 {
        self.weight().double_value(&[0])
    }

    pub(super) fn set(&self, std: f64) {
        let _no_grad = tch::no_grad_guard();
        let _ = self.weight().shallow_clone().fill_(std);
    }
}

impl Trainable for Gaussian {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, _: &Cond, _: Mode) -> cm_model::Result<Tensor> {
        let squares = sigma.broadcast(x.device(), |sigma| sigma * sigma);
        let var = self.weight().square();
        Ok(match self.form {
            Form::Consistency => x * ((&var + LEVELS.range.min().powi(2)) / (var + squares)).sqrt(),
            Form::Denoiser => x * &var / (var + squares),
        })
    }
}

/// `images` images whose pixels repeat `four`.
pub(super) fn repeated(four: [f64; 4], images: usize) -> Tensor {
    Tensor::from_slice(&four.repeat(images)).to_kind(Kind::Float).view(SHAPE.batch(images as i64))
}

/// Measures an example of one image for each pair of levels. Its four pixels (image, noise) are (±s, ±1), whose second
/// moments are those of N(0, s²) and N(0, 1) that do not depend on each other: for a model that is linear in x, the
/// mean over the pixels of anything quadratic is the expectation itself.
pub(super) fn on_pairs<T>(pairs: &Pairs, data_std: f64, measure: impl FnOnce(&Example<'_>) -> T) -> T {
    let (s, count) = (data_std, pairs.sigma.len());
    measure(&Example {
        images: &repeated([s, s, -s, -s], count),
        noise: &repeated([1.0, -1.0, 1.0, -1.0], count),
        pairs,
        cond: &Cond::none(),
    })
}

/// All pairs of neighbours on a grid of N levels, each once.
pub(super) fn grid_pairs(num_scales: usize) -> Pairs {
    let sigmas = KarrasGrid::EDM.ascending(num_scales);
    Pairs::new(sigmas.windows(2).map(|w| (w[1], w[0])), Weighting::Uniform, DATA_STD)
}

/// The s at which the gradient of the mean loss, as the graph of `losses` has it, changes its sign.
pub(super) fn fixed_point(model: &Gaussian, losses: impl Fn(&Gaussian) -> Losses) -> f64 {
    root(|std| {
        model.set(std);
        losses(model).per_sample.mean(Kind::Float).backward();
        let mut grad = model.weight().grad();
        let slope = grad.double_value(&[0]);
        let _ = grad.zero_();
        slope
    })
}
