//! Memory order of images: NCHW tensors stored pixel by pixel ("channels last") or plane by plane.
//!
//! The shape is [B, C, H, W] either way; only the strides differ. On CPUs with AVX-512 and on tensor cores
//! convolutions run faster channels-last, and results agree up to rounding.

use tch::Tensor;

use crate::shim;

/// The same values with channels varying fastest in memory; gradients flow through.
///
/// # Shapes
/// [B, C, H, W] gives [B, C, H, W]. A tensor of other rank, and one that is in this order already, is returned as
/// another handle on the same storage.
pub fn channels_last(tensor: &Tensor) -> Tensor {
    if tensor.dim() != 4 || is_channels_last(tensor) {
        return tensor.shallow_clone();
    }
    // libtorch can refuse this for exotic tensors alone (sparse, quantised); those keep their order.
    shim::channels_last(tensor).unwrap_or_else(|_| tensor.shallow_clone())
}

/// Whether a rank-4 tensor has channels varying fastest, without gaps.
///
/// With one channel or one pixel both orders are the same, and both questions are answered yes.
#[must_use]
pub fn is_channels_last(tensor: &Tensor) -> bool {
    shim::is_channels_last(tensor)
}

/// Whether a tensor fills its memory without gaps and nobody else uses that memory: no view, no other handle.
///
/// A view keeps the tensor that it was made of, and so is never alone.
#[must_use]
pub fn is_alone(tensor: &Tensor) -> bool {
    shim::is_alone(tensor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn image() -> Tensor {
        Tensor::arange(2 * 3 * 4 * 5, (Kind::Float, Device::Cpu)).view([2, 3, 4, 5])
    }

    #[test]
    fn order_changes_and_values_do_not() {
        let plane = image();
        let pixel = channels_last(&plane);
        assert!(!is_channels_last(&plane) && plane.is_contiguous());
        assert!(is_channels_last(&pixel) && !pixel.is_contiguous());
        assert_eq!(pixel.stride(), [60, 1, 15, 3]);
        assert!(pixel.equal(&plane));
        assert!(pixel.contiguous().is_contiguous());
    }

    #[test]
    fn converting_twice_copies_once() {
        let pixel = channels_last(&image());
        assert_eq!(channels_last(&pixel).data_ptr(), pixel.data_ptr());
    }

    #[test]
    fn other_ranks_pass_through() {
        let vector = Tensor::ones([3], (Kind::Float, Device::Cpu));
        assert_eq!(channels_last(&vector).data_ptr(), vector.data_ptr());
        assert!(!is_channels_last(&vector));
    }

    #[test]
    fn whoever_shares_memory_is_not_alone() {
        let plane = image().copy();
        assert!(is_alone(&plane) && is_alone(&channels_last(&plane)));
        let handle = plane.shallow_clone();
        assert!(!is_alone(&plane));
        drop(handle);
        assert!(is_alone(&plane));
        let view = plane.view([-1]);
        assert!(!is_alone(&plane) && !is_alone(&view));
        drop(plane);
        assert!(!is_alone(&view), "a view keeps the whole");
        // A part of memory, a place that is read twice, and gaps.
        let base = || Tensor::arange(6, (Kind::Float, Device::Cpu));
        assert!(!is_alone(&base().narrow(0, 0, 3)));
        assert!(!is_alone(&base().narrow(0, 0, 1).expand([4], false)));
        assert!(!is_alone(&base().as_strided([3], [2], 0)));
    }

    #[test]
    fn gradients_flow_through() {
        let x = image().set_requires_grad(true);
        (channels_last(&x) * 3.0).sum(Kind::Float).backward();
        assert!(x.grad().eq_tensor(&(x.ones_like() * 3.0)).all().int64_value(&[]) == 1);
    }
}
