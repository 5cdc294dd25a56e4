//! Folders of diffusers: a `UNet2DModel` is OpenAI's network with other names and q, k and v apart.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cm_model::schedule::NoiseCond;
use cm_model::{Params, ParamsBuilder, TensorMap, short};
use serde_json::Value;
use tch::Tensor;

use super::architecture::Architecture;
use super::{Kind, NUM_SCALES, TorchFile, Watch, choices, problem, with_source};
use crate::spec::OpenaiUnetSpec;
use crate::{Error, ModelFile, ModelSpec, NetSpec, PrecondSpec, Result, Role};

mod config;
mod names;

pub(super) use config::{SCHEDULER, write_config, write_scheduler};

pub(super) const CONFIG: &str = "config.json";
pub(super) const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
/// The weights of folders from before safetensors.
const OLD_WEIGHTS: &str = "diffusion_pytorch_model.bin";

/// The folder with the network's config: `path` itself or `unet` below it.
pub(super) fn unet_folder(path: &Path) -> Result<PathBuf> {
    let unet = path.join("unet");
    for folder in [path, &unet] {
        let has = |name: &str| folder.join(name).is_file();
        if has(CONFIG) && (has(WEIGHTS) || has(OLD_WEIGHTS)) {
            return Ok(folder.to_owned());
        }
    }
    let text = format!("no unet/{CONFIG} with unet/{WEIGHTS} in this folder, so not one of diffusers");
    Err(problem(path, text))
}

/// Whether a file of weights lies beside its config.
pub(super) fn is_weights(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == WEIGHTS) && path.with_file_name(CONFIG).is_file()
}

/// The file of weights and the network that the config describes.
pub(super) fn network(folder: &Path) -> Result<(PathBuf, OpenaiUnetSpec)> {
    let path = folder.join(CONFIG);
    let net = config::network(&config::read(&path)?).map_err(|e| problem(&path, e))?;
    let (new, old) = (folder.join(WEIGHTS), folder.join(OLD_WEIGHTS));
    Ok((if new.is_file() { new } else { old }, net))
}

/// What the folder says without a kind: the file of weights, the network, and all of it if the scheduler tells.
pub(super) fn description(folder: &Path) -> Result<(PathBuf, OpenaiUnetSpec, Option<ModelSpec>)> {
    let (weights, net) = network(folder)?;
    let spec = match config::scheduler(folder)? {
        scheduler @ config::Scheduler::Consistency { .. } => {
            Some(spec(folder, net.clone(), scheduler, None)?)
        }
        _ => None,
    };
    Ok((weights, net, spec))
}

/// Reads the folder that [`unet_folder`] found.
pub(super) fn load(folder: &Path, kind: Option<Kind>, watch: Watch<'_>) -> Result<ModelFile> {
    let (weights, net) = network(folder)?;
    let scheduler = config::scheduler(folder)?;
    let mut spec = spec(folder, net.clone(), scheduler, kind.as_ref())?;
    if let Some(kind) = kind {
        spec.about.insert("kind".into(), kind.name().to_owned());
    }
    let theirs = if weights.ends_with(OLD_WEIGHTS) {
        TorchFile::open(&weights)?.tensors(watch)?
    } else {
        super::read_safetensors(&weights, watch)?.tensors
    };
    let tensors = to_ours(&weights, &net, theirs)?;
    super::check(&weights, &spec.net, &tensors)?;
    // `unet` is no name that says where a model is from.
    let named = match folder.file_name() {
        Some(name) if name == "unet" => folder.parent().unwrap_or(folder),
        _ => folder,
    };
    Ok(ModelFile::new(&weights, with_source(named, spec), tensors))
}

/// What contradicts a kind.
fn contradictions(net: &OpenaiUnetSpec, scheduler: &config::Scheduler, kind: &Kind) -> Vec<String> {
    let mut found = kind.contradictions(&net.clone().into());
    if let config::Scheduler::Consistency { precond, .. } = scheduler {
        if kind.role() != Role::Consistency {
            found.push(format!("{SCHEDULER} is for consistency models, expected a {}", kind.role()));
        }
        found.extend(precond.differences(&kind.precond()));
    }
    found
}

/// Role and noise levels, from the scheduler or the kind or from both, which must agree.
fn spec(
    folder: &Path,
    net: OpenaiUnetSpec,
    scheduler: config::Scheduler,
    kind: Option<&Kind>,
) -> Result<ModelSpec> {
    if let Some(kind) = kind {
        let differences = contradictions(&net, &scheduler, kind);
        if !differences.is_empty() {
            return Err(problem(folder, format!("it is not {kind}: {}", differences.join("; "))));
        }
    }
    let (role, precond, num_scales) = match (scheduler, kind) {
        (config::Scheduler::Consistency { precond, num_scales }, _) => {
            (Role::Consistency, precond, Some(num_scales))
        }
        (_, Some(kind)) => (kind.role(), kind.precond(), kind.num_scales()),
        (scheduler, None) => {
            let scheduler = match scheduler {
                config::Scheduler::Other(class) => format!("its scheduler, {class},"),
                _ => format!("without {SCHEDULER} it"),
            };
            let found = Architecture::of_net(&net.into());
            let text = format!(
                "{found}; {scheduler} does not say whether it is a denoiser or a consistency function. {}",
                choices(&found)
            );
            return Err(problem(folder, text));
        }
    };
    let mut spec = ModelSpec::new(role, net.into(), precond);
    if let Some(scales) = num_scales {
        spec.about.insert(NUM_SCALES.into(), scales.to_string());
    }
    Ok(spec)
}

/// Tensors under our names, from those of diffusers.
fn to_ours(path: &Path, net: &OpenaiUnetSpec, mut theirs: TensorMap) -> Result<TensorMap> {
    let (params, mut ours, mut differences) = (shapes(net)?, TensorMap::new(), Vec::new());
    for mapped in names::map(net, &params) {
        let mut parts = Vec::new();
        for name in &mapped.theirs {
            match theirs.remove(name) {
                None => differences.push(format!("'{name}' {:?} is missing", mapped.shape)),
                Some(part) if part.size() != mapped.shape => {
                    let (got, expected) = (part.size(), &mapped.shape);
                    differences.push(format!("'{name}' has shape {got:?}, expected {expected:?}"));
                }
                Some(part) => parts.push(part),
            }
        }
        if parts.len() < mapped.theirs.len() {
            continue;
        }
        if parts.iter().any(|part| part.kind() != parts[0].kind()) {
            differences.push(format!("{:?} have different dtypes", mapped.theirs));
            continue;
        }
        let whole = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0) };
        ours.insert(mapped.ours.clone(), whole.reshape(&mapped.our_shape));
    }
    differences.extend(theirs.keys().map(|name| format!("'{}' is not a part of the network", short(name))));
    match differences.is_empty() {
        true => Ok(ours),
        false => {
            let source = cm_model::Error::Weights { differences };
            Err(Error::Weights { path: path.into(), source })
        }
    }
}

/// Tensors under the names of diffusers, from ours, which fit the network.
pub(super) fn to_theirs(net: &OpenaiUnetSpec, ours: &TensorMap) -> Result<TensorMap> {
    let mut theirs = TensorMap::new();
    for mapped in names::map(net, &shapes(net)?) {
        let Some(whole) = ours.get(&mapped.ours) else { continue };
        let parts = whole.chunk(mapped.theirs.len() as i64, 0);
        for (name, part) in mapped.theirs.iter().zip(parts) {
            theirs.insert(name.clone(), part.reshape(&mapped.shape));
        }
    }
    Ok(theirs)
}

fn shapes(net: &OpenaiUnetSpec) -> Result<BTreeMap<String, Vec<i64>>> {
    let net = NetSpec::OpenaiUnet(net.clone()).build_with(ParamsBuilder::shapes())?;
    let params: &Params = net.params();
    Ok(params.iter().map(|(name, tensor)| (name.to_owned(), tensor.size())).collect())
}
