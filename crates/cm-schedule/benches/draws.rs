//! Are the numbers that are drawn on the host small beside a training step?
//!
//! - `pairs`: the noise levels of 512 images, as each step draws them: the table of iCT's last stage, built anew in every
//!   step, and draws of it; and ECT's t and r.
//! - `normals`: the noise of one image of CIFAR-10 on one thread; a batch is spread over all of them (`noise` of
//!   cm-torch).
//! - `order`: the order of an epoch of CIFAR-10 and of ImageNet, drawn once an epoch.

#![allow(missing_docs)] // criterion's macro makes an undocumented function

use std::hint::black_box;
use std::time::Duration;

use cm_schedule::rng::permutation;
use cm_schedule::{Ect, EctAdjust, IndexDist, KarrasGrid, LogNormal, Purpose, Stream};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};

const IMAGES: u64 = 512;
/// Pairs of neighbouring levels at the end of iCT's training.
const ICT_PAIRS: usize = 1280;
/// ln σ of iCT and ECT on CIFAR-10.
const LEVELS: LogNormal = LogNormal { mean: -1.1, std: 2.0 };

fn stream(purpose: Purpose, step: u32, sample: u64) -> Stream {
    Stream { seed: 1, purpose, step, sample }
}

fn pairs(c: &mut Criterion) {
    let mut group = c.benchmark_group("pairs");
    group.throughput(Throughput::Elements(IMAGES));
    let mut step = 0;
    group.bench_function(BenchmarkId::new("ict", IMAGES), |b| {
        let dist = IndexDist::LogNormal { mean: LEVELS.mean, std: LEVELS.std };
        b.iter(|| {
            step += 1;
            let sigmas = KarrasGrid::EDM.ascending(ICT_PAIRS + 1);
            let table = dist.table(&sigmas).expect("mass between the levels");
            let pair = |image| {
                let index = table.sample(stream(Purpose::Index, step, image).uniform(0));
                (sigmas[index + 1], sigmas[index])
            };
            (0..IMAGES).map(pair).collect::<Vec<_>>()
        });
    });
    group.bench_function(BenchmarkId::new("ect", IMAGES), |b| {
        let map = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } };
        b.iter(|| {
            step += 1;
            let pair = |image| {
                let t = LEVELS.sigma(stream(Purpose::Index, step, image).normal(0));
                (t, map.r(t, 7))
            };
            (0..IMAGES).map(pair).collect::<Vec<_>>()
        });
    });
    group.finish();
}

fn normals(c: &mut Criterion) {
    let mut group = c.benchmark_group("normals");
    let mut image = vec![0.0; 3 * 32 * 32];
    group.throughput(Throughput::Elements(image.len() as u64));
    let mut step = 0;
    group.bench_function("3x32x32", |b| {
        b.iter(|| {
            step += 1;
            stream(Purpose::Noise, step, 0).fill_normals(black_box(&mut image));
        });
    });
    group.finish();
}

fn order(c: &mut Criterion) {
    let mut group = c.benchmark_group("order");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    for (name, images) in [("cifar10", 50_000), ("imagenet", 1_281_167)] {
        group.throughput(Throughput::Elements(u64::from(images)));
        let mut epoch = 0;
        group.bench_function(BenchmarkId::new(name, images), |b| {
            b.iter(|| {
                epoch += 1;
                permutation(1, epoch, images)
            });
        });
    }
    group.finish();
}

fn settings() -> Criterion {
    Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3))
}

criterion_group!(name = benches; config = settings(); targets = pairs, normals, order);
criterion_main!(benches);
