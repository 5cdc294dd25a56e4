//! Does one optimiser step with two weight averages move memory about as fast as the machine can copy it? (At least
//! 70 % of the bandwidth of a copy between large buffers on the same threads.)
//!
//! A step reads weight, gradient, both moments and each average once, and writes all but the gradient once. It cannot
//! be faster than memory, so the share of the copy's bandwidth says what is left to gain. Both are measured in turns, and
//! the best of each counts, so that a busy machine blurs both alike.

#![allow(missing_docs)] // criterion's macro makes an undocumented function
#![allow(clippy::print_stdout)] // the share of bandwidth is this bench's answer

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

use cm_torch::device::threads;
use cm_torch::optim::{EmaTarget, GradsAfter, OptimKind, Optimizer, StepOptions, grad_norm};
use cm_torch::tch::{Device, Kind, Tensor};

const EMAS: usize = 2;

/// Weights in the shapes of a CIFAR-10 U-Net of 56 M parameters: 128 and 256 channels, many small vectors among them.
fn shapes() -> Vec<Vec<i64>> {
    let mut shapes = vec![vec![128, 3, 3, 3], vec![512, 128], vec![512, 512]];
    for block in 0..42 {
        let (input, output) = if block < 8 { (128, 128) } else { (256 + 128 * (block % 3 / 2), 256) };
        shapes.extend([vec![output, input, 3, 3], vec![output, output, 3, 3], vec![output * 2, 512]]);
        shapes.extend([vec![output], vec![output], vec![input], vec![input], vec![output * 2]]);
    }
    shapes
}

struct Model {
    weights: Vec<Tensor>,
    emas: Vec<Vec<Tensor>>,
    names: Vec<String>,
}

impl Model {
    fn new() -> Self {
        let filled = |value: f64| {
            shapes().iter().map(|s| Tensor::ones(s, (Kind::Float, Device::Cpu)) * value).collect()
        };
        let weights: Vec<Tensor> = filled(0.02);
        let weights: Vec<Tensor> = weights.into_iter().map(|w| w.set_requires_grad(true)).collect();
        for w in &weights {
            (w * 0.01).sum(Kind::Float).backward();
            // The gradient of a sum is one number repeated; give it memory of its own.
            w.grad().set_data(&w.grad().copy().contiguous());
        }
        let names = (0..weights.len()).map(|i| format!("w{i}")).collect();
        Self { weights, emas: (0..EMAS).map(|_| filled(0.02)).collect(), names }
    }

    fn params(&self) -> Vec<(&str, &Tensor)> {
        self.names.iter().map(String::as_str).zip(&self.weights).collect()
    }

    fn numel(&self) -> usize {
        self.weights.iter().map(Tensor::numel).sum()
    }
}

/// Bytes that a step must move: per element 4 + EMAs reads and 3 + EMAs writes of 4 bytes.
fn step_bytes(numel: usize) -> f64 {
    (numel * 4 * ((4 + EMAS) + (3 + EMAS))) as f64
}

fn seconds(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// Copies a buffer on all threads with plain memcpy.
fn copy_by_memcpy(from: &[f32], to: &mut [f32]) {
    let share = from.len().div_ceil(threads());
    std::thread::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

/// Best seconds of a copy of 100 M floats, by memcpy or by libtorch, and of a step of each optimiser, taken in turns.
fn best_of_turns(
    optimizers: &mut [(&str, Optimizer)],
    mut step: impl FnMut(&mut Optimizer),
) -> (f64, Vec<f64>) {
    let from = vec![1.0f32; COPIED];
    let mut to = vec![0.0f32; COPIED];
    let tensor = Tensor::ones([COPIED as i64], (Kind::Float, Device::Cpu));
    let mut target = tensor.zeros_like();
    let mut best_copy = f64::INFINITY;
    let mut best_step = vec![f64::INFINITY; optimizers.len()];
    for _ in 0..15 {
        best_copy = best_copy.min(seconds(|| copy_by_memcpy(&from, &mut to)));
        best_copy = best_copy.min(seconds(|| target.copy_(&tensor)));
        for ((_, optimizer), best) in optimizers.iter_mut().zip(&mut best_step) {
            *best = best.min(seconds(|| step(optimizer)));
        }
    }
    (best_copy, best_step)
}

const COPIED: usize = 100_000_000;

fn optimizer(c: &mut Criterion) {
    let model = Model::new();
    let params = model.params();
    let emas: Vec<EmaTarget> = model.emas.iter().map(|tensors| EmaTarget { beta: 0.9999, tensors }).collect();
    let bytes = step_bytes(model.numel());
    let options = StepOptions { grads: GradsAfter::Keep, ..StepOptions::new(1e-4) };
    let mut step = |optimizer: &mut Optimizer| {
        optimizer.step(&options, &params, &emas).unwrap();
    };

    let rules = [("adam", OptimKind::adam()), ("radam", OptimKind::radam())];
    let mut optimizers = rules.map(|(name, kind)| (name, Optimizer::new(kind, &params).unwrap()));
    for (_, optimizer) in &mut optimizers {
        // Past RAdam's plain steps, and every page touched.
        (0..7).for_each(|_| step(optimizer));
    }
    let (best_copy, best_step) = best_of_turns(&mut optimizers, &mut step);
    let copy_rate = (COPIED * 8) as f64 / best_copy / 1e9;
    println!("copy: {copy_rate:.1} GB/s on {} threads", threads());
    for ((name, _), best) in optimizers.iter().zip(best_step) {
        let rate = bytes / best / 1e9;
        println!(
            "{name} + {EMAS} EMAs, {:.1} M weights in {} tensors: {:.1} ms, {rate:.1} GB/s, {:.0} % of the copy",
            model.numel() as f64 / 1e6,
            params.len(),
            best * 1e3,
            100.0 * rate / copy_rate
        );
    }

    let mut group = c.benchmark_group("optimizer_step_2ema_cpu");
    group.throughput(Throughput::Bytes(bytes as u64));
    for (name, optimizer) in &mut optimizers {
        group.bench_function(BenchmarkId::new(*name, "56M"), |b| b.iter(|| step(optimizer)));
    }
    group.finish();

    let mut group = c.benchmark_group("grad_norm_cpu");
    group.throughput(Throughput::Bytes(model.numel() as u64 * 4));
    group.bench_function("56M", |b| b.iter(|| grad_norm(&params).unwrap()));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_secs(5));
    targets = optimizer
}
criterion_main!(benches);
