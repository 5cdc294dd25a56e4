use super::plan::Plan;
use super::walk::{Ask, Walk};

/// What a sampler needs of its states: linear combinations.
///
/// The space is a value apart from its vectors, so that a crate can run samplers on a type that it does not own (a
/// libtorch tensor, say): it implements this trait for a type of its own.
pub trait VectorSpace {
    /// A state: one image or a batch.
    type Vector;

    /// Σ aᵢ·vᵢ over `terms`, of which there is at least one.
    fn combine(&self, terms: &[(f64, &Self::Vector)]) -> Self::Vector;
}

/// Plain numbers: `f64` states for closed-form tests, `Vec<f64>` states for small exact runs.
///
/// Vectors of one combination have the same length; what exceeds the shortest is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scalars<V>(std::marker::PhantomData<V>);

impl<V> Scalars<V> {
    /// The space.
    #[must_use]
    pub fn new() -> Self {
        Scalars(std::marker::PhantomData)
    }
}

impl VectorSpace for Scalars<f64> {
    type Vector = f64;

    fn combine(&self, terms: &[(f64, &f64)]) -> f64 {
        terms.iter().map(|(a, v)| a * **v).sum()
    }
}

impl VectorSpace for Scalars<Vec<f64>> {
    type Vector = Vec<f64>;

    fn combine(&self, terms: &[(f64, &Vec<f64>)]) -> Vec<f64> {
        let len = terms.iter().map(|(_, v)| v.len()).min().unwrap_or(0);
        (0..len).map(|i| terms.iter().map(|(a, v)| a * v[i]).sum()).collect()
    }
}

/// Walks along a plan from `x`, a state at the first step's level, and returns the state after the last.
///
/// `model(x, σ)` is D or f, as the plan needs. `noise(k)` is standard normal noise of the shape of `x` for step `k`
/// (counted from 0); it is asked only where noise is used, at most once per step, so that a source that replays
/// recorded noise can insist that all of it was used. The first error of either ends the walk.
///
/// # Errors
/// Those of `model` and `noise`.
///
/// ```
/// use cm_schedule::{KarrasGrid, solver::{Churn, Plan, Scalars, execute}};
/// // Data that are all 0.3: D(x; σ) = 0.3 everywhere, and every sampler ends there.
/// let plan = Plan::heun(&KarrasGrid::EDM.with_zero(5), &Churn::NONE).unwrap();
/// let no_noise = |_| Err("this plan draws none");
/// let x = execute(&Scalars::<f64>::new(), &plan, 80.0, |_, _| Ok(0.3), no_noise);
/// assert!((x.unwrap() - 0.3).abs() < 1e-12);
/// ```
pub fn execute<S: VectorSpace, E>(
    space: &S,
    plan: &Plan,
    x: S::Vector,
    mut model: impl FnMut(&S::Vector, f64) -> Result<S::Vector, E>,
    mut noise: impl FnMut(usize) -> Result<S::Vector, E>,
) -> Result<S::Vector, E> {
    let mut walk = Walk::new(plan, x);
    loop {
        let answer = match walk.ask() {
            Ask::Model { x, sigma } => model(x, sigma)?,
            Ask::Noise { step } => noise(step)?,
            Ask::Nothing => return Ok(walk.into_state()),
        };
        walk.answer(space, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::{Churn, Renoise};
    use crate::{KarrasGrid, Result as ScheduleResult};

    /// Standard deviation of the Gaussian data, N(0, s²): then D(x; σ) = s²/(s² + σ²) x, the flow is
    /// x(σ) ∝ √(s² + σ²), and f(x, σ) = x √((s² + ε²)/(s² + σ²)).
    const S: f64 = 0.5;
    const EPS: f64 = 0.002;

    fn denoise(x: &f64, sigma: f64) -> Result<f64, String> {
        Ok(x * S * S / (S * S + sigma * sigma))
    }

    fn flow(from: f64, to: f64) -> f64 {
        ((S * S + to * to) / (S * S + from * from)).sqrt()
    }

    /// The slope of ln|error at σ_min| over ln N, for N = 40, 80, …, 1280 intervals.
    fn measured_order(plan: impl Fn(&[f64]) -> ScheduleResult<Plan>) -> f64 {
        let points: Vec<(f64, f64)> = (0..6)
            .map(|k| {
                let n = 40 << k;
                let plan = plan(&KarrasGrid::EDM.descending(n + 1)).unwrap();
                let no_noise = |_| Err("a deterministic plan asked for noise".to_string());
                let end = execute(&Scalars::<f64>::new(), &plan, 80.0, denoise, no_noise).unwrap();
                let exact = 80.0 * flow(80.0, EPS);
                ((n as f64).ln(), (end / exact - 1.0).abs().ln())
            })
            .collect();
        let mean = |f: fn(&(f64, f64)) -> f64| points.iter().map(f).sum::<f64>() / points.len() as f64;
        let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
        let covariance: f64 = points.iter().map(|(x, y)| (x - mx) * (y - my)).sum();
        -covariance / points.iter().map(|(x, _)| (x - mx).powi(2)).sum::<f64>()
    }

    #[test]
    fn euler_has_order_one() {
        let order = measured_order(Plan::euler);
        assert!((order - 1.0).abs() < 0.05, "{order}");
    }

    #[test]
    fn heun_has_order_two() {
        let order = measured_order(|levels| Plan::heun(levels, &Churn::NONE));
        assert!((order - 2.0).abs() < 0.05, "{order}");
    }

    #[test]
    fn dpm2_has_order_two() {
        let order = measured_order(|levels| Plan::dpm2(levels, &Churn::NONE));
        assert!((order - 2.0).abs() < 0.05, "{order}");
    }

    #[test]
    fn dpmpp_2m_has_order_two() {
        let order = measured_order(Plan::dpmpp_2m);
        assert!((order - 2.0).abs() < 0.05, "{order}");
    }

    /// Data that are one point: every solver is exact, from any start, in one step or many.
    #[test]
    fn every_solver_is_exact_on_a_point() {
        let churn = Churn { s_churn: 3.0, s_min: 0.0, s_max: 100.0, s_noise: 1.007 };
        for n in [1, 2, 7] {
            let levels = KarrasGrid::EDM.with_zero(n);
            let plans = [
                Plan::euler(&levels),
                Plan::heun(&levels, &churn),
                Plan::dpm2(&levels, &churn),
                Plan::ancestral(&levels),
                Plan::dpmpp_2m(&levels),
                Plan::multistep(&levels[..n.min(2)], 0.001, Renoise::ToLevel),
            ];
            for plan in plans {
                let plan = plan.unwrap();
                let point = |_: &Vec<f64>, _| Ok::<_, String>(vec![0.3, -0.8]);
                let noise = |k| Ok(vec![1.0, k as f64]);
                let x = execute(&Scalars::<Vec<f64>>::new(), &plan, vec![91.0, -7.0], point, noise).unwrap();
                assert!((x[0] - 0.3).abs() < 1e-11 && (x[1] + 0.8).abs() < 1e-11, "{plan:?} {x:?}");
            }
        }
    }

    /// The variance of the sample, and how often noise was drawn.
    ///
    /// The model is linear and the draws are independent, so a state is the vector of its coefficients on the start
    /// (slot 0) and on the draws, and its variance is exact: no sampling error.
    fn variance(plan: &Plan, gain: impl Fn(f64) -> f64) -> (f64, usize) {
        let slots = plan.draws() + 1;
        let mut draws = 0;
        let mut start = vec![0.0; slots];
        start[0] = plan.steps()[0].sigma_hat;
        let model = |x: &Vec<f64>, sigma| Ok::<_, String>(x.iter().map(|c| c * gain(sigma)).collect());
        let noise = |_| {
            draws += 1;
            let mut unit = vec![0.0; slots];
            unit[draws] = 1.0;
            Ok(unit)
        };
        let end = execute(&Scalars::<Vec<f64>>::new(), plan, start, model, noise).unwrap();
        (end.iter().map(|c| c * c).sum(), draws)
    }

    fn gaussian(sigma: f64) -> f64 {
        S * S / (S * S + sigma * sigma)
    }

    /// Stochastic samplers leave the distribution alone: the variance of the sample approaches that of the data, and
    /// four times the steps bring it at least three times nearer.
    #[test]
    fn stochastic_samplers_keep_the_variance_of_the_data() {
        let churn = Churn { s_churn: 10.0, s_min: 0.05, s_max: 50.0, s_noise: 1.0 };
        type Sampler = fn(&[f64], &Churn) -> ScheduleResult<Plan>;
        let samplers: [Sampler; 3] = [Plan::heun, Plan::dpm2, |levels, _| Plan::ancestral(levels)];
        for sampler in samplers {
            let errors = [128, 512].map(|n| {
                let plan = sampler(&KarrasGrid::EDM.with_zero(n), &churn).unwrap();
                let (variance, draws) = variance(&plan, gaussian);
                assert!(draws > n / 2 && draws == plan.draws());
                (variance / (S * S) - 1.0).abs()
            });
            assert!(errors[1] < errors[0] / 3.0, "{errors:?}");
        }
    }

    /// With the exact consistency function, multistep sampling has the exact variance after any number of steps.
    #[test]
    fn multistep_sampling_is_exact() {
        let jump = |sigma: f64| flow(sigma, EPS);
        let exact = S * S + EPS * EPS;
        // The start σ_max·z lacks the data's own variance; the first jump carries that share on.
        for levels in [&[80.0][..], &[80.0, 5.0], &[80.0, 24.4, 5.84, 0.9, 0.661]] {
            let plan = Plan::multistep(levels, EPS, Renoise::ToLevel).unwrap();
            let (got, draws) = variance(&plan, jump);
            assert_eq!(draws, levels.len() - 1);
            let shortage: f64 = S * S / (80.0f64.powi(2) + S * S)
                * levels[1..].iter().map(|sigma| exact / (S * S + sigma * sigma)).product::<f64>();
            assert!((got / exact - 1.0 + shortage).abs() < 1e-12, "{got}");
        }
        // ECT's noise is too much by ε², of which the last jump keeps its share.
        let ect = Plan::multistep(&[80.0, 0.821], EPS, Renoise::Full).unwrap();
        let song = Plan::multistep(&[80.0, 0.821], EPS, Renoise::ToLevel).unwrap();
        let excess = variance(&ect, jump).0 - variance(&song, jump).0;
        assert!((excess / (EPS * EPS * jump(0.821).powi(2)) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn errors_end_the_walk() {
        let plan = Plan::euler(&[2.0, 1.0, 0.0]).unwrap();
        let mut calls = 0;
        let model = |_: &f64, _| {
            calls += 1;
            Err("no model")
        };
        let end = execute(&Scalars::<f64>::new(), &plan, 1.0, model, |_| Ok(0.0));
        assert_eq!((end, calls), (Err("no model"), 1));
        let noisy = Plan::ancestral(&[2.0, 1.0, 0.0]).unwrap();
        let end = execute(&Scalars::<f64>::new(), &noisy, 1.0, |x, _| Ok(*x), Err);
        assert_eq!(end, Err(0));
    }
}
