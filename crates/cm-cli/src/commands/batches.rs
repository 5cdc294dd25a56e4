//! From the data loader to what a trainer takes.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Result;
use cm_data::augment::Draws;
use cm_data::{Augment, Dataset, Loader, LoaderSpec};
use cm_model::Cond;
use cm_train::{Batch, BatchSource, BoxError, RankLog};
use tch::Device;

use crate::experiment::Experiment;

/// The batches of a run: that of step k is a function of the seed and k. They are read ahead from the first step
/// that is asked for.
pub struct Batches {
    loader: Loader,
    stream: Option<(u64, cm_data::Batches)>,
    total_steps: u64,
    conditional: bool,
    augment: Option<Augment>,
    device: Device,
    /// Which of the images of each batch this process trains on.
    rows: Range<usize>,
    log: Option<RankLog>,
}

impl Batches {
    /// The `rows` of the batches of an experiment over opened data.
    pub fn open(
        experiment: &Experiment,
        data: Arc<dyn Dataset>,
        device: Device,
        rows: Range<usize>,
    ) -> Result<Self> {
        let train = &experiment.train;
        let loader = LoaderSpec::new(train.batch, train.seed, experiment.data.flip);
        Ok(Self {
            loader: Loader::new(data, LoaderSpec { max_corrupt: experiment.data.max_corrupt, ..loader })?,
            stream: None,
            total_steps: train.total_steps,
            conditional: experiment.network.num_classes() > 0,
            augment: experiment.augment.map(Augment::new).transpose()?,
            device,
            rows,
            log: None,
        })
    }

    /// Writes down which images were asked for.
    pub fn with_log(self, log: RankLog) -> Self {
        Self { log: Some(log), ..self }
    }

    fn next(&mut self, step: u64) -> Result<cm_data::Batch, BoxError> {
        let mut stream = match self.stream.take() {
            Some((next, stream)) if next == step => stream,
            _ => self.loader.stream_rows(step..self.total_steps.max(step + 1), self.rows.clone()),
        };
        let batch = stream.next().ok_or("the loader ended early")?;
        // Before an error too, which may be that there are too many of them.
        for problem in self.loader.corrupt() {
            eprintln!("WARNING: passed over: {problem}");
        }
        let batch = batch?;
        self.stream = Some((step + 1, stream));
        Ok(batch)
    }
}

impl BatchSource for Batches {
    fn batch(&mut self, step: u64) -> Result<Batch, BoxError> {
        let batch = self.next(step)?;
        if let Some(log) = &mut self.log {
            log.add(step + 1, &batch.ids)?;
        }
        let labels = if self.conditional { batch.to_labels(self.device)? } else { None };
        let images = batch.to_images(self.device)?;
        let Some(augment) = &self.augment else {
            return Ok(Batch { images, cond: Cond { labels, augment: None } });
        };
        // A run is at most 2^32 steps long.
        let draw = |sample| Draws::at(self.loader.spec().seed, step as u32, sample);
        let draws: Vec<Draws> = (0..self.loader.spec().batch as u64).map(draw).collect();
        let (images, parameters) = augment.apply_rows(&images, &draws, self.rows.clone())?;
        Ok(Batch { images, cond: Cond { labels, augment: Some(parameters) } })
    }

    fn passed_over(&self) -> u64 {
        self.loader.corrupt_so_far() as u64
    }
}

#[cfg(test)]
mod tests {
    use cm_data::AugmentSpec;

    use super::*;
    use crate::config::Source;

    fn batch(augment: Option<AugmentSpec>, step: u64) -> Batch {
        rows(augment, step, 0..32)
    }

    fn rows(augment: Option<AugmentSpec>, step: u64, rows: Range<usize>) -> Batch {
        let sets = ["network.augment_dim=9".to_owned(), "train.batch=32".to_owned()];
        let mut experiment = Experiment::read(&Source::find("digits-ct").unwrap(), &sets).unwrap();
        experiment.augment = augment;
        let data = experiment.data.open().unwrap();
        Batches::open(&experiment, data, Device::Cpu, rows).unwrap().batch(step).unwrap()
    }

    #[test]
    fn rows_of_an_augmented_batch_are_those_of_the_whole() {
        let spec = Some(AugmentSpec::edm_cifar10());
        let (whole, part) = (batch(spec, 3), rows(spec, 3, 10..27));
        let worst = (whole.images.narrow(0, 10, 17) - part.images).abs().max().double_value(&[]);
        assert!(worst < 1e-6, "{worst}");
        assert!(whole.cond.augment.unwrap().narrow(0, 10, 17).equal(&part.cond.augment.unwrap()));
    }

    #[test]
    fn an_augmented_batch_is_a_function_of_the_step_and_comes_with_its_labels() {
        let spec = Some(AugmentSpec::edm_cifar10());
        let (plain, once, again, other) = (batch(None, 3), batch(spec, 3), batch(spec, 3), batch(spec, 4));
        assert!(plain.cond.augment.is_none());
        let labels = |batch: &Batch| batch.cond.augment.as_ref().unwrap().shallow_clone();
        assert_eq!((once.images.size(), labels(&once).size()), (plain.images.size(), vec![32, 9]));
        assert!(once.images.equal(&again.images) && labels(&once).equal(&labels(&again)));
        assert!(!labels(&once).equal(&labels(&other)));
        // Images without labels are those of the plain batch, and the others are not.
        let told = labels(&once).abs().sum_dim_intlist(1, false, None);
        let changed = (once.images - plain.images).abs().sum_dim_intlist([1, 2, 3].as_slice(), false, None);
        assert!(told.gt(0.0).equal(&changed.gt(0.0)));
        assert!(told.gt(0.0).any().int64_value(&[]) == 1 && told.gt(0.0).all().int64_value(&[]) == 0);
    }
}
