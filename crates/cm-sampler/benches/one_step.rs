//! What does sampling cost beside the network? One step of 64 images is held against the bare network's forward at
//! that batch, on the network of `configs/emoji-ect.toml`: at most 1.05 times as long.
//!
//! A state in float64, the noise, the preconditioning and the clamp are what may cost; a small network is where they
//! show. The ratio is printed with it, in two ways: of the shortest times of each, run in turn, since whatever else the
//! machine does can only make a run longer; and of whole samplings to the time that they themselves spent in the
//! network, which on a busy machine is the steadier one.

#![allow(missing_docs)] // criterion's macro makes a public function
#![allow(clippy::print_stdout)] // the ratio is the answer

use std::cell::Cell;
use std::time::{Duration, Instant};

use cm_sampler::model::{Backbone, Cond, ImageShape, Params, Preconditioned, Result};
use cm_sampler::nets::{NetSpec, SongUnetSpec, build};
use cm_sampler::schedule::solver::Churn;
use cm_sampler::schedule::{Boundary, Edm, KarrasGrid, NoiseCond, SigmaRange};
use cm_sampler::tch::{self, Device, Kind, Tensor};
use cm_sampler::{Hooks, Method, Request, Solver, one_step, sample};
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};

const BATCH: i64 = 64;
/// What the ratio may be.
const MOST: f64 = 1.05;
/// Pairs of runs that the ratio is taken over.
const PAIRS: usize = 15;

/// The network of the emoji demo, 1.4 M parameters.
fn emoji() -> NetSpec {
    NetSpec::SongUnet(SongUnetSpec {
        image_size: 32,
        model_channels: 32,
        channel_mult: vec![1, 2, 2],
        num_blocks: 1,
        attn_resolutions: vec![],
        augment_dim: 0,
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    })
}

/// A network that adds up the time spent in it.
struct Timed {
    net: Box<dyn Backbone + Send>,
    seconds: Cell<f64>,
}

impl Backbone for Timed {
    fn shape(&self) -> ImageShape {
        self.net.shape()
    }
    fn num_classes(&self) -> i64 {
        self.net.num_classes()
    }
    fn params(&self) -> &Params {
        self.net.params()
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> Result<Tensor> {
        let start = Instant::now();
        let result = self.net.forward(x, c_noise, cond, train);
        self.seconds.set(self.seconds.get() + start.elapsed().as_secs_f64());
        result
    }
}

fn shortest(seconds: Vec<f64>) -> f64 {
    seconds.into_iter().fold(f64::INFINITY, f64::min)
}

fn one_step_of_64(c: &mut Criterion) {
    let net = build(&emoji(), 0, Device::Cpu).expect("the network of a preset");
    net.params().set_requires_grad(false);
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).expect("positive");
    let f = Preconditioned::new(Timed { net, seconds: Cell::new(0.0) }, precond, SigmaRange::EDM);
    let x = Tensor::randn(f.net.shape().batch(BATCH), (Kind::Float, Device::Cpu));
    let c_noise = Tensor::full([BATCH], 80f64.ln() / 4.0, (Kind::Float, Device::Cpu));
    let seeds: Vec<u64> = (0..BATCH as u64).collect();

    let forward = || {
        let _no_grad = tch::no_grad_guard();
        f.net.forward(&x, &c_noise, &Cond::none(), false).expect("shapes fit")
    };
    let one = || one_step(&f, &Request::new(&seeds)).expect("the request fits");

    let mut group = c.benchmark_group("one_step");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function("emoji/64x3x32x32/forward", |b| b.iter(forward));
    group.bench_function("emoji/64x3x32x32/one_step", |b| b.iter(one));
    group.finish();

    let timed = |run: &dyn Fn() -> Tensor| {
        let start = Instant::now();
        drop(run());
        start.elapsed().as_secs_f64()
    };
    let (mut forwards, mut samples, mut inside) = (Vec::new(), Vec::new(), 0.0);
    for _ in 0..PAIRS {
        forwards.push(timed(&forward));
        f.net.seconds.set(0.0);
        samples.push(timed(&one));
        inside += f.net.seconds.get();
    }
    let within = samples.iter().sum::<f64>() / inside;
    let (forward, sample) = (shortest(forwards), shortest(samples));
    println!(
        "one step {:.1} ms, bare forward {:.1} ms: ratio {:.3}; to its own time in the network: {within:.3}; at most \
         {MOST}",
        1e3 * sample,
        1e3 * forward,
        sample / forward
    );
    assert!(within.min(sample / forward) <= MOST, "sampling costs more than {MOST} times the network");
}

/// EDM's sampler on the same network: 35 evaluations.
fn heun_18_of_16(c: &mut Criterion) {
    let net = build(&emoji(), 0, Device::Cpu).expect("the network of a preset");
    net.params().set_requires_grad(false);
    let precond = Edm::new(0.5, NoiseCond::QuarterLog).expect("positive");
    let denoiser = Preconditioned::new(net, precond, SigmaRange::EDM);
    let levels = KarrasGrid::new(SigmaRange::EDM, 7.0).expect("EDM's").with_zero(18);
    let heun = Solver::Heun { churn: Churn::NONE };
    let method = Method::solver(&denoiser, heun, &levels).expect("the levels fall");
    let seeds: Vec<u64> = (0..16).collect();
    let mut group = c.benchmark_group("heun_18");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    group.sampling_mode(SamplingMode::Flat);
    group.bench_function("emoji/16x3x32x32", |b| {
        b.iter(|| sample(&method, &Request::new(&seeds), Hooks::default()).expect("the request fits"));
    });
    group.finish();
}

criterion_group!(benches, one_step_of_64, heun_18_of_16);
criterion_main!(benches);
