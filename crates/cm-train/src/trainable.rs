use cm_model::{Backbone, Cond, ImageShape, Mode, Params, Preconditioned, Result, Sigma};
use cm_schedule::Precond;
use tch::Tensor;

/// What a loss needs of a network: an evaluation with gradients and, if asked for, with dropout.
///
/// It belongs to training alone. Samplers see a [`cm_model::Denoiser`] or a [`cm_model::ConsistencyFn`], which
/// have no training mode, so a sampler cannot turn dropout on.
pub trait Trainable {
    /// Shape of the images.
    fn shape(&self) -> ImageShape;

    /// Number of classes; 0 for an unconditional network.
    fn num_classes(&self) -> i64;

    /// The weights.
    fn params(&self) -> &Params;

    /// `f(x, σ)`, with its preconditioning.
    ///
    /// # Shapes
    /// `x` and the result: `[B, C, H, W]` float32, images in [-1, 1] plus noise in the same units.
    ///
    /// # Errors
    /// [`cm_model::Error`] if `x`, σ or the condition do not fit the network.
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> Result<Tensor>;
}

impl<N: Backbone, P: Precond> Trainable for Preconditioned<N, P> {
    fn shape(&self) -> ImageShape {
        self.net.shape()
    }

    fn num_classes(&self) -> i64 {
        self.net.num_classes()
    }

    fn params(&self) -> &Params {
        self.net.params()
    }

    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> Result<Tensor> {
        Preconditioned::evaluate(self, x, sigma, cond, mode)
    }
}
