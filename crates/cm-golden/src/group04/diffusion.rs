//! 04c, losses EDMLoss, VELoss and VPLoss: diffusion training in EDM's repository.

use cm_model::{Backbone, Mode};
use cm_schedule::reference::Vp;
use cm_schedule::sigma_dist::LogNormal;
use cm_schedule::{SigmaRange, Weighting};
use cm_train::{Distance, Example, Pairs, denoising_loss};
use serde::Deserialize;
use tch::Tensor;

use super::{Watched, gradients};
use crate::close::Tolerance;
use crate::golden::{Golden, Result, problem};
use crate::group01;
use crate::group02::labels;
use crate::report::Checks;

/// The losses that [`check`] knows, by the reference's names.
pub const LOSSES: &[&str] = &["EDMLoss", "VELoss", "VPLoss"];

/// Arguments of `EDMLoss`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EdmArguments {
    #[serde(rename = "P_mean")]
    p_mean: f64,
    #[serde(rename = "P_std")]
    p_std: f64,
    sigma_data: f64,
}

impl Default for EdmArguments {
    fn default() -> Self {
        Self { p_mean: -1.2, p_std: 1.2, sigma_data: 0.5 }
    }
}

/// Arguments of `VELoss`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VeArguments {
    sigma_min: f64,
    sigma_max: f64,
}

impl Default for VeArguments {
    fn default() -> Self {
        Self { sigma_min: 0.02, sigma_max: 100.0 }
    }
}

/// Arguments of `VPLoss`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct VpArguments {
    beta_d: f64,
    beta_min: f64,
    epsilon_t: f64,
}

impl Default for VpArguments {
    fn default() -> Self {
        Self { beta_d: 19.9, beta_min: 0.1, epsilon_t: 1e-5 }
    }
}

/// The noise levels that the loss makes of its draws, their weighting, and σ_data for it.
fn levels(golden: &Golden) -> Result<(Vec<f64>, Weighting, f64)> {
    match golden.meta::<String>("loss")?.as_str() {
        "EDMLoss" => {
            let arguments: EdmArguments = golden.meta_json("loss_kwargs")?;
            let dist = LogNormal { mean: arguments.p_mean, std: arguments.p_std };
            let draws = golden.input_values("rnd_normal")?;
            let levels = draws.into_iter().map(|z| dist.sigma(z)).collect();
            Ok((levels, Weighting::Karras, arguments.sigma_data))
        }
        "VELoss" => {
            let VeArguments { sigma_min, sigma_max } = golden.meta_json("loss_kwargs")?;
            let draws = golden.input_values("rnd_uniform")?;
            let level = |u: f64| sigma_min * (sigma_max / sigma_min).powf(u);
            Ok((draws.into_iter().map(level).collect(), Weighting::Snr, 1.0))
        }
        "VPLoss" => {
            let arguments: VpArguments = golden.meta_json("loss_kwargs")?;
            let draws = golden.input_values("rnd_uniform")?;
            let time = |u: f64| 1.0 + u * (arguments.epsilon_t - 1.0);
            let (beta_d, beta_min) = (arguments.beta_d as f32, arguments.beta_min as f32);
            let level = |u: f64| f64::from(Vp::sigma_with(time(u) as f32, beta_d, beta_min));
            let levels = draws.into_iter().map(level).collect();
            Ok((levels, Weighting::Snr, 1.0))
        }
        other => problem(format!("the loss '{other}' is not known here")),
    }
}

/// The draws' noise levels, the network's input and output, the loss of every value, and the gradients of their mean.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let mut model = group01::model(golden)?;
    model.sigma_range = SigmaRange::EDM;
    let student = Watched::new(&model);
    let (sigmas, weighting, sigma_data) = levels(golden)?;
    let pairs = Pairs::new(sigmas.into_iter().map(|sigma| (sigma, 0.0)), weighting, sigma_data);
    let (images, noise) = (golden.input("images")?, golden.input("noise")?);
    let cond = labels(golden, "class_labels")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let losses = denoising_loss(&student, &example, &Distance::L2, Mode::Eval)?;

    let tolerance = Tolerance::Rel(golden.tolerance("loss rel")?);
    checks.values("sigma0", &pairs.sigma, tolerance)?;
    checks.tensor("net_in0", &student.calls.borrow()[0].0, tolerance)?;
    checks.tensor("net_out0", &losses.student, tolerance)?;
    let weights: Vec<f32> = pairs.weight.iter().map(|&weight| weight as f32).collect();
    let weights = Tensor::from_slice(&weights).view([-1, 1, 1, 1]);
    let each = (&losses.student - &losses.target).square() * weights;
    checks.tensor("loss", &each, tolerance)?;
    let mean = losses.per_sample.mean(None);
    checks.tensor("loss_mean", &mean, tolerance)?;
    mean.backward();
    let params = Backbone::params(&model.net);
    gradients(checks, params, "model.", Tolerance::Rel(golden.tolerance("grads rel")?))
}
