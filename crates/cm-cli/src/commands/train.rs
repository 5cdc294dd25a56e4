//! `cm train`, `cm train-cifar10` and `cm train-teacher`, and what every training does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use cm_data::SourceKind;
use cm_train::{Checkpoints, Ending, Method, RunLock};
use tch::Device;

use super::session::{self, Run, View};
use super::{data, dry_run, sweep};
use crate::args::{CifarArgs, RunArgs, TeacherArgs, TrainArgs};
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::lpips;
use crate::ranks::Ranks;
use crate::runs::{CONFIG_FILE, find_model};
use crate::sources::{ModelSource, Start};
use crate::ui;

/// Runs `cm train`, or a sweep of it.
pub fn train(args: &TrainArgs, ranks: &Ranks) -> Outcome {
    if let Some(sweep) = sweep::Sweep::of(args)? {
        ranks.refuse("--sweep", "start it without ranks, or train its runs one by one").or_usage()?;
        return sweep.run();
    }
    let (experiment, folder) = read(args.config.as_deref(), &args.run).or_usage()?;
    start(experiment, &folder, Data { given: args.data.as_deref(), fetch: false }, &args.run, ranks)
}

/// Runs `cm train-cifar10`: as `cm train`, with the data fetched where it is not there.
pub fn train_cifar10(args: &CifarArgs, ranks: &Ranks) -> Outcome {
    let (experiment, folder) = read(Some(&args.config), &args.run).or_usage()?;
    start(experiment, &folder, Data { given: args.data.as_deref(), fetch: true }, &args.run, ranks)
}

/// Runs `cm train-teacher`: as `cm train-cifar10`, with another experiment unless one is named.
pub fn train_teacher(args: &TeacherArgs, ranks: &Ranks) -> Outcome {
    let (experiment, folder) = read(Some(&args.config), &args.run).or_usage()?;
    if experiment.train.recipe().method() != Method::Denoising {
        return Err(Failure::Usage(anyhow::anyhow!(
            "--config {}: it does not train a diffusion model, and a teacher is one, as in --config cifar10-edm",
            args.config
        )));
    }
    start(experiment, &folder, Data { given: args.data.as_deref(), fetch: true }, &args.run, ranks)
}

/// Where the images of a training come from.
pub struct Data<'a> {
    /// What the command line says.
    pub given: Option<&'a Path>,
    /// Whether CIFAR-10 is fetched where it is not there.
    pub fetch: bool,
}

impl Data<'_> {
    fn put_into(&self, experiment: &mut Experiment) -> Result<()> {
        if self.fetch && experiment.data.kind == SourceKind::Cifar10 {
            // A run that was resumed knows where its data lies.
            let given = self.given.or(experiment.data.path.as_deref()).map(Path::to_owned);
            let place = data::place_of_cifar10(given.as_deref(), metric_error(experiment))?;
            experiment.set_data(&place);
        } else if let Some(path) = self.given {
            experiment.set_data(path);
        }
        Ok(())
    }
}

/// The experiment and the folder of its run. A run that is resumed keeps its own config.
pub fn read(config: Option<&str>, args: &RunArgs) -> Result<(Experiment, PathBuf)> {
    let named = config.map(|config| Experiment::read(&Source::find(config)?, &args.sets)).transpose()?;
    let folder = match (&args.out, &named) {
        (Some(out), _) => out.clone(),
        (None, Some(experiment)) => Path::new("out/runs").join(&experiment.name),
        (None, None) => bail!("{CONFIG_IS_MISSING}"),
    };
    let own = folder.join(CONFIG_FILE);
    let (mut experiment, folder) = match named {
        _ if args.resume && own.is_file() => {
            ui::say(&format!("config: {} (a resumed run keeps its own; --set changes it)", own.display()));
            let experiment = Experiment::read(&Source::file(own.clone())?, &args.sets)?;
            announce_changes(&Experiment::read(&Source::file(own)?, &[])?, &experiment)?;
            (experiment, folder)
        }
        Some(experiment) => (experiment, folder),
        None if args.resume => {
            bail!("{}: no {CONFIG_FILE} in this folder; is it a run? --config starts one", folder.display())
        }
        None => bail!("{CONFIG_IS_MISSING}"),
    };
    if let Some(path) = &args.init_from {
        experiment.init = Some(ModelSource::at(path, args.kind.as_deref())?);
    }
    Ok((experiment, folder))
}

const CONFIG_IS_MISSING: &str = "--config is missing: a TOML file or a preset, such as --config digits-ct, or \
                                 --config digits-cd to distil";

/// Says what `--set` changes in a run that goes on, but for the section `[train]`, which the checkpoint knows too.
fn announce_changes(old: &Experiment, new: &Experiment) -> Result<()> {
    let (old, new) = (toml::Table::try_from(old)?, toml::Table::try_from(new)?);
    let sections = old.keys().chain(new.keys()).filter(|section| *section != "train");
    for section in sections.collect::<std::collections::BTreeSet<_>>() {
        let (old, new) = (old.get(section), new.get(section));
        if old != new {
            let text = |value: Option<&toml::Value>| value.map_or("none".to_owned(), ToString::to_string);
            ui::say(&format!(
                "WARNING: changed since the run began: {section}: {} → {}",
                text(old),
                text(new)
            ));
        }
    }
    Ok(())
}

/// Why the experiment's metric cannot be used, if it cannot.
fn metric_error(experiment: &Experiment) -> Option<cm_train::Error> {
    lpips::missing_weights(&experiment.train.metric)
}

/// Starts a training, or a dry run of it.
pub fn start(
    experiment: Experiment,
    folder: &Path,
    data: Data<'_>,
    args: &RunArgs,
    ranks: &Ranks,
) -> Outcome {
    let device = ranks.device(&args.device).or_usage()?;
    if args.dry_run {
        ranks.refuse("--dry-run", "start it without ranks").or_usage()?;
        check_kind(&experiment, args).or_usage()?;
        if experiment.teacher.is_some() || experiment.init.is_some() {
            Start::read(&experiment, false).or_usage()?;
            println!("# the named model fits the experiment");
        }
        return dry_run::dry_run(&experiment, device);
    }
    let ready = Ready::new(experiment, folder, &data, args, device, ranks)?;
    let (stop, total) = (session::stop_on_signal()?, ready.experiment.train.total_steps);
    match ready.train(folder, args.resume, &stop)? {
        Ended { ending: Ending::Finished, .. } if !ranks.group.is_first() => Ok(()),
        Ended { ending: Ending::Finished, .. } => finished(folder),
        Ended { ending: Ending::Stopped, step } => Err(Failure::Interrupted(format!(
            "saved step {step} of {total}; go on with: cm train --out {} --resume",
            folder.display()
        ))),
    }
}

/// `--as` says something of a model that is named.
fn check_kind(experiment: &Experiment, args: &RunArgs) -> Result<()> {
    if args.kind.is_some() && experiment.teacher.is_none() && experiment.init.is_none() {
        bail!("--as belongs to --teacher or --init-from, and neither is here");
    }
    Ok(())
}

/// A training that nothing stands in the way of.
pub struct Ready {
    /// The experiment, with the place of its data.
    pub experiment: Experiment,
    models: Start,
    data: Arc<dyn cm_data::Dataset>,
    device: Device,
    ranks: Ranks,
}

/// How a training ended, and after which step.
pub struct Ended {
    pub ending: Ending,
    pub step: u64,
}

impl Ready {
    /// Finds whatever the user has to mend before a network is built, and in models before any data.
    pub fn new(
        mut experiment: Experiment,
        folder: &Path,
        data: &Data<'_>,
        args: &RunArgs,
        device: Device,
        ranks: &Ranks,
    ) -> Outcome<Self> {
        check_kind(&experiment, args).or_usage()?;
        let goes_on = args.resume && !Checkpoints::of_run(folder).steps()?.is_empty();
        let models = Start::read(&experiment, goes_on).or_usage()?;
        ranks.first_one_then_all(|| data.put_into(&mut experiment).or_usage())?;
        let data = experiment.data.open().or_usage()?;
        experiment.check_data(&*data).or_usage()?;
        if let Some(error) = metric_error(&experiment) {
            return Err(Failure::Usage(error.into()));
        }
        check_folder(folder, args.resume).or_usage()?;
        experiment.compute(device).or_usage()?;
        // Nothing has been written up to here, by any rank.
        ranks.agree(&experiment, &*data).or_usage()?;
        Ok(Self { experiment, models, data, device, ranks: ranks.clone() })
    }

    /// Trains to the end, or until `stop` is set.
    pub fn train(self, folder: &Path, resume: bool, stop: &AtomicBool) -> Outcome<Ended> {
        let Self { experiment, models, data, device, ranks } = self;
        ui::say(&format!("data: {} ({} images of {})", data.source(), data.len(), data.shape()));
        let mut trainer = session::build_trainer(&experiment, &models, device).or_usage()?;
        drop(models);
        // Before a checkpoint is read: another process may be about to remove it. Of several ranks the first writes.
        let _lock = ranks.group.is_first().then(|| RunLock::take(folder)).transpose().or_usage()?;
        if resume && ranks.group.is_first() {
            announce(&cm_train::resume(&mut trainer, folder).or_usage()?);
        }
        trainer.join(ranks.group.clone()).or_usage()?;
        ui::say(&format!(
            "network: {} parameters; run: {} steps of {} images into {}",
            cm_train::Trainable::params(trainer.student()).num_parameters(),
            experiment.train.total_steps,
            experiment.train.batch,
            folder.display()
        ));
        let mut view = View::new(&experiment, folder, trainer.steps_done());
        let run = Run { experiment: &experiment, data, folder, stop };
        let ending = run.train(&mut trainer, &mut view)?;
        Ok(Ended { ending, step: trainer.steps_done() })
    }
}

/// A new run needs a folder without checkpoints.
fn check_folder(folder: &Path, resume: bool) -> Result<()> {
    let steps = Checkpoints::of_run(folder).steps()?;
    match steps.last() {
        Some(step) if !resume => bail!(
            "{}: this folder holds a run (checkpoint of step {step}); go on with --resume, or choose another --out",
            folder.display()
        ),
        _ => Ok(()),
    }
}

fn announce(resumed: &cm_train::Resumed) {
    for broken in &resumed.passed_over {
        eprintln!("WARNING: {} is not whole and was passed over: {}", broken.path.display(), broken.problem);
    }
    for change in &resumed.changed {
        eprintln!("WARNING: changed since the checkpoint: {change}");
    }
    match resumed.step {
        Some(step) => eprintln!("resumed at step {step}"),
        None => eprintln!("no checkpoint yet: starting from step 0"),
    }
}

fn finished(folder: &Path) -> Outcome {
    let model: PathBuf = find_model(folder, None).context("looking for the run's model")?;
    println!("model: {}", model.display());
    println!("try:   cm sample {} --seeds 0-63", folder.display());
    Ok(())
}
