//! What do the fused forms of `cm_torch::fused` give, one layer at a time, beside libtorch's own operations?
//!
//! Each row names the layer, the images, their dtype and the pass, and then the form: `fused`, or `plain`, which is the
//! same work under [`Plain`]. Images lie channels-last, as in training in bfloat16. `fast_paths` of cm-train holds whole
//! networks to recorded ratios; this bench says which layer a change of them comes from.
//!
//! - `norm`: group normalisation with the embedding in front and SiLU behind it, as in the blocks of DDPM++.
//! - `sum`: (a + b)·√½, where two branches meet; backward it is one product in either form.
//! - `conv`: a convolution 3×3 forward and backward, where the weights' gradient is for the tiles of AMX. On other
//!   processors both forms are libtorch's.
//!
//! `both` is forward and backward. The loss is of the first image alone: it takes next to nothing, and still gives a
//! gradient of all images that lies in memory as in a network.

#![allow(missing_docs)] // criterion's macro makes an undocumented function

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main};

use cm_torch::autocast::Autocast;
use cm_torch::fused::{Norm, Plain, scaled_sum, tile_conv};
use cm_torch::memory_format::channels_last;
use cm_torch::tch::{Device, Kind, Tensor};

mod common;

use common::group;

/// Images and dtypes: the first level of DDPM++ on CIFAR-10, and the second of the network of the demo on digits, whose
/// images are so small that each is normalised while it lies in the cache.
const IMAGES: [([i64; 4], Kind); 3] = [
    ([16, 128, 32, 32], Kind::BFloat16),
    ([128, 64, 4, 4], Kind::BFloat16),
    ([16, 128, 32, 32], Kind::Float),
];
/// Convolutions: images, channels, and pixels in a row.
const CONVS: [(i64, i64, i64); 4] = [(128, 64, 4), (8, 256, 8), (8, 256, 16), (8, 256, 32)];

/// Both forms of the same work.
fn both(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, mut work: impl FnMut()) {
    for (form, plain) in [("fused", false), ("plain", true)] {
        let _plain = plain.then(Plain::enter);
        group.bench_function(BenchmarkId::new(name, form), |b| b.iter(&mut work));
    }
}

fn randn(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu))
}

fn images(shape: [i64; 4], kind: Kind) -> Tensor {
    channels_last(&randn(&shape).to_kind(kind))
}

fn named([b, c, h, w]: [i64; 4], kind: Kind, pass: &str) -> String {
    let kind = if kind == Kind::Float { "f32" } else { "bf16" };
    format!("{b}x{c}x{h}x{w}/{kind}/{pass}")
}

/// The same numbers as an input without a gradient yet, so that no pass adds to that of the one before.
fn leaf(tensor: &Tensor) -> Tensor {
    tensor.detach().set_requires_grad(true)
}

fn backward(result: &Tensor) {
    result.permute([0, 2, 3, 1]).get(0).sum(result.kind()).backward();
}

fn norm(c: &mut Criterion) {
    let mut group = group(c, "norm");
    for (shape, kind) in IMAGES {
        let [batch, channels, ..] = shape;
        let inputs = [images(shape, kind), randn(&[channels]), randn(&[channels]), randn(&[batch, channels])];
        let forward = |[x, weight, bias, add]: &[Tensor; 4]| {
            let groups = (channels / 4).min(32);
            Norm { weight, bias, groups, eps: 1e-6, add: Some(add), modulate: None, silu: true }.forward(x)
        };
        both(&mut group, &named(shape, kind, "forward"), || drop(forward(&inputs)));
        both(&mut group, &named(shape, kind, "both"), || {
            backward(&forward(&inputs.each_ref().map(leaf)));
        });
    }
    group.finish();
}

fn sum(c: &mut Criterion) {
    let mut group = group(c, "sum");
    for (shape, kind) in IMAGES {
        let [a, b] = [(); 2].map(|()| images(shape, kind));
        both(&mut group, &named(shape, kind, "forward"), || drop(scaled_sum(&a, &b, 0.5f64.sqrt())));
    }
    group.finish();
}

fn conv(c: &mut Criterion) {
    let mut group = group(c, "conv");
    for (batch, channels, side) in CONVS {
        let (shape, kind) = ([batch, channels, side, side], Kind::BFloat16);
        let inputs = [images(shape, kind), randn(&[channels, channels, 3, 3]) * 0.02, randn(&[channels])];
        let forward = |[x, weight, bias]: &[Tensor; 3]| {
            let _bf16 = Autocast::enter(Device::Cpu, Some(kind));
            let tiled = tile_conv(x, (weight, bias), (1, 1));
            tiled.unwrap_or_else(|| x.conv2d(weight, Some(bias), 1, 1, 1, 1))
        };
        both(&mut group, &named(shape, kind, "both"), || {
            backward(&forward(&inputs.each_ref().map(leaf)));
        });
    }
    group.finish();
}

criterion_group!(benches, norm, sum, conv);
criterion_main!(benches);
