//! Activation checkpointing: parts of a network keep their inputs alone, and are computed again in the backward pass.
//!
//! Without it, every operation of a forward pass keeps what its own backward pass needs until that comes. With it, one
//! part of the network at a time does: memory for time, about one more forward pass (Chen et al. 2016,
//! arXiv 1604.06174). Dropout masks, autocast and [`Rows`](crate::rng::Rows) are those of the first computation, so that
//! the result is the same.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tch::Tensor;

use crate::{Result, rng, shim};

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
    /// What a part panicked with, while C++ is between it and whoever is to see it.
    static PANIC: RefCell<Option<Box<dyn Any + Send>>> = const { RefCell::new(None) };
}

/// While it lives, parts of networks on this thread are computed again in the backward pass; see [`part`].
#[derive(Debug)]
#[must_use = "parts are computed again only if they are computed while this value lives"]
pub struct Recompute {
    before: bool,
    /// It belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Recompute {
    /// Starts a region, which may lie within another one.
    pub fn enter() -> Self {
        Self { before: ON.replace(true), _thread: PhantomData }
    }
}

impl Drop for Recompute {
    fn drop(&mut self) {
        ON.set(self.before);
    }
}

/// A part of a network: `compute` of the inputs, which lie on one device.
///
/// Within a [`Recompute`] region it is computed without a graph, and once more in the backward pass, which may be long
/// after the region; so `compute` owns what it needs, reads weights that do not change until then, and changes nothing.
/// A backward pass through it is possible once. Elsewhere, or where no gradients are asked for, this is
/// `compute(inputs)`.
///
/// ```
/// use cm_torch::recompute::{Recompute, part};
/// use cm_torch::tch::{Device, Kind, Tensor};
/// let x = Tensor::full([2], 3.0, (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let cube = {
///     let _region = Recompute::enter();
///     part([x.shallow_clone()], |[x]| &x * &x * &x)
/// };
/// cube.sum(Kind::Float).backward();
/// assert_eq!(x.grad().double_value(&[0]), 27.0);
/// ```
///
/// # Panics
/// If `compute` panics. In the backward pass that is an error of it, which [`backward`] makes a panic again.
pub fn part<const N: usize>(
    inputs: [Tensor; N],
    compute: impl Fn([Tensor; N]) -> Tensor + Send + 'static,
) -> Tensor {
    if !ON.get() || !shim::recompute::grad_enabled() {
        return compute(inputs);
    }
    PANIC.set(None);
    let rows = rng::window_now();
    let compute = move |inputs: Vec<Tensor>| {
        let _rows = rng::Rows::again(rows);
        // The shim hands over as many as it was given.
        let run = || inputs.try_into().map(&compute).unwrap_or_default();
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(output) => Ok(output),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                PANIC.set(Some(panic));
                Err(text.unwrap_or_else(|| "a part of the network panicked".to_owned()))
            }
        }
    };
    match shim::recompute::run(&inputs, Box::new(compute)) {
        Ok(output) => output,
        Err(error) => {
            go_on_with_panic();
            panic!("{error}")
        }
    }
}

/// The backward pass from `loss`, a single number.
///
/// # Errors
/// What libtorch refuses, memory among it.
pub fn backward(loss: &Tensor) -> Result<()> {
    // What an earlier pass left that somebody else began.
    PANIC.set(None);
    let result = loss.f_backward();
    if result.is_err() {
        go_on_with_panic();
    }
    Ok(result?)
}

fn go_on_with_panic() {
    if let Some(panic) = PANIC.take() {
        resume_unwind(panic);
    }
}
