use super::execute::VectorSpace;
use super::plan::{Plan, Rule, Step};

/// What a [`Walk`] needs before it can go on.
#[derive(Debug, PartialEq)]
pub enum Ask<'w, V> {
    /// The model at (x, σ): D or f, as the plan needs.
    Model {
        /// Where.
        x: &'w V,
        /// At which noise level.
        sigma: f64,
    },
    /// Standard normal noise of the shape of the state.
    Noise {
        /// The step of the plan that adds it, counted from 0.
        step: usize,
    },
    /// Nothing: the walk is at its end.
    Nothing,
}

/// A walk along a plan that stops wherever it needs something from outside.
///
/// [`ask`](Self::ask) says what, [`answer`](Self::answer) goes on with it; between the two the caller may do as it
/// likes: call the model for several walks at once, show the state, or come back later. Noise is asked for only where
/// it is used. [`execute`](super::execute) is a loop around it.
///
/// ```
/// use cm_schedule::solver::{Ask, Plan, Renoise, Scalars, Walk};
/// // Two jumps: the model, noise to the second level, the model.
/// let plan = Plan::multistep(&[80.0, 0.8], 0.002, Renoise::ToLevel).unwrap();
/// let (space, mut walk) = (Scalars::<f64>::new(), Walk::new(&plan, 80.0));
/// assert_eq!(walk.ask(), Ask::Model { x: &80.0, sigma: 80.0 });
/// walk.answer(&space, 0.3);
/// assert_eq!(walk.ask(), Ask::Noise { step: 0 });
/// walk.answer(&space, 0.0);
/// assert_eq!(walk.ask(), Ask::Model { x: &0.3, sigma: 0.8 });
/// walk.answer(&space, 0.25);
/// assert_eq!(walk.ask(), Ask::Nothing);
/// assert_eq!(walk.into_state(), 0.25);
/// ```
#[derive(Debug)]
pub struct Walk<'p, V> {
    steps: &'p [Step],
    at: usize,
    stage: Stage<V>,
    /// The state; in [`Stage::Second`] the place of the second evaluation.
    x: V,
    /// The denoised image of the step before, for [`Rule::Multistep`].
    last: Option<V>,
}

/// Where in a step a walk is.
#[derive(Debug)]
enum Stage<V> {
    /// Before the noise that comes first.
    Churn,
    /// Before the first evaluation.
    First,
    /// Between the evaluations.
    Second { x_hat: V, denoised: V },
    /// Before the noise that comes last.
    Renoise,
}

impl<'p, V> Walk<'p, V> {
    /// A walk that begins with `x`, a state at the plan's first level.
    #[must_use]
    pub fn new(plan: &'p Plan, x: V) -> Self {
        let mut walk = Walk { steps: plan.steps(), at: 0, stage: Stage::Churn, x, last: None };
        walk.skip_noise_of_nothing();
        walk
    }

    /// What comes next.
    #[must_use]
    pub fn ask(&self) -> Ask<'_, V> {
        let Some(step) = self.steps.get(self.at) else { return Ask::Nothing };
        let x = &self.x;
        match self.stage {
            Stage::Churn | Stage::Renoise => Ask::Noise { step: self.at },
            Stage::First => Ask::Model { x, sigma: step.sigma_hat },
            Stage::Second { .. } => Ask::Model { x, sigma: step.second_sigma().unwrap_or(step.sigma_hat) },
        }
    }

    /// Goes on with what was asked for: an estimate of the model, or noise. At the end it changes nothing.
    pub fn answer<S: VectorSpace<Vector = V>>(&mut self, space: &S, value: V) {
        let Some(step) = self.steps.get(self.at) else { return };
        let noisy = |x: &V, std| space.combine(&[(1.0, x), (std, &value)]);
        self.stage = match std::mem::replace(&mut self.stage, Stage::Renoise) {
            Stage::Churn => {
                self.x = noisy(&self.x, step.churn_std);
                Stage::First
            }
            Stage::First => self.first(space, step, value),
            Stage::Second { x_hat, denoised } => {
                self.x = second(space, step, &x_hat, &denoised, (&self.x, &value));
                self.last = Some(denoised);
                Stage::Renoise
            }
            Stage::Renoise => {
                self.x = noisy(&self.x, step.renoise_std);
                self.at += 1;
                Stage::Churn
            }
        };
        self.skip_noise_of_nothing();
    }

    /// The state: that after the last step, where the walk is at its end.
    #[must_use]
    pub fn into_state(self) -> V {
        self.x
    }

    /// The first evaluation of a step from x̂ at σ̂ to σ'. Variable names follow the formulas of [`Rule`].
    fn first<S: VectorSpace<Vector = V>>(&mut self, space: &S, step: &Step, denoised: V) -> Stage<V> {
        let (from, to) = (step.sigma_hat, step.sigma_next);
        // Euler's line: x̂ + (σ − σ̂) (x̂ − D)/σ̂.
        let line =
            |x_hat: &V, d: &V, sigma: f64| space.combine(&[(sigma / from, x_hat), (1.0 - sigma / from, d)]);
        let x_next = match step.rule {
            Rule::Jump => {
                (self.x, self.last) = (denoised, None);
                return Stage::Renoise;
            }
            Rule::Heun | Rule::Midpoint { .. } => {
                let second = line(&self.x, &denoised, step.second_sigma().unwrap_or(to));
                return Stage::Second { x_hat: std::mem::replace(&mut self.x, second), denoised };
            }
            Rule::Euler => line(&self.x, &denoised, to),
            Rule::Multistep { weight } => {
                // A plan that begins with this rule has nothing to extrapolate from, and 1 + w − w = 1.
                let last = self.last.as_ref().unwrap_or(&denoised);
                line(&self.x, &space.combine(&[(1.0 + weight, &denoised), (-weight, last)]), to)
            }
        };
        (self.x, self.last) = (x_next, Some(denoised));
        Stage::Renoise
    }

    /// Noise of standard deviation 0 is not asked for.
    fn skip_noise_of_nothing(&mut self) {
        while let Some(step) = self.steps.get(self.at) {
            match self.stage {
                Stage::Churn if step.churn_std == 0.0 => self.stage = Stage::First,
                Stage::Renoise if step.renoise_std == 0.0 => {
                    (self.at, self.stage) = (self.at + 1, Stage::Churn)
                }
                _ => return,
            }
        }
    }
}

/// The state after the second evaluation, which gave `estimate` at `x`.
fn second<S: VectorSpace>(
    space: &S,
    step: &Step,
    x_hat: &S::Vector,
    denoised: &S::Vector,
    (x, estimate): (&S::Vector, &S::Vector),
) -> S::Vector {
    let (from, to) = (step.sigma_hat, step.sigma_next);
    match step.rule {
        Rule::Midpoint { sigma_mid } => {
            // x̂ + (σ' − σ̂) (x_mid − D_mid)/σ_mid.
            let slope = (to - from) / sigma_mid;
            space.combine(&[(1.0, x_hat), (slope, x), (-slope, estimate)])
        }
        _ => {
            // x̂ + (σ' − σ̂)/2 · ((x̂ − D)/σ̂ + (x_euler − D')/σ').
            let half = 0.5 * (to - from);
            space.combine(&[
                (1.0 + half / from, x_hat),
                (-half / from, denoised),
                (half / to, x),
                (-half / to, estimate),
            ])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KarrasGrid;
    use crate::solver::{Churn, Renoise, Scalars};

    /// A walk asks the model at the levels of the plan, and for noise at the steps that add some, once each.
    #[test]
    fn a_walk_asks_for_what_the_plan_says() {
        let churn = Churn { s_churn: 3.0, s_min: 0.1, s_max: 30.0, s_noise: 1.0 };
        let levels = KarrasGrid::EDM.with_zero(7);
        let plans = [
            Plan::euler(&levels),
            Plan::heun(&levels, &churn),
            Plan::dpm2(&levels, &churn),
            Plan::ancestral(&levels),
            Plan::dpmpp_2m(&levels),
            Plan::multistep(&[80.0, 5.0, 0.7], 0.002, Renoise::ToLevel),
            Plan::multistep_indices(&KarrasGrid::EDM, 40, &[0, 22, 30]),
        ];
        for plan in plans.map(Result::unwrap) {
            let (space, mut walk) = (Scalars::<f64>::new(), Walk::new(&plan, 80.0));
            let (mut sigmas, mut noisy) = (Vec::new(), Vec::new());
            loop {
                match walk.ask() {
                    Ask::Model { sigma, .. } => sigmas.push(sigma),
                    Ask::Noise { step } => noisy.push(step),
                    Ask::Nothing => break,
                }
                walk.answer(&space, 0.1);
            }
            assert_eq!(sigmas, plan.evaluation_sigmas());
            let adds = |k: &usize| plan.steps()[*k].churn_std > 0.0 || plan.steps()[*k].renoise_std > 0.0;
            assert_eq!(noisy, (0..plan.steps().len()).filter(adds).collect::<Vec<_>>());
        }
    }

    /// Two walks that take turns end where each would alone: a walk keeps all that it needs to itself.
    #[test]
    fn walks_that_take_turns_do_not_meet() {
        let plans = [
            Plan::heun(&KarrasGrid::EDM.with_zero(5), &Churn::NONE).unwrap(),
            Plan::dpmpp_2m(&KarrasGrid::EDM.with_zero(9)).unwrap(),
        ];
        let space = Scalars::<f64>::new();
        let denoise = |x: f64, sigma: f64| (x / (1.0 + sigma)).tanh();
        let step = |walk: &mut Walk<'_, f64>| {
            let Ask::Model { x, sigma } = walk.ask() else { return false };
            let estimate = denoise(*x, sigma);
            walk.answer(&space, estimate);
            true
        };
        let alone = plans.each_ref().map(|plan| {
            let mut walk = Walk::new(plan, 70.0);
            while step(&mut walk) {}
            walk.into_state()
        });
        let mut walks = plans.each_ref().map(|plan| Walk::new(plan, 70.0));
        loop {
            let going = walks.each_mut().map(step);
            if going == [false, false] {
                break;
            }
        }
        assert_eq!(walks.map(Walk::into_state), alone);
    }

    #[test]
    fn an_answer_at_the_end_changes_nothing() {
        let plan = Plan::euler(&[2.0, 0.0]).unwrap();
        let (space, mut walk) = (Scalars::<f64>::new(), Walk::new(&plan, 2.0));
        walk.answer(&space, 0.3);
        assert_eq!(walk.ask(), Ask::Nothing);
        walk.answer(&space, 9.0);
        assert_eq!(walk.into_state(), 0.3);
    }
}
