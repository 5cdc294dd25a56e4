use std::rc::Rc;

use cm_model::{
    Cond, GaussianOracle, ImageDistance, ImageShape, Init, LpipsSpec, Mode, Params, ParamsBuilder, Sigma,
    TensorMap,
};
use cm_schedule::{EmaRule, LrRule, NumScales};
use cm_torch::optim::OptimKind;
use tch::{Device, Kind, Tensor};

use crate::testing::{LEVELS, Model, SHAPE, batch, mlp, spec, trainer};
use crate::{
    Batch, Error, Metric, Networks, PairRule, TargetRule, TeacherRule, TeacherSolver, TrainSpec, Trainable,
    Trainer,
};

/// Every tensor of a trainer's state.
fn state(trainer: &Trainer<Model>) -> TensorMap {
    let mut state = trainer.student().params().snapshot();
    for name in trainer.ema_names() {
        let average = trainer.with_ema(name, |model| model.params().snapshot()).unwrap();
        state.extend(average.into_iter().map(|(key, tensor)| (format!("{name}.{key}"), tensor)));
    }
    let target = trainer.target().iter().flat_map(|t| t.params().snapshot()).collect::<Vec<_>>();
    state.extend(target.into_iter().map(|(key, tensor)| (format!("target.{key}"), tensor)));
    let moments = trainer.optimizer.export();
    state.extend(moments.into_iter().map(|(key, tensor)| (format!("optimizer.{key}"), tensor.copy())));
    state
}

fn equal(a: &TensorMap, b: &TensorMap) -> bool {
    a.len() == b.len() && a.iter().all(|(name, tensor)| tensor.equal(&b[name]))
}

/// The largest difference of two states, relative to the largest value of each tensor.
fn difference(a: &TensorMap, b: &TensorMap) -> f64 {
    let one = |(name, tensor): (&String, &Tensor)| {
        let (x, y) = (tensor.to_kind(Kind::Double), b[name].to_kind(Kind::Double));
        (&x - y).abs().max().double_value(&[]) / x.abs().max().double_value(&[]).max(1e-6)
    };
    a.iter().map(one).fold(0.0, f64::max)
}

#[test]
fn micro_batches_make_the_step_of_the_whole_batch() {
    let run = |micro_batch| {
        // Adam divides by the gradient's size, which magnifies roundings where it is near 0; its ε does not here.
        let optimizer = OptimKind::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-2, weight_decay: 0.0 };
        let mut trainer = trainer(&TrainSpec { micro_batch, optimizer, ..spec() }, 0.0);
        let reports: Vec<_> = (0..3).map(|step| trainer.step(&batch(step, 12)).unwrap()).collect();
        (state(&trainer), reports)
    };
    let (whole, reports) = run(None);
    for micro_batch in [1, 5, 12, 100] {
        let (parts, part_reports) = run(Some(micro_batch));
        assert!(difference(&whole, &parts) < 1e-4, "{micro_batch}: {}", difference(&whole, &parts));
        for (a, b) in std::iter::zip(&reports, &part_reports) {
            assert!((a.loss / b.loss - 1.0).abs() < 1e-4 && (a.grad_norm / b.grad_norm - 1.0).abs() < 1e-4);
            assert!(std::iter::zip(&a.samples, &b.samples).all(|(a, b)| a.sigma == b.sigma));
        }
    }
}

/// Stands for a network that measures; it is l1.
#[derive(Debug)]
struct Means;

impl ImageDistance for Means {
    fn between(&self, a: &Tensor, b: &Tensor) -> Tensor {
        (a - b).abs().mean_dim([1, 2, 3].as_slice(), false, Kind::Float)
    }
}

#[test]
fn a_trainer_measures_with_the_perceptual_distance_that_it_is_handed() {
    let lpips = TrainSpec { metric: Metric::of_lpips(LpipsSpec::CONSISTENCY_MODELS), ..spec() };
    let with = |perceptual: Option<Rc<dyn ImageDistance>>| {
        let networks = Networks { target: Some(mlp(1, 0.0)), perceptual, ..Networks::of(mlp(0, 0.0)) };
        Trainer::new(networks, &lpips, LEVELS)
    };
    assert!(matches!(with(None), Err(Error::MissingWeights { .. })));
    let (mut handed, mut own) =
        (with(Some(Rc::new(Means))).unwrap(), trainer(&TrainSpec { metric: Metric::L1, ..spec() }, 0.0));
    for step in 0..3 {
        assert_eq!(handed.step(&batch(step, 12)).unwrap(), own.step(&batch(step, 12)).unwrap());
    }
    assert!(equal(&state(&handed), &state(&own)));
}

#[test]
fn averages_and_target_follow_the_new_weights() {
    let mut trainer = trainer(&spec(), 0.0);
    let before = trainer.student().params().snapshot();
    let report = trainer.step(&batch(0, 12)).unwrap();
    let after = trainer.student().params().snapshot();
    assert!(!equal(&before, &after));
    let mixed = |beta: f64| -> TensorMap {
        after.iter().map(|(name, new)| (name.clone(), &before[name] * beta + new * (1.0 - beta))).collect()
    };
    let slow = trainer.with_ema("0.9", |model| model.params().snapshot()).unwrap();
    assert!(difference(&mixed(0.9), &slow) < 1e-6);
    // The ramp-up makes the first step's half-life 0.
    let fast = trainer.with_ema("halflife-100-rampup-0.05", |model| model.params().snapshot()).unwrap();
    assert!(equal(&after, &fast));
    assert_eq!((report.num_scales, report.mu.unwrap()), (Some(2), 0.9));
    assert!(difference(&mixed(0.9), &trainer.target().unwrap().params().snapshot()) < 1e-6);
    assert!(equal(&after, &trainer.student().params().snapshot()), "lent weights come back");
    let error = trainer.with_ema("0.5", |_| ()).unwrap_err().to_string();
    assert!(error.contains("0.9 or halflife-100"), "{error}");
}

#[test]
fn reports_say_where_the_run_is() {
    let lr_rule = LrRule::Warmup { warmup_images: 24.0 };
    let mut trainer = trainer(&TrainSpec { lr_rule, ..spec() }, 0.0);
    let reports: Vec<_> = (0..3).map(|step| trainer.step(&batch(step, 12)).unwrap()).collect();
    assert_eq!(reports.iter().map(|r| r.lr).collect::<Vec<_>>(), [0.0, 0.005, 0.01]);
    assert_eq!(reports.iter().map(|r| (r.step, r.images)).collect::<Vec<_>>(), [(1, 12), (2, 24), (3, 36)]);
    let last = &reports[2];
    let mean = last.samples.iter().map(|s| s.loss).sum::<f64>() / 12.0;
    assert!((last.loss - mean).abs() < 1e-12 && last.samples.len() == 12 && last.grad_norm > 0.0);
    assert_eq!(last.distance, last.loss, "weights are 1");
    assert_eq!((trainer.steps_done(), trainer.images_seen(), trainer.is_finished()), (3, 36, false));
}

#[test]
fn long_gradients_are_clipped() {
    let first_moment = |grad_clip| {
        let mut trainer = trainer(&TrainSpec { grad_clip, ..spec() }, 0.0);
        let report = trainer.step(&batch(0, 12)).unwrap();
        let moments = trainer.optimizer.export();
        let moments = moments.iter().filter(|(name, _)| name.starts_with("exp_avg."));
        let squares: f64 = moments.map(|(_, m)| m.square().sum(Kind::Double).double_value(&[])).sum();
        // m = (1 − β₁)·g after the first step.
        (report.grad_norm, squares.sqrt() / 0.1)
    };
    let (norm, used) = first_moment(None);
    assert!((used / norm - 1.0).abs() < 1e-4);
    let (same_norm, clipped) = first_moment(Some(norm / 8.0));
    assert_eq!(norm, same_norm);
    assert!((clipped / norm * 8.0 - 1.0).abs() < 1e-4);
    assert_eq!(first_moment(Some(norm * 2.0)), (norm, used));
}

#[test]
fn a_step_that_is_not_finite_is_not_taken() {
    let mut trainer = trainer(&spec(), 0.2);
    trainer.step(&batch(0, 12)).unwrap();
    let before = state(&trainer);
    let bad = batch(1, 12);
    let _ = bad.images.get(3).fill_(f64::NAN);
    let error = trainer.step(&bad).unwrap_err();
    let what = "image 3 of the batch is not finite and the loss (NaN)";
    assert!(matches!(&error, Error::NonFinite { step: 2, what: found, .. } if found == what), "{error}");
    assert!(equal(&before, &state(&trainer)));
    assert_eq!((trainer.steps_done(), trainer.images_seen()), (1, 12));
    // A good batch then makes the step that it would have made without the bad one.
    trainer.step(&batch(1, 12)).unwrap();
    let mut clean = self::trainer(&spec(), 0.2);
    (0..2).for_each(|step| drop(clean.step(&batch(step, 12)).unwrap()));
    assert!(equal(&state(&clean), &state(&trainer)));
}

/// f = x + √p·0 with p = 0: the value is fine, the gradient of p is not.
struct Spoilt {
    params: Params,
}

impl Spoilt {
    fn new() -> Self {
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let _ = builder.root().param("good", &[1], Init::Ones).unwrap();
        let _ = builder.root().param("spoilt", &[1], Init::Zeros).unwrap();
        Self { params: builder.finish() }
    }
}

impl Trainable for Spoilt {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn evaluate(&self, x: &Tensor, _: Sigma<'_>, _: &Cond, _: Mode) -> cm_model::Result<Tensor> {
        let get = |name| self.params.get(name).unwrap();
        Ok(x * get("good") + get("spoilt").sqrt())
    }
}

#[test]
fn the_tensor_that_spoils_a_gradient_is_named_or_repaired() {
    let live = TrainSpec { target: TargetRule::Live {}, ..spec() };
    let mut trainer = Trainer::new(Networks::of(Spoilt::new()), &live, LEVELS).unwrap();
    let error = trainer.step(&batch(0, 12)).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("'spoilt'"), "{error}");
    let value = |trainer: &Trainer<Spoilt>| {
        ["good", "spoilt"].map(|name| trainer.student().params().get(name).unwrap().double_value(&[0]))
    };
    assert_eq!(value(&trainer), [1.0, 0.0]);
    let repaired = TrainSpec { replace_non_finite: Some(1e5), grad_clip: Some(1.0), ..live };
    let mut trainer = Trainer::new(Networks::of(Spoilt::new()), &repaired, LEVELS).unwrap();
    let report = trainer.step(&batch(0, 12)).unwrap();
    let [good, spoilt] = value(&trainer);
    assert!(!report.grad_norm.is_finite() && good != 1.0 && spoilt.is_finite());
}

#[test]
fn trainers_refuse_what_does_not_fit() {
    let clipped = TrainSpec { grad_clip: Some(f64::INFINITY), ..spec() };
    assert!(refusal(clipped, true, false).contains("train.grad_clip = inf"));
    let mut trainer = trainer(&spec(), 0.0);
    let error = trainer.step(&batch(0, 11)).unwrap_err().to_string();
    assert!(error.contains("12 images") && error.contains("11 images"), "{error}");
    let flat = Batch { images: batch(0, 12).images.view([12, 16]), cond: Cond::none() };
    assert!(trainer.step(&flat).is_err());
}

/// Why there is no trainer with, or without, a target network and a teacher.
fn refusal(spec: TrainSpec, target: bool, teacher: bool) -> String {
    let oracle = || GaussianOracle { data_std: 0.5, shape: SHAPE, sigma_range: LEVELS.range };
    let networks = Networks {
        student: mlp(0, 0.0),
        target: target.then(|| mlp(1, 0.0)),
        teacher: teacher.then(|| Box::new(oracle()) as _),
        perceptual: None,
    };
    Trainer::new(networks, &spec, LEVELS).unwrap_err().to_string()
}

#[test]
fn networks_that_do_not_go_with_the_settings_are_refused_by_key_and_remedy() {
    let live = TrainSpec { target: TargetRule::Live {}, ..spec() };
    let teacher = Some(TeacherRule { solver: TeacherSolver::Heun });
    let distilled = TrainSpec { teacher, ..live.clone() };
    let pairs = PairRule::Steps { rho: 7.0, num_scales: NumScales::Fixed { num_scales: 4 } };
    let halved = TrainSpec { pairs, target: TargetRule::TwoSteps {}, ..spec() };
    let no_target = "expected a target network; hand a second network of the student's architecture over";
    let no_teacher =
        "expected a teacher to distil; hand its denoiser over as Networks::teacher, or leave train";
    let cases = [
        (spec(), false, false, format!("train.target.kind = ema: {no_target}")),
        (halved, false, false, format!("train.target.kind = two_steps: {no_target}")),
        (
            live.clone(),
            true,
            false,
            "train.target.kind = live: expected no target network; hand over Networks::target = None".into(),
        ),
        (distilled, false, false, format!("train.teacher = {{ solver = … }}: {no_teacher}")),
        (
            live,
            false,
            true,
            "train.teacher = none: expected no teacher; hand over Networks::teacher = None, or set".into(),
        ),
        (spec(), true, true, "train.teacher = none: expected no teacher".into()),
    ];
    for (spec, target, teacher, says) in cases {
        let error = refusal(spec, target, teacher);
        assert!(error.starts_with(&says), "{error}");
    }
}

#[test]
fn a_run_is_a_function_of_its_seed() {
    let run = |seed| {
        let emas = vec![EmaRule::Beta { beta: 0.5 }];
        let mut trainer = trainer(&TrainSpec { seed, emas, ..spec() }, 0.3);
        (0..4).for_each(|step| drop(trainer.step(&batch(step, 12)).unwrap()));
        state(&trainer)
    };
    assert!(equal(&run(1), &run(1)));
    assert!(!equal(&run(1), &run(2)));
}

#[test]
fn a_teacher_of_other_images_is_refused() {
    let shape = ImageShape { channels: 3, height: 4, width: 4 };
    let oracle = GaussianOracle { data_std: 0.5, shape, sigma_range: LEVELS.range };
    let teacher = Some(TeacherRule { solver: TeacherSolver::Euler });
    let spec = TrainSpec { target: TargetRule::Live {}, teacher, ..spec() };
    let networks = Networks { teacher: Some(Box::new(oracle)), ..Networks::of(mlp(0, 0.0)) };
    let error = Trainer::new(networks, &spec, LEVELS).unwrap_err().to_string();
    assert!(error.starts_with("teacher: expected images of 1×4×4") && error.contains("3×4×4"), "{error}");
}
