//! How long does a run stand still for a checkpoint, and how long does it take to go on from one?
//!
//! A checkpoint holds weights, one average, the target's weights and RAdam's two moments. Rates are of its bytes.
//!
//! - `save`: written, synced to the disk, read back for its checksums and renamed into place.
//! - `open`: every checksum compared, as before anything is loaded.
//! - `resume`: the newest whole one is looked for, opened, and loaded.
//!
//! The folder is where temporary files lie (`TMPDIR`): on a disk `save` is mostly its syncing. What was just written is
//! still in the system's memory, so that no row waits for a disk to read.

#![allow(missing_docs)] // criterion's macro makes a public function

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use cm_model::{Compute, Cond};
use cm_net::{NetSpec, SongUnetSpec};
use cm_schedule::{Reading, SigmaRange, TargetEma};
use cm_train::{Batch, Checkpoint, Checkpoints, Levels, Networks, TargetRule, Trainer, Weights, resume};
use criterion::{BatchSize, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

mod common;

use common::{Model, model, train_spec};

fn spec(model_channels: i64) -> NetSpec {
    NetSpec::SongUnet(SongUnetSpec {
        image_size: 8,
        image_channels: 1,
        augment_dim: 0,
        model_channels,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![],
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    })
}

/// A run after one step, so that no moment is 0.
fn trainer(spec: &NetSpec) -> Trainer<Model> {
    let rule = TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper };
    let network = || model(spec, Compute::default());
    let networks = Networks { student: network(), target: Some(network()), teacher: None, perceptual: None };
    let levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };
    let settings = train_spec(4, TargetRule::Ema { rule });
    let mut trainer = Trainer::new(networks, &settings, levels).expect("the settings are valid");
    let images = Tensor::rand(spec.image_shape().batch(4), (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    trainer.step(&Batch { images, cond: Cond::none() }).expect("a step on noise is finite");
    trainer
}

fn metadata(_: Weights<'_>, _: u64) -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn bytes(checkpoint: &Path) -> u64 {
    let state = Checkpoint::open(checkpoint).expect("what was just written").state;
    state.files.values().map(|file| file.bytes).sum()
}

fn checkpoint(c: &mut Criterion) {
    let mut group = c.benchmark_group("checkpoint");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(3));
    for (name, channels) in [("digits_32", 32), ("digits_64", 64)] {
        let mut trainer = trainer(&spec(channels));
        let run = tempfile::tempdir().expect("a folder");
        let path = trainer.save(&Checkpoints::of_run(run.path()), &metadata).expect("room for it");
        group.throughput(Throughput::Bytes(bytes(&path)));
        group.bench_function(format!("{name}/save"), |b| {
            // A new run each time: a step that has a checkpoint keeps it. Its removal is not measured.
            let save = |run: tempfile::TempDir| {
                trainer.save(&Checkpoints::of_run(run.path()), &metadata).expect("room for it");
                run
            };
            b.iter_batched(|| tempfile::tempdir().expect("a folder"), save, BatchSize::PerIteration);
        });
        group.bench_function(format!("{name}/open"), |b| {
            b.iter(|| Checkpoint::open(&path).expect("a whole checkpoint"));
        });
        group.bench_function(format!("{name}/resume"), |b| {
            b.iter(|| resume(&mut trainer, run.path()).expect("a whole checkpoint"));
        });
    }
    group.finish();
}

criterion_group!(benches, checkpoint);
criterion_main!(benches);
