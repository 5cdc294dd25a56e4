//! The border to `shim/recompute.cpp`.

use std::ffi::{c_char, c_void};

use tch::Tensor;
use torch_sys::C_tensor;

use super::{check, pointers};
use crate::Result;

/// Computes one tensor from others; an error is the text of a panic.
pub(crate) type Compute = dyn Fn(Vec<Tensor>) -> std::result::Result<Tensor, String> + Send;

type ComputeFn = unsafe extern "C" fn(
    *mut c_void,
    *mut *mut C_tensor,
    usize,
    *mut *mut C_tensor,
    *mut c_char,
    usize,
) -> bool;
type DropFn = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn cm_grad_enabled() -> bool;
    fn cm_recompute(
        inputs: *const *const C_tensor,
        n: usize,
        data: *mut c_void,
        compute: ComputeFn,
        drop: DropFn,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Whether operations on this thread keep what a backward pass needs.
pub(crate) fn grad_enabled() -> bool {
    // SAFETY: no arguments.
    unsafe { cm_grad_enabled() }
}

/// The output, whose backward pass calls `compute` again.
pub(crate) fn run(inputs: &[Tensor], compute: Box<Compute>) -> Result<Tensor> {
    let inputs = pointers(inputs);
    // A pointer to a `dyn` is two words; C++ takes one.
    let data = Box::into_raw(Box::new(compute)).cast::<c_void>();
    let mut out = std::ptr::null_mut();
    // SAFETY: the inputs outlive the call. The shim owns `data` from here on, calls `call` with it and at last `release`,
    // once; it may do so on another thread, which `Send` allows, and never on two at a time: a node of a graph is run by
    // one thread. On success `out` is a fresh at::Tensor that the new handle owns.
    unsafe {
        check(cm_recompute(inputs.as_ptr(), inputs.len(), data, call, release, &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

unsafe extern "C" fn call(
    data: *mut c_void,
    inputs: *mut *mut C_tensor,
    n: usize,
    output: *mut *mut C_tensor,
    error: *mut c_char,
    room: usize,
) -> bool {
    // SAFETY: `data` is that of `run`, and alive; the shim hands over `n` fresh at::Tensors.
    let (compute, inputs) = unsafe {
        let handles = std::slice::from_raw_parts(inputs, n);
        (&*data.cast::<Box<Compute>>(), handles.iter().map(|&handle| Tensor::from_ptr(handle)).collect())
    };
    match compute(inputs) {
        Ok(tensor) => {
            // SAFETY: the shim frees the at::Tensor, and this handle does not.
            unsafe { *output = tensor.as_ptr().cast_mut() };
            std::mem::forget(tensor);
            true
        }
        Err(text) => {
            let length = text.len().min(room.saturating_sub(1));
            // SAFETY: `error` has `room` bytes, all of them 0, of which the last one stays.
            unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), error.cast::<u8>(), length) };
            false
        }
    }
}

unsafe extern "C" fn release(data: *mut c_void) {
    // SAFETY: `data` is that of `run`, and nobody uses it any more.
    drop(unsafe { Box::from_raw(data.cast::<Box<Compute>>()) });
}
