//! Group 05: samplers and edits.

pub mod ablation;
pub mod edit;
pub mod third_party;

use cm_model::{ImageShape, NoiseSource, Site};
use cm_sampler::{Hooks, Method, Precision, Request, Solver, sample};
use cm_schedule::solver::{Churn, Plan, Renoise};
use cm_schedule::{KarrasGrid, SigmaRange};
use serde::Deserialize;
use tch::Tensor;

use crate::analytic::{Analytic, Call, Recorder, stacked};
use crate::close::{Tolerance, values};
use crate::golden::{Golden, Result, problem};
use crate::group03::grid;
use crate::report::Checks;
use crate::{group01, group04};

/// OpenAI's names of the samplers that walk a consistency function and a denoiser.
pub const OPENAI_SAMPLERS: &[&str] =
    &["onestep", "multistep", "euler", "heun", "dpm", "ancestral", "progdist"];

/// Standard deviation of the data that OpenAI's networks of group 04 assume.
const SIGMA_DATA: f64 = 0.5;

/// Replays the recorded draws in their own dtype, and knows whether all were used.
struct Draws {
    draws: std::vec::IntoIter<Tensor>,
}

impl Draws {
    /// The start, and those of the file's draws that the plan adds with a scale above 0: a reference may draw
    /// noise that it then multiplies by 0.
    fn new(golden: &Golden, start: Tensor, plan: &Plan) -> Result<Self> {
        let mut draws = vec![start];
        let used: Vec<bool> =
            plan.steps().iter().map(|step| step.churn_std > 0.0 || step.renoise_std > 0.0).collect();
        if golden.has("noise") {
            let noise = golden.input("noise")?;
            let recorded = noise.size()[0] as usize;
            let needed = used.iter().rposition(|used| *used).map_or(0, |last| last + 1);
            if recorded < needed || recorded > used.len() {
                return problem(format!("{recorded} draws were recorded, the plan has {} steps", used.len()));
            }
            draws.extend((0..recorded).filter(|&step| used[step]).map(|step| noise.get(step as i64)));
        } else if used.contains(&true) {
            return problem("tensor 'noise' is missing");
        }
        Ok(Self { draws: draws.into_iter() })
    }
}

impl NoiseSource for Draws {
    fn normal(&mut self, shape: ImageShape, site: &Site<'_>) -> cm_model::Result<Tensor> {
        let missing = || cm_model::Error::Recorded(format!("draw {} was not recorded", site.step));
        let draw = self.draws.next().ok_or_else(missing)?;
        shape.check("recorded noise", &draw)?;
        Ok(draw)
    }
}

/// How a run differs from the plain one.
#[derive(Clone, Copy)]
struct Run<'a> {
    clip: bool,
    precision: Precision,
    labels: Option<&'a [i64]>,
}

/// Samples from the recorded start (standard noise) and draws, and checks that all of them were used.
fn run(checks: &mut Checks<'_>, method: &Method<'_>, start: Tensor, how: Run<'_>) -> Result<Tensor> {
    // Recorded noise does not look at the seeds.
    let seeds: Vec<u64> = (0..start.size()[0] as u64).collect();
    let mut noise = Draws::new(checks.golden, start, method.plan())?;
    let Run { clip, precision, labels } = how;
    let request = Request { labels, clip, precision, ..Request::new(&seeds) };
    let images = sample(method, &request, Hooks { noise: Some(&mut noise), on_evaluation: None })?;
    let left = noise.draws.len();
    checks.fact("every draw that counts is used", left == 0, format!("{left} draws are left over"));
    Ok(images)
}

/// Shape of the images of the batch `name`.
fn image_shape(golden: &Golden, name: &str) -> Result<ImageShape> {
    match golden.input(name)?.size()[..] {
        [_, channels, height, width] => Ok(ImageShape { channels, height, width }),
        ref size => problem(format!("tensor '{name}': expected [B, C, H, W], got {size:?}")),
    }
}

/// The start of OpenAI's samplers, which is noise of σ_max whatever the first level is; ours scale by that level.
fn openai_start(golden: &Golden, method: &Method<'_>) -> Result<Tensor> {
    Ok(golden.input("init_noise")?.to_kind(tch::Kind::Double)
        * (grid(golden)?.range().max() / method.start()))
}

/// What stands behind OpenAI's name of a sampler.
enum Kind {
    Jumps(Plan),
    Solver(Solver, Vec<f64>),
}

fn openai_kind(golden: &Golden) -> Result<Kind> {
    let grid = grid(golden)?;
    let steps: usize = golden.meta("steps")?;
    let churn = Churn {
        s_churn: golden.meta_or("s_churn", 0.0)?,
        s_min: golden.meta_or("s_tmin", 0.0)?,
        s_max: golden.meta_or("s_tmax", f64::MAX)?.min(f64::MAX),
        s_noise: golden.meta_or("s_noise", 1.0)?,
    };
    let ode = |solver| Kind::Solver(solver, grid.with_zero(steps));
    Ok(match golden.meta::<String>("sampler")?.as_str() {
        "onestep" => {
            Kind::Jumps(Plan::multistep(&[grid.range().max()], grid.range().min(), Renoise::ToLevel)?)
        }
        "multistep" => {
            let ts: Vec<usize> = golden.meta_json("ts")?;
            Kind::Jumps(Plan::multistep_indices(&grid, steps, &ts)?)
        }
        "euler" => ode(Solver::Euler),
        "heun" => ode(Solver::Heun { churn }),
        "dpm" => ode(Solver::Dpm2 { churn }),
        "ancestral" => ode(Solver::Ancestral),
        // Euler on one level more, without the step to 0.
        "progdist" => Kind::Solver(Solver::Euler, grid.descending(steps + 1)),
        sampler => return problem(format!("the sampler '{sampler}' is not known here")),
    })
}

/// Checks the recorded evaluations: what the model was given, at which level, and what it gave.
fn evaluations(checks: &mut Checks<'_>, calls: &[Call], tolerance: Tolerance) -> Result<()> {
    let (x, sigma, estimate) = stacked(calls)?;
    checks.values("eval_sigma", &sigma, tolerance)?;
    if checks.golden.has("eval_x") && checks.tensor("eval_x", &x, tolerance)? {
        // Each evaluation in its own scale too: the first ones are hundreds of times larger than the last.
        let want = checks.golden.want("eval_x")?;
        for call in 0..calls.len() as i64 {
            checks.between(&format!("eval_x[{call}]"), &x.get(call), &want.get(call), tolerance);
        }
    }
    if checks.golden.has("eval_denoised_unclipped") {
        checks.tensor("eval_denoised_unclipped", &estimate, tolerance)?;
    }
    let few = [("eval_x_first", 0), ("eval_x_second", 1), ("eval_x_last", calls.len() as i64 - 1)];
    for (name, call) in few.into_iter().filter(|(name, _)| checks.golden.has(name)) {
        if call >= calls.len() as i64 {
            return problem(format!("the model was called {} times, '{name}' needs more", calls.len()));
        }
        checks.tensor(name, &x.get(call), tolerance)?;
    }
    Ok(())
}

/// 05a: OpenAI's samplers on the closed-form model.
pub fn openai(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let shape = image_shape(golden, "init_noise")?;
    let model = Recorder::new(Analytic { shape, range: grid(golden)?.range() });
    let how = Run { clip: golden.meta("clip_denoised")?, precision: Precision::Mixed, labels: None };
    let method = match openai_kind(golden)? {
        Kind::Jumps(plan) => Method::jumps(&model, plan)?,
        Kind::Solver(solver, levels) => Method::solver(&model, solver, &levels)?,
    };
    let images = run(checks, &method, openai_start(golden, &method)?, how)?;
    evaluations(checks, &model.into_calls(), Tolerance::Rel(golden.tolerance("eval_x rel")?))?;
    // The reference clamps what it returns, whether or not it clamps on the way.
    checks.tensor("out", &images.clamp(-1.0, 1.0), Tolerance::Abs(golden.tolerance("abs")?))?;
    Ok(())
}

/// 05b: the same on a network of 04a.
pub fn openai_network(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let weights = checks.library.named(&golden.meta::<String>("weights")?, checks.path)?;
    let range = grid(golden)?.range();
    let distilled: bool = golden.meta("distillation")?;
    let labels = if golden.has("y") { Some(golden.input_integers("y")?) } else { None };
    let clip = golden.meta("clip_denoised")?;
    let how = Run { clip, precision: Precision::Mixed, labels: labels.as_deref() };
    let images = match (openai_kind(golden)?, distilled) {
        (Kind::Jumps(plan), true) => {
            let f = group04::consistency_function(&weights, range, SIGMA_DATA)?;
            let method = Method::jumps(&f, plan)?;
            run(checks, &method, openai_start(golden, &method)?, how)?
        }
        (Kind::Solver(solver, levels), false) => {
            let d = group04::denoiser(&weights, range, SIGMA_DATA)?;
            let method = Method::solver(&d, solver, &levels)?;
            run(checks, &method, openai_start(golden, &method)?, how)?
        }
        (_, distilled) => return problem(format!("such a sampler with distillation = {distilled}")),
    };
    checks.tensor("out", &images.clamp(-1.0, 1.0), Tolerance::Abs(golden.tolerance("abs")?))?;
    Ok(())
}

/// Arguments of EDM's `edm_sampler`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(non_snake_case, reason = "the reference's names")]
struct EdmArguments {
    num_steps: usize,
    sigma_min: f64,
    sigma_max: f64,
    rho: f64,
    S_churn: f64,
    S_min: f64,
    S_max: f64,
    S_noise: f64,
}

impl Default for EdmArguments {
    fn default() -> Self {
        Self {
            num_steps: 18,
            sigma_min: 0.002,
            sigma_max: 80.0,
            rho: 7.0,
            S_churn: 0.0,
            S_min: 0.0,
            S_max: f64::MAX,
            S_noise: 1.0,
        }
    }
}

impl EdmArguments {
    /// Heun's method and its levels, in the part of the range that the network knows.
    fn heun(&self, known: (f64, f64)) -> Result<(Solver, KarrasGrid)> {
        let range = SigmaRange::new(self.sigma_min.max(known.0), self.sigma_max.min(known.1))?;
        let (s_churn, s_min, s_max, s_noise) = (self.S_churn, self.S_min, self.S_max, self.S_noise);
        let churn = Churn { s_churn, s_min, s_max, s_noise };
        Ok((Solver::Heun { churn }, KarrasGrid::new(range, self.rho)?))
    }
}

/// 05d, fn edm_sampler: EDM's sampler on the closed-form model, all in float64.
pub fn edm(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let arguments: EdmArguments = golden.meta_json("args")?;
    let (solver, grid) = arguments.heun((golden.meta("net_sigma_min")?, golden.meta("net_sigma_max")?))?;
    let model = Recorder::new(Analytic { shape: image_shape(golden, "latents")?, range: grid.range() });
    let method = Method::solver(&model, solver, &grid.with_zero(arguments.num_steps))?;
    let how = Run { clip: false, precision: Precision::Double, labels: None };
    let images = run(checks, &method, golden.input("latents")?, how)?;
    let tolerance = Tolerance::Rel(golden.tolerance("fp64 rel")?);
    evaluations(checks, &model.into_calls(), tolerance)?;
    checks.tensor("out", &images, tolerance)?;
    Ok(())
}

/// 05e: the same on a network of group 01, which computes in float32.
pub fn edm_network(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let arguments: EdmArguments = golden.meta_json("args")?;
    let (solver, grid) = arguments.heun((0.0, f64::INFINITY))?;
    let weights = checks.library.named(&golden.meta::<String>("weights")?, checks.path)?;
    let mut model = group01::denoiser(&weights)?;
    model.sigma_range = grid.range();
    let labels =
        if golden.has("class_labels") { Some(classes(&golden.input("class_labels")?)?) } else { None };
    let method = Method::solver(&model, solver, &grid.with_zero(arguments.num_steps))?;
    let how = Run { clip: false, precision: Precision::Mixed, labels: labels.as_deref() };
    let images = run(checks, &method, golden.input("latents")?, how)?;
    checks.tensor("out", &images, Tolerance::Abs(golden.tolerance("abs")?))?;
    Ok(())
}

/// The classes that one-hot rows stand for.
fn classes(rows: &Tensor) -> Result<Vec<i64>> {
    let size = rows.size();
    let width = *size.last().unwrap_or(&1) as usize;
    let class = |row: &[f64]| match row.iter().position(|&v| v == 1.0) {
        Some(class) if row.iter().sum::<f64>() == 1.0 => Ok(class as i64),
        _ => problem(format!("class labels {row:?}: expected a one and zeros")),
    };
    values(rows).chunks(width).map(class).collect()
}

/// 05g: ECT's few-step sampler, in float64.
pub fn ect_generator(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let t_max: f64 = golden.meta("t_max")?;
    let middle: Vec<f64> = golden.meta_json("mid_t")?;
    let times: Vec<f64> = std::iter::once(t_max).chain(middle).collect();
    // The reference knows no lowest level; the plan's noise does not depend on it either.
    let range = SigmaRange::new(KarrasGrid::EDM.range().min(), t_max)?;
    let model = Recorder::new(Analytic { shape: image_shape(golden, "latents")?, range });
    let method = Method::jumps(&model, Plan::multistep(&times, range.min(), Renoise::Full)?)?;
    let how = Run { clip: false, precision: Precision::Double, labels: None };
    let images = run(checks, &method, golden.input("latents")?, how)?;
    let tolerance = Tolerance::Rel(golden.tolerance("fp64 rel")?);
    evaluations(checks, &model.into_calls(), tolerance)?;
    checks.tensor("out", &images, tolerance)?;
    Ok(())
}

/// 05h: DPM-Solver++(2M), in float32 or float64 as the file is.
pub fn dpmpp_2m(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let double = golden.input("x")?.kind() == tch::Kind::Double;
    let tolerance = Tolerance::Rel(golden.tolerance(if double { "fp64 rel" } else { "fp32 rel" })?);
    let grid = grid(golden)?;
    checks.values("sigmas", &grid.with_zero(golden.meta("steps")?), tolerance)?;
    // From here on the recorded levels, so that the rounding of a float32 grid is not taken for one of the solver.
    let levels = golden.input_values("sigmas")?;
    let above_zero = levels.iter().filter(|sigma| **sigma > 0.0);
    let (low, high) = above_zero.fold((f64::INFINITY, 0.0), |(low, high), s| (s.min(low), s.max(high)));
    let model =
        Recorder::new(Analytic { shape: image_shape(golden, "x")?, range: SigmaRange::new(low, high)? });
    let method = Method::solver(&model, Solver::DpmPp2m, &levels)?;
    // The file's start is already at σ_max; the sampler takes standard noise.
    let start = golden.input("x")?.to_kind(tch::Kind::Double) / method.start();
    let precision = if double { Precision::Double } else { Precision::Mixed };
    let images = run(checks, &method, start, Run { clip: false, precision, labels: None })?;
    evaluations(checks, &model.into_calls(), tolerance)?;
    checks.tensor("out", &images, tolerance)?;
    Ok(())
}
