//! Fixed points of consistency training and distillation on Gaussian data, and how they near the truth.

use cm_model::Mode;
use cm_schedule::{Ect, EctAdjust, LogNormal, Weighting};

use super::closed_form::{self, WAYS, Way, gain, log_log_slope};
use super::gaussian::{DATA_STD, Form, Gaussian, ORACLE, fixed_point, grid_pairs, on_pairs};
use crate::testing::LEVELS;
use crate::{
    Distance, Losses, Metric, PairRule, Pairs, Place, Recipe, Target, TargetRule, Teacher, TeacherRule,
    TeacherSolver, consistency_loss, distillation_loss,
};

const EULER: Way = Some(TeacherSolver::Euler);
const HEUN: Way = Some(TeacherSolver::Heun);

fn model(std: f64) -> Gaussian {
    Gaussian::new(Form::Consistency, std)
}

/// The expected loss of each pair, of CT or of CD from the exact teacher.
fn losses(way: Way, student: &Gaussian, target: Target<'_>, pairs: &Pairs, distance: &Distance) -> Losses {
    on_pairs(pairs, DATA_STD, |example| match way {
        None => consistency_loss(student, target, example, distance, Mode::Eval).unwrap(),
        Some(solver) => {
            let teacher = Teacher { denoiser: &ORACLE, rule: TeacherRule { solver } };
            distillation_loss(student, target, teacher, example, distance, Mode::Eval).unwrap()
        }
    })
}

fn trained_std(way: Way, pairs: &Pairs) -> f64 {
    fixed_point(&model(1.0), |student| losses(way, student, Target::Live, pairs, &Distance::L2))
}

/// |fixed point − truth|, in closed form.
fn error(way: Way, num_scales: usize) -> f64 {
    (closed_form::fixed_point(way, &grid_pairs(num_scales)) - DATA_STD).abs()
}

/// What float32 leaves of a fixed point. With u = 2⁻²⁴ the two sides of a residual are off by some 3u of their size,
/// and moving s by δ moves them apart by about δ times the step between their levels, which is near 6/N where it
/// counts; N pairs average. That makes u√N/2, of which this is four times.
fn rounding(num_scales: usize) -> f64 {
    2.0 * 0.5f64.powi(24) * (num_scales as f64).sqrt()
}

/// At N = 1281 what Heun misses the truth by, 5e-6, is little more than the rounding: its order is measured on the
/// closed form, which this ties to the loss.
#[test]
fn losses_have_the_fixed_points_of_their_grid() {
    for num_scales in [11, 18, 40, 151, 1281] {
        let pairs = grid_pairs(num_scales);
        let got = WAYS.map(|way| trained_std(way, &pairs));
        for (way, got) in std::iter::zip(WAYS, got) {
            let want = closed_form::fixed_point(way, &pairs);
            assert!((got - want).abs() < rounding(num_scales), "N = {num_scales}, {way:?}: {got} {want}");
        }
        let [ct, euler, heun] = got.map(|std| (std - DATA_STD).abs());
        assert!(heun < euler && heun < ct, "N = {num_scales}");
    }
}

/// Values as tabulated in docs/derivations.md.
#[test]
fn fixed_points_have_their_tabulated_values() {
    let table = [
        (11, 0.3747, 0.6088),
        (18, 0.4237, 0.5343),
        (40, 0.4662, 0.5061),
        (151, 0.4912, 0.5004),
        (1281, 0.4990, 0.5000),
    ];
    for (num_scales, first_order, heun) in table {
        let pairs = grid_pairs(num_scales);
        for (way, want) in std::iter::zip(WAYS, [first_order, first_order, heun]) {
            let got = closed_form::fixed_point(way, &pairs);
            assert!((got - want).abs() <= 5e-5, "N = {num_scales}, {way:?}: {got}");
        }
    }
}

/// The constants are C₁ and C₂ of docs/derivations.md, computed apart from this code.
#[test]
fn errors_fall_with_the_order_of_the_solver() {
    let grids = [40, 80, 160, 320, 640, 1281];
    for (way, order, tolerance, constant) in
        [(None, 1.0, 0.15, -1.31948), (EULER, 1.0, 0.15, -1.31948), (HEUN, 2.0, 0.3, 8.71807)]
    {
        let slope = log_log_slope(&grids.map(|n| (n as f64, error(way, n))));
        assert!((slope + order).abs() < tolerance, "{way:?}: {slope}");
        let limit = (closed_form::fixed_point(way, &grid_pairs(1281)) - DATA_STD) * 1280f64.powf(order);
        assert!((limit / constant - 1.0).abs() < 3e-3, "{way:?}: {limit}");
    }
}

/// The same through the losses themselves; Heun's only up to where its error is still a hundred times the rounding.
#[test]
fn the_losses_themselves_fall_with_that_order() {
    for (way, order, tolerance, grids) in [
        (None, 1.0, 0.15, [40, 151, 1281]),
        (EULER, 1.0, 0.15, [40, 151, 1281]),
        (HEUN, 2.0, 0.3, [40, 80, 151]),
    ] {
        let error = |n: usize| (trained_std(way, &grid_pairs(n)) - DATA_STD).abs();
        let slope = log_log_slope(&grids.map(|n| (n as f64, error(n))));
        assert!((slope + order).abs() < tolerance, "{way:?}: {slope}");
    }
}

#[test]
fn heun_is_nearer_than_euler_but_on_coarse_grids() {
    for num_scales in (11..200).chain([320, 640, 1281]) {
        assert!(error(HEUN, num_scales) < error(EULER, num_scales), "N = {num_scales}");
    }
    assert!(error(HEUN, 8) > error(EULER, 8));
}

/// An Euler step of the exact teacher is the mean of the points that CT may meet: the gradients agree, and the losses
/// differ by the variance v(t − r)²/(v + t²) around it, as f shows it.
#[test]
fn training_adds_its_variance_to_the_loss_of_distillation() {
    let (student, pairs) = (model(0.8), grid_pairs(18));
    let of = |way| losses(way, &student, Target::Live, &pairs, &Distance::L2).per_sample.detach();
    let differences = Vec::<f32>::try_from(of(None) - of(EULER)).unwrap();
    let var = DATA_STD * DATA_STD;
    for (i, got) in differences.into_iter().enumerate() {
        let (t, r) = (pairs.sigma[i], pairs.next[i]);
        let want = gain(0.8, r).powi(2) * var * (t - r).powi(2) / (var + t * t);
        // The losses themselves are below 0.1.
        assert!((f64::from(got) - want).abs() < 1e-7, "{t}: {got} {want}");
    }
}

#[test]
fn a_constant_factor_moves_no_fixed_point() {
    let pairs = grid_pairs(18);
    let heavier = Pairs { weight: vec![7.0; 17], ..pairs.clone() };
    for way in WAYS {
        let want = trained_std(way, &pairs);
        assert!((trained_std(way, &heavier) - want).abs() < rounding(18), "{way:?}");
        // Four pixels: the sum over the image is four times the mean.
        let summed = |student: &Gaussian| losses(way, student, Target::Live, &pairs, &Distance::SquaredNorm);
        assert!((fixed_point(&model(1.0), summed) - want).abs() < rounding(18), "{way:?}");
    }
    // A factor that depends on the level does move it, if not by much: the steps of the grid are nearly proportional to
    // their level, and where they are, the weight drops out of the first order.
    let levels = std::iter::zip(pairs.sigma.clone(), pairs.next.clone());
    let snr = Pairs::new(levels, Weighting::Snr, DATA_STD);
    let moved = (trained_std(None, &snr) - trained_std(None, &pairs)).abs();
    assert!(moved > 1e-3);
}

#[test]
fn an_averaged_target_rests_where_the_live_one_does() {
    let (pairs, twin) = (grid_pairs(18), model(1.0));
    for way in WAYS {
        // At rest the average of the weights is the weights.
        let averaged = fixed_point(&model(1.0), |student| {
            twin.set(student.std());
            losses(way, student, Target::Network(&twin), &pairs, &Distance::L2)
        });
        assert_eq!(averaged, trained_std(way, &pairs));
        let frozen = fixed_point(&model(1.0), |student| {
            twin.set(0.8);
            losses(way, student, Target::Network(&twin), &pairs, &Distance::L2)
        });
        assert!((frozen - averaged).abs() > 1e-2, "{way:?}: {frozen}");
    }
}

const CIFAR_LEVELS: LogNormal = LogNormal { mean: -1.1, std: 2.0 };

/// ECT's pairs in a stage: t at 1200 places of a log-normal, weighted by their density and by 1/(t − r).
fn ect_pairs(levels: LogNormal, map: &Ect, stage: u32) -> Pairs {
    let scores: Vec<f64> = (0..1200).map(|i| (f64::from(i) + 0.5) / 100.0 - 6.0).collect();
    let (low, high) = (LEVELS.range.min(), LEVELS.range.max());
    let pair = |&z: &f64| {
        let t = levels.sigma(z).clamp(low, high);
        let r = map.r(t, stage);
        (t, if r < low { 0.0 } else { r })
    };
    let mut pairs = Pairs::new(scores.iter().map(pair), Weighting::InverseStep, DATA_STD);
    for (weight, z) in std::iter::zip(&mut pairs.weight, scores) {
        *weight *= (-z * z / 2.0).exp();
    }
    pairs
}

/// Values as tabulated in docs/derivations.md. Where it counts, the last stage's steps are as short as those of a grid of
/// 3000 levels.
#[test]
fn ect_nears_the_truth_as_r_nears_t() {
    let constant = [0.4225, 0.4655, 0.4836, 0.4920, 0.4960, 0.4980, 0.4990, 0.4995];
    let sigmoid = [0.2847, 0.3172, 0.4251, 0.4664, 0.4840, 0.4922, 0.4961, 0.4981];
    for (adjust, table) in [(EctAdjust::Const {}, constant), (EctAdjust::Sigmoid { k: 8.0, b: 1.0 }, sigmoid)]
    {
        let map = Ect { q: 2.0, stages: 8, adjust };
        let mut last = f64::INFINITY;
        for (stage, tabulated) in (0..8).zip(table) {
            let pairs = ect_pairs(CIFAR_LEVELS, &map, stage);
            let got = trained_std(None, &pairs);
            let want = closed_form::fixed_point(None, &pairs);
            assert!((got - want).abs() < rounding(3000), "{adjust:?}, stage {stage}: {got} {want}");
            assert!((want - tabulated).abs() <= 5e-5, "{adjust:?}, stage {stage}: {want}");
            let error = (got - DATA_STD).abs();
            assert!(error < last, "{adjust:?}, stage {stage}: {error}");
            last = error;
        }
    }
}

#[test]
fn with_one_ratio_the_error_of_ect_is_a_quarter_of_the_step() {
    let map = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Const {} };
    for levels in [CIFAR_LEVELS, LogNormal { mean: -0.4, std: 1.6 }, LogNormal { mean: 1.0, std: 0.7 }] {
        let error = closed_form::fixed_point(None, &ect_pairs(levels, &map, 7)) - DATA_STD;
        let limit = -(1.0 - map.ratio(7)) * DATA_STD / 4.0;
        assert!((error / limit - 1.0).abs() < 5e-3, "{levels:?}: {error} {limit}");
    }
}

/// The pairs above stand for those that a run draws.
#[test]
fn ect_draws_the_pairs_of_its_law() {
    let map = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } };
    let recipe = Recipe {
        pairs: PairRule::Continuous { sigma: CIFAR_LEVELS, map },
        target: TargetRule::Live {},
        teacher: None,
        metric: Metric::L2,
        weighting: Weighting::InverseStep,
    };
    for (step, stage) in [(0, 0), (250, 2), (799, 7)] {
        let place = Place { seed: 3, step, total_steps: 800 };
        let drawn = recipe.pairs(&place, 0..1 << 16, &LEVELS).unwrap();
        let [got, want] =
            [drawn, ect_pairs(CIFAR_LEVELS, &map, stage)].map(|pairs| closed_form::fixed_point(None, &pairs));
        // Five standard errors of so many draws, as a share of what is between the fixed point and the truth.
        assert!((got - want).abs() < 0.02 * (want - DATA_STD).abs(), "stage {stage}: {got} {want}");
    }
}
