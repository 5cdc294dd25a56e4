//! The closed-form model of the sampler files.

use std::cell::RefCell;

use cm_model::{Cond, ConsistencyFn, Denoiser, ImageShape, Result, Sigma};
use cm_schedule::SigmaRange;
use tch::{Device, Tensor};

use crate::golden::Problem;

/// `D(x; σ) = x/4/(σ² + ¼) + 0.3·σ/√(σ² + ¼)·tanh(x/√(σ² + ¼) + 0.2)`, computed in the dtype of `x`.
///
/// The sampler files were recorded with this function in the place of a network, be it a denoiser or a consistency
/// function.
#[derive(Debug, Clone, Copy)]
pub struct Analytic {
    /// Shape of the images.
    pub shape: ImageShape,
    /// Noise levels of the sampler.
    pub range: SigmaRange,
}

impl Analytic {
    fn value(&self, x: &Tensor, sigma: Sigma<'_>) -> Result<Tensor> {
        let batch = self.shape.check("analytic model", x)?;
        sigma.check(batch)?;
        let Sigma::One(sigma) = sigma else {
            return Err(cm_model::Error::Value {
                what: "sigma of the analytic model".into(),
                expected: "one level for the whole batch".into(),
                got: "one for each image".into(),
            });
        };
        let var = sigma * sigma + 0.25;
        Ok(x * (0.25 / var) + (x * (1.0 / var.sqrt()) + 0.2).tanh() * (0.3 * sigma / var.sqrt()))
    }
}

/// Notes every call of the model inside it.
#[derive(Debug)]
pub struct Recorder<M> {
    model: M,
    calls: RefCell<Vec<Call>>,
}

/// One evaluation of a model.
#[derive(Debug)]
pub struct Call {
    /// What it was given.
    pub x: Tensor,
    /// At which level.
    pub sigma: f64,
    /// What it gave.
    pub result: Tensor,
}

impl<M> Recorder<M> {
    /// No call yet.
    pub fn new(model: M) -> Self {
        Self { model, calls: RefCell::default() }
    }

    /// The calls, in order.
    pub fn into_calls(self) -> Vec<Call> {
        self.calls.into_inner()
    }

    fn note(&self, x: &Tensor, sigma: Sigma<'_>, result: &Tensor) {
        let sigma = match sigma {
            Sigma::One(sigma) => sigma,
            Sigma::Each(sigmas) => sigmas.first().copied().unwrap_or(f64::NAN),
        };
        self.calls.borrow_mut().push(Call { x: x.copy(), sigma, result: result.copy() });
    }
}

/// The calls as the files hold them: inputs and results stacked, and the noise levels.
///
/// # Errors
/// [`Problem`] if there was no call.
pub fn stacked(calls: &[Call]) -> std::result::Result<(Tensor, Vec<f64>, Tensor), Problem> {
    if calls.is_empty() {
        return Err(Problem("the sampler never called its model".into()));
    }
    let inputs: Vec<_> = calls.iter().map(|call| call.x.shallow_clone()).collect();
    let results: Vec<_> = calls.iter().map(|call| call.result.shallow_clone()).collect();
    Ok((Tensor::stack(&inputs, 0), calls.iter().map(|call| call.sigma).collect(), Tensor::stack(&results, 0)))
}

macro_rules! implement {
    ($trait:ident, $method:ident) => {
        impl $trait for Analytic {
            fn shape(&self) -> ImageShape {
                self.shape
            }
            fn num_classes(&self) -> i64 {
                0
            }
            fn sigma_range(&self) -> SigmaRange {
                self.range
            }
            fn device(&self) -> Device {
                Device::Cpu
            }
            fn $method(&self, x: &Tensor, sigma: Sigma<'_>, _cond: &Cond) -> Result<Tensor> {
                self.value(x, sigma)
            }
        }

        impl<M: $trait> $trait for Recorder<M> {
            fn shape(&self) -> ImageShape {
                self.model.shape()
            }
            fn num_classes(&self) -> i64 {
                self.model.num_classes()
            }
            fn sigma_range(&self) -> SigmaRange {
                self.model.sigma_range()
            }
            fn device(&self) -> Device {
                self.model.device()
            }
            fn $method(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor> {
                let result = self.model.$method(x, sigma, cond)?;
                self.note(x, sigma, &result);
                Ok(result)
            }
        }
    };
}

implement!(Denoiser, denoise);
implement!(ConsistencyFn, jump);
