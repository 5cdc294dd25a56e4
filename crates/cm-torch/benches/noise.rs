//! Is drawing the noise of a batch small beside a training step? (It should stay under 1 % of one.)

#![allow(missing_docs)] // criterion's macro makes an undocumented function

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

use cm_schedule::rng::Purpose;
use cm_torch::philox::{NormalSpec, normals};
use cm_torch::tch::Device;

/// Batches of the paper: name, images, numbers per image.
const SHAPES: [(&str, usize, usize); 3] =
    [("512x3x32x32", 512, 3 * 32 * 32), ("32x3x64x64", 32, 3 * 64 * 64), ("1x3x256x256", 1, 3 * 256 * 256)];

fn noise(c: &mut Criterion) {
    let mut group = c.benchmark_group("philox_normals_cpu");
    for (name, images, per_sample) in SHAPES {
        let samples: Vec<u64> = (0..images as u64).collect();
        let spec = NormalSpec { seed: 1, purpose: Purpose::Noise, step: 0, samples: &samples, per_sample };
        group.throughput(Throughput::Elements((images * per_sample) as u64));
        group.bench_function(name, |b| b.iter(|| normals(black_box(&spec), Device::Cpu).unwrap()));
    }
    group.finish();
}

criterion_group!(benches, noise);
criterion_main!(benches);
