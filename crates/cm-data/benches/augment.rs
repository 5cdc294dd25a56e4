//! Is augmentation a small part of a training step?
//!
//! The batch is 64 images of 3×32×32, as CIFAR-10's are. A step of consistency training with NCSN++ in bfloat16 takes 1.1 s
//! for 8 of them on two CPU cores with AMX (docs/performance.md).
//!
//! - `edm_cifar10`: the released setting, where about 40 % of the images are resampled. Below 1 % of a step, nothing
//!   is to be gained by running it ahead on the loader's thread.
//! - `every_image`: p = 1, the most that it can cost.

use std::hint::black_box;

use cm_data::augment::{Augment, AugmentSpec, Draws};
use criterion::{Criterion, Throughput};
use tch::{Device, Kind, Tensor};

const BATCH: u64 = 64;

fn augment(c: &mut Criterion) {
    let images = Tensor::rand([BATCH as i64, 3, 32, 32], (Kind::Float, Device::Cpu)) * 2 - 1;
    let released = AugmentSpec::edm_cifar10();
    let mut group = c.benchmark_group("augment_64x3x32x32/cpu");
    group.throughput(Throughput::Elements(BATCH));
    for (name, spec) in [("edm_cifar10", released), ("every_image", AugmentSpec { p: 1.0, ..released })] {
        let augment = Augment::new(spec).unwrap();
        let mut step = 0;
        group.bench_function(name, |b| {
            b.iter(|| {
                step += 1;
                let draws: Vec<Draws> = (0..BATCH).map(|sample| Draws::at(0, step, sample)).collect();
                black_box(augment.apply(&images, &draws).unwrap())
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    augment(&mut criterion);
    criterion.final_summary();
}
