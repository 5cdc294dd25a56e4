//! Group 03: noise grids, scalings, curricula and tables, all of them in `cm-schedule`.

use cm_schedule::curriculum::{Ect, EctAdjust, NumScales, Reading, TargetEma};
use cm_schedule::ema::EmaRule;
use cm_schedule::lr::LrRule;
use cm_schedule::sigma_dist::IndexDist;
use cm_schedule::solver::Plan;
use cm_schedule::weighting::Weighting;
use cm_schedule::{Boundary, Edm, KarrasGrid, NoiseCond, Precond, Scalings, SigmaRange};
use cm_train::Distance;
use serde::Deserialize;

use crate::close::Tolerance;
use crate::golden::{Golden, Problem, Result, problem};
use crate::report::Checks;

/// Every element within its own share: these tensors span decades, and what is stated for them is meant so.
fn each(rel: f64) -> Tolerance {
    Tolerance::Each { rel, abs: 0.0 }
}

/// The grid that the file's metadata describes.
pub(crate) fn grid(golden: &Golden) -> Result<KarrasGrid> {
    let range = SigmaRange::new(golden.meta("sigma_min")?, golden.meta("sigma_max")?)?;
    Ok(KarrasGrid::new(range, golden.meta("rho")?)?)
}

/// The numbers n of the tensors `<prefix>n`.
fn counts(golden: &Golden, prefix: &str) -> Result<Vec<usize>> {
    let parse =
        |text: &str| text.parse().map_err(|_| Problem(format!("'{prefix}{text}': expected a number")));
    golden.names_after(prefix).map(parse).collect()
}

/// The numbers i of the tensors `<prefix>i.<suffix>`.
fn cases(golden: &Golden, prefix: &str, suffix: &str) -> Vec<String> {
    let mut found: Vec<String> = golden
        .names_after(prefix)
        .filter_map(|rest| rest.split_once('.'))
        .filter(|(_, name)| *name == suffix)
        .map(|(case, _)| case.to_owned())
        .collect();
    found.sort();
    found
}

/// 03a: Karras grids in the forms that the references use them in.
pub fn sigma_grids(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let grid = grid(golden)?;
    let single = each(golden.tolerance("fp32 grids: rel")?);
    let double = each(golden.tolerance("fp64 grids: rel")?);
    for n in counts(golden, "openai_get_sigmas_karras.n")? {
        checks.values(&format!("openai_get_sigmas_karras.n{n}"), &grid.with_zero(n), single)?;
    }
    for n in counts(golden, "kinyugo_karras_schedule.n")? {
        checks.values(&format!("kinyugo_karras_schedule.n{n}"), &grid.ascending(n), single)?;
    }
    for n in counts(golden, "edm_t_steps.n")? {
        checks.values(&format!("edm_t_steps.n{n}"), &grid.with_zero(n), double)?;
    }
    for n in counts(golden, "openai_cm_t.scales")? {
        let (t, t2): (Vec<_>, Vec<_>) = (0..n.saturating_sub(1)).map(|index| grid.pair(index, n)).unzip();
        checks.values(&format!("openai_cm_t.scales{n}"), &t, single)?;
        checks.values(&format!("openai_cm_t2.scales{n}"), &t2, single)?;
    }
    for n in counts(golden, "openai_progdist_t.scales")? {
        let steps: Vec<_> = (0..n).map(|index| grid.halved_step(index, n)).collect();
        let (start, middle): (Vec<_>, Vec<_>) = steps.iter().map(|s| (s[0], s[1])).unzip();
        checks.values(&format!("openai_progdist_t.scales{n}"), &start, single)?;
        checks.values(&format!("openai_progdist_t2.scales{n}"), &middle, single)?;
    }
    multistep_times(checks, &grid, double)
}

/// The levels and noises of the multistep sampler for a list of indices.
fn multistep_times(checks: &mut Checks<'_>, grid: &KarrasGrid, tolerance: Tolerance) -> Result<()> {
    let golden = checks.golden;
    if !golden.has("openai_multistep_ts") {
        return Ok(());
    }
    let ts: Vec<usize> = golden.meta_json("multistep_ts")?;
    checks.integers("openai_multistep_ts", &ts.iter().map(|&i| i as i64).collect::<Vec<_>>())?;
    let plan = Plan::multistep_indices(grid, golden.meta("multistep_steps")?, &ts)?;
    checks.values("openai_multistep_t", &plan.evaluation_sigmas(), tolerance)?;
    let noise: f64 = plan.steps().iter().map(|step| step.renoise_std).sum();
    checks.values("openai_multistep_final_noise_scale", &[noise + missed_end(grid)], tolerance)?;
    Ok(())
}

/// The noise that the released sampler adds by mistake at the last index: there its level is the power of a root of
/// σ_min, which misses σ_min by a rounding, and √(t² − σ_min²) makes 10⁻¹⁰ of it. A plan ends at σ_min itself.
fn missed_end(grid: &KarrasGrid) -> f64 {
    let (min, max, rho) = (grid.range().min(), grid.range().max(), grid.rho());
    let (low, high) = (min.powf(1.0 / rho), max.powf(1.0 / rho));
    let t = (high + (low - high)).powf(rho).clamp(min, max);
    (t * t - min * min).sqrt()
}

/// 03b: the scalars of preconditioning, and the loss weights.
pub fn scalings(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let sigmas = golden.input_values("sigma")?;
    let sigma_min: f64 = golden.meta("sigma_min")?;
    let single = each(golden.tolerance("fp32 rel")?);
    let near_zero = Tolerance::Each { rel: single.limit(), abs: golden.tolerance("abs")? };
    let double = each(golden.tolerance("f64 rel")?);
    for name in golden.names().map(String::from).filter(|name| name != "sigma").collect::<Vec<_>>() {
        let (single_name, in_double) = match name.strip_suffix(".f64") {
            Some(name) => (name, true),
            None => (name.as_str(), false),
        };
        let got = scalar(single_name, &sigmas, sigma_min)?;
        let is_c_out = single_name.contains("c_out") || single_name.starts_with("kinyugo_out");
        let tolerance = match (in_double, is_c_out) {
            (true, _) => double,
            (false, true) => near_zero,
            (false, false) => single,
        };
        checks.values(&name, &got, tolerance)?;
    }
    Ok(())
}

/// The values of one of the rules of 03b, `<rule>[.<part>].sd<σ_data>`.
fn scalar(name: &str, sigmas: &[f64], sigma_min: f64) -> Result<Vec<f64>> {
    let unknown = || Problem(format!("'{name}' is no rule that is known here"));
    let of_noise = |cond: NoiseCond| Ok(sigmas.iter().map(|&sigma| cond.value(sigma)).collect());
    match name {
        "openai_rescaled_t" => return of_noise(NoiseCond::ThousandQuarterLog),
        "edm_c_noise" => return of_noise(NoiseCond::QuarterLog),
        _ => {}
    }
    let (rule, sigma_data) = name.rsplit_once(".sd").ok_or_else(unknown)?;
    let sigma_data: f64 = sigma_data.parse().map_err(|_| unknown())?;
    let boundary = Boundary::new(sigma_data, sigma_min, NoiseCond::QuarterLog)?;
    let edm = Edm::new(sigma_data, NoiseCond::QuarterLog)?;
    let pick = |precond: &dyn Precond, part: fn(Scalings) -> f64| {
        Ok(sigmas.iter().map(|&sigma| part(precond.scalings(sigma))).collect())
    };
    let weigh = |rule: Weighting| {
        // None of the rules recorded here reads the second level.
        Ok(sigmas.iter().map(|&sigma| rule.weight(sigma, f64::NAN, sigma_data)).collect())
    };
    match rule {
        "edm.c_skip" => pick(&edm, |s| s.c_skip),
        "edm.c_out" => pick(&edm, |s| s.c_out),
        "edm.c_in" => pick(&edm, |s| s.c_in),
        "boundary.c_skip" | "kinyugo_skip" => pick(&boundary, |s| s.c_skip),
        "boundary.c_out" | "kinyugo_out" => pick(&boundary, |s| s.c_out),
        "boundary.c_in" => pick(&boundary, |s| s.c_in),
        // EDM's own loss weight is the same function of σ as the released "karras" weighting.
        "edmloss_weight" => weigh(Weighting::Karras),
        rule => weigh(weighting(rule.strip_prefix("weight.").ok_or_else(unknown)?)?),
    }
}

/// OpenAI's names of the weightings.
pub(crate) fn weighting(name: &str) -> Result<Weighting> {
    Ok(match name {
        "uniform" => Weighting::Uniform,
        "snr" => Weighting::Snr,
        "snr+1" => Weighting::SnrPlus1,
        "karras" => Weighting::Karras,
        "truncated-snr" => Weighting::TruncatedSnr,
        name => return problem(format!("the weighting '{name}' is not known here")),
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EmaAndScales {
    target_ema_mode: String,
    start_ema: f64,
    scale_mode: String,
    start_scales: usize,
    end_scales: usize,
    total_steps: u64,
    distill_steps_per_iter: u64,
}

impl EmaAndScales {
    /// The combinations that the reference knows.
    fn rules(&self) -> Result<(TargetEma, NumScales)> {
        let fixed = TargetEma::Fixed { mu: self.start_ema };
        let (s0, s1) = (self.start_scales, self.end_scales);
        Ok(match (self.target_ema_mode.as_str(), self.scale_mode.as_str()) {
            ("fixed", "fixed") => (fixed, NumScales::Fixed { num_scales: s0 }),
            ("fixed", "progressive") => (fixed, NumScales::Progressive { s0, s1 }),
            ("adaptive", "progressive") => {
                let ema = TargetEma::Adaptive { mu0: self.start_ema, s0, reading: Reading::Released };
                (ema, NumScales::Progressive { s0, s1 })
            }
            // A target that never moves: progressive distillation replaces it between its stages.
            ("fixed", "progdist") => {
                let steps_per_stage = self.distill_steps_per_iter;
                (TargetEma::Fixed { mu: 1.0 }, NumScales::ProgDist { start: s0, steps_per_stage })
            }
            (ema, scales) => {
                return problem(format!("no rule for target_ema_mode {ema} with scale_mode {scales}"));
            }
        })
    }
}

fn steps(golden: &Golden, name: &str) -> Result<Vec<u64>> {
    golden
        .input_integers(name)?
        .into_iter()
        .map(|step| u64::try_from(step).map_err(|_| Problem(format!("'{name}' holds {step}"))))
        .collect()
}

/// 03c: N(k) and μ(k) of the released code.
pub fn ema_and_scales(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = each(golden.tolerance("ema rel")?);
    for case in cases(golden, "case", "step") {
        let arguments: EmaAndScales = golden.meta_json(&format!("case{case}"))?;
        let (ema, scales) = arguments.rules()?;
        let steps = steps(golden, &format!("case{case}.step"))?;
        let n: Vec<usize> = steps.iter().map(|&k| scales.num_scales(k, arguments.total_steps)).collect();
        checks.integers(&format!("case{case}.scales"), &n.iter().map(|&n| n as i64).collect::<Vec<_>>())?;
        let mu: Vec<f64> = n.iter().map(|&n| ema.mu(n)).collect();
        checks.values(&format!("case{case}.target_ema"), &mu, tolerance)?;
    }
    Ok(())
}

/// 03d: iCT's curriculum, its table of noise levels, its weights and the pseudo-Huber metric.
pub fn improved(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let double = each(golden.tolerance("f64 rel")?);
    curriculum(checks, "ict", |s0, s1| NumScales::Doubling { s0, s1 }, double)?;
    curriculum(checks, "ct", |s0, s1| NumScales::Progressive { s0, s1 }, double)?;
    level_tables(checks)?;
    pseudo_huber(checks)
}

fn curriculum(
    checks: &mut Checks<'_>,
    kind: &str,
    rule: fn(usize, usize) -> NumScales,
    tolerance: Tolerance,
) -> Result<()> {
    let golden = checks.golden;
    let arguments: Vec<(u64, usize, usize)> =
        if golden.meta_text(kind).is_some() { golden.meta_json(kind)? } else { Vec::new() };
    for (case, (total, s0, s1)) in arguments.into_iter().enumerate() {
        let steps = steps(golden, &format!("{kind}{case}.step"))?;
        let n: Vec<usize> = steps.iter().map(|&k| rule(s0, s1).num_scales(k, total)).collect();
        checks.integers(&format!("{kind}{case}.N"), &n.iter().map(|&n| n as i64).collect::<Vec<_>>())?;
        let ema = format!("{kind}{case}.ema");
        if golden.has(&ema) {
            let rule = TargetEma::Adaptive { mu0: golden.meta("mu0")?, s0, reading: Reading::Paper };
            checks.values(&ema, &n.iter().map(|&n| rule.mu(n)).collect::<Vec<_>>(), tolerance)?;
        }
    }
    Ok(())
}

/// The grid of each length, the probabilities of its pairs, and the weights 1/Δσ.
fn level_tables(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let grid = grid(golden)?;
    let single = golden.tolerance("probabilities abs")?;
    let double = each(golden.tolerance("f64 rel")?);
    for n in counts(golden, "sigmas.n")? {
        // The file says nothing of the grids and weights themselves; float32 arithmetic keeps them this near.
        checks.values(&format!("sigmas.n{n}"), &grid.ascending(n), each(2.0 * single))?;
        let levels = golden.input_values(&format!("sigmas.n{n}"))?;
        let weight = |pair: &[f64]| Weighting::InverseStep.weight(pair[1], pair[0], 1.0);
        let weights: Vec<f64> = levels.windows(2).map(weight).collect();
        checks.values(&format!("ict_weight.n{n}"), &weights, each(single))?;
        let prefix = format!("lognormal_p.n{n}.");
        for rule in golden.names_after(&prefix).map(String::from).collect::<Vec<_>>() {
            let (values, in_double) = rule.strip_suffix(".f64").map_or((rule.as_str(), false), |r| (r, true));
            let (mean, std) = mean_and_std(values)
                .ok_or_else(|| Problem(format!("'{prefix}{rule}': expected mean<m>.std<s>")))?;
            let table = IndexDist::LogNormal { mean, std }.table(&levels)?;
            let tolerance = if in_double { double } else { Tolerance::Abs(single) };
            checks.values(&format!("{prefix}{rule}"), table.probabilities(), tolerance)?;
        }
    }
    Ok(())
}

/// Reads `mean-1.1.std2.0`.
fn mean_and_std(text: &str) -> Option<(f64, f64)> {
    let (mean, std) = text.strip_prefix("mean")?.split_once(".std")?;
    Some((mean.parse().ok()?, std.parse().ok()?))
}

fn pseudo_huber(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if !golden.has("ph.input") {
        return Ok(());
    }
    let tolerance = Tolerance::Abs(golden.tolerance("ph abs")?);
    let c: f64 = golden.meta("ph_c")?;
    let (input, target) = (golden.input("ph.input")?, golden.input("ph.target")?);
    let (input, target) = (input.to_kind(tch::Kind::Double), target.to_kind(tch::Kind::Double));
    let distance = Distance::PseudoHuber { c }.between(&input, &target);
    checks.tensor("ph.per_sample_paper", &distance, tolerance)?;
    // The third-party reading: each value is a sample of its own.
    let as_samples = |t: &tch::Tensor| t.view([-1, 1, 1, 1]);
    let elementwise = Distance::PseudoHuber { c }.between(&as_samples(&input), &as_samples(&target));
    checks.tensor("ph.elementwise", &elementwise.view_as(&input), tolerance)?;
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EctCase {
    q: f64,
    k: f64,
    b: f64,
    adj: String,
}

impl EctCase {
    fn mapping(&self, stages: u32) -> Result<Ect> {
        ect(self.q, self.k, self.b, &self.adj, stages)
    }
}

/// ECT's mapping from the arguments of the reference's loss.
pub(crate) fn ect(q: f64, k: f64, b: f64, adj: &str, stages: u32) -> Result<Ect> {
    let adjust = match adj {
        "const" => EctAdjust::Const {},
        "sigmoid" => EctAdjust::Sigmoid { k, b },
        adj => return problem(format!("the adjustment '{adj}' is not known here")),
    };
    Ok(Ect { q, stages, adjust })
}

/// 03e: ECT's mapping t → r and its weight.
pub fn easy(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let rel = golden.tolerance("fp32 rel")?;
    let t = golden.input_values("t")?;
    let cases: Vec<EctCase> = golden.meta_json("cases")?;
    let stages: u32 = golden.meta("stages")?;
    for (case, arguments) in cases.iter().enumerate() {
        let mapping = arguments.mapping(stages)?;
        for stage in 0..stages {
            let name = |what: &str| format!("case{case}.stage{stage}.{what}");
            let r: Vec<f64> = t.iter().map(|&t| mapping.r(t, stage)).collect();
            checks.values(&name("r"), &r, Tolerance::Rel(rel))?;
            // As a share of t, so that the small levels count as much as the large ones.
            let share = |r: &[f64]| {
                let shares: Vec<f64> = r.iter().zip(&t).map(|(r, t)| r / t).collect();
                tch::Tensor::from_slice(&shares)
            };
            let recorded = golden.input_values(&name("r"))?;
            checks.between(&name("r/t"), &share(&r), &share(&recorded), Tolerance::Abs(rel));
            // 1/(t − r) of the recorded float32 r: where r is near t, its rounding is most of the difference.
            let pairs = t.iter().zip(&recorded);
            let weights: Vec<f64> = pairs.map(|(&t, &r)| Weighting::InverseStep.weight(t, r, 1.0)).collect();
            checks.values(&name("inv_dt"), &weights, each(rel))?;
            checks.values(&name("ratio"), &[mapping.ratio(stage)], each(rel))?;
        }
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WarmUp {
    ema_halflife_kimg: f64,
    ema_rampup_ratio: Option<f64>,
    batch_size: u64,
    lr_rampup_kimg: f64,
}

/// 03f: EDM's EMA half-life with ramp-up, and its learning-rate warm-up.
pub fn ema_warm_up(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = each(golden.tolerance("rel")?);
    let cases: Vec<WarmUp> = golden.meta_json("cases")?;
    for (case, arguments) in cases.iter().enumerate() {
        let images = steps(golden, &format!("case{case}.nimg"))?;
        let ema = EmaRule::HalfLife {
            halflife_images: arguments.ema_halflife_kimg * 1000.0,
            rampup_ratio: arguments.ema_rampup_ratio,
        };
        let beta: Vec<f64> = images.iter().map(|&n| ema.beta(n, arguments.batch_size)).collect();
        checks.values(&format!("case{case}.ema_beta"), &beta, tolerance)?;
        let lr = LrRule::Warmup { warmup_images: arguments.lr_rampup_kimg * 1000.0 };
        let factor: Vec<f64> = images.iter().map(|&n| lr.factor(0, n, u64::MAX)).collect();
        checks.values(&format!("case{case}.lr_factor"), &factor, tolerance)?;
    }
    Ok(())
}
