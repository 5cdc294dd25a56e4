use cm_model::{Cond, ImageShape, Init, Mode, Params, ParamsBuilder, Sigma};
use cm_schedule::{EmaRule, IndexDist, KarrasGrid, LrRule, NumScales, SigmaRange, TargetEma, Weighting};
use cm_torch::optim::OptimKind;
use tch::{Device, Kind, Tensor};

use crate::testing::{LEVELS, Model, SHAPE, batch, mlp, spec, trainer};
use crate::{
    Batch, Distance, Example, Losses, Metric, Networks, PairRule, Pairs, Target, TargetRule, TrainSpec,
    Trainable, Trainer, consistency_loss,
};

/// The consistency function of data N(0, s²) with s as its only parameter: f(x, σ) = x √((s² + ε²)/(s² + σ²)).
struct Gaussian {
    params: Params,
}

const ONE_PIXEL: ImageShape = ImageShape { channels: 1, height: 1, width: 1 };

impl Gaussian {
    fn new(std: f64) -> Self {
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let _ = builder.root().param("std", &[1], Init::Zeros).unwrap();
        let model = Self { params: builder.finish() };
        model.set(std);
        model
    }

    fn std(&self) -> Tensor {
        self.params.get("std").unwrap().shallow_clone()
    }

    fn set(&self, std: f64) {
        let _no_grad = tch::no_grad_guard();
        let _ = self.std().fill_(std);
    }
}

impl Trainable for Gaussian {
    fn shape(&self) -> ImageShape {
        ONE_PIXEL
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, _: &Cond, _: Mode) -> cm_model::Result<Tensor> {
        let squares = sigma.broadcast(x.device(), |sigma| sigma * sigma);
        let var = self.std().square();
        let end = LEVELS.range.min().powi(2);
        Ok(x * ((&var + end) / (var + squares)).sqrt())
    }
}

fn images(values: &[f32]) -> Tensor {
    Tensor::from_slice(values).view([-1, 1, 1, 1])
}

/// The loss on (image, noise) pairs whose empirical moments are those of N(0, s²) and N(0, 1), independent of each
/// other: for a linear f and the squared distance this is the expectation itself.
fn expected_loss(model: &Gaussian, data_std: f64, pairs: &Pairs) -> Losses {
    let s = data_std as f32;
    let times = pairs.sigma.len();
    let repeated = |values: [f32; 4]| images(&values.repeat(times));
    let four = |values: &[f64]| values.iter().flat_map(|&v| [v; 4]).collect::<Vec<_>>();
    let pairs = Pairs { sigma: four(&pairs.sigma), next: four(&pairs.next), weight: four(&pairs.weight) };
    let example = Example {
        images: &repeated([s, s, -s, -s]),
        noise: &repeated([1.0, -1.0, 1.0, -1.0]),
        pairs: &pairs,
        cond: &Cond::none(),
    };
    consistency_loss(model, Target::Live, &example, &Distance::L2, Mode::Eval).unwrap()
}

fn grid_pairs(num_scales: usize) -> Pairs {
    let sigmas = KarrasGrid::EDM.ascending(num_scales);
    Pairs::new(sigmas.windows(2).map(|w| (w[1], w[0])), Weighting::Uniform, 0.5)
}

/// The s at which the gradient of the expected CT loss vanishes, by bisection.
fn fixed_point(num_scales: usize) -> f64 {
    let model = Gaussian::new(1.0);
    let pairs = grid_pairs(num_scales);
    let slope = |std: f64| {
        model.set(std);
        expected_loss(&model, 0.5, &pairs).per_sample.mean(Kind::Float).backward();
        let mut grad = model.std().grad();
        let slope = grad.double_value(&[0]);
        let _ = grad.zero_();
        slope
    };
    let (mut low, mut high) = (0.1, 1.0);
    assert!(slope(low) < 0.0 && slope(high) > 0.0);
    while high - low > 1e-4 {
        let middle = (low + high) / 2.0;
        *(if slope(middle) < 0.0 { &mut low } else { &mut high }) = middle;
    }
    (low + high) / 2.0
}

/// With s' for f at σ and s for the stopped target, 0 = Σ ∂g_s/∂s(t)·(g_s(t)(v + t²) − g_s(r)(v + tr)) over the pairs,
/// where g_s(σ) = √((s² + ε²)/(s² + σ²)) and v = 0.25; solved apart from this code.
#[test]
fn consistency_training_has_the_fixed_point_of_its_grid() {
    for (num_scales, want) in [(11, 0.3747), (18, 0.4237), (40, 0.4662), (151, 0.4912)] {
        let got = fixed_point(num_scales);
        assert!((got - want).abs() < 5e-4, "N = {num_scales}: {got} {want}");
    }
}

#[test]
fn training_reaches_the_fixed_point() {
    let spec = TrainSpec {
        total_steps: 400,
        batch: 1024,
        micro_batch: None,
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Fixed { num_scales: 18 },
            index: IndexDist::Uniform {},
        },
        target: TargetRule::Live {},
        optimizer: OptimKind::adam(),
        lr: 0.01,
        lr_rule: LrRule::Constant {},
        emas: vec![EmaRule::Beta { beta: 0.99 }],
        ..spec()
    };
    let mut trainer = Trainer::new(Networks::of(Gaussian::new(0.9)), &spec, LEVELS).unwrap();
    // ± 0.5 has the second moment of N(0, 0.25), and the loss sees no other.
    let signs: Vec<f32> = (0..1024).map(|i| if i % 2 == 0 { 0.5 } else { -0.5 }).collect();
    let batch = Batch { images: images(&signs), cond: Cond::none() };
    while !trainer.is_finished() {
        trainer.step(&batch).unwrap();
    }
    let average = trainer.with_ema("0.99", |model| model.std().double_value(&[0])).unwrap();
    assert!((average - 0.424).abs() < 0.02, "{average}");
}

#[test]
fn the_loss_of_an_exact_function_vanishes_as_the_levels_meet() {
    let exact = Gaussian::new(0.5);
    let loss = |step: f64| {
        let pairs =
            Pairs::new([0.01, 0.3, 1.0, 30.0].map(|t| (t, t * (1.0 - step))), Weighting::Uniform, 0.5);
        expected_loss(&exact, 0.5, &pairs).per_sample.mean(Kind::Float).double_value(&[])
    };
    let losses = [0.08, 0.04, 0.02, 0.01].map(loss);
    for pair in losses.windows(2) {
        assert!((pair[0] / pair[1] - 4.0).abs() < 0.4, "{losses:?}");
    }
    assert!(losses[3] < 1e-4);
}

/// Data at one point: the flow is straight, both ends of every pair lie on it, and the exact f has no loss at all.
#[test]
fn the_loss_of_an_exact_function_is_zero_on_straight_flows() {
    let exact = Gaussian::new(0.0);
    let losses = expected_loss(&exact, 0.0, &grid_pairs(40)).per_sample;
    assert!(losses.max().double_value(&[]) < 1e-12, "{losses}");
    let wrong = expected_loss(&Gaussian::new(0.1), 0.0, &grid_pairs(40)).per_sample;
    assert!(wrong.max().double_value(&[]) > 1e-4);
}

#[test]
fn at_sigma_zero_the_target_is_the_image() {
    let model = mlp(0, 0.0);
    let Batch { images, cond } = batch(0, 4);
    let noise = batch(9, 4).images;
    let losses = |next: Vec<f64>| {
        let sigma = vec![1.0; 4];
        let pairs = Pairs { sigma, next, weight: vec![2.0; 4] };
        let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
        consistency_loss(&model, Target::Live, &example, &Distance::L1, Mode::Eval).unwrap()
    };
    let all = losses(vec![0.0; 4]);
    assert!(all.target.equal(&images));
    let some = losses(vec![0.0, 0.5, 0.0, 0.5]);
    let at_image = [0, 2].map(|i| some.target.get(i).equal(&images.get(i)));
    let elsewhere = [1, 3].map(|i| some.target.get(i).equal(&images.get(i)));
    assert_eq!((at_image, elsewhere), ([true; 2], [false; 2]));
    assert!(some.per_sample.get(0).equal(&all.per_sample.get(0)));
    assert!((&all.distance * 2.0).equal(&all.per_sample.detach()));
}

fn mlp_loss(student: &Model, target: Target<'_>, pairs: &Pairs, mode: Mode) -> Losses {
    let Batch { images, cond } = batch(0, pairs.sigma.len() as i64);
    let noise = batch(5, pairs.sigma.len() as i64).images;
    let example = Example { images: &images, noise: &noise, pairs, cond: &cond };
    consistency_loss(student, target, &example, &Distance::L2, mode).unwrap()
}

fn gradients(model: &Model) -> Vec<Tensor> {
    model.params().trainable().map(|(_, weight)| weight.grad()).collect()
}

#[test]
fn no_gradient_flows_through_the_target() {
    let pairs = Pairs::new([(1.0, 0.5), (3.0, 2.0)], Weighting::Uniform, 0.5);
    let live = mlp(0, 0.0);
    mlp_loss(&live, Target::Live, &pairs, Mode::Eval).per_sample.mean(Kind::Float).backward();
    let (student, twin) = (mlp(0, 0.0), mlp(0, 0.0));
    mlp_loss(&student, Target::Network(&twin), &pairs, Mode::Eval).per_sample.mean(Kind::Float).backward();
    assert!(gradients(&twin).iter().all(|grad| !grad.defined()));
    assert!(std::iter::zip(gradients(&live), gradients(&student)).all(|(a, b)| a.equal(&b)));
    // With the gradient through both ends the result is another one.
    let full = mlp(0, 0.0);
    let ends = [&pairs.sigma, &pairs.next].map(|levels| {
        let level = Tensor::from_slice(levels).to_kind(Kind::Float).view([-1, 1, 1, 1]);
        let x = batch(0, 2).images + batch(5, 2).images * level;
        full.evaluate(&x, Sigma::Each(levels), &Cond::none(), Mode::Eval).unwrap()
    });
    Distance::L2.between(&ends[0], &ends[1]).mean(Kind::Float).backward();
    assert!(
        std::iter::zip(gradients(&live), gradients(&full)).any(|(a, b)| !a.allclose(&b, 1e-3, 1e-6, false))
    );
}

#[test]
fn student_and_target_share_their_dropout() {
    let (student, twin) = (mlp(0, 0.5), mlp(0, 0.5));
    // In float32 both ends are one point: what differs is the mask alone.
    let pairs = Pairs::new([(1.0, 1.0 - 1e-12); 8], Weighting::Uniform, 0.5);
    for dropout_seed in 0..5 {
        let mode = Mode::Train { dropout_seed };
        for target in [Target::Live, Target::Network(&twin)] {
            let losses = mlp_loss(&student, target, &pairs, mode);
            assert_eq!(losses.per_sample.abs().max().double_value(&[]), 0.0);
        }
    }
    let [a, b] = [0, 1]
        .map(|dropout_seed| mlp_loss(&student, Target::Live, &pairs, Mode::Train { dropout_seed }).student);
    assert!(!a.equal(&b), "the masks of two seeds differ");
}

#[test]
fn a_target_without_memory_is_the_live_network() {
    let weights = |target| {
        let mut trainer = trainer(&TrainSpec { target, metric: Metric::L1, ..spec() }, 0.3);
        for step in 0..10 {
            trainer.step(&batch(step, 12)).unwrap();
        }
        trainer.student().params().snapshot()
    };
    let live = weights(TargetRule::Live {});
    let memoryless = weights(TargetRule::Ema { rule: TargetEma::Fixed { mu: 0.0 } });
    assert!(live.iter().all(|(name, tensor)| tensor.equal(&memoryless[name])));
    let slow = weights(TargetRule::Ema { rule: TargetEma::Fixed { mu: 0.5 } });
    assert!(live.iter().any(|(name, tensor)| !tensor.equal(&slow[name])));
}

#[test]
fn examples_that_do_not_fit_are_refused() {
    let model = mlp(0, 0.0);
    let Batch { images, cond } = batch(0, 2);
    let error = |noise: &Tensor, sigma: f64, next: f64, count: usize| {
        let pairs = Pairs { sigma: vec![sigma; count], next: vec![next; count], weight: vec![1.0; count] };
        let example = Example { images: &images, noise, pairs: &pairs, cond: &cond };
        consistency_loss(&model, Target::Live, &example, &Distance::L2, Mode::Eval).unwrap_err().to_string()
    };
    assert!(error(&images, 1.0, 0.5, 3).contains("2 of each"));
    assert!(error(&images, 1.0, 1.0, 2).contains("next = 1, sigma = 1"));
    assert!(error(&images, 1.0, f64::NAN, 2).contains("next = NaN"));
    assert!(error(&images.narrow(0, 0, 1), 1.0, 0.5, 2).contains("2 of each"));
    assert!(error(&images.narrow(2, 0, 2), 1.0, 0.5, 2).contains("training noise"));
    assert_eq!(SHAPE.numel(), 16);
    assert_eq!(LEVELS.range, SigmaRange::EDM);
}
