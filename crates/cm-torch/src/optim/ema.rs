use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::check_shape;
use crate::{Error, Result, shim};

/// One set of averaged weights and how slowly it moves this time: ema ← β · ema + (1 − β) · θ.
#[derive(Debug, Clone, Copy)]
pub struct EmaTarget<'a> {
    /// β, in [0, 1]: 0 copies the weights, 1 leaves the average as it is.
    pub beta: f64,
    /// One Float tensor per weight, in the order of the weights, sharing no memory with them.
    pub tensors: &'a [Tensor],
}

/// Moves averages towards weights without an optimiser step.
pub fn ema_update(params: &[(&str, &Tensor)], emas: &[EmaTarget]) -> Result<()> {
    update(params, emas, false)
}

/// [`ema_update`], with a choice of the kernels of other devices for CPU tensors.
pub(super) fn update(params: &[(&str, &Tensor)], emas: &[EmaTarget], by_lists: bool) -> Result<()> {
    for (name, weight) in params {
        super::check_kind(name, weight)?;
    }
    check(emas, params)?;
    let weights = shim::pointers(params.iter().map(|(_, w)| *w));
    shim::ema_update(&weights, &EmaPointers::new(emas).for_shim(), by_lists)
}

pub(super) fn check(emas: &[EmaTarget], params: &[(&str, &Tensor)]) -> Result<()> {
    for ema in emas {
        if !(0.0..=1.0).contains(&ema.beta) {
            return Err(Error::value("EMA beta", "a number in [0, 1]", ema.beta));
        }
        if ema.tensors.len() != params.len() {
            return Err(Error::value("EMA", format!("{} tensors", params.len()), ema.tensors.len()));
        }
        for (tensor, (name, weight)) in ema.tensors.iter().zip(params) {
            let what = || format!("EMA of '{name}'");
            check_shape(&what(), &weight.size(), tensor)?;
            if tensor.kind() != Kind::Float {
                return Err(Error::Dtype { what: what(), expected: Kind::Float, got: tensor.kind() });
            }
            if tensor.device() != weight.device() {
                let devices = (format!("{:?}", weight.device()), format!("{:?}", tensor.device()));
                return Err(Error::value(what(), format!("device {}", devices.0), devices.1));
            }
            // A shallow clone in place of a copy would average the weights with themselves.
            if tensor.numel() > 0 && tensor.data_ptr() == weight.data_ptr() {
                return Err(Error::value(
                    what(),
                    "a tensor of its own",
                    "the weight's own memory; use a copy",
                ));
            }
        }
    }
    Ok(())
}

/// Pointer lists for the shim, kept alive while it reads them.
pub(super) struct EmaPointers {
    lists: Vec<(f64, Vec<*const C_tensor>)>,
}

impl EmaPointers {
    pub(super) fn new(emas: &[EmaTarget]) -> Self {
        Self { lists: emas.iter().map(|ema| (ema.beta, shim::pointers(ema.tensors))).collect() }
    }

    pub(super) fn for_shim(&self) -> Vec<shim::Ema> {
        self.lists.iter().map(|(beta, list)| shim::Ema { beta: *beta, tensors: list.as_ptr() }).collect()
    }
}
