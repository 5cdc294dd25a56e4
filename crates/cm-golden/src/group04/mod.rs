//! Group 04: losses with their gradients, the optimiser and the averages.

pub mod diffusion;
pub mod teachers;

use std::cell::RefCell;

use cm_model::{Cond, ImageShape, Init, Mode, Params, ParamsBuilder, Preconditioned, Sigma};
use cm_schedule::sigma_dist::LogNormal;
use cm_schedule::{Boundary, Edm, KarrasGrid, NoiseCond, Precond, SigmaRange, Weighting};
use cm_torch::optim::{EmaTarget, OptimKind, Optimizer, StepOptions};
use cm_train::{Distance, Example, Losses, Metric, Pairs, Target, Trainable, consistency_loss};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::close::Tolerance;
use crate::golden::{Golden, Result, problem};
use crate::group02::labels;
use crate::group03::{ect, grid, weighting};
use crate::nets::{EdmConfig, Net, edm_network, openai_network};
use crate::report::Checks;

/// The consistency function of an OpenAI file of weights.
pub(crate) fn consistency_function(
    weights: &Golden,
    range: SigmaRange,
    sigma_data: f64,
) -> Result<Preconditioned<Net, Boundary>> {
    let boundary = Boundary::new(sigma_data, range.min(), NoiseCond::ThousandQuarterLog)?;
    Ok(Preconditioned::new(openai_network(weights)?, boundary, range))
}

/// The denoiser of an OpenAI file of weights.
pub(crate) fn denoiser(
    weights: &Golden,
    range: SigmaRange,
    sigma_data: f64,
) -> Result<Preconditioned<Net, Edm>> {
    let edm = Edm::new(sigma_data, NoiseCond::ThousandQuarterLog)?;
    Ok(Preconditioned::new(openai_network(weights)?, edm, range))
}

/// 04a: weights that other files use. They must fit the network that the file describes, name for name, and be in
/// it as they were stored.
pub fn weights(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let net = openai_network(golden)?;
    for (name, weight) in cm_model::Backbone::params(&net).iter() {
        checks.tensor(&format!("state.{name}"), weight, Tolerance::Exact)?;
    }
    Ok(())
}

/// Notes every evaluation of a network, its result with the graph.
struct Watched<'a> {
    inner: &'a dyn Trainable,
    calls: RefCell<Vec<(Tensor, Tensor)>>,
}

impl<'a> Watched<'a> {
    fn new(inner: &'a dyn Trainable) -> Self {
        Self { inner, calls: RefCell::default() }
    }
}

impl Trainable for Watched<'_> {
    fn shape(&self) -> ImageShape {
        self.inner.shape()
    }
    fn num_classes(&self) -> i64 {
        self.inner.num_classes()
    }
    fn params(&self) -> &Params {
        self.inner.params()
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> cm_model::Result<Tensor> {
        let result = self.inner.evaluate(x, sigma, cond, mode)?;
        self.calls.borrow_mut().push((x.copy(), result.shallow_clone()));
        Ok(result)
    }
}

/// Checks every gradient in the file, and the norm of all of them.
fn gradients(checks: &mut Checks<'_>, params: &Params, prefix: &str, tolerance: Tolerance) -> Result<()> {
    let golden = checks.golden;
    for name in golden.names_after("grad.").map(String::from).collect::<Vec<_>>() {
        let own = name.strip_prefix(prefix).and_then(|own| params.get(own));
        let Some(weight) = own else { return problem(format!("the network has no parameter '{name}'")) };
        checks.tensor(&format!("grad.{name}"), &weight.grad(), tolerance)?;
    }
    if golden.has("grad_global_norm") {
        let squares = |(_, weight): (&str, &Tensor)| {
            weight.grad().to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[])
        };
        let norm = params.trainable().map(squares).sum::<f64>().sqrt();
        checks.values("grad_global_norm", &[norm], tolerance)?;
    }
    Ok(())
}

fn distance(name: &str) -> Result<Distance> {
    Ok(match name {
        "l1" => Distance::L1,
        "l2" => Distance::L2,
        "l2-32" => Distance::L2At32,
        name => return problem(format!("the metric '{name}' is not known here")),
    })
}

/// 04b, kind CT: OpenAI's consistency training on networks of 04a.
pub fn consistency_training(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if !golden.meta::<bool>("student_distillation")? {
        return problem("consistency training is recorded with student_distillation = true");
    }
    let grid = grid(golden)?;
    let sigma_data = golden.meta("sigma_data")?;
    let network = |role: &str| {
        let file = checks.library.named(&golden.meta::<String>(role)?, checks.path)?;
        consistency_function(&file, grid.range(), sigma_data)
    };
    let (student, target) = (network("student")?, network("target")?);
    let (student, target) = (Watched::new(&student), Watched::new(&target));
    let pairs = recorded_pairs(golden, &grid, sigma_data)?;
    let (images, noise) = (golden.input("x_start")?, golden.input("noise")?);
    let cond = labels(golden, "y")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let distance = distance(&golden.meta::<String>("loss_norm")?)?;
    let losses = consistency_loss(&student, Target::Network(&target), &example, &distance, Mode::Eval)?;

    let loss = Tolerance::Rel(golden.tolerance("loss rel")?);
    let point = golden.tolerance("x_t2 abs")?;
    checks.values("t", &pairs.sigma, loss)?;
    checks.values("t2", &pairs.next, loss)?;
    points(checks, "x_t", &student, &pairs.sigma, point)?;
    points(checks, "x_t2", &target, &pairs.sigma, point)?;
    checks.tensor("distiller", &losses.student, loss)?;
    checks.tensor("distiller_target", &losses.target, loss)?;
    checks.tensor("loss", &losses.per_sample, loss)?;
    let mean = losses.per_sample.mean(None);
    checks.tensor("loss_mean", &mean, loss)?;
    mean.backward();
    gradients(checks, student.params(), "", Tolerance::Rel(golden.tolerance("grads rel")?))
}

/// The pairs of neighbouring levels that the recorded indices select.
fn recorded_pairs(golden: &Golden, grid: &KarrasGrid, sigma_data: f64) -> Result<Pairs> {
    let num_scales: usize = golden.meta("num_scales")?;
    let indices = golden.input_integers("indices")?;
    if let Some(index) = indices.iter().find(|&&i| i < 0 || i as usize + 1 >= num_scales) {
        return problem(format!("index {index} is not one of the {num_scales} levels' pairs"));
    }
    let weighting = weighting(&golden.meta::<String>("weight_schedule")?)?;
    let pairs = indices.iter().map(|&index| grid.pair(index as usize, num_scales));
    Ok(Pairs::new(pairs, weighting, sigma_data))
}

/// What the network was given at its one evaluation, in units of the level σ that the pair starts from.
///
/// Where σ is so small that the tolerance is finer than float32 holds the image itself, two units in the last place
/// of it are allowed: the reference reaches x_t2 by a solver step from x_t, this project goes there directly.
fn points(
    checks: &mut Checks<'_>,
    name: &str,
    network: &Watched<'_>,
    sigmas: &[f64],
    tolerance: f64,
) -> Result<()> {
    let calls = network.calls.borrow();
    let [(x, _)] = calls.as_slice() else {
        return problem(format!("{} evaluations for '{name}'", calls.len()));
    };
    let unit = unit(&checks.golden.want(name)?, sigmas, 2.0 * f64::from(f32::EPSILON) / tolerance);
    scaled(checks, name, x, &unit, tolerance)
}

/// The levels σ, and where they are smaller this share of the values of `x`.
fn unit(x: &Tensor, sigmas: &[f64], share: f64) -> Tensor {
    let levels = Sigma::Each(sigmas).broadcast(Device::Cpu, |sigma| sigma).to_kind(Kind::Double);
    levels.maximum(&(x.to_kind(Kind::Double).abs() * share))
}

fn scaled(checks: &mut Checks<'_>, name: &str, x: &Tensor, unit: &Tensor, tolerance: f64) -> Result<()> {
    let want = checks.golden.want(name)?.to_kind(Kind::Double);
    checks.between(name, &(x.to_kind(Kind::Double) / unit), &(want / unit), Tolerance::Abs(tolerance));
    Ok(())
}

/// Arguments of the reference's `ECMLoss`, with its defaults.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EcmArguments {
    #[serde(rename = "P_mean")]
    p_mean: f64,
    #[serde(rename = "P_std")]
    p_std: f64,
    sigma_data: f64,
    q: f64,
    c: f64,
    k: f64,
    b: f64,
    adj: String,
}

impl Default for EcmArguments {
    fn default() -> Self {
        let adj = "sigmoid".into();
        Self { p_mean: -1.1, p_std: 2.0, sigma_data: 0.5, q: 2.0, c: 0.0, k: 8.0, b: 1.0, adj }
    }
}

/// 04c, loss ECMLoss: ECT's loss, live target, on its network in training mode without dropout.
pub fn easy_consistency(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let config: EdmConfig = golden.meta_json("config")?;
    if config.dropout > 0.0 {
        return problem("dropout in training mode cannot be repeated");
    }
    let arguments: EcmArguments = golden.meta_json("loss_kwargs")?;
    let stage: u32 = golden.meta("stage")?;
    let edm = Edm::new(arguments.sigma_data, NoiseCond::QuarterLog)?;
    let net = edm_network(golden, &config, golden.state(), false)?;
    let network = Preconditioned::new(net, edm, SigmaRange::EDM);
    let student = Watched::new(&network);

    let levels = LogNormal { mean: arguments.p_mean, std: arguments.p_std };
    let map = ect(arguments.q, arguments.k, arguments.b, &arguments.adj, stage + 1)?;
    let pairs = golden.input_values("rnd_normal")?.into_iter().map(|z| {
        let t = levels.sigma(z);
        (t, map.r(t, stage))
    });
    let pairs = Pairs::new(pairs, Weighting::InverseStep, arguments.sigma_data);
    let (images, noise) = (golden.input("images")?, golden.input("noise")?);
    let cond = labels(golden, "class_labels")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let distance = Metric::PseudoHuber { c: Some(arguments.c) }.build(student.shape())?;
    let mode = Mode::Train { dropout_seed: 0 };
    let losses = consistency_loss(&student, Target::Live, &example, &distance, mode)?;

    let tolerance = Tolerance::Rel(golden.tolerance("loss rel")?);
    ecm_evaluations(checks, &student, &pairs, &losses, tolerance)?;
    checks.tensor("loss", &losses.per_sample, tolerance)?;
    let mean = losses.per_sample.mean(None);
    checks.tensor("loss_mean", &mean, tolerance)?;
    mean.backward();
    gradients(checks, student.params(), "model.", Tolerance::Rel(golden.tolerance("grads rel")?))
}

/// What student and target were given and gave. Where r = 0 the target is the image itself, and the file holds 0.
fn ecm_evaluations(
    checks: &mut Checks<'_>,
    student: &Watched<'_>,
    pairs: &Pairs,
    losses: &Losses,
    tolerance: Tolerance,
) -> Result<()> {
    let golden = checks.golden;
    let calls = student.calls.borrow();
    checks.values("sigma0", &pairs.sigma, tolerance)?;
    let (target_calls, student_call) = match calls.as_slice() {
        [student] => (None, student),
        [target, student] => (Some(target), student),
        calls => return problem(format!("{} evaluations of the network", calls.len())),
    };
    checks.tensor("net_in0", &student_call.0, tolerance)?;
    checks.tensor("net_out0", &losses.student, tolerance)?;
    let recorded = golden.has("net_in1");
    if recorded != target_calls.is_some() {
        return problem("the file and this project differ on whether any r is above 0");
    }
    if let Some((x, estimate)) = target_calls {
        checks.values("sigma1", &pairs.next, tolerance)?;
        checks.tensor("net_in1", x, tolerance)?;
        let above_zero: Vec<f32> = pairs.next.iter().map(|&r| if r > 0.0 { 1.0 } else { 0.0 }).collect();
        let estimate = estimate * Tensor::from_slice(&above_zero).view([-1, 1, 1, 1]);
        checks.tensor("net_out1", &estimate, tolerance)?;
    }
    Ok(())
}

/// How near a float32 grid is to the exact one, as the files of group 03 state it.
const FLOAT32_GRID: f64 = 2e-6;

/// The one-layer consistency function of the third-party files: `F(x, σ) = tanh(conv(x)/√(1 + σ²))`, with neither
/// c_in nor a function of σ in front of it.
struct OneLayer {
    shape: ImageShape,
    params: Params,
    weight: Tensor,
    bias: Tensor,
    precond: Boundary,
}

impl OneLayer {
    fn new(weight: &Tensor, bias: &Tensor, shape: ImageShape, precond: Boundary) -> Result<Self> {
        let builder = ParamsBuilder::unset(Device::Cpu);
        let own =
            [("W", weight), ("b", bias)].map(|(name, t)| builder.root().param(name, &t.size(), Init::Zeros));
        let [own_weight, own_bias] = own;
        let (own_weight, own_bias) = (own_weight?, own_bias?);
        let params = builder.finish();
        let values = [("W", weight), ("b", bias)].map(|(name, t)| (name.to_owned(), t.shallow_clone()));
        params.load(&values.into(), cm_model::Cast::Never)?;
        Ok(Self { shape, params, weight: own_weight, bias: own_bias, precond })
    }
}

impl Trainable for OneLayer {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, _: &Cond, _: Mode) -> cm_model::Result<Tensor> {
        let column = |g: &dyn Fn(f64) -> f64| sigma.broadcast(Device::Cpu, g);
        let conv = x.conv2d(&self.weight, Some(&self.bias), [1, 1], [1, 1], [1, 1], 1);
        let raw = (conv * column(&|s| 1.0 / (1.0 + s * s).sqrt())).tanh();
        let skip = x * column(&|s| self.precond.scalings(s).c_skip);
        Ok(skip + raw * column(&|s| self.precond.scalings(s).c_out))
    }
}

/// 04d: iCT and CT of a third-party implementation on its one-layer model.
pub fn improved_training(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let (student, teacher) = (one_layer(golden, "")?, one_layer(golden, "_teacher")?);
    let tolerance = Tolerance::Rel(golden.tolerance("fp32 rel")?);
    improved_loss(checks, &student, tolerance)?;
    student.params.trainable().for_each(|(_, weight)| weight.shallow_clone().zero_grad());
    let losses = third_party_losses(checks, "ct_", &student, Target::Network(&teacher), Weighting::Uniform)?;
    checks.tensor("ct_predicted", &losses.student, tolerance)?;
    checks.tensor("ct_target", &losses.target, tolerance)?;
    let loss = losses.per_sample.mean(None);
    checks.tensor("ct_loss", &loss, tolerance)?;
    loss.backward();
    for (name, weight) in student.params.trainable() {
        let recorded = format!("ct_grad_{name}");
        if golden.has(&recorded) {
            checks.tensor(&recorded, &weight.grad(), tolerance)?;
        }
    }
    Ok(())
}

fn one_layer(golden: &Golden, suffix: &str) -> Result<OneLayer> {
    let shape = match golden.input("x")?.size()[..] {
        [_, channels, height, width] => ImageShape { channels, height, width },
        ref size => return problem(format!("expected images [B, C, H, W], got {size:?}")),
    };
    let (sigma_data, sigma_min) = (golden.meta("sigma_data")?, golden.meta("sigma_min")?);
    let boundary = Boundary::new(sigma_data, sigma_min, NoiseCond::QuarterLog)?;
    let (weight, bias) = (golden.input(&format!("W{suffix}"))?, golden.input(&format!("b{suffix}"))?);
    OneLayer::new(&weight, &bias, shape, boundary)
}

/// Runs this project's loss on the file's draws; `prefix` is that of its tensors.
fn third_party_losses(
    checks: &mut Checks<'_>,
    prefix: &str,
    student: &OneLayer,
    target: Target<'_>,
    rule: Weighting,
) -> Result<Losses> {
    let golden = checks.golden;
    let tolerance = Tolerance::Rel(golden.tolerance("fp32 rel")?);
    let n: usize = golden.meta(&format!("{prefix}num_timesteps"))?;
    let recorded = format!("{prefix}sigmas");
    checks.values(&recorded, &grid(golden)?.ascending(n), Tolerance::Each { rel: FLOAT32_GRID, abs: 0.0 })?;
    // From here on the recorded levels: neighbours are so near to each other that a difference of their float32
    // roundings shows in the loss.
    let levels = golden.input_values(&recorded)?;
    if levels.len() != n {
        return problem(format!("{} levels, {prefix}num_timesteps = {n}", levels.len()));
    }
    let indices = golden.input_integers(&format!("{prefix}timesteps"))?;
    let in_range = |i: &&i64| **i < 0 || **i as usize + 1 >= n;
    if let Some(index) = indices.iter().find(in_range) {
        return problem(format!("index {index} is not one of the {n} levels' pairs"));
    }
    let pairs = indices.iter().map(|&i| (levels[i as usize + 1], levels[i as usize]));
    let pairs = Pairs::new(pairs, rule, golden.meta("sigma_data")?);
    if golden.has(&format!("{prefix}loss_weights")) {
        checks.values(&format!("{prefix}loss_weights"), &pairs.weight, tolerance)?;
    }
    let (images, noise, cond) = (golden.input("x")?, golden.input("noise")?, Cond::none());
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    Ok(consistency_loss(student, target, &example, &Distance::L2, Mode::Eval)?)
}

/// iCT with the metric taken of each value apart: pairs, weights, images and the target without gradient are this
/// project's, the reading is the third party's (the paper's metric takes the norm over the whole image).
fn improved_loss(checks: &mut Checks<'_>, student: &OneLayer, tolerance: Tolerance) -> Result<()> {
    let golden = checks.golden;
    let losses = third_party_losses(checks, "", student, Target::Live, Weighting::InverseStep)?;
    checks.tensor("predicted", &losses.student, tolerance)?;
    checks.tensor("target", &losses.target, tolerance)?;
    let huber = Metric::PseudoHuber { c: None }.build(student.shape)?;
    let values = |t: &Tensor| t.view([-1, 1, 1, 1]);
    let elementwise = huber.between(&values(&losses.student), &values(&losses.target));
    let elementwise = elementwise.view_as(&losses.student);
    checks.tensor("elementwise", &elementwise, tolerance)?;
    let weights = golden.want("loss_weights")?.view([-1, 1, 1, 1]);
    let loss = (elementwise * weights).mean(None);
    checks.tensor("loss", &loss, tolerance)?;
    loss.backward();
    for (name, weight) in student.params.trainable() {
        checks.tensor(&format!("grad_{name}"), &weight.grad(), tolerance)?;
    }
    Ok(())
}

/// β₁, β₂ and ε of every recorded run; the decay of those whose name ends in `_wd`.
const BETAS: (f64, f64) = (0.9, 0.999);
const EPS: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.01;

fn optimiser(name: &str) -> Result<OptimKind> {
    let (rule, weight_decay) = name.strip_suffix("_wd").map_or((name, 0.0), |rule| (rule, WEIGHT_DECAY));
    let ((beta1, beta2), eps) = (BETAS, EPS);
    Ok(match rule {
        "radam" => OptimKind::RAdam { beta1, beta2, eps, weight_decay },
        "adam" => OptimKind::Adam { beta1, beta2, eps, weight_decay },
        "adamw" => OptimKind::AdamW { beta1, beta2, eps, weight_decay },
        other => return problem(format!("the optimiser '{other}' is not known here")),
    })
}

/// 04e: weights and their average along a run with given gradients.
pub fn optimisers(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Abs(golden.tolerance("fp32 abs")?);
    let (lr, beta): (f64, f64) = (golden.meta("lr")?, golden.meta("ema_rate")?);
    let (start, gradients) = (golden.input("p0")?, golden.input("grads")?);
    let steps: i64 = golden.meta("steps")?;
    let named = |name: &str| name.strip_suffix(".params").map(String::from);
    for name in golden.names().filter_map(named).collect::<Vec<_>>() {
        let weight = start.copy().set_requires_grad(true);
        let average = [start.copy()];
        let params = [("p", &weight)];
        let mut optimizer = Optimizer::new(optimiser(&name)?, &params)?;
        let (mut weights, mut averages) = (Vec::new(), Vec::new());
        for step in 0..steps {
            // The gradient of Σ p·g is g.
            (&weight * gradients.get(step)).sum(Kind::Float).backward();
            let emas = [EmaTarget { beta, tensors: &average }];
            let skipped = optimizer.step(&StepOptions::new(lr), &params, &emas)?;
            if !skipped.is_empty() {
                return problem("the optimiser saw no gradient");
            }
            weights.push(weight.detach().copy());
            averages.push(average[0].copy());
        }
        checks.tensor(&format!("{name}.params"), &Tensor::stack(&weights, 0), tolerance)?;
        checks.tensor(&format!("{name}.ema"), &Tensor::stack(&averages, 0), tolerance)?;
    }
    Ok(())
}
