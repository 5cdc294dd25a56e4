//! Group 02: OpenAI's network and its denoiser in both parameterisations.

use cm_model::{Backbone, Cond, Mode, Preconditioned, Sigma};
use cm_schedule::{Boundary, Edm, NoiseCond, Precond, Scalings, SigmaRange};
use tch::{Device, Tensor};

use crate::close::Tolerance;
use crate::golden::{Golden, Result};
use crate::group01::{activations, statistics};
use crate::nets::{AnyPrecond, openai_network};
use crate::report::Checks;

/// Labels of the tensor `name`, if the file has it.
pub(crate) fn labels(golden: &Golden, name: &str) -> Result<Cond> {
    let labels = if golden.has(name) { Some(golden.input(name)?) } else { None };
    Ok(Cond { labels, augment: None })
}

/// 02: the raw network, then the denoiser (`plain`) and the consistency function (`distill`) around it.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Rel(golden.tolerance("max abs <")?);
    let net = openai_network(golden)?;
    let _no_grad = tch::no_grad_guard();
    let (x, timesteps, cond) = (golden.input("x")?, golden.input("timesteps")?, labels(golden, "y")?);
    checks.tensor("emb", &net.embed(&timesteps, &cond, false)?, tolerance)?;
    let mut blocks = Vec::new();
    let probe = &mut |name: &str, x: &Tensor| blocks.push((name.to_owned(), statistics(x)));
    checks.tensor("output", &net.raw(&x, &timesteps, &cond, false, probe)?, tolerance)?;
    activations(checks, &blocks, tolerance)?;
    golden.information(
        "output_half_attention",
        "how far the released code, which casts q, k and v to half precision, lies from exact attention",
    );
    let (sigma_data, sigma_min): (f64, f64) = (golden.meta("sigma_data")?, golden.meta("sigma_min")?);
    let range = SigmaRange::new(sigma_min, golden.meta("sigma_max")?)?;
    let cond_of_noise = NoiseCond::ThousandQuarterLog;
    let edm = AnyPrecond::Edm(Edm::new(sigma_data, cond_of_noise)?);
    let boundary = AnyPrecond::Boundary(Boundary::new(sigma_data, sigma_min, cond_of_noise)?);
    let model = Preconditioned::new(net, edm, range);
    let net = denoiser(checks, "plain", model, tolerance)?;
    denoiser(checks, "distill", Preconditioned::new(net, boundary, range), tolerance)?;
    Ok(())
}

/// The tensors `<form>.*`; gives the network back.
fn denoiser<N: Backbone>(
    checks: &mut Checks<'_>,
    form: &str,
    model: Preconditioned<N, AnyPrecond>,
    tolerance: Tolerance,
) -> Result<N> {
    let golden = checks.golden;
    let x = golden.input("denoise_x_t")?;
    let sigmas = golden.input_values("denoise_sigmas")?;
    let cond = labels(golden, "denoise_y")?;
    let sigma = Sigma::Each(&sigmas);
    let scalar = |part: fn(Scalings) -> f64| sigma.flat(Device::Cpu, |s| part(model.precond.scalings(s)));
    checks.tensor(&format!("{form}.c_skip"), &scalar(|s| s.c_skip), tolerance)?;
    checks.tensor(&format!("{form}.c_out"), &scalar(|s| s.c_out), tolerance)?;
    checks.tensor(&format!("{form}.c_in"), &scalar(|s| s.c_in), tolerance)?;
    checks.tensor("rescaled_t", &scalar(|s| s.c_noise), tolerance)?;
    // From the recorded scalars: a float32 noise label of 1000 is rounded by 6e-5, which the network sees.
    let input = &x * golden.want(&format!("{form}.c_in"))?.view([-1, 1, 1, 1]);
    let raw = model.net.forward(&input, &golden.want("rescaled_t")?, &cond, false)?;
    checks.tensor(&format!("{form}.model_output"), &raw, tolerance)?;
    let denoised = model.evaluate(&x, sigma, &cond, Mode::Eval)?;
    checks.tensor(&format!("{form}.denoised"), &denoised, tolerance)?;
    Ok(model.net)
}
