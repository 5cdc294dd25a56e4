use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use cm_model::files;
use serde::Serialize;

use crate::{Error, EventFile, Result, StepReport};

/// The log as a table.
pub const PROGRESS_FILE: &str = "progress.csv";
/// The log with everything that was measured, one JSON object on a line.
pub const STATS_FILE: &str = "stats.jsonl";

const HEADER: &str = "step,images,loss,grad_norm,lr,num_scales,mu,images_per_second,seconds";

/// Upper ends of the ranges of σ that losses are averaged over; the last range is open.
const SIGMA_EDGES: [f64; 4] = [0.02, 0.2, 2.0, 20.0];

/// Averages over the steps since the last entry of the log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LogEntry {
    /// Steps taken so far.
    pub step: u64,
    /// Images seen so far.
    pub images: u64,
    /// Mean loss.
    pub loss: f64,
    /// Mean distance between student and target, before weighting.
    pub distance: f64,
    /// Mean norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Largest norm of the gradient.
    pub grad_norm_max: f64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// N(k) of the last step, where noise levels come from a grid.
    pub num_scales: Option<usize>,
    /// Stage of the t → r mapping in the last step, where they are continuous.
    pub stage: Option<usize>,
    /// Rate of the target's average in the last step, where there is a target network.
    pub mu: Option<f64>,
    /// Mean loss by noise level.
    pub by_sigma: Vec<SigmaBin>,
    /// Images that this session of the run has found not to decode, and passed over.
    pub passed_over: u64,
    /// Speed since the last entry.
    pub images_per_second: f64,
    /// Time since this session of the run began.
    pub seconds: f64,
}

/// The mean loss of the images whose noise level lies below `sigma_below` and in no lower range.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SigmaBin {
    /// Upper end; `None` for the last range.
    pub sigma_below: Option<f64>,
    /// Mean loss; `None` if no image fell into the range.
    pub loss: Option<f64>,
    /// Number of images.
    pub images: u64,
}

/// `progress.csv`, `stats.jsonl` and the event file of a run.
#[derive(Debug)]
pub(crate) struct Logs {
    progress: Appended,
    stats: Appended,
    events: EventFile,
    window: Window,
    began: Instant,
}

impl Logs {
    /// Opens the logs of the run in `folder` to go on behind `step`: later entries, which an interrupted session wrote
    /// after its last checkpoint, are cut off, and so is a torn last line.
    pub(crate) fn open(folder: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
        let json_step =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64();
        let progress = Appended::open(folder.join(PROGRESS_FILE), Some(HEADER), |line| {
            line == HEADER || first_number(line).is_some_and(|s| s <= step)
        })?;
        let stats =
            Appended::open(folder.join(STATS_FILE), None, |line| json_step(line).is_some_and(|s| s <= step))?;
        let events = EventFile::open(folder, step)?;
        Ok(Self { progress, stats, events, window: Window::new(), began: Instant::now() })
    }

    /// Adds a step to the averages.
    pub(crate) fn add(&mut self, report: &StepReport) {
        self.window.add(report);
    }

    /// Writes the averages since the last call, and how many images were passed over, or nothing if there was no step.
    pub(crate) fn write(&mut self, last: &StepReport, passed_over: u64) -> Result<Option<LogEntry>> {
        if self.window.steps == 0 {
            return Ok(None);
        }
        let entry = std::mem::replace(&mut self.window, Window::new()).entry(last, passed_over, self.began);
        let optional = |value: Option<String>| value.unwrap_or_default();
        self.progress.line(&format!(
            "{},{},{},{},{},{},{},{:.2},{:.2}",
            entry.step,
            entry.images,
            entry.loss,
            entry.grad_norm,
            entry.lr,
            optional(entry.num_scales.map(|n| n.to_string())),
            optional(entry.mu.map(|mu| mu.to_string())),
            entry.images_per_second,
            entry.seconds,
        ))?;
        let json = serde_json::to_string(&entry)
            .map_err(|e| Error::io(&self.stats.path, "writing", std::io::Error::other(e)))?;
        self.stats.line(&json)?;
        self.events.entry(&entry)?;
        Ok(Some(entry))
    }
}

/// Which images each rank of a run has seen: one file `ranks/rank-0001.csv` for each, with a row for each step.
#[derive(Debug)]
pub struct RankLog(Appended);

const RANK_HEADER: &str = "step,first_id,last_id";

impl RankLog {
    /// Opens the log of `rank` of the run in `folder`, to go on behind `step`. Rank 0 also cuts later rows off the logs
    /// of ranks that there are no more: the run goes on with `ranks` of them.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that cannot be read or written.
    pub fn open(folder: &Path, rank: usize, ranks: usize, step: u64) -> Result<Self> {
        let folder = folder.join("ranks");
        fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "creating the folder", e))?;
        let open = |rank: usize| {
            Appended::open(folder.join(format!("rank-{rank:04}.csv")), Some(RANK_HEADER), |line| {
                line == RANK_HEADER || first_number(line).is_some_and(|s| s <= step)
            })
        };
        if rank == 0 {
            let entries = fs::read_dir(&folder).map_err(|e| Error::io(&folder, "reading the folder", e))?;
            for entry in entries.flatten() {
                let name = entry.file_name();
                let number = name.to_str().and_then(|name| name.strip_prefix("rank-")?.strip_suffix(".csv"));
                if let Some(number) = number.and_then(|number| number.parse().ok()).filter(|n| *n >= ranks) {
                    open(number)?;
                }
            }
        }
        open(rank).map(Self)
    }

    /// Adds a row: the ids of the images that this rank has in `step`, which follow one another. (An image's id is its
    /// place in the sequence of all images that the run draws.)
    ///
    /// # Errors
    /// [`Error::Io`] if the row cannot be written.
    pub fn add(&mut self, step: u64, ids: &[u64]) -> Result<()> {
        match (ids.first(), ids.last()) {
            (Some(first), Some(last)) => self.0.line(&format!("{step},{first},{last}")),
            _ => Ok(()),
        }
    }
}

fn first_number(line: &str) -> Option<u64> {
    line.split(',').next()?.parse().ok()
}

/// Sums over some steps.
#[derive(Debug)]
struct Window {
    steps: u64,
    images: u64,
    loss: f64,
    distance: f64,
    grad_norm: f64,
    grad_norm_max: f64,
    bins: [(f64, u64); SIGMA_EDGES.len() + 1],
    began: Instant,
}

impl Window {
    fn new() -> Self {
        Self {
            steps: 0,
            images: 0,
            loss: 0.0,
            distance: 0.0,
            grad_norm: 0.0,
            grad_norm_max: 0.0,
            bins: Default::default(),
            began: Instant::now(),
        }
    }

    fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        self.images += report.samples.len() as u64;
        self.loss += report.loss;
        self.distance += report.distance;
        self.grad_norm += report.grad_norm;
        self.grad_norm_max = self.grad_norm_max.max(report.grad_norm);
        for sample in &report.samples {
            let bin = SIGMA_EDGES.partition_point(|&edge| edge <= sample.sigma);
            self.bins[bin].0 += sample.loss;
            self.bins[bin].1 += 1;
        }
    }

    fn entry(self, last: &StepReport, passed_over: u64, began: Instant) -> LogEntry {
        let steps = self.steps as f64;
        let edges = SIGMA_EDGES.into_iter().map(Some).chain([None]);
        let by_sigma = edges.zip(self.bins).map(|(sigma_below, (sum, images))| {
            let loss = (images > 0).then(|| sum / images as f64);
            SigmaBin { sigma_below, loss, images }
        });
        LogEntry {
            step: last.step,
            images: last.images,
            loss: self.loss / steps,
            distance: self.distance / steps,
            grad_norm: self.grad_norm / steps,
            grad_norm_max: self.grad_norm_max,
            lr: last.lr,
            num_scales: last.num_scales,
            stage: last.stage,
            mu: last.mu,
            by_sigma: by_sigma.collect(),
            passed_over,
            images_per_second: self.images as f64 / self.began.elapsed().as_secs_f64().max(1e-9),
            seconds: began.elapsed().as_secs_f64(),
        }
    }
}

/// A text file that grows by whole lines.
#[derive(Debug)]
struct Appended {
    path: PathBuf,
    file: File,
}

impl Appended {
    fn open(path: PathBuf, header: Option<&str>, keep: impl Fn(&str) -> bool) -> Result<Self> {
        let mut kept = Vec::new();
        match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            opened => {
                let file = opened.map_err(|e| Error::io(&path, "opening", e))?;
                let mut reader = BufReader::new(file);
                let mut line = Vec::new();
                // A crash may leave a last line that has no end, or is no text.
                while reader.read_until(b'\n', &mut line).map_err(|e| Error::io(&path, "reading", e))? > 0 {
                    let text = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
                    kept.extend(text.filter(|line| keep(line)).map(str::to_owned));
                    line.clear();
                }
            }
        }
        if kept.is_empty() {
            kept.extend(header.map(str::to_owned));
        }
        files::write_atomic(&path, |out| kept.iter().try_for_each(|line| writeln!(out, "{line}")))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::io(&path, "opening", e))?;
        Ok(Self { path, file })
    }

    /// One write for one line, so that lines are whole even if two processes write.
    fn line(&mut self, line: &str) -> Result<()> {
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(|e| Error::io(&self.path, "writing", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trainer::SampleLoss;

    fn report(step: u64, loss: f64) -> StepReport {
        StepReport {
            step,
            images: step * 2,
            loss,
            distance: loss,
            grad_norm: step as f64,
            lr: 0.5,
            num_scales: Some(11),
            stage: None,
            mu: None,
            samples: vec![SampleLoss { sigma: 0.01, loss }, SampleLoss { sigma: 20.0, loss }],
        }
    }

    fn log(folder: &Path, from: u64, to: u64) {
        let mut logs = Logs::open(folder, from).unwrap();
        for step in from + 1..=to {
            logs.add(&report(step, 1.0));
            assert!(logs.write(&report(step, 1.0), 0).unwrap().is_some());
        }
    }

    fn steps(folder: &Path) -> Vec<String> {
        let text = fs::read_to_string(folder.join(PROGRESS_FILE)).unwrap();
        text.lines().map(|line| line.split(',').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn entries_are_averages_since_the_last_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut logs = Logs::open(folder.path(), 0).unwrap();
        logs.add(&report(1, 1.0));
        logs.add(&report(2, 4.0));
        let entry = logs.write(&report(2, 4.0), 7).unwrap().unwrap();
        assert_eq!((entry.step, entry.loss, entry.grad_norm, entry.grad_norm_max), (2, 2.5, 1.5, 2.0));
        assert_eq!(entry.by_sigma[0], SigmaBin { sigma_below: Some(0.02), loss: Some(2.5), images: 2 });
        assert_eq!(entry.by_sigma[1].loss, None);
        assert_eq!(entry.by_sigma[4], SigmaBin { sigma_below: None, loss: Some(2.5), images: 2 });
        assert!(logs.write(&report(2, 4.0), 7).unwrap().is_none());
        let text = fs::read_to_string(folder.path().join(STATS_FILE)).unwrap();
        let json: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!((json["step"].as_u64(), json["loss"].as_f64()), (Some(2), Some(2.5)));
        assert_eq!(json["passed_over"].as_u64(), Some(7));
    }

    #[test]
    fn resumed_logs_have_no_duplicates_and_no_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        log(folder.path(), 0, 5);
        for name in [PROGRESS_FILE, STATS_FILE] {
            let mut file = OpenOptions::new().append(true).open(folder.path().join(name)).unwrap();
            file.write_all(b"{\"step\":6,\"lo\xff").unwrap();
        }
        log(folder.path(), 3, 6);
        assert_eq!(steps(folder.path()), ["step", "1", "2", "3", "4", "5", "6"]);
        let stats = fs::read_to_string(folder.path().join(STATS_FILE)).unwrap();
        let steps: Vec<_> =
            stats.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()).collect();
        assert!(steps.iter().map(|v| v["step"].as_u64().unwrap()).eq(1..=6));
    }

    #[test]
    fn logs_of_ranks_go_on_behind_the_step_whatever_the_number_of_ranks() {
        let folder = tempfile::tempdir().unwrap();
        let log = |rank: usize, ranks: usize, from: u64, to: u64| {
            let mut log = RankLog::open(folder.path(), rank, ranks, from).unwrap();
            for step in from + 1..=to {
                let first = 8 * (step - 1) + (8 / ranks * rank) as u64;
                log.add(step, &(first..first + 8 / ranks as u64).collect::<Vec<_>>()).unwrap();
            }
        };
        (0..4).for_each(|rank| log(rank, 4, 0, 3));
        (0..2).for_each(|rank| log(rank, 2, 2, 3));
        let read = |rank: usize| {
            fs::read_to_string(folder.path().join(format!("ranks/rank-000{rank}.csv"))).unwrap()
        };
        assert_eq!(read(1), "step,first_id,last_id\n1,2,3\n2,10,11\n3,20,23\n");
        assert_eq!(read(3), "step,first_id,last_id\n1,6,7\n2,14,15\n");
    }

    #[test]
    fn a_new_run_starts_an_empty_log() {
        let folder = tempfile::tempdir().unwrap();
        log(folder.path(), 0, 2);
        log(folder.path(), 0, 1);
        assert_eq!(steps(folder.path()), ["step", "1"]);
    }
}
