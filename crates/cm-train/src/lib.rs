//! Losses, recipes, the training loop, averages of weights and checkpoints of consistency models.
//!
//! | question | module |
//! | --- | --- |
//! | what does a loss need of a network? | [`Trainable`] |
//! | how far apart are two images? | [`Metric`], [`Distance`] |
//! | which noise levels, which target, which weight? | [`Recipe`] |
//! | what is minimised? | [`denoising_loss`], [`consistency_loss`], [`distillation_loss`], [`progressive_loss`] |
//! | what happens in one step? | [`Trainer::step`] |
//! | what happens in a run? | [`run`](fn@run), [`Observer`] |
//! | what is on the disk? | [`Checkpoints`], [`progress.csv`](PROGRESS_FILE), [`stats.jsonl`](STATS_FILE), [`EventFile`] |
//! | how much memory does it take? | [`MemoryModel`] |
//! | how do several processes train together? | [`Trainer::join`], [`rows_of_rank`] |
//!
//! A recipe is data: diffusion, consistency distillation and training, iCT, ECT and progressive distillation are
//! values of [`Recipe`], each with the loss that it names, not loops of their own. The crate
//! meets networks through [`Trainable`] and data through [`BatchSource`], knows no architecture, prints nothing and
//! saves no random state: what is drawn in step k is a function of the seed and k.
#![deny(missing_docs)]

mod checkpoint;
mod error;
mod events;
mod finite;
mod lock;
mod logs;
mod loss;
mod memory;
mod metric;
mod networks;
mod ranks;
mod recipe;
mod run;
mod shards;
mod spec;
mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod trainable;
mod trainer;

pub use checkpoint::{
    Broken, Checkpoint, Checkpoints, FileRecord, Keep, OPTIMIZER_FILE, RAW_FILE, STATE_FILE, State,
    TARGET_FILE, ema_file,
};
pub use cm_model::ImageDistance;
pub use error::{BoxError, Error, Result};
pub use events::{EVENTS_FILE, EventFile};
pub use lock::{LOCK_FILE, RunLock};
pub use logs::{LogEntry, PROGRESS_FILE, RankLog, STATS_FILE, SigmaBin};
pub use loss::{
    Example, Losses, Target, Teacher, consistency_loss, denoising_loss, distillation_loss, progressive_loss,
};
pub use memory::{MemoryModel, gigabytes, measure_activations};
pub use metric::{Distance, Metric};
pub use networks::Networks;
pub use ranks::{agree, rows_of_rank};
pub use recipe::{
    Levels, Method, PairRule, Pairs, Place, Recipe, Schedule, TargetRule, TeacherRule, TeacherSolver,
};
pub use run::{BatchSource, Ending, Observer, Resumed, RunSpec, Session, resume, run};
pub use spec::{TrainSpec, changed_settings, ema_name};
pub use state::{Metadata, Weights};
pub use trainable::Trainable;
pub use trainer::{Batch, SampleLoss, StepReport, Trainer};
