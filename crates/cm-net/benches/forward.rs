//! How long does one evaluation of a network take, and do bfloat16 and channels-last pay?
//!
//! The answer decides the defaults of sampling and training on the CPU, and how many steps a demo can have. Each
//! name says network, shape and way of computing.

#![allow(missing_docs)] // criterion's macro makes a public function

use std::time::Duration;

use cm_model::schedule::{Edm, NoiseCond, SigmaRange};
use cm_model::{Compute, Cond, Denoiser, Preconditioned, Sigma};
use cm_net::{NetSpec, SongUnetSpec, build};
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

/// The network of the demo on 8×8 digits.
fn digits() -> SongUnetSpec {
    SongUnetSpec {
        image_size: 8,
        image_channels: 1,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: vec![1, 2],
        num_blocks: 2,
        attn_resolutions: vec![4],
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    }
}

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    group.sampling_mode(SamplingMode::Flat);
    let ways = [
        ("fp32", Compute::default()),
        ("fp32_channels_last", Compute { channels_last: true, ..Compute::default() }),
        ("bf16", Compute { autocast: Some(Kind::BFloat16), ..Compute::default() }),
        (
            "bf16_channels_last",
            Compute { autocast: Some(Kind::BFloat16), channels_last: true, ..Compute::default() },
        ),
    ];
    let cases = [
        ("ddpmpp_cifar10", SongUnetSpec::ddpmpp_cifar10(0), vec![1, 16]),
        ("ncsnpp_cifar10", SongUnetSpec::consistency_cifar10(), vec![1, 16]),
        ("digits_32_64", digits(), vec![128]),
    ];
    for (name, spec, batches) in cases {
        let spec = NetSpec::from(spec);
        for (how, compute) in ways {
            let net = build(&spec, 0, Device::Cpu).expect("a published network");
            if compute.channels_last {
                net.params().to_channels_last();
            }
            let precond = Edm::new(0.5, NoiseCond::QuarterLog).expect("positive");
            let sigma_range = SigmaRange::new(0.002, 80.0).expect("in order");
            let model = Preconditioned { net, precond, sigma_range, compute };
            for &batch in &batches {
                let shape = spec.image_shape();
                let x = Tensor::randn(shape.batch(batch), (Kind::Float, Device::Cpu)) * 80.0;
                let id = format!("{name}/{batch}x{}x{}x{}/{how}", shape.channels, shape.height, shape.width);
                group.bench_function(id, |b| {
                    b.iter(|| model.denoise(&x, Sigma::One(80.0), &Cond::none()).expect("shapes fit"));
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
