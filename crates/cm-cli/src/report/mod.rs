//! `cm report`: the paper's comparisons on a data set, one factor at a time around a base, as one command.

mod begin;
mod claims;
mod page;
mod plan;
mod plots;
mod publish;
mod results;
mod score;
mod train;

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result};
use cm_torch::device;
use cm_train::RunLock;
use tch::Device;

use crate::args::ReportArgs;
use crate::commands::session;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::ranks;
use crate::sources::ModelSource;
use crate::ui::clock;
use plan::{Plan, TEACHER, TEACHER_LEVELS, TRIALS, Trial};
use plots::Drawn;
use results::{Results, RunResult};
use score::{Sampling, Scorer};
use train::{Job, MODEL_FILE, one_step};

/// What it found.
const RESULTS_FILE: &str = "results.json";
/// The same for people.
const PAGE_FILE: &str = "results.md";

/// The names of all trials.
pub fn trial_names() -> Vec<&'static str> {
    TRIALS.iter().map(|trial| trial.name).collect()
}

/// Runs `cm report`.
pub fn report(args: &ReportArgs) -> Outcome {
    ranks::refuse_several("cm report").or_usage()?;
    if args.publish || args.publish_only {
        publish::check().or_usage()?;
    }
    if args.publish_only {
        return publish_only(args);
    }
    let device = session::device(&args.device).or_usage()?;
    let mut plan = Plan::new(args, format!("{device:?}")).or_usage()?;
    plan.settings.images = Scorer::digest(&plan.teacher().data).or_usage()?;
    let _lock = RunLock::take(&args.out).or_usage()?;
    begin::begin(&plan.settings, &args.out).or_usage()?;
    let stop = session::stop_on_signal()?;
    let scorer = scorer(&plan, args)?;
    begin::judge(&mut plan.settings, &args.out, &scorer).or_usage()?;
    let report = Report { args, plan: &plan, device, stop: &stop };
    let runs = report.runs(&scorer)?;
    train::heed(&stop)?;
    let results = report.results(&scorer, runs)?;
    results::write(&args.out.join(RESULTS_FILE), &results)?;
    let drawn = report.draw(&results)?;
    let text = page::page(&results, &drawn, None, &|name| format!("{name}.png"));
    let place = args.out.join(PAGE_FILE);
    cm_model::files::write_atomic(&place, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    for claim in &results.claims {
        println!("{:<11} {}", claim.verdict.name(), claim.text);
    }
    println!("\n{:<32} table, claims and pictures", place.display());
    println!("{:<32} every figure", args.out.join(RESULTS_FILE).display());
    match args.publish {
        true => Ok(publish::publish(&results, &drawn, &args.out)?),
        false => Ok(()),
    }
}

fn publish_only(args: &ReportArgs) -> Outcome {
    let place = args.out.join(RESULTS_FILE);
    let results: Option<Results> = results::read(&place).or_usage()?;
    let found =
        results.with_context(|| format!("{}: expected what a finished report leaves", place.display()));
    let results = found.or_usage()?;
    if results.settings.data != args.data.name() {
        let (out, data) = (args.out.display(), &results.settings.data);
        return Err(Failure::Usage(anyhow::anyhow!("{out}: a report on {data}; say --data {data}")));
    }
    let mut drawn = plots::charts(&results, &args.out)?;
    drawn.extend(plots::SAMPLES.iter().map(|(name, what, _)| (*name, *what)));
    Ok(publish::publish(&results, &drawn, &args.out)?)
}

fn scorer(plan: &Plan, args: &ReportArgs) -> Result<Scorer> {
    Scorer::new(&plan.teacher().data, plan.settings.measured, args.out.join("cache"), args.device)
}

/// A report in the making.
struct Report<'a> {
    args: &'a ReportArgs,
    plan: &'a Plan,
    device: Device,
    stop: &'a AtomicBool,
}

impl Report<'_> {
    fn folder(&self, trial: &str, seed: u64) -> PathBuf {
        self.args.out.join(begin::RUNS).join(trial).join(format!("seed-{seed}"))
    }

    /// The teacher and every run, the first seed of all trials before the second of any.
    fn runs(&self, scorer: &Scorer) -> Outcome<Vec<RunResult>> {
        let (trials, seeds) = (&self.plan.trials, self.plan.seeds);
        let count = 1 + trials.len() as u64 * seeds;
        let (started, mut new) = (Instant::now(), 0u64);
        let mut runs = Vec::new();
        let mut one = |job: &Job<'_>, number: u64| -> Outcome<RunResult> {
            let known = job.folder.join(train::RESULT_FILE).is_file();
            let left = count + 1 - number;
            let guess = match (new, known) {
                (_, true) => "has finished".to_owned(),
                (0, _) => format!("{} steps", job.experiment.train.total_steps),
                _ => {
                    let each = started.elapsed().as_secs_f64() / new as f64;
                    format!(
                        "{} steps, about {} left in all",
                        job.experiment.train.total_steps,
                        clock(each * left as f64)
                    )
                }
            };
            eprintln!("run {number} of {count}: {} seed {}: {guess}", job.trial, job.experiment.train.seed);
            new += u64::from(!known);
            job.run(scorer, self.device, self.stop)
        };
        let teacher = self.teacher();
        runs.push(one(&teacher, 1)?);
        if let Some(why) = &runs[0].failed {
            return Err(Failure::Run(anyhow::anyhow!(
                "the teacher's training stopped: {why}; to try again, remove {}",
                self.folder(TEACHER, 0).display()
            )));
        }
        for seed in 0..seeds {
            for trial in trials {
                let job = self.student(trial, seed)?;
                let number = 1 + runs.len() as u64;
                runs.push(one(&job, number)?);
            }
        }
        Ok(runs)
    }

    fn teacher(&self) -> Job<'static> {
        let mut samplings = Vec::new();
        for solver in ["heun", "dpmpp2m", "euler"] {
            for &levels in &self.plan.settings.levels {
                let evaluations = if solver == "heun" { 2 * levels - 1 } else { levels };
                let sampling =
                    Sampling::new(format!("--sampler {solver} --steps {levels}"), evaluations as u64);
                samplings.push((sampling.clone(), 0));
                if solver == "heun" && levels == TEACHER_LEVELS {
                    // As many sets of seeds as a trial has: how far chance moves the figure.
                    samplings.extend((1..self.plan.seeds).map(|range| (sampling.clone(), range)));
                }
            }
        }
        Job {
            trial: TEACHER,
            what: "EDM diffusion model",
            experiment: self.plan.teacher(),
            folder: self.folder(TEACHER, 0),
            samplings,
        }
    }

    fn student(&self, trial: &'static Trial, seed: u64) -> Result<Job<'static>> {
        let mut experiment = self.plan.experiment(trial, seed)?;
        if experiment.train.recipe().method().is_distilled() {
            experiment.teacher = Some(ModelSource::at(&self.folder(TEACHER, 0).join(MODEL_FILE), None)?);
        }
        let samplings = match plan::distilled_to(trial.name) {
            Some(steps) => vec![(self.sampling(trial.name, steps), seed)],
            None => [1, 2, 4].map(|steps| (self.sampling(trial.name, steps), seed)).to_vec(),
        };
        Ok(Job {
            trial: trial.name,
            what: trial.what,
            experiment,
            folder: self.folder(trial.name, seed),
            samplings,
        })
    }

    /// How a student is sampled in so many steps.
    fn sampling(&self, trial: &str, steps: u64) -> Sampling {
        let second = self.plan.settings.second_sigma;
        let highest = self.plan.teacher().precond.sigma_max;
        let multistep = |sigmas: &[f64]| {
            let list: Vec<String> = sigmas.iter().map(f64::to_string).collect();
            Sampling::new(format!("--sampler multistep --sigmas {}", list.join(",")), steps)
        };
        match steps {
            _ if plan::distilled_to(trial).is_some() => Sampling::new("--sampler progdist", steps),
            1 => one_step(),
            2 => multistep(&[highest, second]),
            _ => multistep(&[highest, 4.0 * second, second, second / 4.0]),
        }
    }

    fn results(&self, scorer: &Scorer, runs: Vec<RunResult>) -> Result<Results> {
        let mut results = Results {
            settings: self.plan.settings.clone(),
            date: crate::ui::today(),
            device: crate::ui::device_name(self.device),
            threads: device::threads(),
            judge: scorer.judge(),
            floor: scorer.of_held_out()?,
            runs,
            left_out: self.plan.left_out.clone(),
            claims: Vec::new(),
        };
        results.claims = claims::claims(&results);
        Ok(results)
    }

    fn draw(&self, results: &Results) -> Result<Vec<Drawn>> {
        let out = &self.args.out;
        let mut drawn = plots::charts(results, out)?;
        let model = |trial: &str, steps: u64| {
            let file = self.folder(plan::sampled_in(trial, steps), 0).join(MODEL_FILE);
            let words = match trial {
                TEACHER => format!("--sampler heun --steps {TEACHER_LEVELS}"),
                _ => self.sampling(trial, steps).words,
            };
            file.is_file().then_some((file, words))
        };
        drawn.extend(plots::samples(results, &self.plan.teacher().data, out, &model)?);
        Ok(drawn)
    }
}
