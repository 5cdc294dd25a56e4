//! What U-Nets do between convolutions, in fewer passes over memory than libtorch makes; and convolutions whose weights
//! were prepared once.
//!
//! On CPUs, in float32 and bfloat16, group normalisation with all that stands beside it is one sum over the image and one
//! pass, forward and backward, and nothing but its input is kept. On other devices, and for tensors that the fused form
//! cannot take, libtorch's own operations compute the same formula.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;

use tch::{Kind, Tensor};

use crate::autocast::Autocast;
use crate::shim::fused as shim;

/// Group normalisation with its neighbours:
/// `act((norm(x + add)·weight + bias)·(1 + scale) + shift)`, with SiLU or nothing as `act`.
///
/// # Source
/// Wu and He 2018 (arXiv 1803.08494); `add` is what DDPM++'s blocks do in front of it, `scale` and `shift` what ADM's do
/// behind it (Dhariwal and Nichol 2021, section 4.1).
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// Gain of each channel, `[C]`.
    pub weight: &'a Tensor,
    /// Offset of each channel, `[C]`.
    pub bias: &'a Tensor,
    /// Groups that the channels are divided into.
    pub groups: i64,
    /// Added to the variance.
    pub eps: f64,
    /// Added to each channel of each image in front, `[B, C]`.
    pub add: Option<&'a Tensor>,
    /// Scale and shift of each channel of each image, `[B, C]` both.
    pub modulate: Option<(&'a Tensor, &'a Tensor)>,
    /// Whether SiLU, `z/(1 + e^−z)`, comes last.
    pub silu: bool,
}

impl Norm<'_> {
    /// Normalises `x` of `[B, C, H, W]`; the result has its shape, dtype and memory order.
    ///
    /// # Panics
    /// As libtorch's operations do: for shapes that do not fit one another.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let (scale, shift) = self.modulate.unzip();
        let parts = shim::NormParts {
            weight: self.weight,
            bias: self.bias,
            add: self.add,
            scale,
            shift,
            groups: self.groups,
            eps: self.eps,
            silu: self.silu,
        };
        if PLAIN.get() {
            return self.composed(x);
        }
        match shim::norm(x, &parts) {
            Ok(Some(normalised)) => normalised,
            Ok(None) => self.composed(x),
            Err(error) => panic!("{error}"),
        }
    }

    /// The same by libtorch's operations, one after the other.
    pub fn composed(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let column = |t: &Tensor| t.to_kind(kind).unsqueeze(-1).unsqueeze(-1);
        let x = self.add.map_or_else(|| x.shallow_clone(), |add| x + column(add));
        let mut y = self.norm_alone(&x);
        if let Some((scale, shift)) = self.modulate {
            y = column(shift).addcmul(&y, &(column(scale) + 1.0));
        }
        if self.silu { y.silu() } else { y }
    }

    fn norm_alone(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        if kind == Kind::Float || !x.device().is_cuda() {
            return x.group_norm(self.groups, Some(self.weight), Some(self.bias), self.eps, true);
        }
        // CUDA's kernel wants one dtype, and autocast would give float32, twice the memory to read and to keep
        // for the backward pass. Its sums are float32 in any case.
        let _as_it_is = Autocast::enter(x.device(), None);
        let (weight, bias) = (self.weight.to_kind(kind), self.bias.to_kind(kind));
        x.group_norm(self.groups, Some(&weight), Some(&bias), self.eps, true)
    }
}

/// `(a + b)·scale`, where two branches of a network meet.
///
/// # Panics
/// As libtorch's operations do: for shapes that do not fit one another.
pub fn scaled_sum(a: &Tensor, b: &Tensor, scale: f64) -> Tensor {
    if scale == 1.0 {
        return a + b;
    }
    if PLAIN.get() {
        return (a + b) * scale;
    }
    match shim::scaled_sum(a, b, scale) {
        Ok(Some(sum)) => sum,
        Ok(None) => (a + b) * scale,
        Err(error) => panic!("{error}"),
    }
}

/// The convolution of `x` `[N, C, H, W]` with `weight` `[O, C, k, k]` and `bias` `[O]`, for training under bfloat16
/// autocast on a CPU with AMX: the gradients of weight and bias are computed on its tiles, and not rounded to bfloat16.
/// `None` where it does not apply, and for all but stride 1 with k/2 zeros around, k of 1 or 3, channels in sixteens,
/// channels-last images of at most 32×32 pixels, and weights that want a gradient.
///
/// # Panics
/// As libtorch's operations do: for shapes that do not fit one another.
pub fn tile_conv(
    x: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    (stride, padding): (i64, i64),
) -> Option<Tensor> {
    let fits = stride == 1 && weight.size().iter().skip(2).all(|&k| k == 2 * padding + 1);
    if PLAIN.get() || !fits {
        return None;
    }
    match shim::tile_conv(x, weight, bias) {
        Ok(y) => y,
        Err(error) => panic!("{error}"),
    }
}

thread_local! {
    static PACKING: Cell<Option<Kind>> = const { Cell::new(None) };
    static PLAIN: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, everything of this module on this thread, and what else asks [`is_plain`], is computed by libtorch's
/// operations alone: what the fast forms are measured against.
#[derive(Debug)]
#[must_use = "the plain forms are used only as long as this value lives"]
pub struct Plain {
    before: bool,
    /// It belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Plain {
    /// Begins it.
    pub fn enter() -> Self {
        Self { before: PLAIN.replace(true), _thread: PhantomData }
    }
}

/// Whether this thread is inside a [`Plain`].
#[must_use]
pub fn is_plain() -> bool {
    PLAIN.get()
}

impl Drop for Plain {
    fn drop(&mut self) {
        PLAIN.set(self.before);
    }
}

/// While it lives, convolutions on this thread keep their weights prepared: cast, and in the order that the CPU's kernels
/// read. For passes without gradients, many of them with the same weights.
///
/// Weights that change in between, by libtorch's operations or by [`crate::optim`] or as [`note_change`] says, are prepared anew, so that nothing but
/// time and memory depends on it. The prepared ones stay with their convolution behind the region too, for the next: as
/// much memory again as the weights take in the dtype of the pass. Memory order must be channels-last; elsewhere, and on
/// other devices, nothing changes.
#[derive(Debug)]
#[must_use = "convolutions prepare their weights only as long as this value lives"]
pub struct Packing {
    before: Option<Kind>,
    /// It belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Packing {
    /// Computes convolutions in `kind`, bfloat16 or float32.
    pub fn enter(kind: Kind) -> Self {
        Self { before: PACKING.replace(Some(kind)), _thread: PhantomData }
    }
}

impl Drop for Packing {
    fn drop(&mut self) {
        PACKING.set(self.before);
    }
}

/// Says that the numbers of `tensor` are others than before, where libtorch cannot see it: its handle was put on other
/// memory, which somebody else writes to. Weights that were prepared of it are then known to be old.
pub fn note_change(tensor: &Tensor) {
    shim::bump_version(tensor);
}

/// The prepared weights of one convolution, made when they are first needed.
#[derive(Debug, Default)]
pub struct PackedConv(RefCell<Option<shim::PackedConv>>);

impl PackedConv {
    /// The convolution of `x` with `weight` and `bias`, with `padding` zeros around it; `None` outside of a [`Packing`]
    /// and where libtorch's own has to do it.
    pub fn forward(
        &self,
        x: &Tensor,
        (weight, bias): (&Tensor, &Tensor),
        (stride, padding): (i64, i64),
    ) -> Option<Tensor> {
        let kind = PACKING.get().filter(|_| !PLAIN.get())?;
        let mut packed = self.0.try_borrow_mut().ok()?;
        if packed.is_none() {
            *packed = shim::PackedConv::new().ok();
        }
        // What cannot be packed for any reason, libtorch computes as ever.
        packed.as_mut()?.forward(x, (weight, bias), (stride, padding), kind).ok().flatten()
    }
}

#[cfg(test)]
mod tests;
