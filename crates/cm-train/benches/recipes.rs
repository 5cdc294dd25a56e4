//! What does a step of each recipe cost beside one of another, on the network of 32 channels for 8×8 digits in bfloat16
//! with 128 images? A step of EDM's loss is one network pass with its gradient, consistency training one more pass,
//! and distillation with Heun's method two more of the teacher.
//!
//! `ct_step` says what dtype and memory order do to one of them; whole networks of published size are
//! `cargo xtask race`'s.

// The macro below makes a public function without a comment.
#![allow(missing_docs)]

use std::time::Duration;

use cm_model::{Compute, Cond, Denoiser, Preconditioned};
use cm_net::{NetSpec, SongUnetSpec, build};
use cm_schedule::{Ect, EctAdjust, Edm, IndexDist, LogNormal, NoiseCond, NumScales, SigmaRange, Weighting};
use cm_train::{
    Batch, Levels, Metric, Networks, PairRule, TargetRule, TeacherRule, TeacherSolver, TrainSpec, Trainable,
    Trainer,
};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};

mod common;

use common::{model, train_spec};

const IMAGES: usize = 128;

/// A step that is there to be taken.
type Step = Box<dyn FnMut()>;

fn network() -> NetSpec {
    NetSpec::SongUnet(SongUnetSpec {
        image_size: 8,
        image_channels: 1,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![],
        dropout: 0.0,
        ..SongUnetSpec::ddpmpp_cifar10(0)
    })
}

fn compute() -> Compute {
    Compute { autocast: Some(Kind::BFloat16), channels_last: true, ..Compute::default() }
}

fn denoiser() -> Preconditioned<Box<dyn cm_model::Backbone + Send>, Edm> {
    let net = build(&network(), 1, Device::Cpu).expect("the bench's network is valid");
    net.params().to_channels_last();
    let precond = Edm::new(0.5, NoiseCond::QuarterLog).expect("EDM's numbers are valid");
    Preconditioned { net, precond, sigma_range: SigmaRange::EDM, compute: compute() }
}

/// A step on noise; the step reads its losses, so its work is inside the time.
fn step<M: Trainable>(networks: Networks<M>, spec: &TrainSpec) -> impl FnMut() + use<M> {
    let levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };
    let mut trainer = Trainer::new(networks, spec, levels).expect("the bench's settings are valid");
    let shape = network().image_shape().batch(IMAGES as i64);
    let images = Tensor::rand(shape, (Kind::Float, Device::Cpu)) * 2.0 - 1.0;
    let batch = Batch { images, cond: Cond::none() };
    move || {
        trainer.step(&batch).expect("a step on noise is finite");
    }
}

fn consistency(spec: &TrainSpec) -> impl FnMut() + use<> {
    let teacher = spec.teacher.is_some().then(|| Box::new(denoiser()) as Box<dyn Denoiser>);
    let student = model(&network(), compute());
    step(Networks { student, target: None, teacher, perceptual: None }, spec)
}

fn recipes(criterion: &mut Criterion) {
    let live = train_spec(IMAGES, TargetRule::Live {});
    let heun = TrainSpec { teacher: Some(TeacherRule { solver: TeacherSolver::Heun }), ..live.clone() };
    let huber = TrainSpec {
        metric: Metric::PseudoHuber { c: None },
        weighting: Weighting::InverseStep,
        ..live.clone()
    };
    let ict = TrainSpec {
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Fixed { num_scales: 18 },
            index: IndexDist::LogNormal { mean: -1.1, std: 2.0 },
        },
        ..huber.clone()
    };
    let map = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } };
    let pairs = PairRule::Continuous { sigma: LogNormal { mean: -1.1, std: 2.0 }, map };
    let ect = TrainSpec { pairs, ..huber };
    let edm = TrainSpec {
        pairs: PairRule::Denoise { sigma: LogNormal { mean: -1.2, std: 1.2 } },
        target: TargetRule::Image {},
        weighting: Weighting::Karras,
        ..live.clone()
    };
    let networks = Networks { student: denoiser(), target: None, teacher: None, perceptual: None };
    let mut steps: [(&str, Step); 5] = [
        ("edm", Box::new(step(networks, &edm))),
        ("ct", Box::new(consistency(&live))),
        ("cd_heun", Box::new(consistency(&heun))),
        ("ict", Box::new(consistency(&ict))),
        ("ect", Box::new(consistency(&ect))),
    ];
    let mut group = criterion.benchmark_group("recipes");
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    group.throughput(Throughput::Elements(IMAGES as u64));
    for (name, step) in &mut steps {
        group.bench_function(*name, |bencher| bencher.iter(&mut *step));
    }
    group.finish();
}

criterion_group!(benches, recipes);
criterion_main!(benches);
