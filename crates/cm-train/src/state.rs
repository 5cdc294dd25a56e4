use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cm_model::{Bundle, Cast};
use tch::Tensor;

use crate::checkpoint::{OPTIMIZER_FILE, RAW_FILE, TARGET_FILE, ema_file};
use crate::trainer::Borrowed;
use crate::{Checkpoint, Checkpoints, Result, Trainable, Trainer, changed_settings};

/// Which weights a model file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights<'a> {
    /// The student's own.
    Raw,
    /// The average of this name.
    Ema(&'a str),
    /// The target network's.
    Target,
}

/// Makes the metadata of a model file: one key whose value is the model's config, by which the file loads by itself.
pub type Metadata<'a> = dyn Fn(Weights<'_>, u64) -> BTreeMap<String, String> + 'a;

impl<M: Trainable> Trainer<M> {
    /// Writes a checkpoint of the state between two steps and returns its folder.
    ///
    /// `metadata` is asked for each model file, with the number of steps taken. Where averages and moments are shared
    /// out ([`Trainer::is_sharded`]), all ranks call this, and rank 0 writes.
    ///
    /// # Errors
    /// [`crate::Error::Spoilt`] if a weight, an average or a moment is not finite: nothing could go on from there.
    /// [`crate::Error::Io`] or [`crate::Error::Model`] with the file that cannot be written; there is then no new
    /// checkpoint, or where its folder alone could not be synced, one that may not be on the disk yet.
    pub fn save(&self, checkpoints: &Checkpoints, metadata: &Metadata<'_>) -> Result<PathBuf> {
        self.check_state()?;
        if let Some(group) = self.group().filter(|_| self.is_sharded()) {
            let there =
                Tensor::from_slice(&[i64::from(group.is_first() && checkpoints.has(self.steps_done()))]);
            group.broadcast("whether there is a checkpoint of this step", &there, 0)?;
            if there.f_int64_value(&[0])? != 0 {
                return Ok(checkpoints.path(self.steps_done()));
            }
            if !group.is_first() {
                self.each_average(|_, _| Ok(()))?;
                self.whole_moments()?;
                return Ok(checkpoints.path(self.steps_done()));
            }
            // All ranks have been told that it is written: it must not be looked at again.
            let write = |folder: &Path| self.write_files(folder, metadata);
            return checkpoints.replace(self.steps_done(), self.images_seen(), self.spec(), write);
        }
        checkpoints.save(self.steps_done(), self.images_seen(), self.spec(), |folder| {
            self.write_files(folder, metadata)
        })
    }

    fn write_files(&self, folder: &Path, metadata: &Metadata<'_>) -> Result<()> {
        let metadata = |weights: Weights<'_>| metadata(weights, self.steps_done());
        let params = self.student().params();
        params.write(&folder.join(RAW_FILE), &metadata(Weights::Raw))?;
        self.each_average(|name, tensors| {
            let _borrowed = Borrowed::new(&self.weights, tensors);
            Ok(params.write(&folder.join(ema_file(name)), &metadata(Weights::Ema(name)))?)
        })?;
        if let Some(target) = self.target() {
            target.params().write(&folder.join(TARGET_FILE), &metadata(Weights::Target))?;
        }
        let tensors = self.whole_moments()?.unwrap_or_default();
        Ok(Bundle { tensors, metadata: BTreeMap::new() }.write(&folder.join(OPTIMIZER_FILE))?)
    }

    /// Takes over the state of a checkpoint and returns the settings that differ from those that it was trained with.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] for a file that the settings need and the checkpoint lacks,
    /// [`crate::Error::Model`] if weights do not fit, [`crate::Error::Input`] where averages and moments are shared out:
    /// a run is resumed before its ranks meet. The trainer must not be used then: parts of it may have been
    /// loaded.
    pub fn resume(&mut self, checkpoint: &Checkpoint) -> Result<Vec<String>> {
        if self.is_sharded() {
            return Err(crate::Error::Input {
                what: "checkpoint to go on from",
                expected: "a trainer that has not joined other ranks yet".to_owned(),
                got: "one that holds a share of averages and moments".to_owned(),
            });
        }
        self.make_state()?;
        let read = |name: &str| Ok::<_, crate::Error>(Bundle::read(&checkpoint.file(name)?)?.tensors);
        let params = self.student.params();
        params.load(&read(RAW_FILE)?, Cast::Never)?;
        for ema in &self.emas {
            let tensors = read(&ema_file(&ema.name))?;
            // Loading into the student while its weights point at the average's checks names and shapes as for the
            // student; the buffers are the same in every file.
            let _borrowed = Borrowed::new(&self.weights, &ema.tensors);
            params.load(&tensors, Cast::Never)?;
        }
        if let Some(target) = &self.target {
            target.params().load(&read(TARGET_FILE)?, Cast::Never)?;
        }
        self.optimizer.import(&read(OPTIMIZER_FILE)?)?;
        self.step = checkpoint.state.step;
        self.images = checkpoint.state.images;
        Ok(changed_settings(&checkpoint.state.train, self.spec()))
    }
}
