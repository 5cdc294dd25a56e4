//! Group 01: EDM's and ECT's networks with their preconditioning, and the residual block.

use cm_model::{Cast, Cond, Mode, ParamsBuilder, Preconditioned, Sigma};
use cm_net::reference::{BlockInit, BlockSpec, Direction, UnetBlock};
use cm_schedule::reference::{Iddpm, Ve, Vp};
use cm_schedule::{Boundary, Edm, NoiseCond, Precond, Scalings, SigmaRange};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::close::Tolerance;
use crate::golden::{Golden, Problem, Result, problem};
use crate::nets::{AnyPrecond, EdmConfig, Net, edm_network};
use crate::report::Checks;

/// The preconditionings that [`network`] knows, by the reference's names.
pub const PRECONDS: &[&str] = &["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "ECMPrecond"];

/// Standard deviation of the data that EDM's networks assume; no recorded configuration has another.
const SIGMA_DATA: f64 = 0.5;
/// Where ECT's evaluation has its boundary, unless the file says so.
const ECT_SIGMA_MIN: f64 = 0.003;

/// A network with its preconditioning and weights.
pub(crate) fn model(golden: &Golden) -> Result<Preconditioned<Net, AnyPrecond>> {
    let config: EdmConfig = golden.meta_json("config")?;
    let name: String = golden.meta("precond")?;
    let train = golden.meta_or("train_mode", false)?;
    let mut state = golden.state();
    let precond = match name.as_str() {
        "EDMPrecond" => AnyPrecond::Edm(Edm::new(SIGMA_DATA, NoiseCond::QuarterLog)?),
        // ECT's network is another function in training than in evaluation.
        "ECMPrecond" if train => AnyPrecond::Edm(Edm::new(SIGMA_DATA, NoiseCond::QuarterLog)?),
        "ECMPrecond" => {
            let sigma_min = golden.meta_or("sigma_min", ECT_SIGMA_MIN)?;
            AnyPrecond::Boundary(Boundary::new(SIGMA_DATA, sigma_min, NoiseCond::QuarterLog)?)
        }
        "VPPrecond" => AnyPrecond::Vp(Vp),
        "VEPrecond" => AnyPrecond::Ve(Ve),
        "iDDPMPrecond" => {
            let table = state.remove("u").ok_or_else(|| Problem("tensor 'state.u' is missing".into()))?;
            AnyPrecond::Iddpm(Iddpm::from_levels(&Vec::<f32>::try_from(table.view([-1]))?)?)
        }
        other => return problem(format!("the preconditioning '{other}' is not known here")),
    };
    if train && config.dropout > 0.0 {
        return problem("dropout in training mode cannot be repeated");
    }
    let variances = matches!(precond, AnyPrecond::Iddpm(_));
    let net = edm_network(golden, &config, state, variances)?;
    Ok(Preconditioned::new(net, precond, SigmaRange::EDM))
}

/// The denoiser of an `EDMPrecond` file, for samplers.
pub(crate) fn denoiser(golden: &Golden) -> Result<Preconditioned<Net, Edm>> {
    let Preconditioned { net, precond, sigma_range, .. } = model(golden)?;
    match precond {
        AnyPrecond::Edm(edm) => Ok(Preconditioned::new(net, edm, sigma_range)),
        other => problem(format!("{other:?} is not the preconditioning of an EDM denoiser")),
    }
}

/// 01a to 01g: a preconditioned network.
pub fn network(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let model = model(golden)?;
    let tolerance = Tolerance::Rel(golden.tolerance("max abs <")?);
    let train = golden.meta_or("train_mode", false)?;
    let _no_grad = tch::no_grad_guard();
    let x = golden.input("x")?;
    let sigmas = golden.input_values("sigma")?;
    let given = |name: &str| if golden.has(name) { golden.input(name).map(Some) } else { Ok(None) };
    let labels = given("class_labels")?;
    let augment = given("augment_labels")?;
    let cond = |with_labels: bool, with_augment: bool| Cond {
        labels: labels.as_ref().filter(|_| with_labels).map(Tensor::shallow_clone),
        augment: augment.as_ref().filter(|_| with_augment).map(Tensor::shallow_clone),
    };
    let scaled = |part: fn(Scalings) -> f64| {
        Sigma::Each(&sigmas).broadcast(Device::Cpu, |sigma| part(model.precond.scalings(sigma)))
    };
    checks.tensor("c_noise", &scaled(|s| s.c_noise).view([-1]), tolerance)?;
    checks.tensor("model_in", &(&x * scaled(|s| s.c_in)), tolerance)?;
    raw_network(checks, &model.net, &cond(true, true), train, tolerance)?;
    let mode = if train { Mode::Train { dropout_seed: 0 } } else { Mode::Eval };
    let each = Sigma::Each(&sigmas);
    checks.tensor("D", &model.evaluate(&x, each, &cond(true, true), mode)?, tolerance)?;
    if golden.has("D_nolabel") {
        checks.tensor("D_nolabel", &model.evaluate(&x, each, &cond(false, true), mode)?, tolerance)?;
    }
    if golden.has("D_noaugment") {
        checks.tensor("D_noaugment", &model.evaluate(&x, each, &cond(true, false), mode)?, tolerance)?;
    }
    const ONE_LEVEL: &str = "D_scalar_sigma";
    for level in golden.names_after(ONE_LEVEL).map(String::from).collect::<Vec<_>>() {
        let name = format!("{ONE_LEVEL}{level}");
        let sigma =
            level.parse().map_err(|_| Problem(format!("'{name}': expected a noise level at its end")))?;
        checks.tensor(&name, &model.evaluate(&x, Sigma::One(sigma), &cond(true, true), mode)?, tolerance)?;
    }
    Ok(())
}

/// `F`, `emb` and the blocks, from the recorded input and noise label, so that an error of the preconditioning and
/// one of the network do not hide each other.
fn raw_network(
    checks: &mut Checks<'_>,
    net: &Net,
    cond: &Cond,
    train: bool,
    tolerance: Tolerance,
) -> Result<()> {
    let golden = checks.golden;
    let (input, c_noise) = (golden.want("model_in")?, golden.want("c_noise")?);
    checks.tensor("emb", &net.embed(&c_noise, cond, train)?, tolerance)?;
    let mut blocks = Vec::new();
    let raw =
        net.raw(&input, &c_noise, cond, train, &mut |name, x| blocks.push((name.to_owned(), statistics(x))))?;
    checks.tensor("F", &raw, tolerance)?;
    activations(checks, &blocks, tolerance)
}

/// What the files hold of a block's output: mean, unbiased standard deviation, first element.
pub(crate) fn statistics(x: &Tensor) -> Tensor {
    let x = x.detach().to_kind(Kind::Double).contiguous().view([-1]);
    Tensor::stack(&[x.mean(None), x.std(true), x.get(0)], 0)
}

/// Checks every recorded block, in the order in which they were computed, and names the first that differs.
pub(crate) fn activations(
    checks: &mut Checks<'_>,
    blocks: &[(String, Tensor)],
    tolerance: Tolerance,
) -> Result<()> {
    let golden = checks.golden;
    let mut first_miss = None;
    for (block, statistics) in blocks {
        let name = format!("act.{block}");
        if golden.has(&name) && !checks.tensor(&name, statistics, tolerance)? {
            first_miss = first_miss.or(Some(block));
        }
    }
    let missing: Vec<_> =
        golden.names_after("act.").filter(|name| !blocks.iter().any(|(block, _)| block == name)).collect();
    if !missing.is_empty() {
        return problem(format!("the network has no block {}", missing.join(", ")));
    }
    if let Some(block) = first_miss {
        checks.hint(format!("the first block that differs is {block}"));
    }
    Ok(())
}

/// Arguments of the reference's `UNetBlock`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockConfig {
    in_channels: i64,
    out_channels: i64,
    emb_channels: i64,
    #[serde(default)]
    up: bool,
    #[serde(default)]
    down: bool,
    #[serde(default)]
    attention: bool,
    num_heads: Option<i64>,
    channels_per_head: Option<i64>,
    #[serde(default)]
    dropout: f64,
    skip_scale: Option<f64>,
    eps: Option<f64>,
    resample_filter: Option<Vec<f64>>,
    #[serde(default)]
    resample_proj: bool,
    adaptive_scale: Option<bool>,
}

impl BlockConfig {
    fn spec(&self) -> Result<BlockSpec> {
        let per_head = self.channels_per_head.unwrap_or(64);
        Ok(BlockSpec {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            emb_channels: self.emb_channels,
            resample: match (self.up, self.down) {
                (false, false) => None,
                (true, false) => Some(Direction::Up),
                (false, true) => Some(Direction::Down),
                (true, true) => return problem("a block goes up or down, not both"),
            },
            heads: if self.attention { self.num_heads.unwrap_or(self.out_channels / per_head) } else { 0 },
            dropout: self.dropout,
            skip_scale: self.skip_scale.unwrap_or(1.0),
            eps: self.eps.unwrap_or(1e-5),
            resample_filter: self.resample_filter.clone().unwrap_or_else(|| vec![1.0, 1.0]),
            resample_proj: self.resample_proj,
            adaptive_scale: self.adaptive_scale.unwrap_or(true),
            init: BlockInit::Adm,
        })
    }
}

/// 01h: one residual block, with every gradient.
pub fn block(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let spec = golden.meta_json::<BlockConfig>("config")?.spec()?;
    let heads = golden.meta_or("num_heads", spec.heads)?;
    checks.fact("num_heads", heads == spec.heads, format!("{} heads, recorded {heads}", spec.heads));
    let outputs = Tolerance::Rel(golden.tolerance("rel")?);
    let gradients = Tolerance::Rel(golden.tolerance("(outputs),")?);
    let builder = ParamsBuilder::unset(Device::Cpu);
    let block = UnetBlock::new(&builder.root(), &spec)?;
    let params = builder.finish();
    params.load(&golden.state(), Cast::Never)?;
    let x = golden.input("x")?.set_requires_grad(true);
    let emb = golden.input("emb")?.set_requires_grad(true);
    let y = block.forward(&x, &emb, false);
    checks.tensor("y", &y, outputs)?;
    (&y * golden.input("grad_y")?).sum(Kind::Float).backward();
    checks.tensor("grad_x", &x.grad(), gradients)?;
    checks.tensor("grad_emb", &emb.grad(), gradients)?;
    for (name, weight) in params.trainable() {
        checks.tensor(&format!("grad.{name}"), &weight.grad(), gradients)?;
    }
    Ok(())
}
