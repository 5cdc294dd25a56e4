//! One experiment: everything that decides what a training run computes, as typed data.

use std::path::Path;

use anyhow::{Context, Result, bail};
use cm_data::{AugmentSpec, SourceSpec};
use cm_model::Compute;
use cm_net::{ModelSpec, NetSpec, PrecondSpec, Role};
use cm_schedule::NumScales;
use cm_train::{Levels, Method, PairRule, RunSpec, TrainSpec};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::config::Source;
use crate::sources::ModelSource;

/// An experiment file, read and typed. Unknown keys are refused at every level.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Its name, which names the run's folder where none is given.
    pub name: String,
    /// The images.
    pub data: SourceSpec,
    /// How they are augmented; not at all if left out, beyond what the data section says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augment: Option<AugmentSpec>,
    /// The network.
    pub network: NetSpec,
    /// Its preconditioning and noise levels.
    pub precond: PrecondSpec,
    /// The recipe, the optimiser and the averages.
    pub train: TrainSpec,
    /// Dtype, memory order and memory of the network's work.
    pub compute: ComputeSpec,
    /// How often what is written.
    pub run: RunSpec,
    /// The diffusion model that is distilled; named by `--teacher`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<ModelSource>,
    /// The weights that training begins with; named by `--init-from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<ModelSource>,
}

/// The section `[compute]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComputeSpec {
    /// Lower precision inside the network; float32 if left out. Weights, noise levels, preconditioning and loss
    /// stay float32.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autocast: Option<LowPrecision>,
    /// Images and convolution weights in channels-last memory order.
    pub channels_last: bool,
    /// In training, the network's blocks are computed again in the backward pass, for less memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checkpoint_activations: bool,
    /// On CUDA, products and convolutions in float32 round what goes in to TF32 (10 bits of mantissa).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tf32: bool,
    /// On CUDA, cuDNN times its algorithms on each new shape and keeps the fastest; two runs may then differ in their
    /// last bits.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cudnn_benchmark: bool,
}

/// Dtypes of autocast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LowPrecision {
    /// bfloat16: the range of float32, eight bits of mantissa.
    Bf16,
    /// IEEE half precision, on CUDA alone: without a loss scale its gradients may underflow.
    Fp16,
}

impl Experiment {
    /// Reads an experiment and checks it, all but the data.
    pub fn read(source: &Source, sets: &[String]) -> Result<Self> {
        let experiment: Self = source.parse(sets)?;
        experiment.check().with_context(|| source.name.clone())?;
        Ok(experiment)
    }

    fn check(&self) -> Result<()> {
        let safe = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || !self.name.chars().all(safe) || self.name.starts_with('.') {
            bail!("name = {:?}: expected letters, digits, '-', '_' and '.', as in digits-ct", self.name);
        }
        self.network.validate().context("network")?;
        if let Some(augment) = &self.augment {
            augment.validate()?;
            let (labels, dim) = (augment.label_dim(), self.network.augment_dim());
            if labels != dim {
                bail!(
                    "network.augment_dim = {dim}: [augment] makes {labels} labels; set it to {labels} or change which transforms are on"
                );
            }
        }
        self.precond.sigma_range().context("precond")?;
        self.precond.grid().context("precond")?;
        self.precond.boundary().context("precond")?;
        self.run.check()?;
        let shape = self.network.image_shape();
        crate::lpips::check(&self.train.metric, shape)?;
        // Weights of LPIPS are looked for where they are used: a dry run does without.
        match self.train.check(shape) {
            Err(cm_train::Error::MissingWeights { .. }) | Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The network's computing on `device`.
    pub fn compute(&self, device: Device) -> Result<Compute> {
        let autocast = match self.compute.autocast {
            None => None,
            Some(LowPrecision::Bf16) => Some(Kind::BFloat16),
            Some(LowPrecision::Fp16) if device.is_cuda() => Some(Kind::Half),
            Some(LowPrecision::Fp16) => {
                bail!("compute.autocast = \"fp16\" needs CUDA; on a CPU use --set compute.autocast=bf16")
            }
        };
        let ComputeSpec { channels_last, checkpoint_activations, tf32, cudnn_benchmark, .. } = self.compute;
        for (key, on) in [("tf32", tf32), ("cudnn_benchmark", cudnn_benchmark)] {
            if on && !device.is_cuda() {
                bail!("compute.{key} = true needs CUDA; leave it out on a CPU");
            }
        }
        Ok(Compute { autocast, channels_last, checkpoint_activations, graph: false })
    }

    /// Has libtorch compute on CUDA as the experiment says; on a CPU there is nothing to switch.
    pub fn switch(&self, device: Device) -> Result<()> {
        if device.is_cuda() {
            cm_torch::device::set_tf32(self.compute.tf32)?;
            cm_torch::device::set_cudnn_benchmark(self.compute.cudnn_benchmark);
        }
        Ok(())
    }

    /// What the model files of this experiment say about themselves.
    pub fn model_spec(&self) -> ModelSpec {
        let role = match self.train.recipe().method().trains_denoiser() {
            true => Role::Denoiser,
            false => Role::Consistency,
        };
        ModelSpec::new(role, self.network.clone(), self.precond)
    }

    /// The steps of a progressively distilled student after `steps_done` steps of training.
    pub fn student_steps(&self, steps_done: u64) -> Option<usize> {
        let recipe = self.train.recipe();
        // The state between two stages still is that of the one before.
        let last = steps_done.saturating_sub(1);
        match recipe.method() {
            Method::Progressive { .. } => recipe.schedule(last, self.train.total_steps).num_scales,
            _ => None,
        }
    }

    /// The steps of the student of the stage before, which teaches; none for the first teacher, a diffusion model.
    pub fn teacher_steps(&self, steps_done: u64) -> Option<usize> {
        let stage = self.train.recipe().stage(steps_done.saturating_sub(1), self.train.total_steps)?;
        (stage.start > 0).then(|| self.student_steps(stage.start)).flatten()
    }

    /// The noise levels that recipes draw from.
    pub fn levels(&self) -> Result<Levels> {
        Ok(Levels { range: self.precond.sigma_range()?, sigma_data: self.precond.sigma_data })
    }

    /// The experiment as a TOML file, with every value written out.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).context("writing the experiment as TOML")
    }

    /// Sets the length of the run. Schedules scale with it by themselves, but for the stages of progressive distillation.
    pub fn set_steps(&mut self, steps: u64) {
        self.train.total_steps = steps;
        if let PairRule::Steps { num_scales: NumScales::ProgDist { start, steps_per_stage }, .. } =
            &mut self.train.pairs
        {
            // All stages but the last two are of one length, and these two of twice that.
            *steps_per_stage = (steps / u64::from(start.ilog2() + 3)).max(1);
        }
    }

    /// Points the data at `path`, where the data comes from a path.
    pub fn set_data(&mut self, path: &Path) {
        self.data.path = Some(path.to_owned());
    }

    /// Checks that the opened data fits the network.
    pub fn check_data(&self, data: &dyn cm_data::Dataset) -> Result<()> {
        let (want, got) = (self.network.image_shape(), data.shape());
        let fits = (got.channels as i64, got.height as i64, got.width as i64)
            == (want.channels, want.height, want.width);
        if !fits {
            bail!(
                "{}: the images are {got}, the network takes {want}; set data.resolution and data.channels, or \
                 network.image_size and network.image_channels",
                data.source()
            );
        }
        // Files are decoded when they are drawn: images of a wrong size are better found before a network is built.
        match data.get(0) {
            Err(error) if error.is_of_image() && self.data.max_corrupt > 0 => {}
            first => drop(first?),
        }
        let (classes, known) = (self.network.num_classes(), data.num_classes() as i64);
        if classes > 0 && known == 0 {
            bail!("{}: the images have no labels, and the network has {classes} classes", data.source());
        }
        if classes > 0 && known > classes {
            bail!("{}: the data has {known} classes, network.num_classes is {classes}", data.source());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PRESETS;

    #[test]
    fn every_preset_reads_and_survives_its_own_toml() {
        for (name, _) in PRESETS {
            let experiment = Experiment::read(&Source::find(name).unwrap(), &[]).unwrap();
            assert_eq!(experiment.name, *name, "a preset is named as its file");
            let text = experiment.to_toml().unwrap();
            assert_eq!(toml::from_str::<Experiment>(&text).unwrap(), experiment, "{name}");
        }
    }

    #[test]
    fn wrong_values_are_one_line_with_their_key() {
        let error = |set: &str| {
            let source = Source::find("digits-ct").unwrap();
            format!("{:#}", Experiment::read(&source, &[set.to_owned()]).unwrap_err())
        };
        for (set, words) in [
            ("precond.sigma_min=0", "sigma_min"),
            ("train.lr=-1", "train.lr = -1"),
            ("train.lerning_rate=1", "lerning_rate"),
            ("network.image_size=9", "image_size"),
            ("run.log_every=0", "run.log_every = 0"),
            ("name=../x", "name"),
            ("train.metric=l7", "l7"),
        ] {
            let error = error(set);
            assert!(error.contains(words) && !error.contains('\n'), "{set}: {error}");
        }
    }

    #[test]
    fn cifar_is_the_papers_network() {
        let experiment = Experiment::read(&Source::find("cifar10-ct").unwrap(), &[]).unwrap();
        assert_eq!(experiment.network.num_parameters().unwrap(), 56_395_523);
        assert_eq!(experiment.train.batch, 512);
    }
}
