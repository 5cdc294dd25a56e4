use cm_schedule::SigmaRange;
use tch::{Device, Tensor};

use crate::{Cond, ConsistencyFn, Denoiser, ImageShape, Result, Sigma};

/// The exact denoiser and consistency function of data `N(0, s²·I)`; every sampler and loss can be checked
/// against it in milliseconds.
///
/// `D(x; σ) = s²/(s² + σ²)·x`, the flow is `x(σ) ∝ √(s² + σ²)`, and so
/// `f(x, σ) = x·√((s² + σ_min²)/(s² + σ²))`.
#[derive(Debug, Clone, Copy)]
pub struct GaussianOracle {
    /// Standard deviation of the data.
    pub data_std: f64,
    /// Shape of the images.
    pub shape: ImageShape,
    /// Noise levels; `f` is the identity at the lower end.
    pub sigma_range: SigmaRange,
}

impl GaussianOracle {
    fn scale(&self, x: &Tensor, sigma: Sigma<'_>, gain: impl Fn(f64) -> f64) -> Result<Tensor> {
        let batch = ConsistencyFn::shape(self).check("oracle input", x)?;
        sigma.check(batch)?;
        Ok(x * sigma.broadcast(x.device(), gain))
    }
}

impl Denoiser for GaussianOracle {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn sigma_range(&self) -> SigmaRange {
        self.sigma_range
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn denoise(&self, x: &Tensor, sigma: Sigma<'_>, _cond: &Cond) -> Result<Tensor> {
        let var = self.data_std.powi(2);
        self.scale(x, sigma, |sigma| var / (var + sigma.powi(2)))
    }
}

impl ConsistencyFn for GaussianOracle {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn sigma_range(&self) -> SigmaRange {
        self.sigma_range
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, _cond: &Cond) -> Result<Tensor> {
        let (var, end) = (self.data_std.powi(2), self.sigma_range.min());
        self.scale(x, sigma, |sigma| ((var + end.powi(2)) / (var + sigma.powi(2))).sqrt())
    }
}
