use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use cm_torch::dist::ProcessGroup;
use serde::{Deserialize, Serialize};

use crate::logs::{LogEntry, Logs};
use crate::{
    Batch, BoxError, Broken, Checkpoints, Error, Keep, Metadata, Result, StepReport, Trainable, Trainer,
};

/// How often a run writes what: the section `[run]` of an experiment. It changes nothing that is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// Steps between entries of the log.
    pub log_every: u64,
    /// Steps between samples; 0 for samples at the end alone.
    pub sample_every: u64,
    /// Steps between checkpoints; 0 for one at the end alone.
    pub checkpoint_every: u64,
    /// So many of the newest checkpoints stay.
    pub keep_last: usize,
    /// Checkpoints at multiples of this step stay for ever; 0 for none.
    pub milestone_every: u64,
}

impl RunSpec {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Setting`] with the key and its value.
    pub fn check(&self) -> Result<()> {
        if self.log_every == 0 {
            let advice = "it is the number of steps between entries of the log";
            return Err(Error::setting("run.log_every", 0, "1 or more", advice));
        }
        if self.keep_last == 0 {
            let advice = "the newest checkpoint is what a run resumes from";
            return Err(Error::setting("run.keep_last", 0, "1 or more", advice));
        }
        Ok(())
    }

    fn keep(&self) -> Keep {
        Keep { last: self.keep_last, milestone_every: self.milestone_every }
    }
}

/// Where batches come from.
///
/// The batch of a step must be a function of the step, for a resumed run to see what the uninterrupted one would
/// have seen. A closure `|step| …` is a source.
pub trait BatchSource {
    /// The batch of the step with index `step`, from 0.
    ///
    /// # Errors
    /// Whatever keeps the source from making it.
    fn batch(&mut self, step: u64) -> std::result::Result<Batch, BoxError>;

    /// How many images of the data it has passed over so far because they do not decode, for the log.
    fn passed_over(&self) -> u64 {
        0
    }
}

impl<F: FnMut(u64) -> std::result::Result<Batch, BoxError>> BatchSource for F {
    fn batch(&mut self, step: u64) -> std::result::Result<Batch, BoxError> {
        self(step)
    }
}

/// What a program wants to hear of a run: the crate prints nothing itself.
pub trait Observer<M> {
    /// After every step.
    fn on_step(&mut self, _report: &StepReport) {}

    /// After an entry was written to the log.
    fn on_log(&mut self, _entry: &LogEntry) {}

    /// After a checkpoint was written.
    fn on_checkpoint(&mut self, _folder: &Path, _step: u64) {}

    /// After a damaged checkpoint whose step was written anew was kept as `folder`: the user should be told.
    fn on_set_aside(&mut self, _folder: &Path) {}

    /// When samples are due: every `sample_every` steps and at the end. [`Trainer::student`] has the raw weights,
    /// [`Trainer::with_ema`] lends it with averaged ones.
    ///
    /// # Errors
    /// An error ends the run (a checkpoint of this step has been written if one was due).
    fn on_sample(&mut self, _trainer: &Trainer<M>) -> std::result::Result<(), BoxError> {
        Ok(())
    }
}

/// An observer that wants to hear nothing.
impl<M> Observer<M> for () {}

/// Where a run writes, and how its surroundings talk to it.
pub struct Session<'a> {
    /// The run's folder.
    pub folder: &'a Path,
    /// How often it writes what.
    pub spec: &'a RunSpec,
    /// Set to true (by Ctrl-C, say), it makes the run finish its step, save and return.
    pub stop: &'a AtomicBool,
    /// Makes the metadata of model files.
    pub metadata: &'a Metadata<'a>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// At its last step.
    Finished,
    /// Before it, because it was told to stop; its state is in a checkpoint.
    Stopped,
}

/// What a run was resumed from.
#[derive(Debug, Clone, PartialEq)]
pub struct Resumed {
    /// The step of the checkpoint; `None` if there was none, and the run starts anew.
    pub step: Option<u64>,
    /// Newer folders that are not whole and were passed over: the caller should say so loudly.
    pub passed_over: Vec<Broken>,
    /// Settings that differ from those of the checkpoint, as `train.lr: 0.0004 → 0.0001`.
    pub changed: Vec<String>,
}

/// Puts `trainer` where the newest whole checkpoint in `folder` stands.
///
/// A checkpoint that is not whole is never used in part: the next older whole one is, and the result names what was
/// passed over and why.
///
/// # Errors
/// [`Error::Checkpoint`] if there are checkpoints and none is whole, or if the newest whole one does not fit.
pub fn resume<M: Trainable>(trainer: &mut Trainer<M>, folder: &Path) -> Result<Resumed> {
    let (newest, passed_over) = Checkpoints::of_run(folder).newest_whole()?;
    match newest {
        Some(checkpoint) => {
            let changed = trainer.resume(&checkpoint)?;
            Ok(Resumed { step: Some(checkpoint.state.step), passed_over, changed })
        }
        None => match passed_over.into_iter().next() {
            None => Ok(Resumed { step: None, passed_over: Vec::new(), changed: Vec::new() }),
            Some(Broken { path, problem }) => {
                let problem = format!("{problem}, and no older checkpoint is whole; start without --resume");
                Err(Error::checkpoint(path, problem))
            }
        },
    }
}

/// Trains until the run's last step, or until it is told to stop.
///
/// The trainer may be new or resumed; a new one needs a folder without checkpoints. The state after the last step is
/// always saved.
///
/// Where several processes train ([`Trainer::join`]), all call this; rank 0 alone writes, and calls the observer for
/// more than steps. A rank that is told to stop stops them all.
///
/// # Errors
/// [`Error::Diverged`] if a loss or gradient is not finite, or if what a step made of the weights is not; the last good
/// checkpoint stays. Otherwise the first error of the source, the network, the disk or the observer.
pub fn run<M: Trainable>(
    trainer: &mut Trainer<M>,
    source: &mut dyn BatchSource,
    session: &Session<'_>,
    observer: &mut dyn Observer<M>,
) -> Result<Ending> {
    session.spec.check()?;
    let checkpoints = Checkpoints::of_run(session.folder);
    let mut logs = match trainer.writes() {
        true => {
            refuse_newer(&checkpoints, trainer.steps_done())?;
            Some(Logs::open(session.folder, trainer.steps_done())?)
        }
        false => None,
    };
    let mut last_saved = None;
    let mut last_report = None;
    while !trainer.is_finished() && !trainer.any_wants_to_stop(session.stop.load(Ordering::Relaxed))? {
        let step = trainer.steps_done();
        let batch = source.batch(step).map_err(|source| Error::Batch { step: step + 1, source })?;
        let report = trainer.step(&batch).map_err(|error| diverged(error, &checkpoints))?;
        observer.on_step(&report);
        let due = |every: u64| trainer.is_finished() || (every > 0 && report.step.is_multiple_of(every));
        if due(session.spec.checkpoint_every) {
            trainer.compare()?;
        }
        if let Some(logs) = &mut logs {
            logs.add(&report);
            if due(session.spec.log_every) {
                logs.write(&report, source.passed_over())?.iter().for_each(|entry| observer.on_log(entry));
            }
        }
        let group = trainer.group.clone();
        // The other ranks wait in their next exchange, however long this takes.
        let _busy = group.as_deref().filter(|group| group.is_first()).map(ProcessGroup::busy);
        if due(session.spec.checkpoint_every) {
            save(trainer, &checkpoints, session, observer)?;
            last_saved = Some(report.step);
        }
        if due(session.spec.sample_every) {
            draw(trainer, observer)?;
        }
        last_report = Some(report);
    }
    if let Some(report) = last_report.filter(|report| last_saved != Some(report.step)) {
        let _busy = trainer.group().filter(|group| group.is_first()).map(ProcessGroup::busy);
        if let Some(logs) = &mut logs {
            logs.write(&report, source.passed_over())?.iter().for_each(|entry| observer.on_log(entry));
        }
        save(trainer, &checkpoints, session, observer)?;
    }
    Ok(if trainer.is_finished() { Ending::Finished } else { Ending::Stopped })
}

/// Saves, on the rank that writes; the others do their part of it where they have one.
fn save<M: Trainable>(
    trainer: &Trainer<M>,
    checkpoints: &Checkpoints,
    session: &Session<'_>,
    observer: &mut dyn Observer<M>,
) -> Result<()> {
    if !trainer.writes() && !trainer.is_sharded() {
        return Ok(());
    }
    let folder = trainer.save(checkpoints, session.metadata).map_err(|error| diverged(error, checkpoints))?;
    if !trainer.writes() {
        return Ok(());
    }
    checkpoints.take_set_aside().iter().for_each(|folder| observer.on_set_aside(folder));
    checkpoints.prune(session.spec.keep())?;
    observer.on_checkpoint(&folder, trainer.steps_done());
    Ok(())
}

/// Lets the observer draw samples, on the rank that writes.
fn draw<M: Trainable>(trainer: &mut Trainer<M>, observer: &mut dyn Observer<M>) -> Result<()> {
    trainer.gather_averages()?;
    if trainer.writes() {
        let failed = |source| Error::Observer { step: trainer.steps_done(), source };
        observer.on_sample(trainer).map_err(failed)?;
    }
    trainer.drop_averages();
    Ok(())
}

/// A run must not write into the folder of another one that has come further.
fn refuse_newer(checkpoints: &Checkpoints, step: u64) -> Result<()> {
    match checkpoints.newest_whole()?.0 {
        Some(newest) if newest.state.step > step => {
            let problem = format!(
                "it is of step {}, and this run would start behind step {step}; resume (--resume) or choose another \
                 folder (--out)",
                newest.state.step
            );
            Err(Error::checkpoint(newest.path, problem))
        }
        _ => Ok(()),
    }
}

/// Adds to a number that is not finite where the run can go on from.
fn diverged(error: Error, checkpoints: &Checkpoints) -> Error {
    match error {
        Error::NonFinite { .. } | Error::Spoilt { .. } => {
            let checkpoint = checkpoints.newest_whole().ok().and_then(|(newest, _)| newest).map(|c| c.path);
            Error::Diverged { source: Box::new(error), checkpoint }
        }
        other => other,
    }
}
