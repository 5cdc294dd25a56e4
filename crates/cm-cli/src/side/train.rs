//! Training rows: the step of `cm train` on a batch that is there already.

use std::time::Instant;

use anyhow::Result;
use cm_model::{Cond, TensorMap};
use cm_train::{Batch, Trainable, Trainer};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::Row;
use super::work::{Work, classes};
use crate::net::Net;

pub struct TrainRow {
    trainer: Trainer<Net>,
    batch: Batch,
}

impl TrainRow {
    pub fn new(work: &Work, row: &str) -> Result<Self> {
        let (_, trainer) = work.trainer(row)?;
        let batch = batch(work, row, &trainer)?;
        Ok(Self { trainer, batch })
    }
}

/// The images of the row's file with their classes.
pub fn batch(work: &Work, row: &str, trainer: &Trainer<Net>) -> Result<Batch> {
    let images = work.tensor(&work.bundle(row)?, "images")?;
    let num_classes = trainer.student().num_classes();
    let cond = match classes(images.size()[0] as usize, num_classes) {
        Some(labels) => Cond::labels(&labels, num_classes, work.device)?,
        None => Cond::none(),
    };
    Ok(Batch { images, cond })
}

impl Row for TrainRow {
    fn check(&mut self) -> Result<Value> {
        let before = self.trainer.student().params().snapshot();
        let report = self.trainer.step(&self.batch)?;
        let now = self.trainer.student().params().trainable();
        Ok(json!({
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "moved": distance(now, &before),
        }))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..count {
            // A step waits for its losses, so its work is done when it returns, but for the update on a GPU.
            self.trainer.step(&self.batch)?;
        }
        if self.trainer.device().is_cuda() {
            wait_for(self.trainer.student().params().trainable().next().map(|(_, weight)| weight));
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn items(&self) -> u64 {
        self.batch.images.size()[0] as u64
    }
}

/// The norm of what lies between tensors and those of the same names in `others`.
pub fn distance<'a>(tensors: impl Iterator<Item = (&'a str, &'a Tensor)>, others: &TensorMap) -> f64 {
    let square = |(name, tensor): (&str, &Tensor)| {
        let Some(other) = others.get(name) else { return f64::NAN };
        let gap = tensor.detach().to_kind(Kind::Double) - other.to_kind(Kind::Double);
        gap.square().sum(Kind::Double).double_value(&[])
    };
    tensors.map(square).sum::<f64>().sqrt()
}

/// Reading a number of a tensor waits for all that was queued on its device.
pub fn wait_for(tensor: Option<&Tensor>) {
    if let Some(tensor) = tensor {
        let _ = tensor.detach().flatten(0, -1).get(0).double_value(&[]);
    }
}
