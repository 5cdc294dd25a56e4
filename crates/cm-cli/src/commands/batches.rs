//! From the data loader to what a trainer takes.

use std::sync::Arc;

use anyhow::Result;
use cm_data::{Dataset, Loader, LoaderSpec};
use cm_model::Cond;
use cm_train::{Batch, BatchSource, BoxError};
use tch::Device;

use crate::experiment::Experiment;

/// The batches of a run: that of step k is a function of the seed and k. They are read ahead from the first step
/// that is asked for.
pub struct Batches {
    loader: Loader,
    stream: Option<(u64, cm_data::Batches)>,
    total_steps: u64,
    conditional: bool,
    device: Device,
}

impl Batches {
    /// The batches of an experiment over opened data.
    pub fn open(experiment: &Experiment, data: Arc<dyn Dataset>, device: Device) -> Result<Self> {
        let train = &experiment.train;
        Ok(Self {
            loader: Loader::new(data, LoaderSpec::new(train.batch, train.seed, experiment.data.flip))?,
            stream: None,
            total_steps: train.total_steps,
            conditional: experiment.network.num_classes() > 0,
            device,
        })
    }

    fn next(&mut self, step: u64) -> Result<cm_data::Batch, BoxError> {
        let mut stream = match self.stream.take() {
            Some((next, stream)) if next == step => stream,
            _ => self.loader.stream(step..self.total_steps.max(step + 1)),
        };
        let batch = stream.next().ok_or("the loader ended early")??;
        self.stream = Some((step + 1, stream));
        Ok(batch)
    }
}

impl BatchSource for Batches {
    fn batch(&mut self, step: u64) -> Result<Batch, BoxError> {
        let batch = self.next(step)?;
        let labels = if self.conditional { batch.to_labels(self.device)? } else { None };
        Ok(Batch { images: batch.to_images(self.device)?, cond: Cond { labels, augment: None } })
    }
}
