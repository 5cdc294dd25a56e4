//! `cm train --sweep`: a run for each combination of values, one after the other, and a table of all.

pub mod plan;
pub mod table;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use cm_train::{Checkpoints, Ending};
use tch::Device;

use self::plan::Plan;
pub use self::table::Figures;
use self::table::{JSON_FILE, Row, Status, Table};
use super::session;
use super::train::{self, Data, Ended, Ready};
use crate::args::{RunArgs, TrainArgs};
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::ranks::Ranks;
use crate::runs::CONFIG_FILE;

/// Runs that differ in some values, in one folder.
pub struct Sweep<'a> {
    args: &'a TrainArgs,
    out: &'a Path,
    table: Table,
}

impl<'a> Sweep<'a> {
    /// The sweep that the command line means, if it means one: by `--sweep`, or by resuming a folder that holds one.
    pub fn of(args: &'a TrainArgs) -> Outcome<Option<Self>> {
        let Some(out) = &args.run.out else { return Ok(None) };
        let there = match args.run.resume || !args.sweeps.is_empty() {
            true => Table::plan_in(out).or_usage()?,
            false => None,
        };
        let plan = match (args.sweeps.is_empty(), there) {
            (true, there) => there,
            (false, None) => Some(plan::plan(&args.sweeps).or_usage()?),
            (false, Some(there)) if args.run.resume => {
                Some(union(there, plan::plan(&args.sweeps).or_usage()?))
            }
            (false, Some(_)) if args.run.dry_run => Some(plan::plan(&args.sweeps).or_usage()?),
            (false, Some(_)) => {
                return Err(Failure::Usage(anyhow!(
                    "{}: this folder holds a sweep; go on with --resume, or choose another --out",
                    out.join(JSON_FILE).display()
                )));
            }
        };
        for key in plan.iter().flat_map(|plan| &plan.keys) {
            let set = |set: &&String| set.split_once('=').is_some_and(|(other, _)| other.trim() == key);
            if let Some(set) = args.run.sets.iter().find(set) {
                return Err(Failure::Usage(anyhow!(
                    "--set {set}: the runs of the sweep differ in {key}; drop one"
                )));
            }
        }
        Ok(plan.map(|plan| Self { args, out, table: Table::new(plan, out) }))
    }

    /// Runs what has not finished, and shows the table.
    pub fn run(mut self) -> Outcome {
        let device = session::device(&self.args.run.device).or_usage()?;
        if self.args.run.dry_run {
            return self.dry_run();
        }
        let experiments = self.examine(device)?;
        self.table.write(self.out)?;
        let stop = session::stop_on_signal()?;
        let count = experiments.len();
        for (i, experiment) in experiments.into_iter().enumerate() {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let name = &self.table.runs[i].name;
            let Some(experiment) = experiment else {
                eprintln!("sweep: run {} of {count}: {name} has finished", i + 1);
                continue;
            };
            eprintln!("sweep: run {} of {count}: {name}", i + 1);
            self.train(i, experiment, device, &stop)?;
            self.table.write(self.out)?;
        }
        print!("{}", self.table.text());
        self.outcome(stop.load(Ordering::Relaxed))
    }

    fn dry_run(&self) -> Outcome {
        for row in &self.table.runs {
            let args = self.args_of(row);
            println!("# {}", row.name);
            let (experiment, folder) = train::read(self.args.config.as_deref(), &args)
                .with_context(|| row.name.clone())
                .or_usage()?;
            train::start(experiment, &folder, self.data(), &args, &Ranks::alone())?;
        }
        Ok(())
    }

    fn data(&self) -> Data<'a> {
        Data { given: self.args.data.as_deref(), fetch: false }
    }

    fn folder(&self, row: &Row) -> PathBuf {
        self.out.join(&row.name)
    }

    /// The command line of one run. One that goes on has its values in its own config.
    fn args_of(&self, row: &Row) -> RunArgs {
        let mut args = self.args.run.clone();
        let folder = self.folder(row);
        if !(args.resume && folder.join(CONFIG_FILE).is_file()) {
            args.sets.extend(row.values.iter().map(|(key, value)| format!("{key}={value}")));
        }
        args.out = Some(folder);
        args
    }

    /// The experiments of the runs that have not finished, after all of them were found to be possible, and their
    /// configs written: with these a sweep is resumed.
    fn examine(&mut self, device: Device) -> Outcome<Vec<Option<Experiment>>> {
        let (mut experiments, mut wrong) = (Vec::new(), Vec::new());
        for i in 0..self.table.runs.len() {
            match self.examine_run(i, device) {
                Ok(experiment) => experiments.push(experiment),
                Err(Failure::Usage(error)) => wrong.push((i, error)),
                Err(other) => return Err(other),
            }
        }
        let count = self.table.runs.len();
        if !wrong.is_empty() {
            let each = wrong.iter().map(|(i, error)| format!("{}: {error:#}", self.table.runs[*i].name));
            let each = each.collect::<Vec<_>>().join("; ");
            let error =
                anyhow!("sweep: {} of {count} runs cannot be, and none was begun: {each}", wrong.len());
            return Err(Failure::Usage(error));
        }
        for (i, experiment) in experiments.iter().enumerate() {
            let Some(experiment) = experiment else { continue };
            if let Some(same) = experiments[..i].iter().position(|other| other.as_ref() == Some(experiment)) {
                let [one, other] = [same, i].map(|i| self.table.runs[i].name.as_str());
                return Err(Failure::Usage(anyhow!(
                    "sweep: {one} and {other} are the same experiment; drop one"
                )));
            }
        }
        for (row, experiment) in self.table.runs.iter().zip(&experiments) {
            if let Some(experiment) = experiment {
                session::write_config(experiment, &self.folder(row))?;
            }
        }
        Ok(experiments)
    }

    /// The experiment of a run that can begin or go on; none if it has finished.
    fn examine_run(&mut self, i: usize, device: Device) -> Outcome<Option<Experiment>> {
        let args = self.args_of(&self.table.runs[i]);
        let (experiment, folder) = train::read(self.args.config.as_deref(), &args).or_usage()?;
        let row = &mut self.table.runs[i];
        if args.resume {
            row.figures = Figures::of_run(&folder)?;
            let newest = Checkpoints::of_run(&folder).newest_whole()?.0;
            let step = newest.map(|newest| newest.state.step);
            if step.is_some_and(|step| step >= experiment.train.total_steps) {
                refuse_changes(&experiment, &folder).or_usage()?;
                row.status = Status::Finished;
                return Ok(None);
            }
            row.status = if step.is_some() { Status::Interrupted } else { Status::Waiting };
        }
        Ok(Some(Ready::new(experiment, &folder, &self.data(), &args, device, &Ranks::alone())?.experiment))
    }

    /// Trains one run and fills its row. An error is the row's; the sweep goes on.
    fn train(&mut self, i: usize, experiment: Experiment, device: Device, stop: &AtomicBool) -> Result<()> {
        let args = self.args_of(&self.table.runs[i]);
        let folder = self.folder(&self.table.runs[i]);
        let data = self.data();
        let train = || {
            let ready = Ready::new(experiment, &folder, &data, &args, device, &Ranks::alone())?;
            ready.train(&folder, args.resume, stop)
        };
        // libtorch says by a panic that memory ran out; the next run may be smaller.
        let ended = catch_unwind(AssertUnwindSafe(train))
            .unwrap_or_else(|_| Err(Failure::Run(anyhow!("stopped by the error above"))));
        let row = &mut self.table.runs[i];
        row.figures = Figures::of_run(&folder)?;
        row.status = match ended {
            Ok(Ended { ending: Ending::Finished, .. }) => Status::Finished,
            Ok(Ended { ending: Ending::Stopped, step: 0 }) => Status::Waiting,
            Ok(Ended { ending: Ending::Stopped, .. }) => Status::Interrupted,
            Err(failure) => {
                let text = failure.to_string();
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                eprintln!("FAILED: {}: {text}", row.name);
                row.error = Some(text.to_owned());
                Status::Failed
            }
        };
        Ok(())
    }

    fn outcome(&self, stopped: bool) -> Outcome {
        let (count, done) = (self.table.runs.len(), self.table.count(Status::Finished));
        let failed: Vec<&Row> = self.table.runs.iter().filter(|row| row.status == Status::Failed).collect();
        if stopped && done + failed.len() < count {
            return Err(Failure::Interrupted(format!(
                "{done} of {count} runs have finished; go on with: cm train --out {} --resume",
                self.out.display()
            )));
        }
        if failed.is_empty() {
            return Ok(());
        }
        let names = failed.iter().map(|row| row.name.as_str()).collect::<Vec<_>>().join(" and ");
        let why = self.out.join(JSON_FILE);
        Err(Failure::Run(anyhow!(
            "{} of {count} runs failed: {names}; {} says why",
            failed.len(),
            why.display()
        )))
    }
}

/// The runs of a folder, and those that a command line adds to them.
fn union(mut there: Plan, added: Plan) -> Plan {
    there.keys.extend(added.keys.into_iter().filter(|key| !there.keys.contains(key)).collect::<Vec<_>>());
    let is_new = |run: &plan::Planned| there.runs.iter().all(|other| other.name != run.name);
    let new: Vec<_> = added.runs.into_iter().filter(is_new).collect();
    there.runs.extend(new);
    there
}

/// A run that has finished stands for its settings: `--set` cannot give it others.
fn refuse_changes(experiment: &Experiment, folder: &Path) -> Result<()> {
    let own = Experiment::read(&Source::file(folder.join(CONFIG_FILE))?, &[])?;
    if own != *experiment {
        bail!("it has finished, with other values than --set gives; drop --set, or choose another --out");
    }
    Ok(())
}
