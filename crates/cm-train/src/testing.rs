//! What the tests share: a two-layer network and a small run.

use std::sync::{Mutex, PoisonError};

use cm_model::{Backbone, Cond, ImageShape, Init, Mode, Params, ParamsBuilder, Preconditioned, Sigma};
use cm_schedule::{
    Boundary, EmaRule, IndexDist, LrRule, NoiseCond, NumScales, Reading, SigmaRange, TargetEma, Weighting,
};
use cm_torch::optim::OptimKind;
use cm_torch::rng;
use tch::{Device, Kind, Tensor};

use crate::recipe::Levels;
use crate::{Batch, Metric, Networks, PairRule, TargetRule, TrainSpec, Trainable, Trainer};

pub(crate) const SHAPE: ImageShape = ImageShape { channels: 1, height: 4, width: 4 };
pub(crate) const LEVELS: Levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };

/// Two layers on (pixels, c_noise), with dropout between them.
#[derive(Debug)]
pub(crate) struct Mlp {
    params: Params,
    layers: [(Tensor, Tensor); 2],
    dropout: f64,
}

/// The network as a consistency function. Dropout draws from a generator that all threads of a process share, and
/// tests run in parallel: seeding and drawing are one step here.
#[derive(Debug)]
pub(crate) struct Model(Preconditioned<Mlp, Boundary>);

static GENERATOR: Mutex<()> = Mutex::new(());

impl Trainable for Model {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        self.0.params()
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> cm_model::Result<Tensor> {
        let _alone = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        Trainable::evaluate(&self.0, x, sigma, cond, mode)
    }
}

impl Mlp {
    fn new(seed: u64, dropout: f64) -> Self {
        const HIDDEN: i64 = 32;
        let builder = ParamsBuilder::new(seed, Device::Cpu);
        let root = builder.root();
        let layer = |name: &str, inputs, outputs| {
            let place = root.sub(name);
            let weight = place.param("weight", &[outputs, inputs], Init::KaimingNormal { scale: 1.0 });
            (weight.unwrap(), place.param("bias", &[outputs], Init::Zeros).unwrap())
        };
        let layers = [layer("in", SHAPE.numel() + 1, HIDDEN), layer("out", HIDDEN, SHAPE.numel())];
        let _ = root.buffer("scale", &Tensor::from_slice(&[0.25f32])).unwrap();
        Self { params: builder.finish(), layers, dropout }
    }
}

impl Backbone for Mlp {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, _cond: &Cond, train: bool) -> cm_model::Result<Tensor> {
        let batch = SHAPE.check("MLP input", x)?;
        let scale = self.params.get("scale").unwrap();
        let input = Tensor::cat(&[x.view([batch, -1]), (c_noise * scale).view([batch, 1])], 1);
        let [(w0, b0), (w1, b1)] = &self.layers;
        let hidden = rng::dropout(&input.linear(w0, Some(b0)).silu(), self.dropout, train);
        Ok(hidden.linear(w1, Some(b1)).view(SHAPE.batch(batch)))
    }
}

pub(crate) fn mlp(seed: u64, dropout: f64) -> Model {
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    Model(Preconditioned::new(Mlp::new(seed, dropout), precond, SigmaRange::EDM))
}

/// Algorithm 3 on a batch of 12 for 20 steps.
pub(crate) fn spec() -> TrainSpec {
    TrainSpec {
        seed: 7,
        total_steps: 20,
        batch: 12,
        micro_batch: None,
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Progressive { s0: 2, s1: 20 },
            index: IndexDist::Uniform {},
        },
        target: TargetRule::Ema { rule: TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper } },
        teacher: None,
        metric: Metric::L2,
        weighting: Weighting::Uniform,
        optimizer: OptimKind::radam(),
        lr: 0.01,
        lr_rule: LrRule::Constant {},
        emas: vec![
            EmaRule::Beta { beta: 0.9 },
            EmaRule::HalfLife { halflife_images: 100.0, rampup_ratio: Some(0.05) },
        ],
        grad_clip: None,
        replace_non_finite: None,
        shard_state: false,
    }
}

/// A trainer on the network of seed 0.
pub(crate) fn trainer(spec: &TrainSpec, dropout: f64) -> Trainer<Model> {
    let target = spec.target.has_network().then(|| mlp(1, dropout));
    Trainer::new(Networks { target, ..Networks::of(mlp(0, dropout)) }, spec, LEVELS).unwrap()
}

/// A batch that is a function of the step.
pub(crate) fn batch(step: u64, size: i64) -> Batch {
    let count = size * SHAPE.numel();
    let phase = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.37 + step as f64;
    let images = phase.sin().to_kind(Kind::Float).view(SHAPE.batch(size));
    Batch { images, cond: Cond::none() }
}
