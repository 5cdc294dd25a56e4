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

thread_local! {
    static PACKING: Cell<Option<Kind>> = const { Cell::new(None) };
    static PLAIN: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, everything of this module on this thread is computed by libtorch's operations alone: what the fused
/// forms are measured against.
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
mod tests {
    use tch::Device;

    use super::*;
    use crate::memory_format::{channels_last, is_channels_last};
    use crate::optim::{EmaTarget, ema_update};

    fn randn(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    /// Inputs of a normalisation: x, weight, bias, add, scale, shift.
    fn inputs(shape: [i64; 4]) -> Vec<Tensor> {
        let [b, c, ..] = shape;
        // A mean far from 0, where sums of squares alone lose their digits.
        vec![
            randn(&shape) * 2.0 + 30.0,
            randn(&[c]) + 1.0,
            randn(&[c]),
            randn(&[b, c]),
            randn(&[b, c]) * 0.3,
            randn(&[b, c]),
        ]
    }

    /// Result and gradients of all inputs, of dtype `kind` in x alone.
    fn run(inputs: &[Tensor], how: (Kind, bool, bool, bool, bool), fused: bool) -> Vec<Tensor> {
        let (kind, last, modulated, added, silu) = how;
        let leaves: Vec<Tensor> = inputs.iter().map(|t| t.copy().set_requires_grad(true)).collect();
        let x = leaves[0].to_kind(kind);
        let x = if last { channels_last(&x) } else { x };
        let norm = Norm {
            weight: &leaves[1],
            bias: &leaves[2],
            groups: 4,
            eps: 1e-5,
            add: added.then_some(&leaves[3]),
            modulate: modulated.then_some((&leaves[4], &leaves[5])),
            silu,
        };
        let y = if fused {
            let y = shim::norm(
                &x,
                &shim::NormParts {
                    weight: norm.weight,
                    bias: norm.bias,
                    add: norm.add,
                    scale: norm.modulate.map(|m| m.0),
                    shift: norm.modulate.map(|m| m.1),
                    groups: 4,
                    eps: 1e-5,
                    silu,
                },
            );
            let y = y.unwrap().expect("the fused form applies");
            assert_eq!(
                (y.kind(), y.stride(), is_channels_last(&y)),
                (kind, x.stride(), is_channels_last(&x))
            );
            y
        } else {
            norm.composed(&x)
        };
        // A gradient that differs from place to place.
        let slope =
            Tensor::arange(y.numel() as i64, (Kind::Double, Device::Cpu)).reshape_as(&y).sin().to_kind(kind);
        (&y * slope).sum(y.kind()).backward();
        let grad = |t: &Tensor| {
            if t.grad().defined() { t.grad() } else { Tensor::zeros([1], (Kind::Float, Device::Cpu)) }
        };
        std::iter::once(y.to_kind(Kind::Double))
            .chain(leaves.iter().map(|t| grad(t).to_kind(Kind::Double)))
            .collect()
    }

    /// In units of the reference's largest number, or of 1 if all are smaller.
    fn apart(a: &Tensor, b: &Tensor) -> f64 {
        let scale = b.abs().max().double_value(&[]).max(1.0);
        (a - b).abs().max().double_value(&[]) / scale
    }

    #[test]
    fn a_fused_normalisation_and_its_gradients_are_the_formula() {
        tch::manual_seed(1);
        for shape in [[3, 8, 5, 13], [2, 16, 8, 8], [1, 4, 1, 1], [2, 32, 1, 70]] {
            let inputs = inputs(shape);
            let double: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
            for bits in 0..16 {
                let [last, modulated, added, silu] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
                let got = run(&inputs, (Kind::Float, last, modulated, added, silu), true);
                let want = run(&double, (Kind::Double, false, modulated, added, silu), false);
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let apart = apart(got, want);
                    // A single number in each group is its own mean: rounding, times 1/√eps, is all that its gradient is.
                    let most = if shape == [1, 4, 1, 1] { 1e-3 } else { 5e-5 };
                    assert!(apart < most, "{shape:?} {bits} output {i}: {apart}");
                }
            }
        }
    }

    #[test]
    fn bfloat16_is_as_near_as_its_digits_allow() {
        tch::manual_seed(2);
        let mut inputs = inputs([2, 16, 8, 9]);
        inputs[0] = (&inputs[0] - 30.0).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let double: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
        let how = |kind, last| (kind, last, true, true, true);
        let want = run(&double, how(Kind::Double, false), false);
        for last in [false, true] {
            let got = run(&inputs, how(Kind::BFloat16, last), true);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!(apart(got, want) < 2e-2, "{last} output {i}: {}", apart(got, want));
            }
        }
    }

    #[test]
    fn silu_saturates_and_lets_nan_through() {
        let one = |value: f64| {
            let x = Tensor::from_slice(&[value as f32, -1.0, 1.0, 0.0]).view([1, 1, 2, 2]);
            let weight = Tensor::ones([1], (Kind::Float, Device::Cpu));
            let bias = Tensor::from_slice(&[value as f32]);
            let norm = Norm {
                weight: &weight,
                bias: &bias,
                groups: 1,
                eps: 1e-5,
                add: None,
                modulate: None,
                silu: true,
            };
            Vec::<f32>::try_from(norm.forward(&x).view([-1])).unwrap()
        };
        assert!(one(f64::NAN).iter().all(|y| y.is_nan()));
        assert!(one(1e4).iter().all(|y| y.is_finite() && *y > 9e3));
        assert!(one(-1e4).iter().all(|y| y.abs() < 1e-20));
    }

    #[test]
    fn a_second_derivative_is_refused() {
        let x = randn(&[1, 4, 2, 2]).set_requires_grad(true);
        let (weight, bias) =
            (Tensor::ones([4], (Kind::Float, Device::Cpu)), Tensor::zeros([4], (Kind::Float, Device::Cpu)));
        let norm = Norm {
            weight: &weight,
            bias: &bias,
            groups: 2,
            eps: 1e-5,
            add: None,
            modulate: None,
            silu: true,
        };
        let y = norm.forward(&x).sum(Kind::Float);
        let error = Tensor::f_run_backward(&[y], &[&x], true, true).expect_err("differentiated twice");
        assert!(error.to_string().contains("twice"), "{error}");
    }

    #[test]
    fn a_scaled_sum_is_that_with_its_gradients() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let (a, b) = (randn(&[2, 3, 4, 5]).to_kind(kind), randn(&[2, 3, 4, 5]).to_kind(kind));
            let leaf = |t: &Tensor| t.copy().set_requires_grad(true);
            let (a1, b1, a2, b2) = (leaf(&a), leaf(&b), leaf(&a), leaf(&b));
            let slope = randn(&[2, 3, 4, 5]).to_kind(kind);
            let (got, want) = (scaled_sum(&a1, &b1, 0.7), (&a2 + &b2) * 0.7);
            (&got * &slope).sum(kind).backward();
            (&want * &slope).sum(kind).backward();
            let most = if kind == Kind::Float { 1e-6 } else { 1e-2 };
            for (got, want) in [(got, want), (a1.grad(), a2.grad()), (b1.grad(), b2.grad())] {
                assert!(apart(&got.to_kind(Kind::Double), &want.to_kind(Kind::Double)) < most);
            }
        }
    }

    #[test]
    fn packed_weights_are_used_and_noticed_when_old() {
        let _no_grad = tch::no_grad_guard();
        let x = channels_last(&randn(&[2, 8, 6, 6]));
        let (mut weight, mut bias) = (randn(&[16, 8, 3, 3]), randn(&[16]));
        let conv = PackedConv::default();
        let plain = |weight: &Tensor, bias: &Tensor| x.conv2d(weight, Some(bias), 1, 1, 1, 1);
        assert!(conv.forward(&x, (&weight, &bias), (1, 1)).is_none(), "packed without being asked");
        let _packing = Packing::enter(Kind::Float);
        let near = |weight: &Tensor, bias: &Tensor| {
            let packed = conv.forward(&x, (weight, bias), (1, 1)).expect("it can be packed here");
            let plain = plain(weight, bias);
            assert!(apart(&packed.to_kind(Kind::Double), &plain.to_kind(Kind::Double)) < 1e-5);
        };
        for _ in 0..2 {
            near(&weight, &bias);
        }
        let _ = weight.fill_(0.5);
        near(&weight, &bias);
        let _ = bias.fill_(-2.0);
        near(&weight, &bias);
        // Lent memory that is written to under another handle.
        let lent = randn(&[16, 8, 3, 3]);
        weight.set_data(&lent);
        near(&weight, &bias);
        weight.set_data(&randn(&[16, 8, 3, 3]));
        ema_update(&[("w", &weight)], &[EmaTarget { beta: 0.5, tensors: std::slice::from_ref(&lent) }])
            .unwrap();
        weight.set_data(&lent);
        note_change(&weight);
        near(&weight, &bias);
        // Another storage at perhaps the same address.
        drop(weight);
        near(&randn(&[16, 8, 3, 3]), &bias);
        near(&randn(&[16, 8, 3, 3]), &bias);
    }

    fn has_bfloat16() -> bool {
        std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("avx512_bf16"))
    }

    #[test]
    fn packed_weights_are_of_the_dtype_asked_for() {
        let _no_grad = tch::no_grad_guard();
        let x = channels_last(&randn(&[1, 16, 8, 8]));
        let (weight, bias) = (randn(&[16, 16, 3, 3]), randn(&[16]));
        let conv = PackedConv::default();
        for kind in [Kind::BFloat16, Kind::Float, Kind::BFloat16] {
            let _packing = Packing::enter(kind);
            // Machines without bfloat16 in their vector units leave it to libtorch.
            let known = kind == Kind::Float || has_bfloat16();
            let packed = conv.forward(&x, (&weight, &bias), (1, 1));
            assert!(packed.is_some() || !known, "{kind:?} is not packed");
            if let Some(y) = packed {
                assert_eq!(y.kind(), kind);
                let plain = x.conv2d(&weight, Some(&bias), 1, 1, 1, 1);
                assert!(apart(&y.to_kind(Kind::Double), &plain.to_kind(Kind::Double)) < 2e-2);
            }
        }
        let _packing = Packing::enter(Kind::Float);
        assert!(conv.forward(&x, (&weight, &bias), (1, 1)).is_some());
        {
            let _plain = Plain::enter();
            assert!(conv.forward(&x, (&weight, &bias), (1, 1)).is_none());
        }
        let planes = randn(&[1, 16, 8, 8]);
        let _packing = Packing::enter(Kind::Float);
        assert!(conv.forward(&planes, (&weight, &bias), (1, 1)).is_none());
    }
}
