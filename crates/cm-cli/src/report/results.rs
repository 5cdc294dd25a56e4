//! What a report finds, as it stands in its JSON files.

use std::path::Path;

use anyhow::{Context, Result};
use cm_model::files::write_atomic;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::claims::Claim;
use super::plan::{Settings, TEACHER};
use crate::commands::eval::judge::About;

/// Figures of samples, or of real images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The options of `cm sample` that made the samples.
    pub sampler: String,
    /// Evaluations of the network for a sample.
    pub evaluations: u64,
    /// Which of disjoint ranges of seeds the samples were made with.
    pub range: u64,
    /// Images that were measured.
    pub images: u64,
    /// Fréchet classifier distance to the training images: lower is better.
    pub fcd: f64,
    /// Share of samples that lie among real images, by the classifier's features.
    pub precision: f64,
    /// Share of real images that lie among samples.
    pub recall: f64,
}

/// The one-step score of a run on its way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Training images seen.
    pub images: u64,
    /// Fréchet classifier distance.
    pub fcd: f64,
}

/// One run, trained and measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunResult {
    /// The trial, or `teacher`.
    pub trial: String,
    /// What it is.
    pub what: String,
    /// Its seed.
    pub seed: u64,
    /// Steps of training.
    pub steps: u64,
    /// Training images seen.
    pub images: u64,
    /// Trained parameters.
    pub parameters: i64,
    /// Evaluations of a network for each training image, of which one has a gradient.
    pub evaluations_per_image: u64,
    /// Minutes of training, over all sessions.
    pub minutes: f64,
    /// Training images a second.
    pub images_per_second: f64,
    /// Why there are no figures, if the training did not end.
    pub failed: Option<String>,
    /// The one-step score as training went.
    pub curve: Vec<Point>,
    /// Scores at the end.
    pub scores: Vec<Score>,
}

/// A mean over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The standard deviation (divisor n − 1), where there are two values or more.
    pub sd: Option<f64>,
    /// Number of values.
    pub count: usize,
}

impl Spread {
    /// Of some values; none of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let sd = (count > 1).then(|| (squares / (count - 1) as f64).sqrt());
        Some(Self { mean, sd, count })
    }

    /// The same of values that are `factor` times as large.
    pub fn times(self, factor: f64) -> Self {
        Self { mean: factor * self.mean, sd: self.sd.map(|sd| factor * sd), ..self }
    }
}

/// Everything that a report found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Results {
    /// What was trained and measured.
    pub settings: Settings,
    /// The day on which it ended.
    pub date: String,
    /// The device in words.
    pub device: String,
    /// Threads of libtorch.
    pub threads: usize,
    /// The classifier whose features are compared.
    pub judge: Option<About>,
    /// What held-out real images get.
    pub floor: Score,
    /// The teacher, and then every run.
    pub runs: Vec<RunResult>,
    /// What was left out, and why.
    pub left_out: Vec<(String, String)>,
    /// The claims and what became of them.
    pub claims: Vec<Claim>,
}

impl Results {
    /// The runs of a trial, by seed.
    pub fn of<'a>(&'a self, trial: &'a str) -> impl Iterator<Item = &'a RunResult> {
        self.runs.iter().filter(move |run| run.trial == trial)
    }

    /// The trials, in the order of their runs, without the teacher.
    pub fn trials(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for run in self.runs.iter().filter(|run| run.trial != TEACHER) {
            if !names.contains(&run.trial.as_str()) {
                names.push(&run.trial);
            }
        }
        names
    }

    /// How many of a trial's runs did not come to their end.
    pub fn stopped(&self, trial: &str) -> usize {
        self.of(trial).filter(|run| run.failed.is_some()).count()
    }

    /// A figure of a trial's samples of so many evaluations, over the seeds. Of the teacher: Heun's.
    pub fn spread(&self, trial: &str, evaluations: u64, figure: fn(&Score) -> f64) -> Option<Spread> {
        let of_run = |run: &'_ RunResult| {
            let fits = |score: &&Score| {
                score.evaluations == evaluations && (trial != TEACHER || score.sampler.contains("heun"))
            };
            run.scores.iter().filter(fits).map(figure).collect::<Vec<_>>()
        };
        Spread::of(&self.of(trial).flat_map(of_run).collect::<Vec<_>>())
    }
}

/// Reads a JSON file that this program wrote; `None` if there is none.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.with_context(|| format!("{}: reading failed", path.display()))?,
    };
    let value = serde_json::from_slice(&text);
    value.map(Some).with_context(|| format!("{}: not what a report writes", path.display()))
}

/// Writes a JSON file, whole or not at all.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    Ok(write_atomic(path, |file| std::io::Write::write_all(file, text.as_bytes()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_means_and_sample_deviations() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), Some(Spread { mean: 3.0, sd: None, count: 1 }));
        let of = Spread::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!(of, Spread { mean: 2.0, sd: Some(1.0), count: 3 });
        assert_eq!(of.times(2.0), Spread { mean: 4.0, sd: Some(2.0), count: 3 });
    }
}
