use cm_schedule::SigmaRange;
use tch::{Device, Tensor};

use crate::{Cond, ImageShape, Params, Result, Sigma};

/// A raw network `F(c_in·x; c_noise)`, before preconditioning.
pub trait Backbone {
    /// Shape of the images that it takes and gives.
    fn shape(&self) -> ImageShape;

    /// Number of classes that it is conditioned on; 0 for an unconditional network.
    fn num_classes(&self) -> i64;

    /// Its weights and buffers.
    fn params(&self) -> &Params;

    /// Evaluates the network.
    ///
    /// # Shapes
    /// `x` `[B, C, H, W]` float32, already scaled by `c_in`; `c_noise` `[B]` float32; the result is
    /// `[B, C, H, W]`. With `train` the dropout layers are on and draw from libtorch's generator, which the
    /// caller has seeded ([`crate::Preconditioned::evaluate`] does). [`cm_torch::rng::dropout`] draws them so that a
    /// batch that is spread over processes gets the masks that it gets in one.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a condition that does not fit the network.
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> Result<Tensor>;
}

impl<B: Backbone + ?Sized> Backbone for Box<B> {
    fn shape(&self) -> ImageShape {
        (**self).shape()
    }
    fn num_classes(&self) -> i64 {
        (**self).num_classes()
    }
    fn params(&self) -> &Params {
        (**self).params()
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> Result<Tensor> {
        (**self).forward(x, c_noise, cond, train)
    }
}

/// `D(x; σ) ≈ E[x₀ | x₀ + σz = x]`, what a diffusion model learns (Karras et al. 2022, eq. 2).
pub trait Denoiser {
    /// Shape of its images.
    fn shape(&self) -> ImageShape;
    /// Number of classes; 0 for an unconditional model.
    fn num_classes(&self) -> i64;
    /// The noise levels that it was trained on.
    fn sigma_range(&self) -> SigmaRange;
    /// The device of its weights.
    fn device(&self) -> Device;

    /// The denoised image.
    ///
    /// # Shapes
    /// `x` and the result: `[B, C, H, W]` float32, data in [-1, 1], noise in the same units.
    ///
    /// # Errors
    /// [`crate::Error`] if shapes or noise levels do not fit.
    fn denoise(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor>;
}

/// A consistency function: `f(x, σ)` jumps along the probability-flow ODE from noise level σ to σ_min, and
/// `f(x, σ_min) = x` (Song et al. 2023, Sec. 3).
pub trait ConsistencyFn {
    /// Shape of its images.
    fn shape(&self) -> ImageShape;
    /// Number of classes; 0 for an unconditional model.
    fn num_classes(&self) -> i64;
    /// The noise levels that it was trained on; the lower end is where `f` is the identity.
    fn sigma_range(&self) -> SigmaRange;
    /// The device of its weights.
    fn device(&self) -> Device;

    /// The estimate at σ_min.
    ///
    /// # Shapes
    /// `x` and the result: `[B, C, H, W]` float32, data in [-1, 1], noise in the same units.
    ///
    /// # Errors
    /// [`crate::Error`] if shapes or noise levels do not fit.
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor>;
}
