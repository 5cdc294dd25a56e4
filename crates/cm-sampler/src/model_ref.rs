use cm_model::{Cond, ConsistencyFn, Denoiser, ImageShape, Sigma};
use cm_schedule::SigmaRange;
use tch::{Device, Tensor};

use crate::{Error, Result};

/// A model of either kind, borrowed: what a sampler evaluates.
///
/// Which kind a file holds is known only when it is open; what needs the other kind says so with one typed error.
///
/// ```
/// use cm_sampler::{ModelRef, model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// let oracle = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let model = ModelRef::Denoiser(&oracle);
/// assert!(model.denoiser().is_ok());
/// assert!(model.consistency().is_err_and(|e| e.to_string().contains("needs a consistency function")));
/// ```
#[derive(Clone, Copy)]
pub enum ModelRef<'a> {
    /// For one-step and multistep sampling.
    Consistency(&'a dyn ConsistencyFn),
    /// For the ODE solvers.
    Denoiser(&'a dyn Denoiser),
}

impl<'a> ModelRef<'a> {
    /// The consistency function.
    ///
    /// # Errors
    /// [`Error::NeedsConsistency`] if it is a denoiser.
    pub fn consistency(self) -> Result<&'a dyn ConsistencyFn> {
        match self {
            Self::Consistency(f) => Ok(f),
            Self::Denoiser(_) => Err(Error::NeedsConsistency),
        }
    }

    /// The denoiser.
    ///
    /// # Errors
    /// [`Error::NeedsDenoiser`] if it is a consistency function.
    pub fn denoiser(self) -> Result<&'a dyn Denoiser> {
        match self {
            Self::Denoiser(d) => Ok(d),
            Self::Consistency(_) => Err(Error::NeedsDenoiser),
        }
    }

    /// Shape of the images.
    #[must_use]
    pub fn shape(self) -> ImageShape {
        match self {
            Self::Consistency(f) => f.shape(),
            Self::Denoiser(d) => d.shape(),
        }
    }

    /// Number of classes; 0 for an unconditional model.
    #[must_use]
    pub fn num_classes(self) -> i64 {
        match self {
            Self::Consistency(f) => f.num_classes(),
            Self::Denoiser(d) => d.num_classes(),
        }
    }

    /// The noise levels that the model knows.
    #[must_use]
    pub fn sigma_range(self) -> SigmaRange {
        match self {
            Self::Consistency(f) => f.sigma_range(),
            Self::Denoiser(d) => d.sigma_range(),
        }
    }

    /// The device that the model is on.
    #[must_use]
    pub fn device(self) -> Device {
        match self {
            Self::Consistency(f) => f.device(),
            Self::Denoiser(d) => d.device(),
        }
    }

    /// The clean images that the model sees in `x`, `[B, C, H, W]`: f(x, σ) or D(x; σ).
    ///
    /// # Errors
    /// [`Error::Model`] if shapes, noise levels or condition do not fit, or if the model's answer is of another shape than
    /// what it was asked about.
    pub fn estimate(self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor> {
        let estimate = match self {
            Self::Consistency(f) => f.jump(x, sigma, cond)?,
            Self::Denoiser(d) => d.denoise(x, sigma, cond)?,
        };
        same_shape("estimate of the model", &estimate, &x.size())?;
        Ok(estimate)
    }
}

/// What a model or a source of noise gives has to have the shape that it was asked for: anything else would be spread over
/// the images, or panic.
pub(crate) fn same_shape(what: &str, got: &Tensor, expected: &[i64]) -> Result<()> {
    let size = got.size();
    match size.as_slice() == expected {
        true => Ok(()),
        false => {
            let (what, expected) = (what.into(), format!("{expected:?}"));
            Err(Error::Model(cm_model::Error::Shape { what, expected, got: size }))
        }
    }
}

impl std::fmt::Debug for ModelRef<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Consistency(_) => "ModelRef::Consistency",
            Self::Denoiser(_) => "ModelRef::Denoiser",
        })
    }
}

impl<'a> From<&'a dyn ConsistencyFn> for ModelRef<'a> {
    fn from(f: &'a dyn ConsistencyFn) -> Self {
        Self::Consistency(f)
    }
}

impl<'a> From<&'a dyn Denoiser> for ModelRef<'a> {
    fn from(d: &'a dyn Denoiser) -> Self {
        Self::Denoiser(d)
    }
}

#[cfg(feature = "nets")]
impl<'a> From<&'a cm_net::Model> for ModelRef<'a> {
    fn from(model: &'a cm_net::Model) -> Self {
        match model {
            cm_net::Model::Consistency(f) => Self::Consistency(&**f),
            cm_net::Model::Denoiser(d) => Self::Denoiser(&**d),
        }
    }
}
