use std::ops::RangeInclusive;

use super::levels::{Betas, Coordinates, Discretization, IddpmTable, Scaling, Schedule, Solver};
use crate::error::{Result, ensure, ensure_positive};
use crate::sigma::{KarrasGrid, SigmaRange};
use crate::solver::plan::check_falling;
use crate::solver::{Churn, VectorSpace};

/// The sampler that EDM's ablations were made with: any of the older samplers' noise levels, schedules σ(t) and scalings
/// s(t), with Euler's or a second-order method.
///
/// The state is x = s(t)·(image + σ(t)·noise) and follows dx/dt = (σ'/σ + s'/s)·x − (σ' s/σ)·D(x/s; σ). The last
/// step goes to t = 0, where s = 1.
///
/// # Source
/// EDM (arXiv 2206.00364) eq. 4, Table 1 and appendix C; `ablation_sampler` of its released code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ablation {
    /// Number of noise levels above 0.
    pub num_steps: usize,
    /// Lowest level; `None` for that of the discretization: VP σ(ε_s), VE 0.02, iDDPM and EDM 0.002.
    pub sigma_min: Option<f64>,
    /// Highest level; `None` for that of the discretization: VP σ(1), VE 100, iDDPM 81, EDM 80.
    pub sigma_max: Option<f64>,
    /// Exponent of [`Discretization::Edm`].
    pub rho: f64,
    /// How the ODE is followed.
    pub solver: Solver,
    /// Which levels there are.
    pub discretization: Discretization,
    /// σ(t).
    pub schedule: Schedule,
    /// s(t).
    pub scaling: Scaling,
    /// The lowest time of the VP schedule.
    pub epsilon_s: f64,
    /// α: where in a step the second evaluation lies, 1 for Heun's method and ½ for the midpoint rule.
    pub alpha: f64,
    /// Noise before each step.
    pub churn: Churn,
}

impl Default for Ablation {
    /// EDM's own choice in each place, with 18 levels and no churn.
    fn default() -> Self {
        Ablation {
            num_steps: 18,
            sigma_min: None,
            sigma_max: None,
            rho: 7.0,
            solver: Solver::Heun,
            discretization: Discretization::Edm,
            schedule: Schedule::Linear,
            scaling: Scaling::None,
            epsilon_s: 1e-3,
            alpha: 1.0,
            churn: Churn::NONE,
        }
    }
}

impl Ablation {
    /// The steps for a denoiser that knows the levels `known`, by iDDPM's `table` where that is asked for.
    ///
    /// # Errors
    /// When a number is outside its range, and when the levels do not fall.
    ///
    /// ```
    /// use cm_schedule::solver::reference::{Ablation, IddpmTable, Schedule};
    /// let plan = Ablation::default().plan(&(0.0..=f64::INFINITY), &IddpmTable::default()).unwrap();
    /// assert_eq!((plan.start(), plan.evaluations()), (80.0, 35));
    /// let ve = Ablation { schedule: Schedule::Ve, ..Ablation::default() };
    /// assert!(ve.plan(&(0.01..=50.0), &IddpmTable::default()).unwrap().start() <= 50.0);
    /// ```
    pub fn plan(&self, known: &RangeInclusive<f64>, table: &IddpmTable) -> Result<AblationPlan> {
        self.validate()?;
        let range = self.range(known)?;
        let betas = Betas::fit(range.min(), range.max(), self.epsilon_s);
        let at = Coordinates { schedule: self.schedule, scaling: self.scaling, betas };
        let levels = self.levels(range, betas, table)?;
        check_falling(&levels, self.num_steps, "iDDPM's table has too few levels in this range")?;
        let mut times: Vec<f64> = levels.iter().map(|&sigma| at.time(sigma)).collect();
        times.push(0.0);
        check_falling(&times, 2, "a step goes from one time to the next")?;
        let start = at.sigma(times[0]) * at.scale(times[0]);
        let steps = times.windows(2).map(|pair| self.step(&at, pair[0], pair[1]));
        Ok(AblationPlan { start, steps: steps.collect() })
    }

    fn validate(&self) -> Result<()> {
        let advice = "the grid has a first and a last level";
        ensure(self.num_steps >= 2, "num_steps", self.num_steps as f64, "2 or more", advice)?;
        let advice = "1 is Heun's method, 0.5 the midpoint rule";
        let inside = self.alpha > 0.0 && self.alpha <= 1.0;
        ensure(inside, "alpha", self.alpha, "a number above 0 and up to 1", advice)?;
        let inside = self.epsilon_s > 0.0 && self.epsilon_s < 1.0;
        let expected = "a number between 0 and 1";
        ensure(inside, "epsilon_s", self.epsilon_s, expected, "the released samplers use 0.001")?;
        ensure_positive("rho", self.rho, "EDM uses 7")?;
        self.churn.validate()
    }

    fn range(&self, known: &RangeInclusive<f64>) -> Result<SigmaRange> {
        let (low, high) = match self.discretization {
            Discretization::Vp => (Betas::RELEASED.sigma(self.epsilon_s), Betas::RELEASED.sigma(1.0)),
            Discretization::Ve => (0.02, 100.0),
            Discretization::Iddpm => (0.002, 81.0),
            Discretization::Edm => (0.002, 80.0),
        };
        let (low, high) = (self.sigma_min.unwrap_or(low), self.sigma_max.unwrap_or(high));
        SigmaRange::new(low.max(*known.start()), high.min(*known.end()))
    }

    fn levels(&self, range: SigmaRange, betas: Betas, table: &IddpmTable) -> Result<Vec<f64>> {
        let (n, low, high) = (self.num_steps, range.min(), range.max());
        let position = |i: usize| i as f64 / (n - 1) as f64;
        Ok(match self.discretization {
            Discretization::Vp => {
                (0..n).map(|i| betas.sigma(1.0 + position(i) * (self.epsilon_s - 1.0))).collect()
            }
            Discretization::Ve => {
                let ratio = low.powi(2) / high.powi(2);
                (0..n).map(|i| (high.powi(2) * ratio.powf(position(i))).sqrt()).collect()
            }
            Discretization::Iddpm => table.pick(low, high, n),
            Discretization::Edm => KarrasGrid::new(range, self.rho)?.descending(n),
        })
    }

    fn step(&self, at: &Coordinates, t: f64, t_next: f64) -> AblationStep {
        let sigma = at.sigma(t);
        let t_hat = at.time(sigma * (1.0 + self.churn.gamma(sigma, self.num_steps)));
        let (sigma_hat, scale_hat) = (at.sigma(t_hat), at.scale(t_hat));
        // Not 0 by γ alone: where the time of a level is found by a logarithm, rounding can leave 1e-8 of the level, and the
        // reference adds that.
        let added = (sigma_hat * sigma_hat - sigma * sigma).max(0.0).sqrt();
        let h = t_next - t_hat;
        let has_second = self.solver == Solver::Heun && t_next > 0.0;
        AblationStep {
            keep: scale_hat / at.scale(t),
            noise_std: added * scale_hat * self.churn.s_noise,
            first: Stage::at(at, t_hat),
            second: has_second.then(|| Stage::at(at, t_hat + self.alpha * h)),
            h,
            alpha: self.alpha,
        }
    }
}

/// The steps of an [`Ablation`].
#[derive(Debug, Clone, PartialEq)]
pub struct AblationPlan {
    start: f64,
    steps: Vec<AblationStep>,
}

impl AblationPlan {
    /// The standard deviation of the noise that sampling starts from: σ(t₀)·s(t₀).
    #[must_use]
    pub fn start(&self) -> f64 {
        self.start
    }

    /// The steps, in order.
    #[must_use]
    pub fn steps(&self) -> &[AblationStep] {
        &self.steps
    }

    /// How often the model is called.
    #[must_use]
    pub fn evaluations(&self) -> usize {
        self.steps.iter().map(|step| 1 + usize::from(step.second.is_some())).sum()
    }

    /// Walks along the plan from `x`, noise of standard deviation [`start`](Self::start), as
    /// [`execute`](crate::solver::execute) does along others.
    ///
    /// # Errors
    /// Those of `model` and `noise`.
    pub fn execute<S: VectorSpace, E>(
        &self,
        space: &S,
        x: S::Vector,
        mut model: impl FnMut(&S::Vector, f64) -> Result<S::Vector, E>,
        mut noise: impl FnMut(usize) -> Result<S::Vector, E>,
    ) -> Result<S::Vector, E> {
        let mut x = x;
        for (k, step) in self.steps.iter().enumerate() {
            let x_hat = match step.noise_std {
                0.0 => space.combine(&[(step.keep, &x)]),
                std => space.combine(&[(step.keep, &x), (std, &noise(k)?)]),
            };
            let d = step.first.derivative(space, &x_hat, &mut model)?;
            x = match &step.second {
                None => space.combine(&[(1.0, &x_hat), (step.h, &d)]),
                Some(second) => {
                    let x_prime = space.combine(&[(1.0, &x_hat), (step.alpha * step.h, &d)]);
                    let d_prime = second.derivative(space, &x_prime, &mut model)?;
                    let share = 0.5 / step.alpha;
                    space.combine(&[(1.0, &x_hat), (step.h * (1.0 - share), &d), (step.h * share, &d_prime)])
                }
            };
        }
        Ok(x)
    }
}

/// One step: x̂ = `keep`·x + `noise_std`·z, and from there by h.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AblationStep {
    /// s(t̂)/s(t).
    pub keep: f64,
    /// Standard deviation of the noise in the units of the state; 0 asks for none.
    pub noise_std: f64,
    /// The evaluation at t̂.
    pub first: Stage,
    /// The evaluation at t̂ + α h.
    pub second: Option<Stage>,
    /// h = t' − t̂.
    pub h: f64,
    /// α.
    pub alpha: f64,
}

/// One evaluation of the derivative, d = `on_x`·x − `on_denoised`·D(x/`scale`; `sigma`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stage {
    /// σ.
    pub sigma: f64,
    /// s.
    pub scale: f64,
    /// σ'/σ + s'/s.
    pub on_x: f64,
    /// σ' s/σ.
    pub on_denoised: f64,
}

impl Stage {
    fn at(at: &Coordinates, t: f64) -> Self {
        let (sigma, scale) = (at.sigma(t), at.scale(t));
        let growth = at.sigma_derivative(t) / sigma;
        Stage { sigma, scale, on_x: growth + at.scale_derivative(t) / scale, on_denoised: growth * scale }
    }

    fn derivative<S: VectorSpace, E>(
        &self,
        space: &S,
        x: &S::Vector,
        model: &mut impl FnMut(&S::Vector, f64) -> Result<S::Vector, E>,
    ) -> Result<S::Vector, E> {
        let denoised = model(&space.combine(&[(1.0 / self.scale, x)]), self.sigma)?;
        Ok(space.combine(&[(self.on_x, x), (-self.on_denoised, &denoised)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solver::{Plan, Scalars, execute};

    const EVERYWHERE: RangeInclusive<f64> = 0.0..=f64::INFINITY;
    const S: f64 = 0.5;

    fn denoise(x: &f64, sigma: f64) -> Result<f64, String> {
        Ok(x * S * S / (S * S + sigma * sigma))
    }

    fn combinations() -> impl Iterator<Item = Ablation> {
        use Discretization::{Edm, Iddpm, Ve, Vp};
        let schedules = [Schedule::Vp, Schedule::Ve, Schedule::Linear];
        [Vp, Ve, Iddpm, Edm].into_iter().flat_map(move |discretization| {
            schedules.into_iter().flat_map(move |schedule| {
                [Scaling::Vp, Scaling::None].into_iter().map(move |scaling| Ablation {
                    discretization,
                    schedule,
                    scaling,
                    ..Ablation::default()
                })
            })
        })
    }

    /// The relative error at the lowest level, before the step to 0, whose own error does not depend on the number of steps.
    fn error(ablation: &Ablation, num_steps: usize, table: &IddpmTable) -> f64 {
        let ablation = Ablation { num_steps, ..*ablation };
        let mut plan = ablation.plan(&EVERYWHERE, table).unwrap();
        let last = plan.steps.pop().unwrap();
        let (first_sigma, end) = (plan.steps[0].first.sigma, last.first.sigma);
        // Without churn nothing is drawn but what rounding asks for.
        assert!(plan.steps.iter().all(|step| step.noise_std <= 1e-6 * step.first.sigma), "{ablation:?}");
        let x = plan.execute(&Scalars::<f64>::new(), plan.start, denoise, |_| Ok(0.0)).unwrap();
        let exact = first_sigma * ((S * S + end * end) / (S * S + first_sigma * first_sigma)).sqrt();
        (x / last.first.scale / exact - 1.0).abs()
    }

    #[test]
    fn every_combination_has_its_order() {
        let table = IddpmTable::default();
        let orders = [
            (Solver::Euler, 1.0, 1.0),
            (Solver::Heun, 1.0, 2.0),
            (Solver::Heun, 0.6, 2.0),
            (Solver::Heun, 0.5, 2.0),
        ];
        let smooth = combinations().filter(|c| c.discretization != Discretization::Iddpm);
        for combination in smooth {
            for (solver, alpha, order) in orders {
                let ablation = Ablation { solver, alpha, ..combination };
                let [coarse, fine] = [513, 2049].map(|n| error(&ablation, n, &table));
                let measured = (coarse / fine).ln() / 4f64.ln();
                // The midpoint rule gains an order on some of these grids.
                assert!(measured > order - 0.1, "{measured}: {ablation:?}");
                assert!(alpha == 0.5 || measured < order + 0.1, "{measured}: {ablation:?}");
            }
        }
    }

    /// iDDPM's levels are rounded to those of a table, which leaves no clean order, and the error falls all the same.
    #[test]
    fn every_combination_approaches_the_flow_on_the_table_too() {
        let table = IddpmTable::default();
        for combination in combinations().filter(|c| c.discretization == Discretization::Iddpm) {
            for (solver, alpha, least) in
                [(Solver::Euler, 1.0, 5.0), (Solver::Heun, 1.0, 20.0), (Solver::Heun, 0.5, 20.0)]
            {
                let ablation = Ablation { solver, alpha, ..combination };
                let [coarse, fine] = [33, 257].map(|n| error(&ablation, n, &table));
                assert!(coarse > least * fine, "{coarse} {fine}: {ablation:?}");
            }
        }
    }

    /// With σ(t) = t and s = 1 it is EDM's own sampler, churn included.
    #[test]
    fn the_plain_coordinates_are_those_of_the_other_plans() {
        let churn = Churn { s_churn: 4.0, s_min: 0.05, s_max: 50.0, s_noise: 1.007 };
        let levels = KarrasGrid::EDM.with_zero(11);
        let plans = [
            (Solver::Euler, Churn::NONE, Plan::euler(&levels)),
            (Solver::Heun, churn, Plan::heun(&levels, &churn)),
        ];
        let wavy = |x: &f64, sigma: f64| Ok::<_, String>((x / (1.0 + sigma) + 0.2).tanh());
        let noise = |k: usize| Ok((k as f64 * 1.7).sin());
        for (solver, churn, plan) in plans {
            let plan = plan.unwrap();
            let ablation = Ablation { num_steps: 11, solver, churn, ..Ablation::default() };
            let other = ablation.plan(&EVERYWHERE, &IddpmTable::default()).unwrap();
            let noisy = other.steps().iter().filter(|step| step.noise_std > 0.0).count();
            assert_eq!((noisy, other.evaluations()), (plan.draws(), plan.evaluations()));
            let want = execute(&Scalars::<f64>::new(), &plan, 77.0, wavy, noise).unwrap();
            let got = other.execute(&Scalars::<f64>::new(), 77.0, wavy, noise).unwrap();
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
    }

    /// Noise leaves the distribution alone in all coordinates: the variance approaches that of the data.
    #[test]
    fn churn_keeps_the_variance_in_every_coordinate() {
        let churn = Churn { s_churn: 10.0, s_min: 0.05, s_max: 50.0, s_noise: 1.0 };
        for combination in combinations().filter(|c| c.discretization == Discretization::Edm) {
            let errors = [64, 256].map(|num_steps| {
                let ablation = Ablation { num_steps, churn, ..combination };
                let plan = ablation.plan(&EVERYWHERE, &IddpmTable::default()).unwrap();
                // The coefficients of the result on the start and on every draw.
                let unit = |k: usize, a: f64| {
                    let mut v = vec![0.0; num_steps + 1];
                    v[k] = a;
                    v
                };
                let gain = |sigma: f64| S * S / (S * S + sigma * sigma);
                let model =
                    |x: &Vec<f64>, sigma| Ok::<_, String>(x.iter().map(|c| c * gain(sigma)).collect());
                let space = Scalars::<Vec<f64>>::new();
                let end = plan.execute(&space, unit(0, plan.start), model, |k| Ok(unit(k + 1, 1.0))).unwrap();
                assert!(plan.steps.iter().filter(|step| step.noise_std > 1e-3).count() > num_steps / 2);
                (end.iter().map(|c| c * c).sum::<f64>() / (S * S) - 1.0).abs()
            });
            assert!(errors[1] < errors[0] / 3.0, "{errors:?}: {combination:?}");
        }
    }

    #[test]
    fn the_denoiser_bounds_the_levels() {
        let table = IddpmTable::default();
        for combination in combinations() {
            let plan = combination.plan(&(0.05..=40.0), &table).unwrap();
            let levels = plan.steps.iter().map(|step| step.first.sigma).collect::<Vec<_>>();
            let rounding = 1e-9;
            assert!(
                levels[0] <= 40.0 + rounding && levels[17] >= 0.05 - rounding,
                "{levels:?} {combination:?}"
            );
            assert!(levels.windows(2).all(|pair| pair[0] > pair[1]));
        }
        let nothing = Ablation::default().plan(&(90.0..=100.0), &table).unwrap_err().to_string();
        assert!(nothing.contains("sigma_max"), "{nothing}");
    }

    #[test]
    fn faulty_numbers_are_refused_by_name() {
        let good = Ablation::default();
        for (faulty, words) in [
            (Ablation { num_steps: 1, ..good }, "num_steps = 1"),
            (Ablation { alpha: 0.0, ..good }, "alpha = 0"),
            (Ablation { alpha: 1.5, ..good }, "alpha = 1.5"),
            (Ablation { epsilon_s: 1.0, ..good }, "epsilon_s = 1"),
            (Ablation { rho: f64::NAN, ..good }, "rho = NaN"),
            (Ablation { sigma_min: Some(90.0), ..good }, "sigma_max = 80"),
            (Ablation { num_steps: 2000, discretization: Discretization::Iddpm, ..good }, "sigmas["),
        ] {
            let error = faulty.plan(&EVERYWHERE, &IddpmTable::default()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
