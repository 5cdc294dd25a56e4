use cm_model::{Backbone, Cond, ImageShape, Params, ParamsBuilder};
use tch::Tensor;

use crate::{DhariwalUnet, DhariwalUnetSpec, Result};

/// An ADM network that also predicts variances: it has twice the output channels, and the first half is the
/// image (Nichol and Dhariwal 2021; the networks of EDM's `iDDPMPrecond`).
#[derive(Debug)]
pub struct LearnedVariance {
    inner: DhariwalUnet,
}

impl LearnedVariance {
    /// Builds the network from `builder`; see [`DhariwalUnet::new`].
    ///
    /// # Errors
    /// [`crate::Error::Option`] for options that do not go together.
    pub fn new(spec: &DhariwalUnetSpec, builder: ParamsBuilder) -> Result<Self> {
        Ok(Self { inner: DhariwalUnet::with_outputs(spec, 2 * spec.image_channels, builder)? })
    }

    /// The network with all its outputs, `[B, 2C, H, W]`.
    #[must_use]
    pub fn inner(&self) -> &DhariwalUnet {
        &self.inner
    }
}

impl Backbone for LearnedVariance {
    fn shape(&self) -> ImageShape {
        self.inner.shape()
    }
    fn num_classes(&self) -> i64 {
        self.inner.num_classes()
    }
    fn params(&self) -> &Params {
        self.inner.params()
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> cm_model::Result<Tensor> {
        Ok(self.inner.forward(x, c_noise, cond, train)?.narrow(1, 0, self.shape().channels))
    }
}
