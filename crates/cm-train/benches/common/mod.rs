//! What the benches of training steps share.

use cm_model::{Backbone, Compute, Preconditioned};
use cm_net::{NetSpec, build};
use cm_schedule::{Boundary, EmaRule, IndexDist, LrRule, NoiseCond, NumScales, SigmaRange, Weighting};
use cm_torch::optim::OptimKind;
use cm_train::{Metric, PairRule, TargetRule, TrainSpec};
use tch::Device;

/// A consistency function that is trained.
pub type Model = Preconditioned<Box<dyn Backbone + Send>, Boundary>;

/// A network with fresh weights, as a consistency function.
pub fn model(spec: &NetSpec, compute: Compute) -> Model {
    let net = build(spec, 0, Device::Cpu).expect("the bench's network is valid");
    if compute.channels_last {
        net.params().to_channels_last();
    }
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).expect("EDM's numbers are valid");
    Preconditioned { net, precond, sigma_range: SigmaRange::EDM, compute }
}

/// Algorithm 3 with a grid of 18 levels, RAdam and one average.
pub fn train_spec(batch: usize, target: TargetRule) -> TrainSpec {
    TrainSpec {
        seed: 0,
        total_steps: 1_000_000,
        batch,
        micro_batch: None,
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Fixed { num_scales: 18 },
            index: IndexDist::Uniform {},
        },
        target,
        teacher: None,
        metric: Metric::L2,
        weighting: Weighting::Uniform,
        optimizer: OptimKind::radam(),
        lr: 1e-4,
        lr_rule: LrRule::Constant {},
        emas: vec![EmaRule::Beta { beta: 0.9999 }],
        grad_clip: None,
        replace_non_finite: None,
        shard_state: false,
    }
}
