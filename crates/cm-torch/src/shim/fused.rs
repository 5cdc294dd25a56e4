//! The border to `shim/fused.cpp`, `shim/conv.cpp` and `shim/packed.cpp`.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use super::{check, kind_code};
use crate::{Error, Result};

unsafe extern "C" {
    fn cm_fused_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        add: *const C_tensor,
        scale: *const C_tensor,
        shift: *const C_tensor,
        groups: i64,
        eps: f64,
        silu: bool,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn cm_scaled_sum(
        a: *const C_tensor,
        b: *const C_tensor,
        scale: f64,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn cm_tile_conv(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;

    fn cm_bump_version(tensor: *const C_tensor);
    fn cm_packed_conv_new() -> *mut c_void;
    fn cm_packed_conv_free(packed: *mut c_void);
    fn cm_packed_conv(
        packed: *mut c_void,
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        stride: i64,
        padding: i64,
        dtype: c_int,
        y: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// A pointer that is null for what is not there.
fn or_null(tensor: Option<&Tensor>) -> *const C_tensor {
    tensor.map_or(std::ptr::null(), Tensor::as_ptr)
}

/// What a normalisation is made of; see [`crate::fused::Norm`].
pub(crate) struct NormParts<'a> {
    pub weight: &'a Tensor,
    pub bias: &'a Tensor,
    pub add: Option<&'a Tensor>,
    pub scale: Option<&'a Tensor>,
    pub shift: Option<&'a Tensor>,
    pub groups: i64,
    pub eps: f64,
    pub silu: bool,
}

/// The normalised image, or `None` where the fused form does not apply.
pub(crate) fn norm(x: &Tensor, parts: &NormParts<'_>) -> Result<Option<Tensor>> {
    let mut out = std::ptr::null_mut();
    // SAFETY: all tensors outlive the call, and the shim takes null for the optional ones; `out` is null or a fresh
    // at::Tensor that the new handle owns.
    unsafe {
        check(cm_fused_norm(
            x.as_ptr(),
            parts.weight.as_ptr(),
            parts.bias.as_ptr(),
            or_null(parts.add),
            or_null(parts.scale),
            or_null(parts.shift),
            parts.groups,
            parts.eps,
            parts.silu,
            &mut out,
        ))?;
        Ok((!out.is_null()).then(|| Tensor::from_ptr(out)))
    }
}

/// `(a + b)·scale`, or `None` where the fused form does not apply.
pub(crate) fn scaled_sum(a: &Tensor, b: &Tensor, scale: f64) -> Result<Option<Tensor>> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as in `norm`.
    unsafe {
        check(cm_scaled_sum(a.as_ptr(), b.as_ptr(), scale, &mut out))?;
        Ok((!out.is_null()).then(|| Tensor::from_ptr(out)))
    }
}

/// A convolution for training, or `None` where its gradient is not one for the tiles.
pub(crate) fn tile_conv(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Option<Tensor>> {
    let mut out = std::ptr::null_mut();
    // SAFETY: as in `norm`.
    unsafe {
        check(cm_tile_conv(x.as_ptr(), weight.as_ptr(), bias.as_ptr(), &mut out))?;
        Ok((!out.is_null()).then(|| Tensor::from_ptr(out)))
    }
}

pub(crate) fn bump_version(tensor: &Tensor) {
    // SAFETY: the tensor outlives the call, which counts up a number that libtorch keeps beside it.
    unsafe { cm_bump_version(tensor.as_ptr()) }
}

/// The prepared weights of one convolution.
#[derive(Debug)]
pub(crate) struct PackedConv(NonNull<c_void>);

// SAFETY: the object is this value's alone, and what it holds (tensors, weak pointers) counts its references atomically.
unsafe impl Send for PackedConv {}

impl PackedConv {
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: no arguments; the result is owned by the new value.
        let made = NonNull::new(unsafe { cm_packed_conv_new() });
        made.map(Self).ok_or_else(|| Error::Cpp { text: "no room for packed weights".to_owned() })
    }

    /// The convolution in `kind`, or `None` where it cannot be packed.
    pub(crate) fn forward(
        &mut self,
        x: &Tensor,
        (weight, bias): (&Tensor, &Tensor),
        (stride, padding): (i64, i64),
        kind: Kind,
    ) -> Result<Option<Tensor>> {
        let Some(dtype) = kind_code(kind) else { return Ok(None) };
        let mut out = std::ptr::null_mut();
        // SAFETY: as in `norm`; the object lives, and `&mut` keeps others away from it during the call.
        unsafe {
            check(cm_packed_conv(
                self.0.as_ptr(),
                x.as_ptr(),
                weight.as_ptr(),
                bias.as_ptr(),
                stride,
                padding,
                dtype,
                &mut out,
            ))?;
            Ok((!out.is_null()).then(|| Tensor::from_ptr(out)))
        }
    }
}

impl Drop for PackedConv {
    fn drop(&mut self) {
        // SAFETY: made by `cm_packed_conv_new`, freed here alone.
        unsafe { cm_packed_conv_free(self.0.as_ptr()) }
    }
}
