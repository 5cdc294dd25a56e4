//! What does attention between pixels cost in bfloat16, and would libtorch's fused kernel be faster?
//!
//! Up to 8×8 pixels attention is two products and a softmax here, above it the fused kernel. The layer has no public name
//! of its own, so its cost is found by difference: a network of one level has attention once, at the bottom, or three times,
//! and half of what the two differ by is one layer, with its normalisation and its convolutions. libtorch's kernel alone
//! stands beside it, on queries, keys and values of the same size: where the whole layer takes less than that, forward and
//! backward, the kernel would be the worse choice. The answer is printed last, of the shortest of runs in turn, since other
//! work can only make a run longer.

#![allow(missing_docs)] // criterion's macro makes a public function
#![allow(clippy::print_stdout)] // the difference is the answer

use std::time::{Duration, Instant};

use cm_model::torch::autocast::Autocast;
use cm_model::torch::device::keep_memory;
use cm_model::torch::memory_format::channels_last;
use cm_model::{Backbone, Cond};
use cm_net::{NetSpec, SongUnetSpec, build};
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

const SIDES: [i64; 3] = [4, 8, 16];
const IMAGES: i64 = 128;
const CHANNELS: i64 = 64;
/// Runs of each in turn.
const TURNS: usize = 9;

/// What is run, by name.
type Row = (&'static str, Box<dyn Fn()>);

/// A network of one level with attention everywhere, or at the bottom alone.
fn network(side: i64, everywhere: bool) -> Box<dyn Backbone + Send> {
    let spec = NetSpec::from(SongUnetSpec {
        image_size: side,
        augment_dim: 0,
        model_channels: CHANNELS,
        channel_mult: vec![1],
        num_blocks: 1,
        attn_resolutions: if everywhere { vec![side] } else { vec![] },
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    });
    let net = build(&spec, 0, Device::Cpu).expect("a valid network");
    net.params().to_channels_last();
    net
}

/// One pass of a network; with gradients, one of all its weights too.
fn network_pass(side: i64, everywhere: bool, gradients: bool) -> Box<dyn Fn()> {
    let net = network(side, everywhere);
    net.params().set_requires_grad(gradients);
    let x = channels_last(&Tensor::randn(net.shape().batch(IMAGES), (Kind::Float, Device::Cpu)));
    let noise = Tensor::zeros([IMAGES], (Kind::Float, Device::Cpu));
    Box::new(move || {
        let y = {
            let _bf16 = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
            net.forward(&x, &noise, &Cond::none(), false).expect("shapes fit")
        };
        if gradients {
            y.square().sum(Kind::Float).backward();
        }
    })
}

/// libtorch's fused kernel alone, in the memory order that the layer gives it.
fn kernel_pass(side: i64, gradients: bool) -> Box<dyn Fn()> {
    let parts = [(); 3].map(|()| {
        Tensor::randn([IMAGES, 1, side * side, CHANNELS], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16)
    });
    Box::new(move || {
        let [q, k, v] = parts.each_ref().map(|part| part.detach().set_requires_grad(gradients));
        let none = None::<&Tensor>;
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, none, 0.0, false, None, false);
        if gradients {
            y.square().sum(Kind::Float).backward();
        }
    })
}

fn rows(side: i64, gradients: bool) -> [Row; 3] {
    [
        ("network_with_1", network_pass(side, false, gradients)),
        ("network_with_3", network_pass(side, true, gradients)),
        ("kernel_alone", kernel_pass(side, gradients)),
    ]
}

/// The shortest of each row's runs in turn, in milliseconds.
fn shortest(rows: &[Row; 3]) -> [f64; 3] {
    let mut best = [f64::INFINITY; 3];
    for _ in 0..TURNS {
        for ((_, run), best) in rows.iter().zip(&mut best) {
            let began = Instant::now();
            run();
            *best = best.min(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    best
}

fn attention(c: &mut Criterion) {
    keep_memory(); // as `cm` does
    let mut group = c.benchmark_group("attention_bf16");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let mut answers = Vec::new();
    for side in SIDES {
        for (pass, gradients) in [("forward", false), ("both", true)] {
            let rows = rows(side, gradients);
            for (name, run) in &rows {
                group.bench_function(format!("{IMAGES}x{CHANNELS}x{side}x{side}/{pass}/{name}"), |b| {
                    b.iter(run);
                });
            }
            let [one, three, kernel] = shortest(&rows);
            let layer = (three - one) / 2.0;
            answers.push(format!("{side}×{side} {pass}: layer {layer:.2} ms, kernel alone {kernel:.2} ms"));
        }
    }
    group.finish();
    answers.iter().for_each(|answer| println!("{answer}"));
}

criterion_group!(benches, attention);
criterion_main!(benches);
