//! docs/derivations.md in f64, apart from the code of the losses.

use super::gaussian::DATA_STD;
use crate::testing::LEVELS;
use crate::{Pairs, TeacherSolver};

const VAR: f64 = DATA_STD * DATA_STD;

/// How the nearer point of a pair is found: on the ray through the image (CT), or by a step of the teacher (CD).
pub(super) type Way = Option<TeacherSolver>;

pub(super) const WAYS: [Way; 3] = [None, Some(TeacherSolver::Euler), Some(TeacherSolver::Heun)];

/// E[x_t x_r], with x_r found in one of the three ways.
fn moment(way: Way, t: f64, r: f64) -> f64 {
    // The exact flow is dx/dt = a(t) x.
    let a = |t: f64| t / (VAR + t * t);
    let euler = 1.0 + (r - t) * a(t);
    let square = VAR + t * t;
    match way {
        None => VAR + t * r,
        Some(TeacherSolver::Euler) => square * euler,
        Some(TeacherSolver::Heun) => square * (1.0 + (r - t) / 2.0 * (a(t) + a(r) * euler)),
    }
}

/// g_s(t) of f(x, t) = g_s(t) x.
pub(super) fn gain(s: f64, t: f64) -> f64 {
    let end = LEVELS.range.min();
    ((s * s + end * end) / (s * s + t * t)).sqrt()
}

/// ∂g_s/∂s at t.
fn gain_slope(s: f64, t: f64) -> f64 {
    let end = LEVELS.range.min();
    gain(s, t) * s * (t * t - end * end) / ((s * s + end * end) * (s * s + t * t))
}

/// The s at which 0 = Σ w ∂g_s/∂s(t) · (g_s(t) (v + t²) − g_s(r) E[x_t x_r]).
pub(super) fn fixed_point(way: Way, pairs: &Pairs) -> f64 {
    root(|s| {
        let term = |i: usize| {
            let (t, r) = (pairs.sigma[i], pairs.next[i]);
            // At r = 0 the target is the image itself.
            let target = if r == 0.0 { 1.0 } else { gain(s, r) };
            let residual = gain(s, t) * (VAR + t * t) - target * moment(way, t, r);
            pairs.weight[i] * gain_slope(s, t) * residual
        };
        (0..pairs.sigma.len()).map(term).sum()
    })
}

/// Where a function changes from negative to positive between 0.1 and 1, by bisection.
pub(super) fn root(mut function: impl FnMut(f64) -> f64) -> f64 {
    let (mut low, mut high) = (0.1, 1.0);
    assert!(function(low) < 0.0 && function(high) > 0.0);
    for _ in 0..44 {
        let middle = (low + high) / 2.0;
        *(if function(middle) < 0.0 { &mut low } else { &mut high }) = middle;
    }
    (low + high) / 2.0
}

/// The slope of ln |y| over ln x by least squares.
pub(super) fn log_log_slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<_> = points.iter().map(|(x, y)| (x.ln(), y.abs().ln())).collect();
    let count = logs.len() as f64;
    let mean = logs.iter().fold((0.0, 0.0), |sum, p| (sum.0 + p.0 / count, sum.1 + p.1 / count));
    let covariance: f64 = logs.iter().map(|p| (p.0 - mean.0) * (p.1 - mean.1)).sum();
    covariance / logs.iter().map(|p| (p.0 - mean.0).powi(2)).sum::<f64>()
}
