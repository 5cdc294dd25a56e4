//! Models that a run starts from: the teacher of a distillation, and weights to begin with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_model::{Cast, Denoiser, Preconditioned};
use cm_net::import::{self, Kind};
use cm_net::{ModelFile, NetSpec, PrecondSpec, Role};
use cm_train::{Method, Trainable};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Device;

use crate::experiment::Experiment;
use crate::net::Net;
use crate::runs;

/// A model on the disk, in any form that `cm model import` reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSource {
    /// A file, or a folder of diffusers.
    pub path: PathBuf,
    /// What its weights do not say of themselves; see `cm model import --help`.
    #[serde(rename = "as", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
}

impl ModelSource {
    /// The model that `path` means: a file, a folder of diffusers, or the newest checkpoint of a run and in it the
    /// average that `ema` names.
    pub fn find(path: &Path, kind: Option<&str>, ema: Option<&str>) -> Result<Self> {
        let path = match (import::is_diffusers_folder(path), ema) {
            (true, None) => path.to_owned(),
            (true, Some(rate)) => bail!(
                "{}: --ema {rate} chooses inside a run or checkpoint folder; this is one of diffusers",
                path.display()
            ),
            (false, _) => runs::find_model(path, ema)?,
        };
        Ok(Self { path, kind: kind.map(str::to_owned) })
    }

    /// [`find`](Self::find), to be written into an experiment.
    ///
    /// What is kept is the file, since a run may get newer checkpoints, and its absolute path, since what starts from it
    /// may be resumed from another folder.
    pub fn at(path: &Path, kind: Option<&str>) -> Result<Self> {
        let found = Self::find(path, kind, None)?;
        let path = std::path::absolute(&found.path).with_context(|| found.path.display().to_string())?;
        Ok(Self { path, ..found })
    }

    /// Reads the file, its weights included.
    pub fn read(&self) -> Result<ModelFile> {
        let kind = self.kind.as_deref().map(str::parse::<Kind>).transpose()?;
        if self.path.is_dir() && !import::is_diffusers_folder(&self.path) {
            bail!(
                "{}: a folder; name the file in it, such as checkpoints/step-00001000/ema-0.9999.safetensors",
                self.path.display()
            );
        }
        Ok(import::load_any(&self.path, kind)?)
    }
}

/// What an experiment starts from, read and found to fit.
#[derive(Default)]
pub struct Start {
    teacher: Option<ModelFile>,
    init: Option<ModelFile>,
}

impl Start {
    /// Reads the models that the experiment names and checks that they fit it.
    ///
    /// A run that goes on has weights of its own and, in progressive distillation, its teacher among them: it needs
    /// nothing but the teacher of a consistency distillation.
    pub fn read(experiment: &Experiment, goes_on: bool) -> Result<Self> {
        let method = experiment.train.recipe().method();
        if goes_on && !matches!(method, Method::Distillation(_)) {
            return Ok(Self::default());
        }
        let read = |key: &str, source: &ModelSource| {
            let model = source.read();
            model.with_context(|| format!("{key}.path (--set {key}.path=FILE names another)"))
        };
        let teacher = experiment.teacher.as_ref().map(|source| read("teacher", source)).transpose()?;
        let init = experiment.init.as_ref().filter(|_| !goes_on);
        let init = init.map(|source| read("init", source)).transpose()?;
        if method.is_distilled() && teacher.is_none() {
            bail!(
                "{}: this experiment distils a diffusion model: name it with --teacher FILE, as in \
                 cargo xtask distill --teacher edm.pt",
                experiment.name
            );
        }
        if let Some(file) = &teacher {
            check_teacher(file, experiment)?;
        }
        // A student starts from its teacher unless it is told otherwise.
        if let Some(file) = init.as_ref().or(teacher.as_ref()).filter(|_| !goes_on) {
            check_fit(file, experiment)?;
        }
        Ok(Self { teacher, init })
    }

    /// Puts the weights to begin with into the student, where there are some.
    pub fn load(&self, student: &Net) -> Result<()> {
        let Some(file) = self.init.as_ref().or(self.teacher.as_ref()) else { return Ok(()) };
        let mut tensors = cm_model::TensorMap::new();
        for (name, tensor) in &file.tensors {
            if student.params().get(name).is_some() || !is_augment_input(name) {
                tensors.insert(name.clone(), tensor.shallow_clone());
            }
        }
        let loaded = student.params().load(&tensors, Cast::Floats);
        loaded.with_context(|| file.path().display().to_string())
    }

    /// The teacher that a consistency distillation asks at every step.
    pub fn denoiser(&self, experiment: &Experiment, device: Device) -> Result<Option<Box<dyn Denoiser>>> {
        match (&self.teacher, experiment.train.recipe().method()) {
            (Some(file), Method::Distillation(_)) => {
                Ok(Some(file.model(device, experiment.compute(device)?)?.into_denoiser()?))
            }
            _ => Ok(None),
        }
    }
}

/// A teacher of the experiment's own architecture with fresh weights, for a dry run.
pub fn stand_in(experiment: &Experiment, device: Device) -> Result<Box<dyn Denoiser>> {
    let net = cm_net::build(&experiment.network, experiment.train.seed, device)?;
    net.params().set_requires_grad(false);
    let compute = experiment.compute(device)?;
    if compute.channels_last {
        net.params().to_channels_last();
    }
    let (precond, sigma_range) = (experiment.precond.edm()?, experiment.precond.sigma_range()?);
    Ok(Box::new(Preconditioned { net, precond, sigma_range, compute }))
}

/// The one input of a network that is zero when sampling, and that a student that is not augmented can do without.
fn is_augment_input(name: &str) -> bool {
    name == "map_augment.weight"
}

fn check_teacher(file: &ModelFile, experiment: &Experiment) -> Result<()> {
    let path = file.path().display();
    if file.spec.role != Role::Denoiser {
        bail!(
            "{path}: a {} cannot teach; expected a denoiser, such as an EDM model (to train a consistency model \
             further, use --init-from)",
            file.spec.role
        );
    }
    let (got, want) = (&file.spec.net, &experiment.network);
    if got.image_shape() != want.image_shape() || got.num_classes() != want.num_classes() {
        bail!(
            "{path}: it makes images of {} with {} classes, the experiment {} trains on {} with {}",
            got.image_shape(),
            got.num_classes(),
            experiment.name,
            want.image_shape(),
            want.num_classes()
        );
    }
    Ok(())
}

/// Every difference between a file and the network of an experiment, in one error.
fn check_fit(file: &ModelFile, experiment: &Experiment) -> Result<()> {
    if experiment.train.recipe().method().trains_denoiser() && file.spec.role != Role::Denoiser {
        bail!(
            "{}: a {} does not start the training of a denoiser; expected a denoiser",
            file.path().display(),
            file.spec.role
        );
    }
    let found = differences(&file.spec.net, &file.spec.precond, experiment);
    if found.is_empty() {
        return Ok(());
    }
    bail!("{} does not fit the experiment {}: {}", file.path().display(), experiment.name, found.join("; "))
}

/// What keeps weights of one network from being used in the experiment's, as `network.model_channels: 192 in the
/// file, 128 in the experiment`.
pub fn differences(net: &NetSpec, precond: &PrecondSpec, experiment: &Experiment) -> Vec<String> {
    let mut found = Vec::new();
    let value = |x: &NetSpec| serde_json::to_value(x).unwrap_or_default();
    let (got, want) = (value(net), value(&experiment.network));
    let keys = [&got, &want].into_iter().filter_map(Value::as_object).flat_map(|map| map.keys());
    let keys: std::collections::BTreeSet<&String> = keys.collect();
    for key in keys {
        // Dropout is of training alone, and a student need not be told of augmentation.
        let free =
            ["dropout", "label_dropout"].contains(&key.as_str()) || (key == "augment_dim" && want[key] == 0);
        if !free && got[key] != want[key] {
            found.push(difference(&format!("network.{key}"), &got[key], &want[key]));
        }
    }
    let own = &experiment.precond;
    if precond.sigma_data != own.sigma_data {
        found.push(difference("precond.sigma_data", &precond.sigma_data, &own.sigma_data));
    }
    if precond.noise_cond != own.noise_cond {
        let word = |cond| serde_json::to_value(cond).unwrap_or_default();
        found.push(difference("precond.noise_cond", &word(precond.noise_cond), &word(own.noise_cond)));
    }
    found
}

fn difference(key: &str, got: &impl std::fmt::Display, want: &impl std::fmt::Display) -> String {
    format!("{key}: {got} in the file, {want} in the experiment")
}
