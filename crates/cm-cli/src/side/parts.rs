//! Rows that are part of a program: the update of weights and averages, checkpoints, the data path, statistics of FID.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use cm_data::{Loader, LoaderSpec, SourceKind, SourceSpec};
use cm_eval::{Divisor, Moments, MomentsStream, frechet_distance};
use cm_model::{Bundle, TensorMap};
use cm_net::ModelSpec;
use cm_torch::optim::{EmaTarget, Optimizer, StepOptions, grad_norm};
use cm_train::{Checkpoint, Checkpoints, Trainable, Trainer, Weights};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::Row;
use super::train::{batch, distance, wait_for};
use super::work::Work;
use crate::net::Net;

/// Updates before the sides are compared; as many as in scripts/peers/train.py.
pub const CHECKED_UPDATES: usize = 40;

/// What follows the backward pass of a CT step, with made-up gradients.
pub struct UpdateRow {
    trainer: Trainer<Net>,
    optimizer: Optimizer,
    options: StepOptions,
    averages: Vec<(f64, Vec<Tensor>)>,
    /// One a weight. They stay as they are: gradients that follow the weights have led these to 0 after some hundred
    /// updates, and moments that are no longer normal numbers then take a multiple of the time.
    gradients: Vec<Tensor>,
}

impl UpdateRow {
    pub fn new(work: &Work) -> Result<Self> {
        let (experiment, trainer) = work.trainer("ct")?;
        let train = &experiment.train;
        let schedule = train.recipe().schedule(0, train.total_steps);
        let betas = train.emas.iter().map(|rule| rule.beta(0, train.batch as u64)).chain(schedule.mu);
        let weights: Vec<(&str, &Tensor)> = trainer.student().params().trainable().collect();
        let copy = || weights.iter().map(|(_, weight)| weight.detach().copy()).collect::<Vec<_>>();
        let averages = betas.map(|beta| (beta, copy())).collect();
        let gradients = weights.iter().map(|(_, weight)| weight.detach() * 0.1 + 1e-3).collect();
        let optimizer = Optimizer::new(train.optimizer, &weights)?;
        let options =
            StepOptions { replace_non_finite: train.replace_non_finite, ..StepOptions::new(train.lr) };
        Ok(Self { optimizer, options, averages, gradients, trainer })
    }

    /// Gives every weight the gradient 0.1 θ + 0.001, of the weights at the start.
    fn fill(&self) -> Result<()> {
        for ((_, weight), gradient) in self.trainer.student().params().trainable().zip(&self.gradients) {
            (weight * gradient).sum(Kind::Float).f_backward()?;
        }
        Ok(())
    }

    fn update(&mut self) -> Result<()> {
        let weights: Vec<(&str, &Tensor)> = self.trainer.student().params().trainable().collect();
        let averages: Vec<EmaTarget<'_>> =
            self.averages.iter().map(|(beta, tensors)| EmaTarget { beta: *beta, tensors }).collect();
        // The trainer looks at the norm before the weights move.
        grad_norm(&weights)?;
        self.optimizer.step(&self.options, &weights, &averages)?;
        Ok(())
    }
}

impl Row for UpdateRow {
    fn check(&mut self) -> Result<Value> {
        let before: TensorMap = self.trainer.student().params().snapshot();
        // Few updates move an average by so little that its rounding shows.
        for _ in 0..CHECKED_UPDATES {
            self.fill()?;
            self.update()?;
        }
        let params = self.trainer.student().params();
        let (_, first) = self.averages.first().context("no average")?;
        let average = params.trainable().zip(first).map(|((name, _), tensor)| (name, tensor));
        Ok(json!({
            "moved": distance(params.trainable(), &before),
            "average": distance(average, &before),
        }))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..count {
            self.fill()?;
            let begin = Instant::now();
            self.update()?;
            if self.trainer.device().is_cuda() {
                wait_for(self.trainer.student().params().trainable().next().map(|(_, weight)| weight));
            }
            seconds += begin.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    fn items(&self) -> u64 {
        1
    }
}

/// A checkpoint of a CT run, written or read: whole, synced and checked, as runs write and read it.
pub struct CheckpointRow {
    trainer: Trainer<Net>,
    spec: ModelSpec,
    folder: PathBuf,
    loads: bool,
}

impl CheckpointRow {
    pub fn new(work: &Work, row: &str) -> Result<Self> {
        let (experiment, mut trainer) = work.trainer("ct")?;
        trainer.step(&batch(work, "ct", &trainer)?)?;
        let folder = work.file(&format!("ours-{row}"));
        let row = Self { trainer, spec: experiment.model_spec(), folder, loads: row == "checkpoint-load" };
        row.clear()?;
        row.save()?;
        Ok(row)
    }

    fn clear(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| self.folder.display().to_string())
            }
            _ => Ok(()),
        }
    }

    fn save(&self) -> Result<()> {
        let metadata = |_: Weights<'_>, _: u64| self.spec.metadata();
        self.trainer.save(&Checkpoints::of_run(&self.folder), &metadata)?;
        Ok(())
    }

    fn load(&mut self) -> Result<()> {
        let place = Checkpoints::of_run(&self.folder).path(self.trainer.steps_done());
        self.trainer.resume(&Checkpoint::open(&place)?)?;
        Ok(())
    }
}

impl Row for CheckpointRow {
    fn check(&mut self) -> Result<Value> {
        Ok(json!({}))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..count {
            if !self.loads {
                self.clear()?;
            }
            let begin = Instant::now();
            if self.loads {
                self.load()?
            } else {
                self.save()?
            }
            seconds += begin.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    fn items(&self) -> u64 {
        1
    }
}

/// Shuffled, mirrored batches out of a folder of PNGs.
pub struct DataRow {
    loader: Loader,
    stream: cm_data::Batches,
    device: Device,
}

impl DataRow {
    pub fn new(work: &Work, row: &str) -> Result<Self> {
        let path = work.file(&format!("{row}.json"));
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let about: BTreeMap<String, usize> = serde_json::from_str(&text)?;
        let batch = *about.get("batch").context("no batch")?;
        let set = SourceSpec::new(SourceKind::Folder, Some(work.file("pictures"))).open()?;
        let loader = Loader::new(set, LoaderSpec::new(batch, 0, true))?;
        let stream = loader.stream(0..u64::from(u32::MAX));
        Ok(Self { loader, stream, device: work.device })
    }
}

impl Row for DataRow {
    fn check(&mut self) -> Result<Value> {
        let set = self.loader.dataset();
        let all = cm_data::Batch::gather(&**set, 0..set.len() as u32)?.to_images(Device::Cpu)?;
        Ok(json!({ "images": all.size()[0], "mean": all.mean(Kind::Double).double_value(&[]) }))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..count {
            let images = self.stream.next().context("the loader ended")??.to_images(self.device)?;
            wait_for(Some(&images));
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn items(&self) -> u64 {
        self.loader.spec().batch as u64
    }
}

/// Mean and covariance of features, and their Fréchet distance to given ones.
pub struct FidRow {
    shared: Bundle,
}

impl FidRow {
    pub fn new(work: &Work, row: &str) -> Result<Self> {
        Ok(Self { shared: work.bundle(row)? })
    }

    fn distance(&self) -> Result<f64> {
        let part = |name: &str| self.shared.tensors.get(name).with_context(|| format!("no {name}"));
        let mut stream = MomentsStream::default();
        for features in part("features")?.split(64, 0) {
            stream.add(&features)?;
        }
        let real = Moments::from_parts(part("mean")?, part("covariance")?, None)?;
        Ok(frechet_distance(&stream.finish(Divisor::CountLessOne)?, &real)?)
    }
}

impl Row for FidRow {
    fn check(&mut self) -> Result<Value> {
        Ok(json!({ "fid": self.distance()? }))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..count {
            self.distance()?;
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn items(&self) -> u64 {
        self.shared.tensors.get("features").map_or(0, |features| features.size()[0] as u64)
    }
}
