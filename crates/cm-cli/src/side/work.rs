//! What the rows of the race work on: experiments of the presets, without what would make two runs differ.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use cm_model::{Bundle, Compute};
use cm_net::{AttnHeads, NetSpec, OpenaiUnetSpec};
use cm_schedule::{LrRule, NoiseCond};
use cm_train::{Metric, Trainer};
use tch::{Device, Tensor};

use crate::args::{RaceDtype, RaceSize, SideArgs};
use crate::commands::session;
use crate::config::Source;
use crate::experiment::{Experiment, LowPrecision};
use crate::net::Net;
use crate::sources::{ModelSource, Start};

/// What is done in a row.
pub enum Kind {
    Train,
    Sample,
    Update,
    Checkpoint,
    Data,
    Fid,
}

/// The network that diffusers has too, for which there is no experiment.
pub const ADM: &str = "adm";

/// A U-Net of OpenAI's kind of about the size of the others.
fn adm(size: RaceSize) -> OpenaiUnetSpec {
    let tiny = size == RaceSize::Tiny;
    OpenaiUnetSpec {
        image_size: if tiny { 8 } else { 32 },
        // diffusers' pipeline takes nothing else.
        image_channels: 3,
        num_classes: 0,
        model_channels: if tiny { 64 } else { 128 },
        channel_mult: if tiny { vec![1, 2] } else { vec![1, 2, 2] },
        num_blocks: if tiny { 1 } else { 3 },
        attn_resolutions: if tiny { vec![4] } else { vec![16, 8] },
        attn_heads: AttnHeads::HeadChannels(64),
        ..OpenaiUnetSpec::imagenet64()
    }
}

/// The kind of the row `name`.
pub fn kind(name: &str) -> Result<Kind> {
    Ok(match name {
        "ct" | "cd-heun" | "ect" | "edm" => Kind::Train,
        "update" => Kind::Update,
        "checkpoint-save" | "checkpoint-load" => Kind::Checkpoint,
        "data" => Kind::Data,
        "fid" => Kind::Fid,
        name if ["sample-", "heun-", "adm-"].iter().any(|start| name.starts_with(start)) => Kind::Sample,
        name => bail!("{name}: no such row"),
    })
}

/// The settings of one side.
pub struct Work {
    pub folder: PathBuf,
    pub size: RaceSize,
    pub device: Device,
    /// The most bytes that the process held before it had a row.
    pub base: u64,
    batch: usize,
    dtype: RaceDtype,
    sets: Vec<String>,
}

impl Work {
    pub fn new(args: &SideArgs) -> Result<Self> {
        let device = session::device(&args.device)?;
        let usual = match args.size {
            RaceSize::Tiny => 128,
            // What EDM gives each of its GPUs; and what takes seconds, not minutes, on a CPU.
            _ if device.is_cuda() => 64,
            _ => 8,
        };
        Ok(Self {
            folder: args.folder.clone(),
            size: args.size,
            device,
            base: cm_torch::device::memory(device)?.peak_reserved,
            batch: args.batch.unwrap_or(usual),
            dtype: args.dtype,
            sets: args.sets.clone(),
        })
    }

    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            RaceDtype::Fp32 => "fp32",
            RaceDtype::Bf16 => "bf16",
        }
    }

    /// The file `name` of the shared folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A shared file of tensors.
    pub fn bundle(&self, row: &str) -> Result<Bundle> {
        Ok(Bundle::read(&self.file(&format!("{row}.safetensors")))?)
    }

    /// One tensor of a shared file, on the device.
    pub fn tensor(&self, bundle: &Bundle, name: &str) -> Result<Tensor> {
        let tensor = bundle.tensors.get(name).with_context(|| format!("no tensor '{name}'"))?;
        Ok(tensor.to_device(self.device))
    }

    /// The experiment of a training row.
    ///
    /// Dropout and augmentation are off, so that two sides compute the same loss; the learning rate is that of the
    /// experiment from the first step on; LPIPS, which needs weights from elsewhere, gives way to l2.
    pub fn experiment(&self, row: &str) -> Result<Experiment> {
        let preset = match (self.size, row) {
            (RaceSize::Tiny, "ct") => "digits-ct",
            (RaceSize::Tiny, "cd-heun") => "digits-cd",
            (RaceSize::Tiny, "ect") => "digits-ect",
            (RaceSize::Tiny, "edm") => "digits-edm",
            (RaceSize::Cifar10, "ct") => "cifar10-ct",
            (RaceSize::Cifar10, "cd-heun") => "cifar10-cd-l2",
            (RaceSize::Cifar10, "ect") => "cifar10-ect",
            (RaceSize::Cifar10, "edm") => "cifar10-edm-ddpmpp",
            (RaceSize::Imagenet64, "ct" | ADM) => "imagenet64-ct",
            (RaceSize::Imagenet64, "cd-heun") => "imagenet64-cd-l2",
            (RaceSize::Imagenet64, "edm") => "imagenet64-edm",
            (RaceSize::Tiny, ADM) => "digits-ct",
            (RaceSize::Cifar10, ADM) => "cifar10-ct",
            (_, row) => bail!("{row}: no experiment"),
        };
        let mut experiment = Experiment::read(&Source::find(preset)?, &self.sets)?;
        experiment.augment = None;
        match &mut experiment.network {
            NetSpec::SongUnet(spec) => (spec.dropout, spec.augment_dim) = (0.0, 0),
            NetSpec::DhariwalUnet(spec) => (spec.dropout, spec.augment_dim) = (0.0, 0),
            NetSpec::OpenaiUnet(spec) => spec.dropout = 0.0,
        }
        if row == ADM && self.size != RaceSize::Imagenet64 {
            experiment.network = NetSpec::OpenaiUnet(adm(self.size));
            experiment.precond.noise_cond = NoiseCond::ThousandQuarterLog;
        }
        let train = &mut experiment.train;
        (train.batch, train.micro_batch, train.lr_rule) = (self.batch, None, LrRule::Constant {});
        if train.metric.lpips().is_some() {
            train.metric = Metric::L2;
        }
        let is_low = self.dtype == RaceDtype::Bf16;
        experiment.compute.autocast = is_low.then_some(LowPrecision::Bf16);
        if self.device.is_cuda() {
            (experiment.compute.cudnn_benchmark, experiment.compute.tf32) = (true, is_low);
        }
        Ok(experiment)
    }

    /// How the network computes.
    pub fn compute(&self, experiment: &Experiment) -> Result<Compute> {
        experiment.compute(self.device)
    }

    /// A trainer as `cm train` builds it, on the shared weights.
    pub fn trainer(&self, row: &str) -> Result<(Experiment, Trainer<Net>)> {
        let mut experiment = self.experiment(row)?;
        experiment.init = Some(ModelSource::at(&self.file(&weights(row)), None)?);
        if experiment.train.teacher.is_some() {
            experiment.teacher = Some(ModelSource::at(&self.file(&teacher(row)), None)?);
        }
        let start = Start::read(&experiment, false)?;
        let trainer = session::build_trainer(&experiment, &start, self.device)?;
        Ok((experiment, trainer))
    }
}

/// Classes of so many images: one after the other; none for an unconditional network.
pub fn classes(images: usize, num_classes: i64) -> Option<Vec<i64>> {
    (num_classes > 0).then(|| (0..images as i64).map(|image| image % num_classes).collect())
}

/// The file of a row's weights.
pub fn weights(row: &str) -> String {
    format!("{row}-weights.safetensors")
}

/// The file of its teacher's.
pub fn teacher(row: &str) -> String {
    format!("{row}-teacher.safetensors")
}
