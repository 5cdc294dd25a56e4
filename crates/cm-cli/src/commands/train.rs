//! `cm train`, `cm train-cifar10` and `cm train-teacher`, and what every training does.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_data::SourceKind;
use cm_train::{Checkpoints, Ending};
use tch::Device;

use super::session::{self, Run, View};
use super::{data, dry_run};
use crate::args::{CifarArgs, RunArgs, TeacherArgs, TrainArgs};
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::lpips;
use crate::runs::{CONFIG_FILE, find_model};
use crate::sources::{ModelSource, Start};

/// Runs `cm train`.
pub fn train(args: &TrainArgs) -> Outcome {
    let (mut experiment, folder) = read(args.config.as_deref(), &args.run).or_usage()?;
    if let Some(path) = &args.data {
        experiment.set_data(path);
    }
    start(&experiment, &folder, &args.run)
}

/// Runs `cm train-cifar10`: as `cm train`, with the data fetched where it is not there.
pub fn train_cifar10(args: &CifarArgs) -> Outcome {
    let (experiment, folder) = read(Some(&args.config), &args.run).or_usage()?;
    start_with_data(experiment, &folder, args.data.as_deref(), &args.run)
}

/// Runs `cm train-teacher`: as `cm train-cifar10`, with another experiment unless one is named.
pub fn train_teacher(args: &TeacherArgs) -> Outcome {
    let (experiment, folder) = read(Some(&args.config), &args.run).or_usage()?;
    if !experiment.train.recipe().method().trains_denoiser() {
        return Err(Failure::Usage(anyhow::anyhow!(
            "--config {}: it trains a consistency model; a teacher is a denoiser, as in --config cifar10-edm",
            args.config
        )));
    }
    start_with_data(experiment, &folder, args.data.as_deref(), &args.run)
}

/// Starts a training whose data, if it is CIFAR-10, is fetched where it is not there.
pub fn start_with_data(
    mut experiment: Experiment,
    folder: &Path,
    data: Option<&Path>,
    args: &RunArgs,
) -> Outcome {
    if experiment.data.kind == SourceKind::Cifar10 && !args.dry_run {
        // A run that was resumed knows where its data lies.
        let given = data.or(experiment.data.path.as_deref()).map(Path::to_owned);
        let place = data::place_of_cifar10(given.as_deref(), metric_error(&experiment)).or_usage()?;
        experiment.set_data(&place);
    } else if let Some(path) = data {
        experiment.set_data(path);
    }
    start(&experiment, folder, args)
}

/// The experiment and the folder of its run. A run that is resumed keeps its own config.
pub fn read(config: Option<&str>, args: &RunArgs) -> Result<(Experiment, PathBuf)> {
    let named = config.map(|config| Experiment::read(&Source::find(config)?, &args.sets)).transpose()?;
    let folder = match (&args.out, &named) {
        (Some(out), _) => out.clone(),
        (None, Some(experiment)) => Path::new("out/runs").join(&experiment.name),
        (None, None) => bail!("--config is missing: a TOML file or a preset, such as --config digits-ct"),
    };
    let own = folder.join(CONFIG_FILE);
    let (mut experiment, folder) = match named {
        _ if args.resume && own.is_file() => {
            eprintln!("config: {} (a resumed run keeps its own; --set changes it)", own.display());
            (Experiment::read(&Source::file(own)?, &args.sets)?, folder)
        }
        Some(experiment) => (experiment, folder),
        None if args.resume => {
            bail!("{}: no {CONFIG_FILE} in this folder; is it a run? --config starts one", folder.display())
        }
        None => bail!("--config is missing: a TOML file or a preset, such as --config digits-ct"),
    };
    if let Some(path) = &args.init_from {
        experiment.init = Some(ModelSource::at(path, args.kind.as_deref())?);
    }
    Ok((experiment, folder))
}

/// Why the experiment's metric cannot be used, if it cannot.
fn metric_error(experiment: &Experiment) -> Option<cm_train::Error> {
    lpips::missing_weights(&experiment.train.metric)
}

fn start(experiment: &Experiment, folder: &Path, args: &RunArgs) -> Outcome {
    let device = session::device(&args.device).or_usage()?;
    if args.dry_run {
        if experiment.teacher.is_some() || experiment.init.is_some() {
            Start::read(experiment).or_usage()?;
        }
        return dry_run::dry_run(experiment, device);
    }
    // Whatever the user has to mend is found before a network is built, and models before any data.
    let models = Start::read(experiment).or_usage()?;
    let opened = experiment.data.open().or_usage()?;
    experiment.check_data(&*opened).or_usage()?;
    if let Some(error) = metric_error(experiment) {
        return Err(Failure::Usage(error.into()));
    }
    check_folder(folder, args.resume).or_usage()?;
    experiment.compute(device).or_usage()?;
    run(experiment, &models, opened, folder, device, args.resume)
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

fn run(
    experiment: &Experiment,
    models: &Start,
    data: std::sync::Arc<dyn cm_data::Dataset>,
    folder: &Path,
    device: Device,
    resume: bool,
) -> Outcome {
    let stop = session::stop_on_signal()?;
    eprintln!("data: {} ({} images of {})", data.source(), data.len(), data.shape());
    let mut trainer = session::build_trainer(experiment, models, device).or_usage()?;
    if resume {
        announce(&cm_train::resume(&mut trainer, folder).or_usage()?);
    }
    eprintln!(
        "network: {} parameters; run: {} steps of {} images into {}",
        cm_train::Trainable::params(trainer.student()).num_parameters(),
        experiment.train.total_steps,
        experiment.train.batch,
        folder.display()
    );
    let total = experiment.train.total_steps;
    let mut view = View::new(experiment, folder, trainer.steps_done());
    let ending = Run { experiment, data, folder, stop: &stop }.train(&mut trainer, &mut view)?;
    let at = format!("step {} of {total}", trainer.steps_done());
    match ending {
        Ending::Finished => finished(folder),
        Ending::Stopped => Err(Failure::Interrupted(format!(
            "saved {at}; go on with: cm train --out {} --resume",
            folder.display()
        ))),
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
