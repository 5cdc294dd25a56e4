use crate::error::{Error, Result, ensure, ensure_positive, validated_serde};
use crate::sigma::KarrasGrid;
use serde::{Deserialize, Serialize};

/// How the deterministic part of a step goes from x̂ at σ̂ to the next level σ'.
///
/// With d(x, σ) = (x − D(x; σ))/σ, the derivative dx/dσ of the probability-flow ODE (EDM, eq. 1 with σ(t) = t).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// x' = f(x̂, σ̂): the consistency function's own jump. One evaluation.
    Jump,
    /// x' = x̂ + (σ' − σ̂) d(x̂, σ̂). One evaluation; at σ' = 0 this is D(x̂; σ̂).
    Euler,
    /// Euler's x', then x' = x̂ + (σ' − σ̂) (d(x̂, σ̂) + d(x', σ'))/2. Two evaluations; σ' > 0.
    Heun,
    /// Euler to σ_mid, then x' = x̂ + (σ' − σ̂) d(x_mid, σ_mid). Two evaluations.
    Midpoint {
        /// The level of the second evaluation, between σ̂ and σ'.
        sigma_mid: f64,
    },
    /// x' = (σ'/σ̂) x̂ + (1 − σ'/σ̂) ((1 + w) D − w D_last), with D_last from the step before. One evaluation.
    Multistep {
        /// w: how far D is extrapolated away from D_last.
        weight: f64,
    },
}

impl Rule {
    /// How often a step of this rule calls the model.
    #[must_use]
    pub fn evaluations(self) -> usize {
        match self {
            Rule::Jump | Rule::Euler | Rule::Multistep { .. } => 1,
            Rule::Heun | Rule::Midpoint { .. } => 2,
        }
    }
}

/// One step of a [`Plan`]: add noise, follow the rule, add noise.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Standard deviation of the noise that is added first; 0 asks for none.
    pub churn_std: f64,
    /// σ̂: the noise level after it, at which the model is called first.
    pub sigma_hat: f64,
    /// The deterministic part.
    pub rule: Rule,
    /// σ': the level at which it ends.
    pub sigma_next: f64,
    /// Standard deviation of the noise that is added last; 0 asks for none.
    pub renoise_std: f64,
}

impl Step {
    fn new(sigma_hat: f64, rule: Rule, sigma_next: f64) -> Self {
        Step { churn_std: 0.0, sigma_hat, rule, sigma_next, renoise_std: 0.0 }
    }

    /// The second of two evaluations (its level), if there are two.
    pub(super) fn second_sigma(&self) -> Option<f64> {
        match self.rule {
            Rule::Heun => Some(self.sigma_next),
            Rule::Midpoint { sigma_mid } => Some(sigma_mid),
            Rule::Jump | Rule::Euler | Rule::Multistep { .. } => None,
        }
    }
}

/// Noise that a stochastic sampler adds before each step, to forget the errors of earlier ones.
///
/// Inside `s_min` ≤ σ ≤ `s_max` the level is raised to σ̂ = (1 + γ) σ with γ = min(`s_churn`/steps, √2 − 1), by
/// noise of standard deviation `s_noise` √(σ̂² − σ²).
///
/// In a file: `{ s_churn = 40.0, s_min = 0.05, s_max = 50.0, s_noise = 1.003 }`, EDM's setting for ImageNet-64.
///
/// # Source
/// EDM (arXiv 2206.00364) algorithm 2.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Churn {
    /// How much noise in all; 0 for a deterministic sampler.
    pub s_churn: f64,
    /// Lowest level at which noise is added.
    pub s_min: f64,
    /// Highest level at which noise is added; finite, so that it can be written into any file.
    pub s_max: f64,
    /// Factor on the noise, slightly above 1 to make up for a denoiser that removes too much.
    pub s_noise: f64,
}
validated_serde!(Churn);

impl Churn {
    /// No noise: the deterministic sampler.
    pub const NONE: Churn = Churn { s_churn: 0.0, s_min: 0.0, s_max: f64::MAX, s_noise: 1.0 };

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        let advice = "0 adds no noise; EDM uses 40 for ImageNet-64";
        ensure(
            self.s_churn >= 0.0 && self.s_churn.is_finite(),
            "s_churn",
            self.s_churn,
            "0 or more",
            advice,
        )?;
        ensure(
            self.s_min >= 0.0,
            "s_min",
            self.s_min,
            "0 or more",
            "it is the lowest level that gets noise",
        )?;
        let advice = "it is the highest level that gets noise; for no limit give a large number";
        let in_order = self.s_max >= self.s_min && self.s_max.is_finite();
        ensure(
            in_order,
            "s_max",
            self.s_max,
            format!("a finite number from s_min = {} up", self.s_min),
            advice,
        )?;
        ensure_positive("s_noise", self.s_noise, "1 keeps the variance; EDM uses 1.003 to 1.007")
    }

    /// γ at a level, for a sampler of `steps` steps.
    #[must_use]
    pub fn gamma(&self, sigma: f64, steps: usize) -> f64 {
        if (self.s_min..=self.s_max).contains(&sigma) {
            (self.s_churn / steps as f64).min(std::f64::consts::SQRT_2 - 1.0)
        } else {
            0.0
        }
    }

    /// A step from `sigma` whose rule is still to be chosen.
    fn step(&self, sigma: f64, sigma_next: f64, steps: usize) -> Step {
        let sigma_hat = sigma * (1.0 + self.gamma(sigma, steps));
        let churn_std = (sigma_hat * sigma_hat - sigma * sigma).sqrt() * self.s_noise;
        Step { churn_std, ..Step::new(sigma_hat, Rule::Euler, sigma_next) }
    }
}

/// How much noise multistep consistency sampling adds to reach the next level τ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Renoise {
    /// √(τ² − σ_min²): the jump ends at σ_min, so that the sum has level τ exactly. Consistency Models.
    ToLevel,
    /// τ, as if the jump ended at 0: ECT's released sampler. At τ = 0.821 the difference is 2.4·10⁻⁶.
    Full,
}

impl Renoise {
    /// The standard deviation of the noise for level `sigma`.
    #[must_use]
    pub fn std(self, sigma: f64, sigma_min: f64) -> f64 {
        match self {
            Renoise::ToLevel => (sigma * sigma - sigma_min * sigma_min).max(0.0).sqrt(),
            Renoise::Full => sigma,
        }
    }
}

/// The steps of a sampler, in order.
///
/// ```
/// use cm_schedule::{KarrasGrid, solver::{Churn, Plan}};
/// // EDM's deterministic sampler on 18 levels: 35 evaluations, no noise.
/// let plan = Plan::heun(&KarrasGrid::EDM.with_zero(18), &Churn::NONE).unwrap();
/// assert_eq!((plan.evaluations(), plan.draws()), (35, 0));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    steps: Vec<Step>,
}

impl Plan {
    /// The Euler method along falling levels, the last of which may be 0.
    ///
    /// # Errors
    /// When there are fewer than two levels, when they do not fall, or when one is not finite and above 0 (the last
    /// may be 0).
    pub fn euler(levels: &[f64]) -> Result<Self> {
        let steps = intervals(levels)?.map(|(sigma, next)| Step::new(sigma, Rule::Euler, next)).collect();
        Ok(Plan { steps })
    }

    /// Heun's method, deterministic (EDM algorithm 1) or with churn (algorithm 2). A step to 0 is Euler's, because
    /// there is no derivative at 0.
    ///
    /// # Errors
    /// As [`euler`](Self::euler), and when `churn` does not [`validate`](Churn::validate).
    pub fn heun(levels: &[f64], churn: &Churn) -> Result<Self> {
        churn.validate()?;
        let n = levels.len().saturating_sub(1);
        let steps = intervals(levels)?.map(|(sigma, next)| {
            let rule = if next > 0.0 { Rule::Heun } else { Rule::Euler };
            Step { rule, ..churn.step(sigma, next, n) }
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// DPM-2 as Karras et al. restate it: the midpoint rule with σ_mid = ((σ̂^⅓ + σ'^⅓)/2)³, also on a step to 0.
    ///
    /// # Errors
    /// As [`heun`](Self::heun).
    pub fn dpm2(levels: &[f64], churn: &Churn) -> Result<Self> {
        churn.validate()?;
        let n = levels.len().saturating_sub(1);
        let steps = intervals(levels)?.map(|(sigma, next)| {
            let step = churn.step(sigma, next, n);
            let sigma_mid = f64::midpoint(step.sigma_hat.cbrt(), next.cbrt()).powi(3);
            Step { rule: Rule::Midpoint { sigma_mid }, ..step }
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// Euler-ancestral: Euler to σ_down below the next level σ', then noise σ_up back to it, with
    /// σ_up = σ' √(1 − σ'²/σ²) and σ_down² = σ'² − σ_up². No noise is asked for on a step to 0.
    ///
    /// # Errors
    /// As [`euler`](Self::euler).
    pub fn ancestral(levels: &[f64]) -> Result<Self> {
        let steps = intervals(levels)?.map(|(sigma, next)| {
            let up = next * (1.0 - (next / sigma).powi(2)).sqrt();
            let down = (next * next - up * up).max(0.0).sqrt();
            Step { renoise_std: up, ..Step::new(sigma, Rule::Euler, down) }
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// DPM-Solver++(2M): with λ = −ln σ, each step extrapolates the denoised image linearly in λ from the last two.
    /// The first step and a step to 0 are first order, where the rule is Euler's.
    ///
    /// # Source
    /// Lu et al., arXiv 2211.01095, algorithm 2, in the form of k-diffusion.
    ///
    /// # Errors
    /// As [`euler`](Self::euler).
    pub fn dpmpp_2m(levels: &[f64]) -> Result<Self> {
        let mut last_h = None;
        let steps = intervals(levels)?.map(|(sigma, next)| {
            let h = (sigma / next).ln();
            let rule = match last_h {
                Some(last_h) if next > 0.0 => Rule::Multistep { weight: h / (2.0 * last_h) },
                _ => Rule::Euler,
            };
            last_h = Some(h);
            Step::new(sigma, rule, next)
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// Multistep consistency sampling: a jump at each of the falling `levels`, and noise to the next level between.
    /// One level is one-step sampling, which asks for no noise.
    ///
    /// # Source
    /// Consistency Models (arXiv 2303.01469) algorithm 1.
    ///
    /// # Errors
    /// When there is no level, when they do not fall, or when one is not above `sigma_min`.
    ///
    /// ```
    /// use cm_schedule::solver::{Plan, Renoise};
    /// let plan = Plan::multistep(&[80.0, 0.821], 0.002, Renoise::ToLevel).unwrap();
    /// assert_eq!((plan.evaluations(), plan.draws()), (2, 1));
    /// assert_eq!(plan.steps()[0].renoise_std, (0.821f64.powi(2) - 0.002f64.powi(2)).sqrt());
    /// ```
    pub fn multistep(levels: &[f64], sigma_min: f64, renoise: Renoise) -> Result<Self> {
        check_falling(levels, 1, "a consistency sampler jumps from at least one level")?;
        ensure_positive("sigma_min", sigma_min, crate::sigma::SIGMA_MIN_ADVICE)?;
        if let Some(index) = levels.iter().position(|&sigma| sigma <= sigma_min) {
            let expected = "expected a level above sigma_min, where the consistency function is the identity";
            return Err(Error::Levels { index, value: levels[index], expected });
        }
        let steps = levels.iter().enumerate().map(|(i, &sigma)| {
            let renoise_std = levels.get(i + 1).map_or(0.0, |&next| renoise.std(next, sigma_min));
            Step { renoise_std, ..Step::new(sigma, Rule::Jump, sigma_min) }
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// Multistep sampling by positions on the grid of `n` levels, in the convention of OpenAI's released sampler:
    /// rising indices, 0 = σ_max, and the **last one is never jumped from**: it only says which noise level the
    /// result has. n − 1, which is σ_min, leaves no noise; `[0, 22, 39]` of 40 is a two-step sampler.
    ///
    /// # Errors
    /// When there are fewer than two indices, when they do not rise, or when one is not below `n`.
    ///
    /// ```
    /// use cm_schedule::{KarrasGrid, solver::Plan};
    /// let plan = Plan::multistep_indices(&KarrasGrid::EDM, 40, &[0, 22, 39]).unwrap();
    /// assert_eq!((plan.evaluations(), plan.draws()), (2, 1));
    /// ```
    pub fn multistep_indices(grid: &KarrasGrid, n: usize, indices: &[usize]) -> Result<Self> {
        if indices.len() < 2 {
            let advice =
                "the last index is the noise level of the result, so one step needs two: 0 and steps - 1";
            return Err(Error::TooFew { key: "ts", got: indices.len(), least: 2, advice });
        }
        for (i, &index) in indices.iter().enumerate() {
            let least = if i == 0 { 0 } else { indices[i - 1] + 1 };
            let expected = format!("an index from {least} to {} at position {i}", n.saturating_sub(1));
            let advice = "indices rise from 0 (sigma_max) to steps - 1 (sigma_min)";
            ensure(index >= least && index < n, "ts", index as f64, expected, advice)?;
        }
        let sigma_min = grid.range().min();
        let steps = indices.windows(2).map(|pair| {
            let [sigma, next] = [pair[0], pair[1]].map(|index| grid.at(index, n));
            let renoise_std = Renoise::ToLevel.std(next, sigma_min);
            Step { renoise_std, ..Step::new(sigma, Rule::Jump, sigma_min) }
        });
        Ok(Plan { steps: steps.collect() })
    }

    /// The steps, in order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// How often the model is called: the cost of a sample.
    #[must_use]
    pub fn evaluations(&self) -> usize {
        self.steps.iter().map(|step| step.rule.evaluations()).sum()
    }

    /// The noise levels at which the model is called, in order.
    #[must_use]
    pub fn evaluation_sigmas(&self) -> Vec<f64> {
        self.steps.iter().flat_map(|step| [Some(step.sigma_hat), step.second_sigma()]).flatten().collect()
    }

    /// How often noise is asked for, the start not counted.
    #[must_use]
    pub fn draws(&self) -> usize {
        self.steps.iter().flat_map(|step| [step.churn_std, step.renoise_std]).filter(|&std| std > 0.0).count()
    }
}

/// The neighbouring pairs of falling levels, the last of which may be 0.
fn intervals(levels: &[f64]) -> Result<impl Iterator<Item = (f64, f64)>> {
    check_falling(levels, 2, "a step goes from one noise level to the next")?;
    Ok(levels.windows(2).map(|pair| (pair[0], pair[1])))
}

pub(super) fn check_falling(levels: &[f64], least: usize, advice: &'static str) -> Result<()> {
    if levels.len() < least {
        return Err(Error::TooFew { key: "sigmas", got: levels.len(), least, advice });
    }
    for (index, &value) in levels.iter().enumerate() {
        let falls = index == 0 || value < levels[index - 1];
        let last = index > 0 && index + 1 == levels.len();
        let positive = value > 0.0 || last && value == 0.0;
        if !(falls && positive && value.is_finite()) {
            let expected = "expected finite levels above 0 that fall; only the last may be 0";
            return Err(Error::Levels { index, value, expected });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn evaluations_and_levels() {
        let levels = KarrasGrid::EDM.with_zero(4);
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| levels[i]);
        let heun = Plan::heun(&levels, &Churn::NONE).unwrap();
        assert_eq!(heun.evaluation_sigmas(), [a, b, b, c, c, d, d]);
        assert_eq!(Plan::euler(&levels).unwrap().evaluation_sigmas(), [a, b, c, d]);
        assert_eq!(Plan::dpmpp_2m(&levels).unwrap().evaluation_sigmas(), [a, b, c, d]);
        let dpm2 = Plan::dpm2(&levels, &Churn::NONE).unwrap();
        assert_eq!(dpm2.evaluations(), 8);
        // The step to 0 has its middle at σ/8.
        assert!((dpm2.evaluation_sigmas()[7] / d - 0.125).abs() < 1e-15);
        for plan in [heun, dpm2] {
            assert_eq!(plan.draws(), 0);
        }
    }

    /// Noise is added inside the interval alone; the level after it is the one the model is called at.
    #[test]
    fn churn_keeps_the_variance() {
        let levels = KarrasGrid::EDM.with_zero(14);
        let churn = Churn { s_churn: 2.1, s_min: 0.05, s_max: 50.0, s_noise: 1.0 };
        let plan = Plan::heun(&levels, &churn).unwrap();
        for (step, sigma) in plan.steps().iter().zip(&levels) {
            let inside = (0.05..=50.0).contains(sigma);
            assert_eq!(step.churn_std > 0.0, inside);
            assert!((sigma.hypot(step.churn_std) / step.sigma_hat - 1.0).abs() < 1e-12);
            assert!((step.sigma_hat / sigma - if inside { 1.15 } else { 1.0 }).abs() < 1e-12);
        }
        // γ never exceeds √2 − 1, where the variance doubles.
        let strong = Churn { s_churn: 1e6, ..Churn::NONE };
        assert!((strong.gamma(1.0, 18) - 0.414_213_56).abs() < 1e-8);
    }

    /// The OpenAI sampler with unit noise on the identity: golden value 1.38236651 = √(σ_22² − σ_min²).
    #[test]
    fn the_last_index_is_only_a_noise_level() {
        let plan = Plan::multistep_indices(&KarrasGrid::EDM, 40, &[0, 22, 39]).unwrap();
        assert_eq!(plan.evaluation_sigmas(), [80.0, KarrasGrid::EDM.at(22, 40)]);
        let total: f64 = plan.steps().iter().map(|step| step.renoise_std).sum();
        assert!((total - 1.382_366_51).abs() < 1e-8, "{total}");
        assert_eq!(plan.steps()[1].renoise_std, 0.0);
        // Another last index leaves its noise on the result.
        let noisy = Plan::multistep_indices(&KarrasGrid::EDM, 40, &[0, 38]).unwrap();
        assert!(noisy.steps()[0].renoise_std > 0.0);
    }

    #[test]
    fn one_step_asks_for_no_noise() {
        for plan in [
            Plan::multistep(&[80.0], 0.002, Renoise::ToLevel).unwrap(),
            Plan::multistep_indices(&KarrasGrid::EDM, 40, &[0, 39]).unwrap(),
        ] {
            assert_eq!((plan.evaluation_sigmas(), plan.draws()), (vec![80.0], 0));
        }
    }

    #[test]
    fn ect_adds_the_whole_level() {
        let plan = Plan::multistep(&[80.0, 0.821], 0.002, Renoise::Full).unwrap();
        assert_eq!(plan.steps()[0].renoise_std, 0.821);
        let song = Renoise::ToLevel.std(0.821, 0.002);
        assert!((0.821 - song - 2.4e-6).abs() < 1e-7);
    }

    #[test]
    fn faulty_levels_are_refused_where_they_are() {
        let at = |levels: &[f64]| match Plan::euler(levels).unwrap_err() {
            Error::Levels { index, .. } => Some(index),
            _ => None,
        };
        assert_eq!(at(&[]), None);
        assert_eq!(at(&[80.0]), None);
        assert_eq!(at(&[1.0, 2.0]), Some(1));
        assert_eq!(at(&[1.0, 0.0, 0.0]), Some(1));
        assert_eq!(at(&[f64::INFINITY, 1.0]), Some(0));
        assert_eq!(at(&[1.0, f64::NAN]), Some(1));
        assert_eq!(at(&[1.0, -1.0]), Some(1));
        let consistency = |levels: &[f64]| Plan::multistep(levels, 0.002, Renoise::ToLevel);
        assert!(matches!(consistency(&[80.0, 0.002]), Err(Error::Levels { index: 1, .. })));
        assert!(matches!(consistency(&[80.0, 0.0]), Err(Error::Levels { index: 1, .. })));
        assert!(matches!(consistency(&[]), Err(Error::TooFew { .. })));
        assert!(Plan::multistep(&[80.0], 0.0, Renoise::Full).unwrap_err().to_string().contains("log(0)"));
    }

    #[test]
    fn faulty_indices_are_refused() {
        let error = |indices: &[usize]| {
            Plan::multistep_indices(&KarrasGrid::EDM, 40, indices).unwrap_err().to_string()
        };
        assert!(error(&[0]).contains("ts has 1 entries"));
        assert!(error(&[0, 40]).contains("ts = 40: expected an index from 1 to 39 at position 1"));
        assert!(error(&[0, 22, 22]).contains("ts = 22: expected an index from 23 to 39 at position 2"));
    }

    #[test]
    fn churn_in_files_is_checked() {
        let text = r#"{"s_churn":40.0,"s_min":0.05,"s_max":50.0,"s_noise":1.003}"#;
        let churn: Churn = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&churn).unwrap(), text);
        let none = serde_json::to_string(&Churn::NONE).unwrap();
        assert_eq!(serde_json::from_str::<Churn>(&none).unwrap(), Churn::NONE);
        for (from, to) in
            [("40.0", "-1.0"), ("50.0", "0.01"), ("1.003", "0"), ("0.05", "-1"), ("s_noise", "noise")]
        {
            assert!(serde_json::from_str::<Churn>(&text.replace(from, to)).is_err(), "{from}");
        }
        assert!(Plan::heun(&[1.0, 0.0], &Churn { s_noise: f64::NAN, ..churn }).is_err());
    }

    proptest! {
        /// Euler to σ_down and noise σ_up reach the next level: σ_down² + σ_up² = σ'², and nothing at 0.
        #[test]
        fn ancestral_steps_reach_their_level(n in 2usize..60) {
            let levels = KarrasGrid::EDM.with_zero(n);
            let plan = Plan::ancestral(&levels).unwrap();
            for (step, next) in plan.steps().iter().zip(&levels[1..]) {
                prop_assert!((step.sigma_next.hypot(step.renoise_std) - next).abs() <= 1e-12 * next);
                prop_assert!(step.sigma_next <= *next && step.sigma_next < step.sigma_hat);
            }
            prop_assert_eq!(plan.draws(), n - 1);
        }
    }
}
