//! Short runs of the trainer on Gaussian data: they end where the derivations say.

use cm_model::Cond;
use cm_schedule::{EmaRule, IndexDist, LogNormal, LrRule, NumScales, TargetEma, Weighting};
use cm_torch::optim::OptimKind;

use super::closed_form;
use super::gaussian::{DATA_STD, Form, Gaussian, ORACLE, grid_pairs, repeated};
use super::progressive::{GRID, Gains, euler_factor, euler_product};
use crate::testing::{LEVELS, spec};
use crate::{Batch, Metric, Networks, PairRule, TargetRule, TeacherRule, TrainSpec, Trainable, Trainer};

const IMAGES: usize = 256;

fn run_spec() -> TrainSpec {
    TrainSpec {
        total_steps: 1500,
        batch: IMAGES,
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Fixed { num_scales: 18 },
            index: IndexDist::Uniform {},
        },
        target: TargetRule::Live {},
        optimizer: OptimKind::adam(),
        emas: vec![EmaRule::Beta { beta: 0.99 }],
        ..spec()
    }
}

/// The trainer at the end of its run. Pixels of ± s have the second moment of N(0, s²), and the losses see no other.
fn trained<M: Trainable>(networks: Networks<M>, spec: &TrainSpec) -> Trainer<M> {
    let mut trainer = Trainer::new(networks, spec, LEVELS).unwrap();
    let s = DATA_STD;
    let batch = Batch { images: repeated([s, -s, s, -s], IMAGES), cond: Cond::none() };
    while !trainer.is_finished() {
        trainer.step(&batch).unwrap();
    }
    trainer
}

fn average(trainer: &Trainer<Gaussian>) -> f64 {
    trainer.with_ema("0.99", Gaussian::std).unwrap()
}

#[test]
fn training_and_distillation_reach_the_fixed_point_of_their_grid() {
    let ema = TargetRule::Ema { rule: TargetEma::Fixed { mu: 0.9 } };
    for solver in closed_form::WAYS {
        for target in [TargetRule::Live {}, ema] {
            let spec =
                TrainSpec { target, teacher: solver.map(|solver| TeacherRule { solver }), ..run_spec() };
            let networks = Networks {
                student: Gaussian::new(Form::Consistency, 0.9),
                target: target.has_network().then(|| Gaussian::new(Form::Consistency, 0.2)),
                teacher: solver.map(|_| Box::new(ORACLE) as _),
                perceptual: None,
            };
            let got = average(&trained(networks, &spec));
            let want = closed_form::fixed_point(solver, &grid_pairs(18));
            assert!((got - want).abs() < 0.01, "{solver:?}, {target:?}: {got} {want}");
        }
    }
}

#[test]
fn diffusion_training_reaches_the_truth() {
    let spec = TrainSpec {
        pairs: PairRule::Denoise { sigma: LogNormal { mean: -1.2, std: 1.2 } },
        target: TargetRule::Image {},
        metric: Metric::SquaredNorm,
        weighting: Weighting::Karras,
        ..run_spec()
    };
    let got = average(&trained(Networks::of(Gaussian::new(Form::Denoiser, 0.9)), &spec));
    assert!((got - DATA_STD).abs() < 0.01, "{got}");
}

/// Stages of 4, 2 and 1 steps, from the exact denoiser at the eight levels of the first teacher.
#[test]
fn progressive_distillation_keeps_the_steps_of_its_first_teacher() {
    let spec = TrainSpec {
        total_steps: 600,
        pairs: PairRule::Steps {
            rho: 7.0,
            num_scales: NumScales::ProgDist { start: 4, steps_per_stage: 120 },
        },
        target: TargetRule::TwoSteps {},
        weighting: Weighting::TruncatedSnr,
        lr: 0.05,
        lr_rule: LrRule::Linear {},
        ..run_spec()
    };
    let networks =
        Networks { student: Gains::exact(8), target: Some(Gains::exact(8)), teacher: None, perceptual: None };
    let trainer = trained(networks, &spec);
    let (gains, levels) = (trainer.student().gains(), GRID.descending(9));
    // The first and the last level of each student's step; the gains that no student uses stay as they were.
    for (start, end) in [(0, 8), (4, 8), (2, 4), (6, 8)] {
        let got = euler_factor(gains[start], levels[start], levels[end]);
        let want = euler_product(&levels[start..=end]);
        assert!((got / want - 1.0).abs() < 1e-3, "{start} to {end}: {got} {want}");
    }
    let first = Gains::exact(8).gains();
    assert!([1, 3, 5, 7].iter().all(|&j| gains[j] == first[j]) && gains[0] > 50.0 * first[0]);
}
