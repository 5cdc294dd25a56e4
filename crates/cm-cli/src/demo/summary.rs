//! What the demo says at its end, to people and in `summary.json`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use cm_eval::Figures;
use serde::{Deserialize, Serialize};

use super::measure::{Compared, Judge};
use crate::args::Bar;
use crate::experiment::Experiment;
use crate::ui::clock;

/// How long it took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Speed {
    /// Everything, in seconds.
    pub total_seconds: f64,
    /// Training alone, sample grids and checkpoints included.
    pub train_seconds: f64,
    /// Training steps.
    pub steps: u64,
    /// Training steps a second.
    pub steps_per_second: f64,
    /// Training images a second.
    pub images_per_second: f64,
}

impl Speed {
    /// The speed of a run of `steps` steps.
    pub fn new(experiment: &Experiment, steps: u64, train_seconds: f64, total_seconds: f64) -> Self {
        let steps_per_second = steps as f64 / train_seconds;
        let images_per_second = steps_per_second * experiment.train.batch as f64;
        Self { total_seconds, train_seconds, steps, steps_per_second, images_per_second }
    }
}

/// The content of `summary.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// The experiment.
    pub preset: String,
    /// Its seed.
    pub seed: u64,
    /// Where it ran.
    pub device: String,
    /// Threads of libtorch.
    pub threads: usize,
    /// Trained parameters of the network.
    pub parameters: i64,
    /// How long it took, without the teacher.
    pub speed: Speed,
    /// How long the teacher took, where there is one.
    pub teacher: Option<Speed>,
    /// The second noise level of the two-step samples, where the model has them.
    pub second_sigma: Option<f64>,
    /// Who judged the samples.
    pub judge: Judge,
    /// The figures.
    pub figures: Compared,
}

/// The file of the figures.
pub const SUMMARY_FILE: &str = "summary.json";

const SHARE: f64 = 0.60;
const ENTROPY: f64 = 2.1;
const NEAREST: f64 = 0.3;
const ABOVE_GAUSSIAN: f64 = 0.1;

impl Summary {
    /// Writes `summary.json`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        Ok(cm_model::files::write_atomic(path, |file| std::io::Write::write_all(file, text.as_bytes()))?)
    }

    /// Reads the `summary.json` of a finished demo.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path)
            .with_context(|| format!("{}: expected what a finished demo leaves in --out", path.display()))?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// Checks that it is of this preset.
    pub fn is_of(&self, preset: &str, folder: &Path) -> Result<()> {
        match self.preset == preset {
            true => Ok(()),
            false => bail!("{}: it is of {}, expected {preset}", folder.display(), self.preset),
        }
    }

    /// The figures with their names: samples first, then what they are compared with.
    pub fn rows(&self) -> Vec<(String, &Figures)> {
        let figures = &self.figures;
        let two =
            self.second_sigma.map_or("two steps".to_owned(), |sigma| format!("two steps (σ = {sigma})"));
        let rows = [
            ("one step".to_owned(), Some(&figures.one_step)),
            (two, figures.two_step.as_ref()),
            ("teacher (35 evaluations)".to_owned(), figures.teacher.as_ref()),
            ("held-out real images".to_owned(), Some(&figures.held_out_real)),
            ("Gaussian fit".to_owned(), Some(&figures.gaussian_fit)),
            ("noise".to_owned(), Some(&figures.noise)),
        ];
        rows.into_iter().filter_map(|(name, row)| Some((name, row?))).collect()
    }

    /// The figures of the one-step samples and the number of training steps, in columns.
    pub fn line(&self) -> String {
        format!("{} {:>9}", columns(&self.figures.one_step), self.speed.steps)
    }

    /// Prints the closing summary.
    pub fn print(&self, out: &Path) {
        let speed = &self.speed;
        println!(
            "\n{}: {} parameters on {} ({} threads)",
            self.preset, self.parameters, self.device, self.threads
        );
        println!(
            "{} in all, {} of them training: {} steps, {:.2} steps/s, {:.0} images/s\n",
            clock(speed.total_seconds),
            clock(speed.train_seconds),
            speed.steps,
            speed.steps_per_second,
            speed.images_per_second
        );
        if let Some(teacher) = &self.teacher {
            println!(
                "its teacher: {} steps in {} before that\n",
                teacher.steps,
                clock(teacher.total_seconds)
            );
        }
        println!("{:<25} {:>10} {:>12} {:>9} {:>9}", "", "confident", "near data", "entropy", "nearest");
        for (name, row) in self.rows() {
            print_row(&name, row);
        }
        if let Some(accuracy) = self.judge.classifier_accuracy {
            println!(
                "\nconfident: share with p > 0.9 by a classifier that is right on {:.1} % of held-out images",
                100.0 * accuracy
            );
        }
        println!("near data: share nearer to a training image than 95 % of held-out real images");
        println!("nearest:   smallest distance to a training image (0 would be a copy)\n");
        for (file, what) in [
            ("one-step.png", "samples in one step"),
            ("two-step.png", "samples in two steps"),
            ("training.png", "samples as training went"),
            ("loss.png", "the loss curve"),
            ("real.png", "held-out real images"),
            ("summary.json", "these figures"),
        ] {
            if out.join(file).is_file() {
                println!("{:<32} {what}", out.join(file).display());
            }
        }
        let model = out.join("model.safetensors");
        println!("\ntry next: cargo xtask cm sample {} --seeds 0-63", model.display());
        println!("          cargo xtask cm model info {}", model.display());
        println!(
            "          cargo xtask cm train --config {} --out runs/mine --set train.total_steps=5000",
            self.preset
        );
    }

    /// Holds the samples to a bar.
    pub fn check(&self, bar: Bar) -> Result<()> {
        let (one, fit) = (&self.figures.one_step, &self.figures.gaussian_fit);
        let share = |figures: &Figures| figures.confident_share.unwrap_or(0.0);
        let mut misses = Vec::new();
        let mut at_least = |what: &str, got: f64, want: f64| {
            if got < want {
                misses.push(format!("{what} {got:.3} < {want:.3}"));
            }
        };
        match bar {
            Bar::Full => {
                at_least("confident share", share(one), SHARE);
                at_least("near share", one.near_share, SHARE);
                at_least("class entropy", one.class_entropy.unwrap_or(0.0), ENTROPY);
                at_least("nearest distance", one.nearest_distance, NEAREST);
                at_least("classifier accuracy", self.judge.classifier_accuracy.unwrap_or(0.0), 0.97);
            }
            Bar::Ci => {
                at_least("confident share", share(one), share(fit) + ABOVE_GAUSSIAN);
                at_least("near share", one.near_share, fit.near_share + ABOVE_GAUSSIAN);
            }
        }
        if !misses.is_empty() {
            bail!("the one-step samples miss the bar: {}", misses.join(", "));
        }
        println!("\nthe one-step samples pass the bar ({bar:?})");
        Ok(())
    }
}

fn print_row(name: &str, row: &Figures) {
    println!("{name:<25} {}", columns(row));
}

fn columns(row: &Figures) -> String {
    let optional = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.3}"));
    format!(
        "{:>10} {:>12.3} {:>9} {:>9.3}",
        optional(row.confident_share),
        row.near_share,
        optional(row.class_entropy),
        row.nearest_distance
    )
}
