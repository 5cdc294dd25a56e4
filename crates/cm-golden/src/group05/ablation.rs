//! 05d, fn ablation_sampler: EDM's ablations, all in float64.

use cm_model::{Cond, Denoiser, Sigma};
use cm_schedule::SigmaRange;
use cm_schedule::solver::reference::{Ablation, Discretization, IddpmTable, Scaling, Schedule, Solver};
use cm_schedule::solver::{Churn, Scalars};
use serde::Deserialize;
use tch::Tensor;

use super::{evaluations, image_shape};
use crate::analytic::{Analytic, Recorder};
use crate::close::{Tolerance, values};
use crate::golden::{Problem, Result, problem};
use crate::report::Checks;

/// Arguments of EDM's `ablation_sampler`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(non_snake_case, reason = "the reference's names")]
struct Arguments {
    num_steps: usize,
    sigma_min: Option<f64>,
    sigma_max: Option<f64>,
    rho: f64,
    solver: Solver,
    discretization: Discretization,
    schedule: Schedule,
    scaling: Scaling,
    epsilon_s: f64,
    C_1: f64,
    C_2: f64,
    M: usize,
    alpha: f64,
    S_churn: f64,
    S_min: f64,
    S_max: f64,
    S_noise: f64,
}

impl Default for Arguments {
    fn default() -> Self {
        let Ablation {
            num_steps,
            sigma_min,
            sigma_max,
            rho,
            solver,
            discretization,
            schedule,
            scaling,
            epsilon_s,
            alpha,
            churn,
        } = Ablation::default();
        Self {
            num_steps,
            sigma_min,
            sigma_max,
            rho,
            solver,
            discretization,
            schedule,
            scaling,
            epsilon_s,
            C_1: 0.001,
            C_2: 0.008,
            M: 1000,
            alpha,
            S_churn: churn.s_churn,
            S_min: churn.s_min,
            S_max: churn.s_max,
            S_noise: churn.s_noise,
        }
    }
}

impl Arguments {
    fn ablation(&self) -> Ablation {
        let (s_churn, s_min, s_max, s_noise) = (self.S_churn, self.S_min, self.S_max, self.S_noise);
        Ablation {
            num_steps: self.num_steps,
            sigma_min: self.sigma_min,
            sigma_max: self.sigma_max,
            rho: self.rho,
            solver: self.solver,
            discretization: self.discretization,
            schedule: self.schedule,
            scaling: self.scaling,
            epsilon_s: self.epsilon_s,
            alpha: self.alpha,
            churn: Churn { s_churn, s_min, s_max, s_noise },
        }
    }

    /// iDDPM's table with the sine of libtorch, which differs from others by an ulp and so moves the levels.
    fn table(&self) -> IddpmTable {
        let sin = |x: f32| Tensor::from(x).sin().double_value(&[]) as f32;
        IddpmTable::new(self.M, self.C_1, self.C_2, sin)
    }
}

/// Checks the sampler on the closed-form model.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let arguments: Arguments = golden.meta_json("args")?;
    let known = golden.meta("net_sigma_min")?..=golden.meta("net_sigma_max")?;
    let plan = arguments.ablation().plan(&known, &arguments.table())?;
    let latents = golden.input("latents")?;
    let start: Vec<f64> = values(&latents).iter().map(|z| z * plan.start()).collect();
    let model = Recorder::new(Analytic { shape: image_shape(golden, "latents")?, range: SigmaRange::EDM });
    let denoise = |x: &Vec<f64>, sigma: f64| -> Result<Vec<f64>> {
        let x = Tensor::from_slice(x).view(latents.size().as_slice());
        Ok(values(&model.denoise(&x, Sigma::One(sigma), &Cond::none())?))
    };
    // The reference draws at every step, and adds what it draws with a scale that may be 0.
    let draws = golden.input("noise")?;
    if draws.size().first() != Some(&(plan.steps().len() as i64)) {
        return problem(format!("noise of shape {:?} for {} steps", draws.size(), plan.steps().len()));
    }
    let noise = |step: usize| Ok::<_, Problem>(values(&draws.get(step as i64)));
    let end = plan.execute(&Scalars::<Vec<f64>>::new(), start, denoise, noise)?;
    let tolerance = Tolerance::Rel(golden.tolerance("fp64 rel")?);
    evaluations(checks, &model.into_calls(), tolerance)?;
    checks.values("out", &end, tolerance)?;
    Ok(())
}
