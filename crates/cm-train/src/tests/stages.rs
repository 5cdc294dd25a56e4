//! Stages of progressive distillation in the trainer: what begins anew, what goes on, and resuming in any of them.

use cm_model::TensorMap;
use cm_schedule::{EmaRule, LrRule, NumScales, Weighting};
use cm_torch::optim::OptimKind;
use tch::{Kind, Tensor};

use super::checkpoints::check_resume;
use crate::testing::{Model, batch, spec, trainer};
use crate::{PairRule, TargetRule, TrainSpec, Trainable, Trainer};

/// Steps 0 to 4 with a student of four steps, 5 to 14 with two, 15 to 19 with one.
fn pd_spec() -> TrainSpec {
    TrainSpec {
        pairs: PairRule::Steps { rho: 7.0, num_scales: NumScales::ProgDist { start: 4, steps_per_stage: 5 } },
        target: TargetRule::TwoSteps {},
        weighting: Weighting::TruncatedSnr,
        optimizer: OptimKind::adam(),
        lr_rule: LrRule::Linear {},
        emas: vec![EmaRule::Beta { beta: 0.75 }],
        ..spec()
    }
}

fn student(trainer: &Trainer<Model>) -> TensorMap {
    trainer.student().params().snapshot()
}

fn teacher(trainer: &Trainer<Model>) -> TensorMap {
    trainer.target().unwrap().params().snapshot()
}

fn equal(a: &TensorMap, b: &TensorMap) -> bool {
    a.len() == b.len() && a.iter().all(|(name, tensor)| tensor.equal(&b[name]))
}

fn near(a: &Tensor, b: &Tensor) -> bool {
    a.allclose(b, 1e-5, 1e-7, false)
}

#[test]
fn the_student_becomes_the_teacher_where_a_stage_begins() {
    let mut trainer = trainer(&pd_spec(), 0.0);
    let mut expected = student(&trainer);
    let mut counts = Vec::new();
    for step in 0..20 {
        let before = student(&trainer);
        if [5, 15].contains(&step) {
            assert!(!equal(&before, &expected), "the stage has trained");
            expected = before;
        }
        counts.push(trainer.step(&batch(step, 12)).unwrap().num_scales.unwrap());
        assert!(
            equal(&teacher(&trainer), &expected),
            "step {step}: the teacher is the student of the last stage"
        );
    }
    assert_eq!(counts, [vec![4; 5], vec![2; 10], vec![1; 5]].concat());
}

#[test]
fn averages_moments_and_learning_rate_begin_anew() {
    let mut trainer = trainer(&pd_spec(), 0.0);
    for step in 0..16 {
        let before = student(&trainer);
        let report = trainer.step(&batch(step, 12)).unwrap();
        let (start, length) = match step {
            0..5 => (0, 5),
            5..15 => (5, 10),
            _ => (15, 5),
        };
        let at = step - start;
        assert!((report.lr - 0.01 * (1.0 - at as f64 / length as f64)).abs() < 1e-12, "step {step}");
        let moments = trainer.optimizer.export();
        assert_eq!(moments["step"].int64_value(&[]) as u64, at + 1);
        if at > 0 {
            continue;
        }
        let (after, average) =
            (student(&trainer), trainer.with_ema("0.75", |model| model.params().snapshot()).unwrap());
        for (name, _) in trainer.student().params().trainable() {
            let (old, new, m) = (&before[name], &after[name], &moments[&format!("exp_avg.{name}")]);
            assert!(
                near(&average[name], &(old * 0.75 + new * 0.25)),
                "{name}: the average starts at the student"
            );
            // Adam's first step is lr·sign(gradient), where ε is small beside it, and m = (1 − β₁)·gradient.
            let wanted: Tensor = m.sign() * -report.lr;
            let clear = m.abs().gt(1e-5).to_kind(Kind::Float);
            assert!(clear.sum(Kind::Float).double_value(&[]) > 0.0, "{name}");
            let off = ((new - old - wanted) * clear).abs().max().double_value(&[]);
            assert!(off < 2e-4 * report.lr, "{name}: {off}");
        }
    }
}

#[test]
fn a_stage_resumes_bit_for_bit_at_its_start_and_inside() {
    for at in [3, 5, 9, 15, 17] {
        check_resume(&TrainSpec { micro_batch: Some(5), ..pd_spec() }, at);
    }
}
