use std::cell::Cell;

use cm_schedule::rng::Purpose;
use tch::Device;

use super::*;
use crate::memory_format::{channels_last, is_channels_last};
use crate::optim::{EmaTarget, ema_update};
use crate::philox::{NormalSpec, normals};

thread_local! {
    /// Seed of this test's numbers, and how many tensors were drawn of it.
    static DRAWN: Cell<(u64, u32)> = const { Cell::new((0, 0)) };
}

fn seed(seed: u64) {
    DRAWN.set((seed, 0));
}

/// Normal numbers that no test beside this one changes, as draws of libtorch's own generator would.
fn randn(shape: &[i64]) -> Tensor {
    let (seed, step) = DRAWN.get();
    DRAWN.set((seed, step + 1));
    let per_sample = shape.iter().product::<i64>() as usize;
    let spec = NormalSpec { seed, purpose: Purpose::Synthetic, step, samples: &[0], per_sample };
    normals(&spec, Device::Cpu).expect("numbers").view(shape).copy()
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
        assert_eq!((y.kind(), y.stride(), is_channels_last(&y)), (kind, x.stride(), is_channels_last(&x)));
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
    seed(1);
    for shape in [[3, 8, 5, 13], [2, 16, 8, 8], [1, 4, 1, 1], [2, 32, 1, 70]] {
        let inputs = inputs(shape);
        let double: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
        for bits in 0..16 {
            let [last, modulated, added, silu] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
            let got = run(&inputs, (Kind::Float, last, modulated, added, silu), true);
            let want = run(&double, (Kind::Double, false, modulated, added, silu), false);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let apart = apart(got, want);
                // A single number in each group is its own mean: what is left is its rounding, 36 * 2^-24, times
                // 1/√eps and a weight of up to 3.
                let most = if shape == [1, 4, 1, 1] { 3e-3 } else { 5e-5 };
                assert!(apart < most, "{shape:?} {bits} output {i}: {apart}");
            }
        }
    }
}

#[test]
fn bfloat16_is_as_near_as_its_digits_allow() {
    seed(2);
    // 64 channels and 48, which are and are not what AVX-512 takes at a time.
    for channels in [16, 48, 64] {
        let mut inputs = inputs([2, channels, 8, 9]);
        inputs[0] = (&inputs[0] - 30.0).to_kind(Kind::BFloat16).to_kind(Kind::Float);
        let double: Vec<Tensor> = inputs.iter().map(|t| t.to_kind(Kind::Double)).collect();
        for (last, silu) in [(false, true), (true, true), (true, false)] {
            let how = |kind, last| (kind, last, true, true, silu);
            let want = run(&double, how(Kind::Double, false), false);
            let got = run(&inputs, how(Kind::BFloat16, last), true);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let apart = apart(got, want);
                assert!(apart < 2e-2, "{channels} {last} {silu} output {i}: {apart}");
            }
        }
    }
}

/// SiLU of `value` in 32 channels of bfloat16, all of whose images are 0.
fn silu_of_even_channels(value: f64) -> Vec<f32> {
    let options = (Kind::Float, Device::Cpu);
    let x = Tensor::zeros([1, 32, 2, 2], (Kind::BFloat16, Device::Cpu));
    let x = crate::memory_format::channels_last(&x);
    let (weight, bias) = (Tensor::ones([32], options), Tensor::full([32], value, options));
    let norm =
        Norm { weight: &weight, bias: &bias, groups: 1, eps: 1e-5, add: None, modulate: None, silu: true };
    Vec::<f32>::try_from(norm.forward(&x).to_kind(Kind::Float).contiguous().view([-1])).unwrap()
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
    let wide = |value: f64| silu_of_even_channels(value);
    assert!(one(f64::NAN).iter().chain(&wide(f64::NAN)).all(|y| y.is_nan()));
    assert!(wide(1e4).iter().all(|y| (*y - 1e4).abs() < 40.0) && wide(-1e4).iter().all(|y| y.abs() < 1e-20));
    assert!(one(1e4).iter().all(|y| y.is_finite() && *y > 9e3));
    assert!(one(-1e4).iter().all(|y| y.abs() < 1e-20));
}

#[test]
fn a_second_derivative_is_refused() {
    let x = randn(&[1, 4, 2, 2]).set_requires_grad(true);
    let (weight, bias) =
        (Tensor::ones([4], (Kind::Float, Device::Cpu)), Tensor::zeros([4], (Kind::Float, Device::Cpu)));
    let norm =
        Norm { weight: &weight, bias: &bias, groups: 2, eps: 1e-5, add: None, modulate: None, silu: true };
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
    ema_update(&[("w", &weight)], &[EmaTarget { beta: 0.5, tensors: std::slice::from_ref(&lent) }]).unwrap();
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

/// Gradients of a convolution of x, weight and bias, and its result, under bfloat16 autocast.
fn convolved(inputs: &[Tensor], k: i64, tiles: bool) -> Vec<Tensor> {
    let leaves: Vec<Tensor> = inputs.iter().map(|t| t.copy().set_requires_grad(true)).collect();
    let x = channels_last(&leaves[0].to_kind(Kind::BFloat16));
    let how = (1, k / 2);
    let y = {
        let _bf16 = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
        match tiles {
            true => tile_conv(&x, (&leaves[1], &leaves[2]), how).expect("it applies"),
            false => x.conv2d(&leaves[1], Some(&leaves[2]), how.0, how.1, 1, 1),
        }
    };
    assert_eq!(y.kind(), Kind::BFloat16);
    let slope = Tensor::arange(y.numel() as i64, (Kind::Double, Device::Cpu)).reshape_as(&y).sin();
    (&y * slope.to_kind(Kind::BFloat16)).sum(Kind::BFloat16).backward();
    let grads = leaves.iter().map(|t| t.grad().to_kind(Kind::Double));
    std::iter::once(y.detach().to_kind(Kind::Double)).chain(grads).collect()
}

/// The gradients of weight and bias in double, for a gradient of the result that bfloat16 holds.
fn exact(inputs: &[Tensor], k: i64) -> [Tensor; 2] {
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.to_kind(Kind::BFloat16).to_kind(Kind::Double).set_requires_grad(true))
        .collect();
    let y = leaves[0].conv2d(&leaves[1], Some(&leaves[2]), 1, k / 2, 1, 1);
    let slope = Tensor::arange(y.numel() as i64, (Kind::Double, Device::Cpu)).reshape_as(&y).sin();
    (&y * slope.to_kind(Kind::BFloat16).to_kind(Kind::Double)).sum(Kind::Double).backward();
    [leaves[1].grad(), leaves[2].grad()]
}

/// Whether the processor names the tiles and the system lends them, asked here anew: a sandbox may not.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn has_tiles() -> bool {
    const REQUEST: libc::c_long = 0x1023;
    const TILES: libc::c_long = 18;
    let named = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16"));
    // SAFETY: the call takes two numbers and touches no memory of this process.
    named && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILES) } == 0
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn has_tiles() -> bool {
    false
}

/// What a convolution for the tiles is made of.
fn conv_parts((n, c, o, height, width, k): (i64, i64, i64, i64, i64, i64)) -> [Tensor; 3] {
    [randn(&[n, c, height, width]), randn(&[o, c, k, k]), randn(&[o])]
}

#[test]
fn gradients_of_weights_on_tiles_are_those_of_the_convolution() {
    if !has_tiles() {
        return;
    }
    seed(3);
    // Rows and columns that are no multiple of anything; one block of channels, and odd numbers of them; more images than
    // are packed at a time, with even and odd numbers of blocks, for either kernel; one pixel; the largest images.
    for shape in [
        (3, 32, 64, 5, 9, 3),
        (2, 16, 48, 8, 8, 3),
        (1, 48, 16, 1, 1, 3),
        (130, 96, 96, 8, 8, 3),
        (200, 48, 80, 8, 8, 3),
        (2, 64, 32, 32, 32, 3),
        (3, 80, 48, 7, 4, 1),
        (130, 80, 48, 16, 16, 1),
    ] {
        let (inputs, k) = (conv_parts(shape), shape.5);
        let (got, want, exact) =
            (convolved(&inputs, k, true), convolved(&inputs, k, false), exact(&inputs, k));
        assert!(got[0].equal(&want[0]) && got[1].equal(&want[1]), "{shape:?}: the rest is libtorch's own");
        for (i, exact) in exact.iter().enumerate() {
            let apart = apart(&got[2 + i], exact);
            assert!(apart < 2e-5, "{shape:?}, gradient {i}: {apart:e}");
        }
    }
}

#[test]
fn tiles_take_what_autograd_hands_them() {
    if !has_tiles() {
        return;
    }
    seed(5);
    let [x, weight, bias] = conv_parts((4, 32, 48, 8, 8, 3));
    // No gradient of x is wanted; weights lie channels-last; the result's gradient is one number for all places.
    let x = channels_last(&x.to_kind(Kind::BFloat16));
    let weight = channels_last(&weight).set_requires_grad(true);
    let bias = bias.set_requires_grad(true);
    let _bf16 = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
    let run = || tile_conv(&x, (&weight, &bias), (1, 1)).expect("it applies");
    run().sum(Kind::BFloat16).backward();
    let double = |t: &Tensor| t.detach().to_kind(Kind::BFloat16).to_kind(Kind::Double);
    let (w, b) = (double(&weight).set_requires_grad(true), double(&bias).set_requires_grad(true));
    double(&x).conv2d(&w, Some(&b), 1, 1, 1, 1).sum(Kind::Double).backward();
    let once = [weight.grad().to_kind(Kind::Double), bias.grad().to_kind(Kind::Double)];
    for (got, want) in std::iter::zip(&once, [w.grad(), b.grad()]) {
        assert!(apart(got, &want) < 2e-5);
    }
    // A second pass adds to what is there.
    run().sum(Kind::BFloat16).backward();
    assert!(apart(&weight.grad().to_kind(Kind::Double), &(&once[0] * 2.0)) < 1e-6);
    let y = run().square().sum(Kind::Float);
    let error = Tensor::f_run_backward(&[y], &[&weight], true, true).expect_err("differentiated twice");
    assert!(error.to_string().contains("twice"), "{error}");
}

#[test]
fn what_tiles_cannot_do_is_left_to_libtorch() {
    let (x, weight, bias) =
        (channels_last(&randn(&[2, 32, 8, 8])).to_kind(Kind::BFloat16), randn(&[32, 32, 3, 3]), randn(&[32]));
    let (weight, bias) = (weight.set_requires_grad(true), bias.set_requires_grad(true));
    let tried = |x: &Tensor, how: (i64, i64)| tile_conv(x, (&weight, &bias), how).is_some();
    assert!(!tried(&x, (1, 1)), "without autocast the dtypes do not fit");
    let _bf16 = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
    assert_eq!(tried(&x, (1, 1)), has_tiles());
    assert!(!tried(&x, (2, 1)) && !tried(&x, (1, 0)), "other strides and paddings");
    let other = |shape: &[i64]| randn(shape).set_requires_grad(true);
    for shape in [vec![32, 32, 3, 1], vec![32, 32], vec![32, 16, 3, 3], vec![0, 32, 3, 3]] {
        let weight = other(&shape);
        assert!(shim::tile_conv(&x, &weight, &bias).unwrap().is_none(), "a weight {shape:?}");
    }
    assert!(!tried(&x.contiguous(), (1, 1)), "planes");
    assert!(!tried(&x.to_kind(Kind::Float), (1, 1)), "float32");
    let wide = channels_last(&randn(&[1, 32, 64, 64]).to_kind(Kind::BFloat16));
    assert!(!tried(&wide, (1, 1)), "large images");
    assert!(!tch::no_grad(|| tried(&x, (1, 1))), "nothing to differentiate");
    let _plain = Plain::enter();
    assert!(!tried(&x, (1, 1)), "plain forms were asked for");
}
