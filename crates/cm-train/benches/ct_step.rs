//! How long does one step of consistency training take: draws, target and student forward, backward, RAdam with one
//! average and the target's average?
//!
//! The digits network decides how many steps the demo can afford; the CIFAR-10 network decides whether bfloat16 and
//! channels-last are worth it on this machine. The step reads its losses, so the device's work is inside the time.
//!
//! | name | network | images | dtype |
//! | --- | --- | --- | --- |
//! | digits_1x8x8_b128_f32 | SongUNet, 32 channels | 128 in one part | float32 |
//! | digits_1x8x8_b128_f32_cl | the same | 128 in one part | float32, channels-last |
//! | digits_1x8x8_b128_bf16_cl | the same | 128 in one part | bfloat16, channels-last |
//! | cifar10_3x32x32_b8_f32 | NCSN++, 56.4 M | 8 in one part | float32 |
//! | cifar10_3x32x32_b8_bf16_cl | the same | 8 in one part | bfloat16, channels-last |

// The macro below makes a public function without a comment.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use cm_model::{Compute, Cond};
use cm_net::{Decoder, Encoder, NetSpec, NoiseEmbedding, SongUnetSpec};
use cm_schedule::{Reading, SigmaRange, TargetEma};
use cm_train::{Batch, Levels, Networks, TargetRule, Trainer};
use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

mod common;

use common::{model, train_spec};

fn digits() -> SongUnetSpec {
    SongUnetSpec {
        image_size: 8,
        image_channels: 1,
        num_classes: 0,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: vec![1, 2],
        channel_mult_emb: 4,
        num_blocks: 1,
        attn_resolutions: Vec::new(),
        dropout: 0.0,
        label_dropout: 0.0,
        embedding: NoiseEmbedding::Positional {},
        channel_mult_noise: 1,
        encoder: Encoder::Standard,
        decoder: Decoder::Standard,
        resample_filter: vec![1.0, 1.0],
    }
}

fn step(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ct_step");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).warm_up_time(Duration::from_secs(1));
    let target_rule =
        TargetRule::Ema { rule: TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper } };
    let fast = |autocast| Compute { autocast, channels_last: true, ..Compute::default() };
    let cases: [(&str, NetSpec, usize, Compute); 5] = [
        ("digits_1x8x8_b128_f32", digits().into(), 128, Compute::default()),
        ("digits_1x8x8_b128_f32_cl", digits().into(), 128, fast(None)),
        ("digits_1x8x8_b128_bf16_cl", digits().into(), 128, fast(Some(Kind::BFloat16))),
        ("cifar10_3x32x32_b8_f32", SongUnetSpec::consistency_cifar10().into(), 8, Compute::default()),
        (
            "cifar10_3x32x32_b8_bf16_cl",
            SongUnetSpec::consistency_cifar10().into(),
            8,
            fast(Some(Kind::BFloat16)),
        ),
    ];
    for (name, spec, batch, compute) in cases {
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            let levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };
            let target = Some(model(&spec, compute));
            let mut trainer = Trainer::new(
                Networks { student: model(&spec, compute), target, teacher: None, perceptual: None },
                &train_spec(batch, target_rule),
                levels,
            )
            .expect("the bench's settings are valid");
            let shape = spec.image_shape().batch(batch as i64);
            let images = Tensor::rand(shape, (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
            let batch = Batch { images, cond: Cond::none() };
            bencher.iter(|| black_box(trainer.step(&batch).expect("a step on noise is finite").loss));
        });
    }
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
