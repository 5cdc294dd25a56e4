//! The border to `shim/*.cpp`: declarations, and the few wrappers that make them safe to call.

use std::ffi::{CStr, c_char, c_int};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::{Error, Result};

pub(crate) mod cuda;
pub(crate) mod dist;
pub(crate) mod fused;
pub(crate) mod recompute;

/// Mirrors `CmOptimStep` in `shim/optim.cpp`.
#[repr(C)]
pub(crate) struct OptimStep {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub grad_scale: f64,
    pub nan_limit: f64,
    pub step: i64,
    pub kind: i32,
    pub grads: i32,
    pub by_lists: i32,
}

/// Mirrors `CmEma` in `shim/optim.cpp`.
#[repr(C)]
pub(crate) struct Ema {
    pub beta: f64,
    pub tensors: *const *const C_tensor,
}

unsafe extern "C" {
    fn cm_free(text: *mut c_char);
    fn cm_torch_version() -> *const c_char;
    fn cm_cpu_capability() -> *mut c_char;

    fn cm_set_tf32(on: bool) -> *mut c_char;
    fn cm_tf32() -> bool;
    fn cm_set_deterministic(on: bool) -> *mut c_char;
    fn cm_deterministic() -> bool;
    fn cm_cudnn_benchmark() -> bool;

    fn cm_autocast_enabled(device: c_int) -> bool;
    fn cm_autocast_dtype(device: c_int) -> c_int;
    fn cm_autocast_enter(device: c_int, enabled: bool, dtype: c_int) -> *mut c_char;
    fn cm_autocast_leave(device: c_int, enabled: bool, dtype: c_int) -> *mut c_char;

    fn cm_channels_last(input: *const C_tensor, output: *mut *mut C_tensor) -> *mut c_char;
    fn cm_is_channels_last(input: *const C_tensor) -> bool;
    fn cm_is_alone(input: *const C_tensor) -> bool;

    fn cm_keep_memory();
    fn cm_kept_bytes() -> i64;

    fn cm_cuda_memory(index: c_int, out: *mut i64) -> *mut c_char;
    fn cm_cuda_reset_peak(index: c_int) -> *mut c_char;

    fn cm_optim_step(
        step: *const OptimStep,
        n: usize,
        weights: *const *const C_tensor,
        exp_avg: *const *const C_tensor,
        exp_avg_sq: *const *const C_tensor,
        n_emas: usize,
        emas: *const Ema,
        without_grad: *mut u8,
    ) -> *mut c_char;
    fn cm_ema_update(
        n: usize,
        weights: *const *const C_tensor,
        n_emas: usize,
        emas: *const Ema,
        by_lists: bool,
    ) -> *mut c_char;
    fn cm_set_grad(tensor: *const C_tensor, grad: *const C_tensor) -> *mut c_char;
    fn cm_norm(
        n: usize,
        tensors: *const *const C_tensor,
        grads: bool,
        by_lists: bool,
        out: *mut f64,
    ) -> *mut c_char;
    fn cm_first_non_finite(
        n: usize,
        tensors: *const *const C_tensor,
        grads: bool,
        out: *mut i64,
    ) -> *mut c_char;
}

/// Takes a heap string of the shim.
fn take_string(text: *mut c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: a non-null text is a NUL-terminated string from strdup that nobody else holds; it is copied before
    // it is freed, once, by the allocator that made it.
    unsafe {
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        cm_free(text);
        Some(owned)
    }
}

fn check(text: *mut c_char) -> Result<()> {
    take_string(text).map_or(Ok(()), |text| Err(Error::Cpp { text }))
}

/// The pointers of tensors, valid as long as the tensors are.
pub(crate) fn pointers<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*const C_tensor> {
    tensors.into_iter().map(Tensor::as_ptr).collect()
}

fn device_code(device: Device) -> c_int {
    match device {
        Device::Cpu => 0,
        Device::Cuda(_) => 1,
        Device::Mps => 2,
        Device::Vulkan => 3,
    }
}

/// libtorch's numbers of the kinds that autocast knows; tch keeps its own table private.
fn kind_code(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Half => Some(5),
        Kind::Float => Some(6),
        Kind::BFloat16 => Some(15),
        _ => None,
    }
}

pub(crate) fn torch_version() -> String {
    // SAFETY: a string literal of the shim.
    unsafe { CStr::from_ptr(cm_torch_version()) }.to_string_lossy().into_owned()
}

pub(crate) fn cpu_capability() -> String {
    // SAFETY: no arguments; the result is owned by us.
    take_string(unsafe { cm_cpu_capability() }).unwrap_or_default()
}

pub(crate) fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: plain values.
    check(unsafe { cm_set_tf32(on) })
}

pub(crate) fn tf32() -> bool {
    // SAFETY: no arguments.
    unsafe { cm_tf32() }
}

pub(crate) fn set_deterministic(on: bool) -> Result<()> {
    // SAFETY: plain values.
    check(unsafe { cm_set_deterministic(on) })
}

pub(crate) fn deterministic() -> bool {
    // SAFETY: no arguments.
    unsafe { cm_deterministic() }
}

pub(crate) fn cudnn_benchmark() -> bool {
    // SAFETY: no arguments.
    unsafe { cm_cudnn_benchmark() }
}

/// Whether autocast is on for a device's type on this thread, and libtorch's number of its dtype.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AutocastState {
    device: c_int,
    enabled: bool,
    dtype: c_int,
}

/// The dtype of autocast on this thread, if it is on.
pub(crate) fn autocast_kind(device: Device) -> Option<Kind> {
    let device = device_code(device);
    // SAFETY: plain values; the state is this thread's.
    let (is_on, code) = unsafe { (cm_autocast_enabled(device), cm_autocast_dtype(device)) };
    let known = [Kind::Half, Kind::Float, Kind::BFloat16];
    known.into_iter().find(|&kind| is_on && kind_code(kind) == Some(code))
}

pub(crate) fn autocast_enter(device: Device, kind: Option<Kind>) -> Result<AutocastState> {
    let device = device_code(device);
    // SAFETY: plain values; the state is this thread's.
    let before = unsafe {
        AutocastState { device, enabled: cm_autocast_enabled(device), dtype: cm_autocast_dtype(device) }
    };
    let (enabled, dtype) = match kind {
        None => (false, before.dtype),
        Some(kind) => {
            let code = kind_code(kind)
                .ok_or_else(|| Error::value("autocast", "BFloat16 or Half", format!("{kind:?}")))?;
            (true, code)
        }
    };
    // SAFETY: plain values.
    check(unsafe { cm_autocast_enter(device, enabled, dtype) })?;
    Ok(before)
}

pub(crate) fn autocast_leave(before: AutocastState) -> Result<()> {
    // SAFETY: plain values.
    check(unsafe { cm_autocast_leave(before.device, before.enabled, before.dtype) })
}

pub(crate) fn channels_last(tensor: &Tensor) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: the input outlives the call; on success `out` is a fresh at::Tensor that the new handle owns.
    unsafe {
        check(cm_channels_last(tensor.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

pub(crate) fn is_channels_last(tensor: &Tensor) -> bool {
    // SAFETY: the tensor outlives the call.
    unsafe { cm_is_channels_last(tensor.as_ptr()) }
}

pub(crate) fn is_alone(tensor: &Tensor) -> bool {
    // SAFETY: the tensor outlives the call.
    unsafe { cm_is_alone(tensor.as_ptr()) }
}

pub(crate) fn keep_memory() {
    // SAFETY: no arguments. It sets one pointer of libtorch that every new tensor reads, to an object that is never
    // freed: a thread that makes a tensor at that moment sees the one before or this one. The C library locks its own
    // settings.
    unsafe { cm_keep_memory() }
}

/// Bytes in tensors on the CPU, or below 0 if nobody counts them.
pub(crate) fn kept_bytes() -> i64 {
    // SAFETY: no arguments; the count is read under its lock.
    unsafe { cm_kept_bytes() }
}

/// Bytes in tensors now, their peak, bytes reserved now, their peak.
pub(crate) fn cuda_memory(index: usize) -> Result<[i64; 4]> {
    let mut out = [0; 4];
    // SAFETY: the shim writes four numbers.
    check(unsafe { cm_cuda_memory(index as c_int, out.as_mut_ptr()) })?;
    Ok(out)
}

pub(crate) fn cuda_reset_peak(index: usize) -> Result<()> {
    // SAFETY: plain values.
    check(unsafe { cm_cuda_reset_peak(index as c_int) })
}

/// Runs one optimiser step; the result says for each weight whether its gradient was missing.
///
/// The caller has checked that the lists are equally long (those in `emas` too) and of equal shapes, all Float and
/// on one device.
pub(crate) fn optim_step(
    step: &OptimStep,
    weights: &[*const C_tensor],
    exp_avg: &[Tensor],
    exp_avg_sq: &[Tensor],
    emas: &[Ema],
) -> Result<Vec<bool>> {
    let mut without_grad = vec![0u8; weights.len()];
    let (m, v) = (pointers(exp_avg), pointers(exp_avg_sq));
    // SAFETY: each list holds `weights.len()` live tensor pointers, which the shim reads during the call alone. Its
    // writes go to tensor storage; tch's handles promise nobody that storage does not change.
    check(unsafe {
        cm_optim_step(
            step,
            weights.len(),
            weights.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            emas.len(),
            emas.as_ptr(),
            without_grad.as_mut_ptr(),
        )
    })?;
    Ok(without_grad.into_iter().map(|flag| flag != 0).collect())
}

/// Averages alone, under the same conditions as [`optim_step`].
pub(crate) fn ema_update(weights: &[*const C_tensor], emas: &[Ema], by_lists: bool) -> Result<()> {
    // SAFETY: as in `optim_step`.
    check(unsafe { cm_ema_update(weights.len(), weights.as_ptr(), emas.len(), emas.as_ptr(), by_lists) })
}

pub(crate) fn set_grad(tensor: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    // SAFETY: both outlive the call, which makes a handle of its own on the gradient.
    check(unsafe { cm_set_grad(tensor.as_ptr(), grad.map_or(std::ptr::null(), Tensor::as_ptr)) })
}

pub(crate) fn norm(tensors: &[*const C_tensor], grads: bool, by_lists: bool) -> Result<f64> {
    let mut out = 0.0;
    // SAFETY: live tensor pointers, read during the call alone.
    check(unsafe { cm_norm(tensors.len(), tensors.as_ptr(), grads, by_lists, &mut out) })?;
    Ok(out)
}

pub(crate) fn first_non_finite(tensors: &[*const C_tensor], grads: bool) -> Result<Option<usize>> {
    let mut out = -1;
    // SAFETY: live tensor pointers, read during the call alone.
    check(unsafe { cm_first_non_finite(tensors.len(), tensors.as_ptr(), grads, &mut out) })?;
    Ok(usize::try_from(out).ok())
}
