//! One run of a report: trained to its end, measured, and tidied up.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use cm_train::{Checkpoints, Ending, Method, RunLock, TeacherSolver, Trainable};
use tch::{Device, Tensor};

use super::plan::TEACHER;
use super::results::{self, Point, RunResult, Score};
use super::score::{Sampling, Scorer};
use crate::commands::session::{self, Run, View};
use crate::commands::sweep::Figures;
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::ranks::without_places;
use crate::runs::{CONFIG_FILE, find_model};
use crate::sources::Start;
use crate::ui::Bar;

/// A run's figures, in its folder. A run that has them is finished.
pub const RESULT_FILE: &str = "result.json";
/// A finished run's weights.
pub const MODEL_FILE: &str = "model.safetensors";

/// A run that is to be made.
pub struct Job<'a> {
    /// The trial, or `teacher`.
    pub trial: &'a str,
    /// What it is.
    pub what: &'a str,
    /// What is trained.
    pub experiment: Experiment,
    /// Where.
    pub folder: PathBuf,
    /// The samples that are measured at the end, each with the range of its seeds.
    pub samplings: Vec<(Sampling, u64)>,
}

impl Job<'_> {
    /// The run's figures: those that are there, or new ones.
    pub fn run(&self, scorer: &Scorer, device: Device, stop: &AtomicBool) -> Outcome<RunResult> {
        self.check_config().or_usage()?;
        let place = self.folder.join(RESULT_FILE);
        if let Some(result) = results::read(&place).or_usage()? {
            let result = self.completed(result, scorer, stop)?;
            results::write(&place, &result)?;
            self.tidy_up()?;
            return Ok(result);
        }
        let _lock = RunLock::take(&self.folder).or_usage()?;
        let result = match self.train(device, stop) {
            Err(Failure::Diverged(error)) => self.result(0, Some(format!("{error:#}")), vec![], vec![])?,
            Err(other) => return Err(other),
            Ok(parameters) => {
                let curve = self.curve(scorer, stop)?;
                let scores = self.scores(&self.samplings, scorer, stop)?;
                self.result(parameters, None, curve, scores)?
            }
        };
        if result.failed.is_none() {
            let model = std::fs::read(find_model(&self.folder, None)?)?;
            let file = self.folder.join(MODEL_FILE);
            cm_model::files::write_atomic(&file, |file| std::io::Write::write_all(file, &model))?;
        }
        results::write(&place, &result)?;
        self.tidy_up()?;
        Ok(result)
    }

    /// Removes the checkpoints of a finished run: those of all runs would fill a disk.
    fn tidy_up(&self) -> Result<()> {
        let checkpoints = self.folder.join("checkpoints");
        match checkpoints.is_dir() {
            true => std::fs::remove_dir_all(&checkpoints)
                .with_context(|| format!("removing {}", checkpoints.display())),
            false => Ok(()),
        }
    }

    /// A finished run with the scores that it has and those that are wanted now: of a teacher, when seeds are added.
    fn completed(&self, mut result: RunResult, scorer: &Scorer, stop: &AtomicBool) -> Outcome<RunResult> {
        if result.failed.is_some() {
            return Ok(result);
        }
        // A student that was not distilled to so many steps is no fair choice for them, and earlier reports have such.
        let known = |score: &Score| {
            let same =
                |(of, _): &(Sampling, u64)| of.words == score.sampler && of.evaluations == score.evaluations;
            self.samplings.iter().any(same)
        };
        result.scores.retain(known);
        let is_there = |(sampling, range): &&(Sampling, u64)| {
            result.scores.iter().any(|score| score.sampler == sampling.words && score.range == *range)
        };
        let missing: Vec<_> = self.samplings.iter().filter(|wanted| !is_there(wanted)).cloned().collect();
        result.scores.extend(self.scores(&missing, scorer, stop)?);
        Ok(result)
    }

    /// A run that was begun with other settings is not gone on with, and its figures are not those of these settings.
    fn check_config(&self) -> Result<()> {
        let config = self.folder.join(CONFIG_FILE);
        if !config.is_file() {
            return Ok(());
        }
        let mut found = Experiment::read(&Source::file(config.clone())?, &[])?;
        // The order in memory decides about speed, and about figures no more than rounding does.
        found.compute.channels_last = self.experiment.compute.channels_last;
        if without_places(&found) != without_places(&self.experiment) {
            bail!(
                "{}: begun with other settings; choose another --out, or remove this run's folder",
                config.display()
            );
        }
        Ok(())
    }

    /// Trains to the end, and returns the number of parameters.
    fn train(&self, device: Device, stop: &AtomicBool) -> Outcome<i64> {
        let (experiment, folder) = (&self.experiment, self.folder.as_path());
        std::fs::create_dir_all(folder)
            .with_context(|| format!("creating {}", folder.display()))
            .or_usage()?;
        let goes_on = !Checkpoints::of_run(folder).steps()?.is_empty();
        let models = Start::read(experiment, goes_on)?;
        let mut trainer = session::build_trainer(experiment, &models, device)?;
        if goes_on {
            let resumed = cm_train::resume(&mut trainer, folder)?;
            for broken in &resumed.passed_over {
                eprintln!(
                    "WARNING: {} is not whole and was passed over: {}",
                    broken.path.display(),
                    broken.problem
                );
            }
        }
        let parameters = trainer.student().params().num_parameters();
        if trainer.is_finished() {
            return Ok(parameters);
        }
        let data = experiment.data.open().or_usage()?;
        experiment.check_data(&*data).or_usage()?;
        // Grids are drawn as training goes; nothing else is wanted of them, nor lines about files.
        let mut quiet = |_: u64, _: &Tensor| Ok(());
        let mut view = View::new(experiment, folder, trainer.steps_done()).with_samples(&mut quiet);
        match (Run { experiment, data, folder, stop }).train(&mut trainer, &mut view)? {
            Ending::Finished => Ok(parameters),
            Ending::Stopped => Err(Failure::Interrupted(format!(
                "{} is saved at step {}; the same command goes on",
                folder.display(),
                trainer.steps_done()
            ))),
        }
    }

    fn is_progressive(&self) -> bool {
        matches!(self.experiment.train.recipe().method(), Method::Progressive { .. })
    }

    /// The one-step score at each of the checkpoints that the run kept. A progressively distilled student has one step
    /// at its end alone, and a teacher never.
    fn curve(&self, scorer: &Scorer, stop: &AtomicBool) -> Outcome<Vec<Point>> {
        if self.is_progressive() || self.trial == TEACHER {
            return Ok(Vec::new());
        }
        let checkpoints = Checkpoints::of_run(&self.folder);
        let steps = checkpoints.steps()?;
        let mut bar = Bar::new("score", "points", 0, steps.len() as u64);
        let mut points = Vec::new();
        for (i, step) in steps.into_iter().enumerate() {
            heed(stop)?;
            let score = scorer.of_model(&checkpoints.path(step), &one_step(), self.experiment.train.seed)?;
            points.push(Point { images: step * self.experiment.train.batch as u64, fcd: score.fcd });
            bar.set(i as u64 + 1, format!("FCD {:.2}", score.fcd));
        }
        bar.finish();
        Ok(points)
    }

    /// The scores at the end.
    fn scores(
        &self,
        samplings: &[(Sampling, u64)],
        scorer: &Scorer,
        stop: &AtomicBool,
    ) -> Outcome<Vec<Score>> {
        let mut bar = Bar::new("score", "samplers", 0, samplings.len() as u64);
        let mut scores = Vec::new();
        for (i, (sampling, range)) in samplings.iter().enumerate() {
            heed(stop)?;
            let score = scorer.of_model(&self.model(), sampling, *range)?;
            bar.set(i as u64 + 1, format!("FCD {:.2}", score.fcd));
            scores.push(score);
        }
        bar.finish();
        Ok(scores)
    }

    /// The weights at the end.
    fn model(&self) -> PathBuf {
        let finished = self.folder.join(MODEL_FILE);
        if finished.is_file() { finished } else { self.folder.clone() }
    }

    fn result(
        &self,
        parameters: i64,
        failed: Option<String>,
        curve: Vec<Point>,
        scores: Vec<Score>,
    ) -> Result<RunResult> {
        let train = &self.experiment.train;
        let log = Figures::of_run(&self.folder)?;
        let steps = log.step.unwrap_or(0);
        Ok(RunResult {
            trial: self.trial.to_owned(),
            what: self.what.to_owned(),
            seed: train.seed,
            steps,
            images: steps * train.batch as u64,
            parameters,
            evaluations_per_image: evaluations_per_image(&self.experiment),
            minutes: log.minutes.unwrap_or(0.0),
            images_per_second: log.images_per_second.unwrap_or(0.0),
            failed,
            curve,
            scores,
        })
    }
}

/// Ends the work at a request to stop; what was computed is there, and the rest is done by the same command.
pub fn heed(stop: &AtomicBool) -> Outcome {
    match stop.load(Ordering::Relaxed) {
        true => Err(Failure::Interrupted("the same command goes on".into())),
        false => Ok(()),
    }
}

/// One step of a consistency function.
pub fn one_step() -> Sampling {
    Sampling::new("--sampler onestep", 1)
}

/// Evaluations for a training image: the student's, the target's, and the teacher's.
fn evaluations_per_image(experiment: &Experiment) -> u64 {
    match experiment.train.recipe().method() {
        Method::Denoising => 1,
        Method::Consistency => 2,
        Method::Distillation(teacher) => {
            let of_solver = match teacher.solver {
                TeacherSolver::Euler => 1,
                TeacherSolver::Heun => 2,
            };
            2 + of_solver
        }
        Method::Progressive { .. } => 3,
    }
}
