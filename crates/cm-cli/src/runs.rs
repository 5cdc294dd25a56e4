//! Run folders: what `cm train` writes and what `cm sample` finds there.
//!
//! ```text
//! out/runs/digits-ct/
//!   config.toml                       the experiment with every value resolved
//!   progress.csv, stats.jsonl         the log
//!   events.out.tfevents.cm            the log and the grids, for TensorBoard
//!   ranks/rank-0000.csv …             the images that each of several processes has seen
//!   samples/step-00000200-raw.png …   grids of the raw and the averaged weights
//!   .lock                             the process that trains here; empty while none does
//!   checkpoints/step-00000200/        raw, ema-RATE, target and optimizer .safetensors, state.json
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_train::{Checkpoint, Checkpoints, RAW_FILE, STATE_FILE, ema_file, ema_name};

/// The file that holds a run's resolved experiment.
pub const CONFIG_FILE: &str = "config.toml";

/// Finds the model file that `path` and `ema` mean: a file itself, or in a checkpoint or a run (its newest whole
/// checkpoint) the average of that rate, `raw`, or the run's first average.
pub fn find_model(path: &Path, ema: Option<&str>) -> Result<PathBuf> {
    if path.is_file() {
        if let Some(rate) = ema {
            bail!(
                "{}: --ema {rate} chooses inside a run or checkpoint folder; this is one file",
                path.display()
            );
        }
        return Ok(path.to_owned());
    }
    if !path.is_dir() {
        bail!(
            "{}: no such file or folder; expected a model file, a checkpoint or a run folder",
            path.display()
        );
    }
    let checkpoint = if path.join(STATE_FILE).is_file() {
        Checkpoint::open(path)?
    } else {
        let (newest, broken) = Checkpoints::of_run(path).newest_whole()?;
        match (newest, broken.first()) {
            (Some(newest), _) => newest,
            (None, Some(broken)) => bail!("{}: {}", broken.path.display(), broken.problem),
            (None, None) => bail!(
                "{}: no checkpoint in this folder; expected checkpoints/step-…/ as `cm train` writes them",
                path.display()
            ),
        }
    };
    let names: Vec<String> = checkpoint.state.train.emas.iter().map(ema_name).collect();
    let file = match ema {
        Some("raw") => RAW_FILE.to_owned(),
        Some(rate) if names.iter().any(|name| name == rate) => ema_file(rate),
        Some(rate) => bail!(
            "--ema {rate}: {} has {}",
            checkpoint.path.display(),
            names.iter().map(String::as_str).chain(["raw"]).collect::<Vec<_>>().join(", ")
        ),
        None => names.first().map_or_else(|| RAW_FILE.to_owned(), |name| ema_file(name)),
    };
    checkpoint.file(&file).with_context(|| format!("{}", checkpoint.path.display()))
}
