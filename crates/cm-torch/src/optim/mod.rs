//! Adam, AdamW and RAdam over named tensors, together with the averages of the weights.
//!
//! The state is plain named tensors and a step count, so that a resumed run continues bit for bit. On the CPU one
//! pass over memory brings moments, weights and all averages up to date; on other devices libtorch's fused and foreach
//! kernels do. Elements are independent of each other, so the result does not depend on the number of threads.

mod ema;
mod norm;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

pub use ema::{EmaTarget, ema_update};
pub use norm::{first_non_finite, first_non_finite_grad, grad_norm, norm};

use crate::fused::is_plain;
use crate::{Error, Result, shim};

/// Which rule moves the weights, with g the gradient, t the step from 1, and
/// m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², m̂ = m / (1 − β₁ᵗ).
///
/// In a file: `{ kind = "radam", beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum OptimKind {
    /// θ ← θ − lr · m̂ / (√v / √(1 − β₂ᵗ) + ε), with `weight_decay` · θ added to g (Kingma and Ba 2015).
    Adam {
        /// β₁, in [0, 1).
        beta1: f64,
        /// β₂, in [0, 1).
        beta2: f64,
        /// ε > 0, beside √v after bias correction.
        eps: f64,
        /// Weight of the L2 term in the gradient.
        weight_decay: f64,
    },
    /// Adam with θ ← (1 − lr · `weight_decay`) θ first, and the gradient as it is (Loshchilov and Hutter 2019).
    AdamW {
        /// β₁, in [0, 1).
        beta1: f64,
        /// β₂, in [0, 1).
        beta2: f64,
        /// ε > 0, beside √v after bias correction.
        eps: f64,
        /// Weight of the decoupled decay.
        weight_decay: f64,
    },
    /// Rectified Adam (Liu et al. 2020, algorithm 2), with `weight_decay` · θ added to g. With ρ∞ = 2/(1 − β₂) − 1
    /// and ρ = ρ∞ − 2 t β₂ᵗ/(1 − β₂ᵗ): where ρ > 5,
    /// θ ← θ − lr · m̂ · √((ρ−4)(ρ−2)ρ∞ / ((ρ∞−4)(ρ∞−2)ρ)) · √(1 − β₂ᵗ) / (√v + ε), else θ ← θ − lr · m̂.
    /// The paper's threshold is ρ > 4; 5 is that of torch.optim.RAdam, with which the published models were
    /// trained. At β₂ = 0.999 step 6 is the first rectified one.
    #[serde(rename = "radam")]
    RAdam {
        /// β₁, in [0, 1).
        beta1: f64,
        /// β₂, in [0, 1).
        beta2: f64,
        /// ε > 0, beside √v before bias correction.
        eps: f64,
        /// Weight of the L2 term in the gradient.
        weight_decay: f64,
    },
}

impl OptimKind {
    /// Adam with β = (0.9, 0.999), ε = 1e-8, no decay.
    #[must_use]
    pub fn adam() -> Self {
        Self::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }

    /// RAdam with β = (0.9, 0.999), ε = 1e-8, no decay: the optimiser of Song et al. 2023.
    #[must_use]
    pub fn radam() -> Self {
        Self::RAdam { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }

    /// The number that the shim knows the rule by, and its β₁, β₂, ε and weight decay.
    fn parts(self) -> (i32, [f64; 4]) {
        match self {
            Self::Adam { beta1, beta2, eps, weight_decay } => (0, [beta1, beta2, eps, weight_decay]),
            Self::AdamW { beta1, beta2, eps, weight_decay } => (1, [beta1, beta2, eps, weight_decay]),
            Self::RAdam { beta1, beta2, eps, weight_decay } => (2, [beta1, beta2, eps, weight_decay]),
        }
    }

    /// Whether every number is in its range.
    pub fn check(self) -> Result<()> {
        let (_, [beta1, beta2, eps, weight_decay]) = self.parts();
        for (name, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::value(format!("optimiser {name}"), "a number in [0, 1)", beta));
            }
        }
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(Error::value("optimiser eps", "a positive number", eps));
        }
        if !(weight_decay >= 0.0 && weight_decay.is_finite()) {
            return Err(Error::value("optimiser weight_decay", "0 or a positive number", weight_decay));
        }
        Ok(())
    }
}

/// What becomes of the gradients after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradsAfter {
    /// They stay.
    Keep,
    /// They become 0 in the same pass; the next backward adds to them.
    Zero,
    /// They are dropped; the next backward hands its own tensors over instead of adding.
    Release,
}

/// One step's own numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOptions {
    /// Learning rate of this step.
    pub lr: f64,
    /// Multiplies every gradient first: 1/n after n micro-batches of summed gradients, or the factor of clipping.
    pub grad_scale: f64,
    /// After scaling, turns NaN into 0 and ±∞ into ± this number, as EDM's training loop does with 1e5.
    pub replace_non_finite: Option<f64>,
    /// What becomes of the gradients.
    pub grads: GradsAfter,
}

impl StepOptions {
    /// Gradients as they are, and dropped afterwards.
    #[must_use]
    pub fn new(lr: f64) -> Self {
        Self { lr, grad_scale: 1.0, replace_non_finite: None, grads: GradsAfter::Release }
    }

    fn check(&self) -> Result<()> {
        if !(self.lr >= 0.0 && self.lr.is_finite()) {
            return Err(Error::value("learning rate", "0 or a positive number", self.lr));
        }
        if !self.grad_scale.is_finite() {
            return Err(Error::value("gradient scale", "a finite number", self.grad_scale));
        }
        match self.replace_non_finite {
            Some(limit) if !(limit > 0.0 && limit.is_finite()) => {
                Err(Error::value("replacement of infinite gradients", "a positive number", limit))
            }
            _ => Ok(()),
        }
    }
}

/// An optimiser for a fixed list of named weights.
///
/// ```
/// use cm_torch::optim::{OptimKind, Optimizer, StepOptions};
/// use cm_torch::tch::{Device, Kind, Tensor};
/// let weight = Tensor::zeros([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let params = [("w", &weight)];
/// let mut optimizer = Optimizer::new(OptimKind::adam(), &params)?;
/// (&weight * 2.0).sum(Kind::Float).backward();
/// optimizer.step(&StepOptions::new(0.1), &params, &[])?;
/// // Adam's first step is lr in the direction of the sign.
/// assert!((weight.double_value(&[0]) + 0.1).abs() < 1e-6);
/// # Ok::<(), cm_torch::Error>(())
/// ```
#[derive(Debug)]
pub struct Optimizer {
    kind: OptimKind,
    step: u64,
    names: Vec<String>,
    exp_avg: Vec<Tensor>,
    exp_avg_sq: Vec<Tensor>,
    /// Tests run the kernels of other devices on CPU tensors.
    by_lists: bool,
}

impl Optimizer {
    /// An optimiser with zero moments for these weights, on their device.
    ///
    /// The weights must be Float (master weights stay so under autocast) and on one device; their order and names are
    /// fixed from here on.
    pub fn new(kind: OptimKind, params: &[(&str, &Tensor)]) -> Result<Self> {
        kind.check()?;
        let mut seen = std::collections::BTreeSet::new();
        for (name, weight) in params {
            check_kind(name, weight)?;
            if !seen.insert(*name) {
                return Err(Error::value(
                    "optimiser",
                    "parameters of different names",
                    format!("'{name}' twice"),
                ));
            }
            if weight.device() != params[0].1.device() {
                return Err(Error::value(
                    format!("parameter '{name}'"),
                    format!("the device of '{}', {:?}", params[0].0, params[0].1.device()),
                    format!("{:?}", weight.device()),
                ));
            }
        }
        let zeros = || {
            let _no_grad = tch::no_grad_guard();
            params.iter().map(|(_, w)| Ok(w.f_zeros_like()?)).collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            kind,
            step: 0,
            names: params.iter().map(|(name, _)| (*name).to_owned()).collect(),
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
            by_lists: false,
        })
    }

    /// The rule.
    #[must_use]
    pub fn kind(&self) -> OptimKind {
        self.kind
    }

    /// Steps done so far.
    #[must_use]
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Moves the weights by their gradients and then each average towards its weight.
    ///
    /// `params` are the weights that the optimiser was made for, in that order. A weight without a gradient keeps its
    /// value and moments (its averages still move on); the result lists the positions of such weights. All weights share
    /// one step count.
    pub fn step(
        &mut self,
        options: &StepOptions,
        params: &[(&str, &Tensor)],
        emas: &[EmaTarget],
    ) -> Result<Vec<usize>> {
        options.check()?;
        self.check_params(params)?;
        ema::check(emas, params)?;
        let (kind, [beta1, beta2, eps, weight_decay]) = self.kind.parts();
        let step = shim::OptimStep {
            lr: options.lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            grad_scale: options.grad_scale,
            nan_limit: options.replace_non_finite.unwrap_or(0.0),
            step: (self.step + 1) as i64,
            kind,
            grads: match options.grads {
                GradsAfter::Keep => 0,
                GradsAfter::Zero => 1,
                GradsAfter::Release => 2,
            },
            by_lists: (self.by_lists || is_plain()).into(),
        };
        let weights = shim::pointers(params.iter().map(|(_, w)| *w));
        let lists = ema::EmaPointers::new(emas);
        let without_grad =
            shim::optim_step(&step, &weights, &self.exp_avg, &self.exp_avg_sq, &lists.for_shim())?;
        self.step += 1;
        Ok((0..).zip(without_grad).filter_map(|(i, missing)| missing.then_some(i)).collect())
    }

    /// The state as named tensors: `exp_avg.<name>`, `exp_avg_sq.<name>` and `step`, a single Int64.
    ///
    /// The moments are handles on the live tensors: write or copy them before the next step.
    #[must_use]
    pub fn export(&self) -> BTreeMap<String, Tensor> {
        let moments = self.moments().map(|(name, tensor)| (name, tensor.shallow_clone()));
        moments.chain([(STEP.to_owned(), Tensor::from(self.step as i64))]).collect()
    }

    /// Takes a state over from [`export`](Self::export), by copying into the optimiser's own tensors.
    ///
    /// Names, shapes and kinds must be exactly those of this optimiser; all differences are reported at once, and
    /// nothing changes then.
    pub fn import(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let differences = self.differences(state);
        if !differences.is_empty() {
            return Err(Error::State { differences });
        }
        let _no_grad = tch::no_grad_guard();
        for (name, own) in self.moments() {
            own.shallow_clone().f_copy_(&state[&name])?;
        }
        self.step = state[STEP].f_int64_value(&[])? as u64;
        Ok(())
    }

    fn moments(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let named = |prefix: &'static str, tensors| {
            self.names.iter().map(move |name| format!("{prefix}.{name}")).zip(tensors)
        };
        named("exp_avg", &self.exp_avg).chain(named("exp_avg_sq", &self.exp_avg_sq))
    }

    fn differences(&self, state: &BTreeMap<String, Tensor>) -> Vec<String> {
        let own: BTreeMap<String, &Tensor> = self.moments().collect();
        let mut differences = Vec::new();
        for (name, tensor) in &own {
            match state.get(name) {
                None => differences.push(format!("'{name}' is missing")),
                Some(t) if t.size() != tensor.size() || t.kind() != Kind::Float => differences.push(format!(
                    "'{name}' is {:?} {:?}, expected Float {:?}",
                    t.kind(),
                    t.size(),
                    tensor.size()
                )),
                Some(_) => {}
            }
        }
        match state.get(STEP) {
            None => differences.push(format!("'{STEP}' is missing")),
            Some(t) if t.kind() != Kind::Int64 || t.numel() != 1 || i64::try_from(t).is_ok_and(|s| s < 0) => {
                differences.push(format!(
                    "'{STEP}' is {:?} {:?}, expected one Int64 from 0",
                    t.kind(),
                    t.size()
                ));
            }
            Some(_) => {}
        }
        let unknown = state.keys().filter(|name| *name != STEP && !own.contains_key(*name));
        differences.extend(unknown.map(|name| format!("'{name}' belongs to no parameter")));
        differences
    }

    fn check_params(&self, params: &[(&str, &Tensor)]) -> Result<()> {
        if params.len() != self.names.len() {
            return Err(Error::value("optimiser", format!("{} parameters", self.names.len()), params.len()));
        }
        for ((name, weight), (own, moment)) in params.iter().zip(self.names.iter().zip(&self.exp_avg)) {
            if name != own {
                return Err(Error::value(
                    "optimiser",
                    format!("parameter '{own}' at this place"),
                    format!("'{name}'"),
                ));
            }
            check_kind(name, weight)?;
            check_shape(&format!("parameter '{name}'"), &moment.size(), weight)?;
        }
        Ok(())
    }
}

/// Makes `grad` the gradient of `weight`, or takes the gradient away, and with it its memory.
///
/// # Errors
/// [`Error::Shape`] and [`Error::Dtype`] for a gradient that is not of the weight's shape and kind.
pub fn set_grad(weight: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    if let Some(grad) = grad {
        check_shape("gradient", &weight.size(), grad)?;
        if grad.kind() != weight.kind() {
            let (expected, got) = (weight.kind(), grad.kind());
            return Err(Error::Dtype { what: "gradient".to_owned(), expected, got });
        }
    }
    shim::set_grad(weight, grad)
}

const STEP: &str = "step";

fn check_kind(name: &str, weight: &Tensor) -> Result<()> {
    match weight.kind() {
        Kind::Float => Ok(()),
        got => Err(Error::Dtype { what: format!("parameter '{name}'"), expected: Kind::Float, got }),
    }
}

fn check_shape(what: &str, expected: &[i64], tensor: &Tensor) -> Result<()> {
    let got = tensor.size();
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { what: what.to_owned(), expected: expected.to_vec(), got })
}
