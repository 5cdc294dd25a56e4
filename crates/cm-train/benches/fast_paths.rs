//! Are the fast forms of `cm_torch::fused` still faster than libtorch's own operations, on small networks?
//!
//! Each row computes the same work in both forms, in turn, and prints the median of the ratios of their times. A ratio
//! that has dropped by more than a third of what is recorded below is an error, after a second look: so CI notices a fast
//! form that is no longer taken. Whole networks of published size are `cargo xtask race`'s.

#![allow(missing_docs)] // no macro of criterion's: ratios are not in its world
#![allow(clippy::print_stdout)] // they are the answer

use std::process::ExitCode;
use std::time::Instant;

use cm_model::{Compute, Cond, ConsistencyFn, Sigma};
use cm_net::{NetSpec, SongUnetSpec};
use cm_schedule::SigmaRange;
use cm_torch::fused::Plain;
use cm_train::{Batch, Levels, Networks, TargetRule, Trainer};
use tch::{Device, Kind, Tensor};

mod common;

use common::{model, train_spec};

/// What is computed, in words and as work.
type Row<'a> = (&'static str, Box<dyn FnMut() + 'a>);

/// Pairs of measurements of a row.
const PAIRS: usize = 9;
/// The share of a recorded ratio that must be left.
const LEFT: f64 = 2.0 / 3.0;
/// On two cores of a Xeon with AMX, calm, 26 November 2026: 1.54 to 1.56, 2.01, 2.03 to 2.07 in three runs.
const RECORDED: [f64; 3] = [1.54, 1.95, 2.0];

fn spec(size: i64, channels: i64, mult: &[i64]) -> NetSpec {
    NetSpec::SongUnet(SongUnetSpec {
        image_size: size,
        image_channels: channels,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: mult.to_vec(),
        num_blocks: 1,
        attn_resolutions: vec![],
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    })
}

/// A step of consistency training without a target network.
fn training(spec: &NetSpec, batch: usize, compute: Compute) -> impl FnMut() {
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
fn sampling(spec: &NetSpec, compute: Compute) -> impl FnMut() {
    let f = model(spec, compute);
    let shape = spec.image_shape().batch(1);
    let x = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 80.0;
    move || drop(f.jump(&x, Sigma::One(80.0), &Cond::none()).expect("the shape fits"))
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
    let mut ratios: Vec<f64> = (0..PAIRS).map(|_| time(true) / time(false)).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[PAIRS / 2]
}

fn main() -> ExitCode {
    let fp32 = Compute { channels_last: true, ..Compute::default() };
    let bf16 = Compute { autocast: Some(Kind::BFloat16), ..fp32 };
    let (digits, emoji) = (spec(8, 1, &[1, 2]), spec(32, 3, &[1, 2, 2]));
    let mut rows: [Row<'_>; 3] = [
        ("training step, 8×8, batch 128, float32", Box::new(training(&digits, 128, fp32))),
        ("training step, 32×32, batch 16, bfloat16", Box::new(training(&emoji, 16, bf16))),
        ("one-step sampling, 32×32, batch 1, bfloat16", Box::new(sampling(&emoji, bf16))),
    ];
    // Elsewhere convolutions in bfloat16 take so long that nothing beside them shows.
    let known = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16"));
    let mut code = ExitCode::SUCCESS;
    for ((name, work), recorded) in rows.iter_mut().zip(RECORDED) {
        let least = recorded * LEFT;
        let mut found = ratio(work);
        if found < least {
            found = ratio(work);
        }
        let too_slow = found < least && (known || !name.ends_with("bfloat16"));
        let word = match (too_slow, found < least) {
            (true, _) => "TOO SLOW",
            (false, true) => "not held: recorded with AMX",
            (false, false) => "holds",
        };
        println!("{name:<46} {found:.2} × plain, recorded {recorded:.2}, at least {least:.2}  {word}");
        if too_slow {
            code = ExitCode::FAILURE;
        }
    }
    code
}
