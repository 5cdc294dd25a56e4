//! 05c: OpenAI's zero-shot edits on the closed-form model, through the library's own loop.

use cm_model::Recorded;
use cm_sampler::edit::{Colorize, Inpaint, Measurement, SuperRes, edit_from};
use cm_sampler::{Hooks, Request, Times};
use cm_schedule::SigmaRange;
use tch::{Kind, Tensor};

use super::{evaluations, image_shape};
use crate::analytic::{Analytic, Recorder, stacked};
use crate::close::Tolerance;
use crate::golden::{Golden, Result, problem};
use crate::report::Checks;

/// Kinds of edits that were recorded.
pub const KINDS: &[&str] = &["inpainting", "colorization", "superres"];

/// 05c. The reference starts from noise that it is given, without the measurement in it.
pub fn openai(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let abs = Tolerance::Abs(golden.tolerance("abs")?);
    let rel = Tolerance::Rel(golden.tolerance("eval_x rel")?);
    let (shape, start) = (image_shape(golden, "images")?, golden.input("x")?);
    let range = SigmaRange::new(golden.meta("t_min")?, golden.meta("t_max")?)?;
    let times = Times::Indices {
        ts: golden.meta_json("ts")?,
        steps: golden.meta("steps")?,
        rho: golden.meta("rho")?,
    };
    let measurement = measurement(checks, abs)?;
    let mut noise = Recorded::new(draws(golden, &times, range)?);
    let seeds: Vec<u64> = (0..start.size().first().copied().unwrap_or(0) as u64).collect();
    let request = Request { batch: seeds.len(), ..Request::new(&seeds) };
    let model = Recorder::new(Analytic { shape, range });
    let hooks = Hooks { noise: Some(&mut noise), on_evaluation: None };
    let out = edit_from(&model, &*measurement, &times, &start, &request, hooks)?;
    let left = noise.finish();
    checks.fact(
        "every draw that counts is used",
        left.is_ok(),
        left.err().map_or(String::new(), |e| e.to_string()),
    );
    let calls = model.into_calls();
    evaluations(checks, &calls, rel)?;
    checks.tensor("eval_x0", &stacked(&calls)?.2, abs)?;
    checks.tensor("out", &out, abs)?;
    Ok(())
}

/// What the file's pictures know, checked against what the reference returned as known.
fn measurement(checks: &mut Checks<'_>, abs: Tolerance) -> Result<Box<dyn Measurement>> {
    let golden = checks.golden;
    let images = golden.input("images")?;
    let pictures = images.size().first().copied().unwrap_or(0) as usize;
    match golden.meta::<String>("kind")?.as_str() {
        "inpainting" => {
            // Here 1 marks what is kept, and what is not kept is returned as black.
            let anew = 1.0 - golden.input("mask")?;
            let inpaint = Inpaint::new(&images, &anew)?;
            checks.tensor("images_out", &(inpaint.measure(0..pictures)? - anew), abs)?;
            Ok(Box::new(inpaint))
        }
        "colorization" => {
            let colorize = Colorize::of(&images)?;
            checks.tensor("images_out", &colorize.measure(0..pictures)?, abs)?;
            // Rows of the identity, imposed on, show the projection off the known direction: 1 − q·qᵀ.
            let nothing = Colorize::of(&Tensor::zeros([1, 3, 1, 1], (Kind::Double, images.device())))?;
            let rows = Tensor::eye(3, (Kind::Double, images.device()));
            let off = nothing.impose(&rows.view([3, 3, 1, 1]), 0..3)?.view([3, 3]);
            known_direction(checks, &(rows - off), abs)?;
            Ok(Box::new(colorize))
        }
        "superres" => {
            let values = golden.input("Q64")?.size().first().copied().unwrap_or(0);
            let factor = (values as f64).sqrt().round() as i64;
            let superres = SuperRes::of(&images, factor)?;
            checks.tensor("images_out", &superres.measure(0..pictures)?, abs)?;
            let nothing =
                SuperRes::from_low(&Tensor::zeros([1, 1, 1, 1], (Kind::Double, images.device())), factor)?;
            let rows = Tensor::eye(values, (Kind::Double, images.device()));
            let patches = rows.reshape([values, 1, factor, factor]);
            let off = nothing.impose(&patches, 0..values as usize)?.reshape([values, values]);
            known_direction(checks, &(rows - off), abs)?;
            Ok(Box::new(superres))
        }
        kind => problem(format!("the edit '{kind}' is not known here")),
    }
}

/// Checks the projection on the known direction against the first column of the reference's basis, whose sign and whose
/// other columns are the linear-algebra library's choice.
fn known_direction(checks: &mut Checks<'_>, projection: &Tensor, abs: Tolerance) -> Result<()> {
    for name in ["Q", "Q64"] {
        let basis = checks.golden.want(name)?.to_kind(Kind::Double);
        if basis.size() != projection.size() {
            return problem(format!(
                "tensor '{name}' has shape {:?}, expected {:?}",
                basis.size(),
                projection.size()
            ));
        }
        let first = basis.narrow(1, 0, 1);
        checks.between(&format!("{name}: first column"), projection, &first.matmul(&first.tr()), abs);
    }
    Ok(())
}

/// The draws that the steps of these times add with a scale above 0.
fn draws(golden: &Golden, times: &Times, range: SigmaRange) -> Result<Vec<Tensor>> {
    let (noise, plan) = (golden.input("noise")?, times.plan(range)?);
    let recorded = noise.size().first().copied().unwrap_or(0);
    if recorded != plan.steps().len() as i64 {
        return problem(format!("{recorded} draws were recorded, the plan has {} steps", plan.steps().len()));
    }
    let counts = |step: &i64| plan.steps()[*step as usize].renoise_std > 0.0;
    Ok((0..recorded).filter(counts).map(|step| noise.get(step)).collect())
}
