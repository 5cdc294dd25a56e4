//! Group 07: LPIPS on networks whose weights are stated by a rule.

use cm_net::Lpips;
use cm_net::lpips::{Form, LpipsReading, PixelRange, Pooling, bundled_lins};
use tch::{Kind, Tensor};

use crate::close::Tolerance;
use crate::golden::{Result, problem};
use crate::hashed;
use crate::report::Checks;

/// The metadata value `net` of the files of the authors' package.
pub const PACKAGE_NETS: &[&str] = &["alex", "squeeze", "vgg"];

/// The bundled heads are those of the file.
fn heads(checks: &mut Checks<'_>, lpips: &Lpips) -> Result<()> {
    for (name, lin) in bundled_lins(lpips.net())? {
        checks.tensor(&name, &lin, Tolerance::Exact)?;
    }
    Ok(())
}

/// Σ of the distances and the gradient of it to the first images.
fn with_gradient(lpips: &Lpips, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let a = a.copy().set_requires_grad(true);
    let layers = lpips.per_layer(&a, b)?;
    layers.sum(Kind::Float).backward();
    Ok((layers.detach(), a.grad()))
}

fn total(layers: &Tensor) -> Tensor {
    layers.sum_dim_intlist([0].as_slice(), false, Kind::Float)
}

/// 07_lpips: the authors' package at several sizes.
pub fn package(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if golden.meta_text("version") != Some("0.1") {
        return problem(format!("version {:?} of the heads is not known here", golden.meta_text("version")));
    }
    let tolerance = Tolerance::Rel(golden.tolerance("fp32 rel")?);
    let lpips = hashed::lpips(golden, LpipsReading::Package)?;
    heads(checks, &lpips)?;
    hashed::check_first_values(checks, lpips.params())?;
    let resolutions: Vec<i64> = golden.meta_json("resolutions")?;
    let images = |name: &str, side: i64| golden.input(&format!("{name}.{side}"));
    for side in &resolutions {
        let (x, y) = (images("x", *side)?, images("y", *side)?);
        let (layers, gradient) = with_gradient(&lpips, &x, &y)?;
        checks.tensor(&format!("per_layer.{side}"), &layers, tolerance)?;
        checks.tensor(&format!("lpips.{side}"), &total(&layers), tolerance)?;
        checks.tensor(&format!("grad_x.{side}"), &gradient, tolerance)?;
    }
    let lpips = lpips.with_form(Form { given: PixelRange::Unit, ..Form::of(LpipsReading::Package) });
    for side in resolutions {
        let [x, y] = [images("x", side)?, images("y", side)?].map(|images| (images + 1.0) / 2.0);
        checks.tensor(&format!("lpips_normalize01.{side}"), &lpips.distance(&x, &y)?, tolerance)?;
    }
    Ok(())
}

/// Of the enlarged image every so many pixels are recorded.
const RECORDED_STRIDE: i64 = 16;

/// 07_openai_lpips: the reading of the released consistency-model code, and its neighbours.
pub fn openai(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if !golden.meta::<bool>("replace_pooling")? {
        return problem("the released code replaces max pooling by average pooling");
    }
    let tolerance = Tolerance::Rel(golden.tolerance("fp32 rel")?);
    let (x, y) = (golden.input("x")?, golden.input("y")?);
    let lpips = hashed::lpips(golden, LpipsReading::Piq)?;
    heads(checks, &lpips)?;
    let piq = lpips.form();
    let first = piq.pixels(&x.narrow(0, 0, 1)).get(0);
    let recorded = first.slice(1, None, None, RECORDED_STRIDE).slice(2, None, None, RECORDED_STRIDE);
    checks.tensor("x_up0", &recorded, tolerance)?;
    let (layers, gradient) = with_gradient(&lpips, &x, &y)?;
    checks.tensor("openai_lpips", &total(&layers), tolerance)?;
    checks.tensor("grad_x", &gradient, tolerance)?;

    let lpips = lpips.with_form(Form { enlarge: false, ..piq });
    checks.tensor("piq_native_res", &lpips.distance(&x, &y)?, tolerance)?;
    let lpips = lpips.with_form(Form { pooling: Pooling::Max, ..piq });
    checks.tensor("openai_lpips_maxpool", &lpips.distance(&x, &y)?, tolerance)?;
    let package = Form { enlarge: true, ..Form::of(LpipsReading::Package) };
    let lpips = lpips.with_form(package);
    checks.tensor("lpips_pkg_maxpool", &lpips.distance(&x, &y)?, tolerance)?;
    Ok(())
}
