//! Does the loader keep a training step fed?
//!
//! A step on CIFAR-10 at batch 512 takes seconds on a CPU and a few hundred milliseconds on a GPU. The questions:
//!
//! - `resident`: what does a batch cost whose pixels lie in memory, with and without mirroring? It should be far
//!   below 1 % of a GPU's step, so that prefetching is needed for decoded files alone.
//! - `tensor`: what does turning its bytes into float32 add?
//! - `png_folder`, `png_zip`: how many PNGs of 32×32 and 64×64 does this machine decode per second? Below the img/s
//!   of the training step, npz or the binary form of the set is the better source.
//! - `epoch_order`: what does the first batch of an epoch cost, which has to permute the set? It must not show.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use cm_data::grid::encode_png;
use cm_data::order::Order;
use cm_data::{Loader, LoaderSpec, MemorySet, Shape, SourceKind, SourceSpec};
use criterion::{BenchmarkId, Criterion, Throughput};
use tch::Device;
use zip::write::SimpleFileOptions;

const BATCH: usize = 512;

/// Noise with some structure, so that PNGs compress about as photographs do.
fn pixels(count: usize, shape: Shape) -> Vec<u8> {
    let mut state = 1_u32;
    (0..count * shape.values())
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((i % shape.width * 4) as u32 + (state >> 27)) as u8
        })
        .collect()
}

fn resident(c: &mut Criterion) {
    let shape = Shape::square(3, 32);
    let set = Arc::new(MemorySet::new("bench", shape, pixels(50_000, shape), None).unwrap());
    let mut group = c.benchmark_group("loader");
    group.throughput(Throughput::Elements(BATCH as u64));
    for flip in [false, true] {
        let loader = Loader::new(set.clone(), LoaderSpec::new(BATCH, 0, flip)).unwrap();
        let mut step = 0;
        group.bench_function(
            BenchmarkId::new("resident_512x3x32x32", if flip { "flip" } else { "plain" }),
            |b| {
                b.iter(|| {
                    // Within one epoch, whose order is made before the measurement.
                    step = (step + 1) % 97;
                    black_box(loader.batch_at(step).unwrap())
                });
            },
        );
    }
    let batch = Loader::new(set, LoaderSpec::new(BATCH, 0, false)).unwrap().batch_at(0).unwrap();
    group.bench_function("tensor_512x3x32x32/cpu", |b| {
        b.iter(|| black_box(batch.to_images(Device::Cpu).unwrap()))
    });
    group.finish();
}

fn decoded(c: &mut Criterion) {
    let mut group = c.benchmark_group("loader");
    group.sample_size(20);
    group.throughput(Throughput::Elements(BATCH as u64));
    for side in [32, 64] {
        let shape = Shape::square(3, side);
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("set.zip");
        let folder = dir.path().join("set");
        write_pngs(&folder, &archive, &pixels(2048, shape), shape);
        for (name, kind, path) in
            [("png_folder", SourceKind::Folder, &folder), ("png_zip", SourceKind::Zip, &archive)]
        {
            let set = SourceSpec::new(kind, Some(path.clone())).open().unwrap();
            let loader = Loader::new(set, LoaderSpec::new(BATCH, 0, true)).unwrap();
            let mut step = 0;
            group.bench_function(BenchmarkId::new(name, format!("512x3x{side}x{side}")), |b| {
                b.iter(|| {
                    step += 1;
                    black_box(loader.batch_at(step).unwrap())
                });
            });
        }
    }
    group.finish();
}

fn write_pngs(folder: &Path, archive: &Path, pixels: &[u8], shape: Shape) {
    std::fs::create_dir(folder).unwrap();
    let mut zip = zip::ZipWriter::new(std::fs::File::create(archive).unwrap());
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (i, chw) in pixels.chunks_exact(shape.values()).enumerate() {
        let bytes = encode_png(chw, shape).unwrap();
        std::fs::write(folder.join(format!("{i:06}.png")), &bytes).unwrap();
        zip.start_file(format!("{i:06}.png"), options).unwrap();
        std::io::Write::write_all(&mut zip, &bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn epoch_order(c: &mut Criterion) {
    let mut group = c.benchmark_group("loader");
    group.sample_size(20);
    for (name, count) in [("cifar10_50000", 50_000_u64), ("imagenet_1281167", 1_281_167)] {
        let order = Order::new(count as usize, 0, false).unwrap();
        let mut epoch = 0;
        group.bench_function(BenchmarkId::new("epoch_order", name), |b| {
            b.iter(|| {
                epoch += 1;
                black_box(order.draws(epoch * count..epoch * count + 1))
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    resident(&mut criterion);
    decoded(&mut criterion);
    epoch_order(&mut criterion);
    criterion.final_summary();
}
