//! What does this machine give, in operations and in bytes a second, on the shapes that training works on? Floors of
//! docs/performance.md are counted with these.
//!
//! - `copy` and `read` of 225 MB, the weights of DDPM++: `copy` counts the bytes that are read and written, `read` those of
//!   a sum.
//! - `product` of two matrices of 4096×4096; a multiplication and an addition are two operations.
//! - `conv`: 3×3, 8 images; `forward`, and `input` and `weight`, the gradient of one of the two alone. The passes are
//!   libtorch's own, with what it casts and reorders for them.
//!
//! criterion prints the rate beside the time (elements are operations).

#![allow(missing_docs)] // criterion's macro makes an undocumented function

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

use cm_torch::memory_format::channels_last;
use cm_torch::tch::{self, Device, Kind, Tensor};

mod common;

use common::group;

/// Weights of DDPM++.
const WEIGHTS: i64 = 56_000_000;
const SIDE: i64 = 4096;
/// Channels and pixels in a row.
const CONVS: [(i64, i64); 3] = [(256, 32), (256, 16), (256, 8)];
const IMAGES: i64 = 8;

fn randn(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

fn memory(c: &mut Criterion) {
    let mut group = group(c, "memory");
    let from = randn(&[WEIGHTS], Kind::Float);
    let mut to = from.zeros_like();
    let bytes = WEIGHTS as u64 * 4;
    group.throughput(Throughput::Bytes(2 * bytes));
    group.bench_function("copy", |b| b.iter(|| to.copy_(&from)));
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("read", |b| b.iter(|| from.sum(Kind::Float)));
    group.finish();
}

fn product(c: &mut Criterion) {
    let mut group = group(c, "product");
    group.throughput(Throughput::Elements(2 * (SIDE as u64).pow(3)));
    for (name, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
        let [a, b] = [(); 2].map(|()| randn(&[SIDE, SIDE], kind));
        group.bench_function(name, |bencher| bencher.iter(|| a.matmul(&b)));
    }
    group.finish();
}

fn conv(c: &mut Criterion) {
    let mut group = group(c, "conv");
    for (channels, side) in CONVS {
        let operations = 2 * IMAGES * side * side * channels * channels * 9;
        group.throughput(Throughput::Elements(operations as u64));
        for (kind_name, kind, last) in
            [("f32", Kind::Float, false), ("f32_cl", Kind::Float, true), ("bf16_cl", Kind::BFloat16, true)]
        {
            let order = |t: Tensor| if last { channels_last(&t) } else { t };
            let x = order(randn(&[IMAGES, channels, side, side], kind));
            let weight = order(randn(&[channels, channels, 3, 3], kind) * 0.02);
            let name = |pass| BenchmarkId::new(pass, format!("{channels}x{side}x{side}/{kind_name}"));
            let forward = |x: &Tensor, weight: &Tensor| x.conv2d(weight, None::<&Tensor>, 1, 1, 1, 1);
            group.bench_function(name("forward"), |b| {
                let _no_grad = tch::no_grad_guard();
                b.iter(|| forward(&x, &weight));
            });
            for (pass, of_input) in [("input", true), ("weight", false)] {
                let leaf = |t: &Tensor, wanted: bool| t.detach().set_requires_grad(wanted);
                let (x, weight) = (leaf(&x, of_input), leaf(&weight, !of_input));
                // The gradient of a sum is ones: to write them takes little beside the convolution.
                let sum = forward(&x, &weight).sum(kind);
                let wanted = if of_input { &x } else { &weight };
                group.bench_function(name(pass), |b| {
                    b.iter(|| Tensor::run_backward(&[&sum], &[wanted], true, false));
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, memory, product, conv);
criterion_main!(benches);
