//! Mixed precision: libtorch picks the dtype of each operation inside a region.
//!
//! Convolutions and matrix products run in the chosen dtype, reductions and norms in float32; weights stay float32.
//! tch's own `autocast` has no dtype, knows CUDA alone and stays on after a panic.

use std::marker::PhantomData;

use tch::{Device, Kind};

use crate::{Error, Result, shim};

/// A region of mixed precision on this thread, which ends when the guard is dropped, by a panic too.
///
/// Regions nest: the inner one decides, and its end restores the outer one. Weights that were cast inside are kept
/// until the outermost region ends, so update weights outside of any region, and do not run a pass without gradients
/// and one with gradients inside the same outermost region: the second would reuse the casts of the first, which
/// carry no graph.
///
/// ```
/// use cm_torch::autocast::Autocast;
/// use cm_torch::tch::{Device, Kind, Tensor};
/// let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
/// let product = {
///     let _region = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
///     x.matmul(&x)
/// };
/// assert_eq!(product.kind(), Kind::BFloat16);
/// assert_eq!(x.matmul(&x).kind(), Kind::Float);
/// ```
#[must_use = "the region ends when the guard is dropped; bind it to a name such as `_autocast`, not to `_`"]
#[derive(Debug)]
pub struct Autocast {
    before: Option<shim::AutocastState>,
    /// The state belongs to one thread, so the guard must not move to another.
    _not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Starts a region on the type of `device`: of dtype `kind`, or of plain float32 for `None`, which also switches
    /// an outer region off.
    ///
    /// # Panics
    /// If `kind` is neither `BFloat16` nor `Half`: [`check`] tells that at the door.
    pub fn enter(device: Device, kind: Option<Kind>) -> Self {
        match Self::try_enter(device, kind) {
            Ok(guard) => guard,
            Err(error) => panic!("{error}"),
        }
    }

    /// [`enter`](Self::enter) for kinds that nobody has checked.
    pub fn try_enter(device: Device, kind: Option<Kind>) -> Result<Self> {
        check(kind)?;
        let before = shim::autocast_enter(device, kind)?;
        Ok(Self { before: Some(before), _not_send: PhantomData })
    }
}

/// The dtype of the region that this thread is in for the type of `device`: `None` outside of any, and in one of plain
/// float32.
#[must_use]
pub fn current(device: Device) -> Option<Kind> {
    shim::autocast_kind(device)
}

impl Drop for Autocast {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // Restoring flags cannot fail in libtorch, and there is nobody to tell in a destructor.
            let _ = shim::autocast_leave(before);
        }
    }
}

/// Whether autocast can compute in `kind`: `None`, `BFloat16` or `Half`.
pub fn check(kind: Option<Kind>) -> Result<()> {
    match kind {
        None | Some(Kind::BFloat16 | Kind::Half) => Ok(()),
        Some(kind) => Err(Error::value("autocast dtype", "BFloat16 or Half", format!("{kind:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    fn product_kind() -> Kind {
        let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        x.matmul(&x).kind()
    }

    #[test]
    fn regions_nest_and_restore() {
        assert_eq!(product_kind(), Kind::Float);
        {
            let _outer = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
            assert_eq!((product_kind(), current(Device::Cpu)), (Kind::BFloat16, Some(Kind::BFloat16)));
            {
                let _inner = Autocast::enter(Device::Cpu, Some(Kind::Half));
                assert_eq!(product_kind(), Kind::Half);
                let _off = Autocast::enter(Device::Cpu, None);
                assert_eq!((product_kind(), current(Device::Cpu)), (Kind::Float, None));
            }
            assert_eq!(product_kind(), Kind::BFloat16);
        }
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn a_panic_ends_the_region() {
        let result = std::panic::catch_unwind(|| {
            let _region = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
            panic!("inside");
        });
        assert!(result.is_err());
        assert_eq!(product_kind(), Kind::Float);
    }

    #[test]
    fn a_region_of_another_device_changes_nothing_here() {
        let _region = Autocast::enter(Device::Cuda(0), Some(Kind::Half));
        assert_eq!(product_kind(), Kind::Float);
    }

    /// A cast kept from before an update would compute with old weights.
    #[test]
    fn casts_are_forgotten_at_the_end() {
        let mut weight = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let x = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        let run = |w: &Tensor| {
            let _outer = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
            let _inner = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
            x.matmul(w).to_kind(Kind::Float).double_value(&[0, 0])
        };
        assert_eq!(run(&weight), 2.0);
        tch::no_grad(|| {
            let _ = weight.fill_(5.0);
        });
        assert_eq!(run(&weight), 10.0);
    }

    #[test]
    fn other_kinds_are_refused() {
        for kind in [Kind::Float, Kind::Double, Kind::Int64] {
            let error = Autocast::try_enter(Device::Cpu, Some(kind)).expect_err("accepted");
            assert!(error.to_string().contains("BFloat16 or Half"), "{error}");
        }
    }
}
