//! Are the fast forms still faster than libtorch's own operations, in small networks and one by one?
//!
//! Each row computes the same work in both forms, in turn, and prints the median of the ratios of their times. A ratio
//! that has dropped by more than a third of what is recorded below is an error, after a second look: so CI notices a fast
//! form that is no longer taken. A step of training is made of so much else that it may lose one of them by less, so each
//! has a row of its own too. Whole networks of published size are `cargo xtask race`'s.

#![allow(missing_docs)] // no macro of criterion's: ratios are not in its world
#![allow(clippy::print_stdout)] // they are the answer

use std::process::ExitCode;
use std::time::Instant;

use cm_model::{Compute, Cond, ConsistencyFn, Sigma};
use cm_net::{NetSpec, SongUnetSpec};
use cm_schedule::SigmaRange;
use cm_torch::autocast::Autocast;
use cm_torch::device::keep_memory;
use cm_torch::fused::{Norm, Plain, tile_conv};
use cm_torch::memory_format::channels_last;
use cm_torch::optim::{EmaTarget, GradsAfter, OptimKind, Optimizer, StepOptions};
use cm_train::{Batch, Levels, Networks, TargetRule, Trainer};
use tch::{Device, Kind, Tensor};

mod common;

use common::{model, train_spec};

/// What is computed, in words, with its recorded ratio.
struct Row {
    name: &'static str,
    recorded: f64,
    /// On processors without AMX convolutions in bfloat16 take so long that nothing beside them shows.
    needs_amx: bool,
    work: Box<dyn FnMut()>,
}

/// Pairs of measurements of a row.
const PAIRS: usize = 9;
/// The share of a recorded ratio that must be left.
const LEFT: f64 = 2.0 / 3.0;
fn spec(size: i64, channels: i64, mult: &[i64], attention: &[i64]) -> NetSpec {
    NetSpec::SongUnet(SongUnetSpec {
        image_size: size,
        image_channels: channels,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: mult.to_vec(),
        num_blocks: 1,
        attn_resolutions: attention.to_vec(),
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    })
}

/// A step of consistency training without a target network.
fn training(spec: &NetSpec, batch: usize, compute: Compute) -> impl FnMut() + use<> {
    let settings = train_spec(batch, TargetRule::Live {});
    let shape = spec.image_shape().batch(batch as i64);
    let networks = Networks { student: model(spec, compute), target: None, teacher: None, perceptual: None };
    let levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };
    let mut trainer = Trainer::new(networks, &settings, levels).expect("the settings are valid");
    let images = Tensor::rand(shape, (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let batch = Batch { images, cond: Cond::none() };
    move || {
        trainer.step(&batch).expect("a step on noise is finite");
    }
}

/// One image in one step.
fn sampling(spec: &NetSpec, compute: Compute) -> impl FnMut() + use<> {
    let f = model(spec, compute);
    let shape = spec.image_shape().batch(1);
    let x = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 80.0;
    move || drop(f.jump(&x, Sigma::One(80.0), &Cond::none()).expect("the shape fits"))
}

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn images(shape: [i64; 4]) -> Tensor {
    channels_last(&randn(&shape).to_kind(Kind::BFloat16))
}

/// Backward of what `forward` makes of `inputs`. The loss is of one image, which takes next to nothing.
fn backward<const N: usize>(inputs: [Tensor; N], forward: impl Fn(&[Tensor; N]) -> Tensor) -> impl FnMut() {
    move || {
        let leaves = inputs.each_ref().map(|tensor| tensor.detach().set_requires_grad(true));
        let y = forward(&leaves);
        y.permute([0, 2, 3, 1]).get(0).sum(y.kind()).backward();
    }
}

/// Embedding, normalisation and SiLU, as in the blocks of the first level of DDPM++.
fn norm() -> impl FnMut() {
    let inputs = [images([16, 128, 32, 32]), randn(&[128]), randn(&[128]), randn(&[16, 128])];
    backward(inputs, |[x, weight, bias, add]| {
        let norm = Norm { weight, bias, groups: 32, eps: 1e-6, add: Some(add), modulate: None, silu: true };
        norm.forward(x)
    })
}

/// A convolution with its gradients, of small images.
fn convolution() -> impl FnMut() {
    let inputs = [images([128, 64, 4, 4]), randn(&[64, 64, 3, 3]) * 0.02, randn(&[64])];
    backward(inputs, |[x, weight, bias]| {
        let _bf16 = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
        let tiled = tile_conv(x, (weight, bias), (1, 1));
        tiled.unwrap_or_else(|| x.conv2d(weight, Some(bias), 1, 1, 1, 1))
    })
}

/// An update of a million weights in forty tensors with two averages, gradients kept.
fn update() -> impl FnMut() {
    let make = || -> Vec<Tensor> { (0..40).map(|_| randn(&[160, 160]) * 0.02).collect() };
    let weights: Vec<Tensor> = make().into_iter().map(|weight| weight.set_requires_grad(true)).collect();
    for weight in &weights {
        (weight * randn(&[160, 160])).sum(Kind::Float).backward();
    }
    let names: Vec<String> = (0..weights.len()).map(|i| i.to_string()).collect();
    let averages = [make(), make()];
    let mut optimizer: Option<Optimizer> = None;
    move || {
        let params: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&weights).collect();
        let averages = averages.each_ref().map(|tensors| EmaTarget { beta: 0.9999, tensors });
        let options = StepOptions { grads: GradsAfter::Keep, ..StepOptions::new(1e-6) };
        let optimizer = optimizer.get_or_insert_with(|| {
            Optimizer::new(OptimKind::radam(), &params).expect("the weights are dense")
        });
        optimizer.step(&options, &params, &averages).expect("the state is of these weights");
    }
}

/// The median of how many times as long the plain form takes.
fn ratio(work: &mut dyn FnMut()) -> f64 {
    work();
    let began = Instant::now();
    work();
    let calls = (0.04 / began.elapsed().as_secs_f64()).ceil().clamp(1.0, 100.0) as usize;
    let mut time = |plain: bool| {
        let _plain = plain.then(Plain::enter);
        work();
        let began = Instant::now();
        (0..calls).for_each(|_| work());
        began.elapsed().as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..PAIRS)
        .map(|pair| {
            // In turns, the first of a pair in one is the second in the next.
            let first = time(pair % 2 == 0);
            let second = time(pair % 2 == 1);
            if pair % 2 == 0 { first / second } else { second / first }
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    ratios[PAIRS / 2]
}

/// With what was recorded on two cores of a Xeon with AMX, calm, on 26 November 2026.
fn rows() -> Vec<Row> {
    let fp32 = Compute { channels_last: true, ..Compute::default() };
    let bf16 = Compute { autocast: Some(Kind::BFloat16), ..fp32 };
    let (digits, emoji) = (spec(8, 1, &[1, 2], &[]), spec(32, 3, &[1, 2, 2], &[]));
    let attentive = spec(8, 1, &[1, 2], &[8, 4]);
    let row = |name, recorded, needs_amx, work: Box<dyn FnMut()>| Row { name, recorded, needs_amx, work };
    vec![
        row("training step, 8×8, float32", 1.55, false, Box::new(training(&digits, 128, fp32))),
        row("training step, 32×32, bfloat16", 2.2, true, Box::new(training(&emoji, 16, bf16))),
        row("training step with attention, 8×8", 2.5, true, Box::new(training(&attentive, 128, bf16))),
        row("one image in one step, 32×32", 2.3, true, Box::new(sampling(&emoji, bf16))),
        row("normalisation, 32×32, both ways", 5.9, false, Box::new(norm())),
        row("convolution, 4×4, both ways", 1.93, true, Box::new(convolution())),
        row("update with two averages", 5.2, false, Box::new(update())),
    ]
}

fn main() -> ExitCode {
    keep_memory();
    let has_amx = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16"));
    let mut code = ExitCode::SUCCESS;
    for Row { name, recorded, needs_amx, work } in &mut rows() {
        let least = *recorded * LEFT;
        let mut found = ratio(work);
        if found < least {
            found = ratio(work);
        }
        let word = match (found < least, *needs_amx && !has_amx) {
            (true, false) => "TOO SLOW",
            (true, true) => "not held: recorded with AMX",
            (false, _) => "holds",
        };
        println!("{name:<36} {found:.2} × plain, recorded {recorded:.2}, at least {least:.2}  {word}");
        if word == "TOO SLOW" {
            code = ExitCode::FAILURE;
        }
    }
    code
}
