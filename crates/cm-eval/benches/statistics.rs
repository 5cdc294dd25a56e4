//! Once the features of images are there, how long do the figures made of them take?
//!
//! It should not be noticed beside the network that computes the features. They have 2,048 numbers, as Inception's have,
//! or 256.
//!
//! - `moments`: mean and covariance, out of batches of 64.
//! - `frechet`: the distance of new moments to stored ones. What has to be found of each covariance is kept with it, so that
//!   the stored ones have theirs already.
//! - `kid`: one subset of 1,000 images of either set; the field's usual number is 100 subsets.
//! - `precision_recall`: grows with the square of the number of images.

#![allow(missing_docs)] // criterion's macro makes an undocumented function

use std::hint::black_box;
use std::time::Duration;

use cm_eval::{Divisor, Moments, MomentsStream, frechet_distance, kid, kid_subsets, precision_recall};
use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use tch::{Device, Kind, Tensor};

const BATCH: i64 = 64;
/// Numbers in a feature of Inception.
const INCEPTION: i64 = 2048;

fn features(images: i64, numbers: i64) -> Tensor {
    Tensor::randn([images, numbers], (Kind::Float, Device::Cpu))
}

fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    group
}

fn moments(c: &mut Criterion) {
    const IMAGES: i64 = 2000;
    let mut group = group(c, "moments");
    group.throughput(Throughput::Elements(IMAGES as u64));
    let all = features(IMAGES, INCEPTION);
    group.bench_function(format!("{IMAGES}x{INCEPTION}"), |b| {
        b.iter(|| {
            let mut stream = MomentsStream::default();
            for batch in all.split(BATCH, 0) {
                stream.add(&batch).expect("finite features");
            }
            black_box(stream.finish(Divisor::CountLessOne).expect("enough images"))
        });
    });
    group.finish();
}

fn frechet(c: &mut Criterion) {
    let mut group = group(c, "frechet");
    for (images, numbers) in [(2000, 256), (2100, INCEPTION)] {
        let stored = Moments::of(&features(images, numbers)).expect("enough images");
        stored.rank().expect("eigenvalues");
        let new = features(images, numbers) + 0.1;
        group.bench_function(numbers.to_string(), |b| {
            let moments = || Moments::of(&new).expect("enough images");
            b.iter_batched(
                moments,
                |new| frechet_distance(&new, &stored).expect("features of one size"),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn pairs(c: &mut Criterion) {
    let mut group = group(c, "pairs");
    let [real, generated] = [features(2000, INCEPTION), features(2000, INCEPTION)];
    let subset = kid_subsets(2000, 2000, 1, 1000, 0);
    group.bench_function("kid/1000x2048", |b| {
        b.iter(|| kid(&real, &generated, &subset).expect("subsets of these"));
    });
    let [real, generated] = [&real, &generated].map(|all| all.narrow(0, 0, 500));
    group.bench_function("precision_recall/500x2048", |b| {
        b.iter(|| precision_recall(&real, &generated, 3).expect("enough images"));
    });
    group.finish();
}

criterion_group!(benches, moments, frechet, pairs);
criterion_main!(benches);
