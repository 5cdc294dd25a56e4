//! `cm demo`: from nothing to a trained consistency model, measured and drawn, in minutes on a CPU.

mod compare;
mod measure;
mod plan;
mod publish;
mod summary;
mod teacher;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cm_eval::Yardstick;
use cm_model::{NoiseSource, Philox, Site};
use cm_sampler::{Request, Times, multistep};
use cm_schedule::rng::Purpose;
use cm_torch::device;
use cm_train::{Batch, Checkpoints, Ending, PROGRESS_FILE, RunLock, Trainable, Trainer};
use tch::{Device, Tensor};

use crate::args::{DemoArgs, DemoData, DemoRecipe};
use crate::commands::session::{self, Run, View};
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::net::Net;
use crate::pictures::{self, Chart, Series};
use crate::ranks;
use crate::sources::Start;
use measure::Sets;
use plan::Plan;
use summary::{SUMMARY_FILE, Speed, Summary};
use teacher::Teacher;

/// Points of a run at which its samples are kept for the strip.
const SNAPSHOTS: u64 = 8;
/// The share of the time that is left to sampling, measuring and drawing.
const RESERVE: f64 = 0.08;
/// Marks a run folder that the demo made and may replace.
const MARK: &str = ".made-by-cm-demo";
/// What the demo leaves in its folder beside the run.
const OWN_FILES: [&str; 7] = [
    "one-step.png",
    "two-step.png",
    "training.png",
    "loss.png",
    "real.png",
    "model.safetensors",
    SUMMARY_FILE,
];
/// Measured and drawn images start from these seeds, apart from those of a run's grids.
const FIRST_SEED: u64 = 10_000;

/// Runs `cm demo`.
pub fn demo(args: &DemoArgs) -> Outcome {
    if args.check.is_some() && args.data != DemoData::Digits {
        return Err(Failure::Usage(anyhow::anyhow!("--check is for --data digits, which has classes")));
    }
    if let Some(seconds) = args.seconds.filter(|s| !(*s >= 20.0 && s.is_finite())) {
        return Err(Failure::Usage(anyhow::anyhow!("--seconds {seconds}: expected 20 or more")));
    }
    ranks::refuse_several("cm demo").or_usage()?;
    if args.recipe == DemoRecipe::All {
        return compare::all(args);
    }
    let plan = Plan::of(args.data, args.recipe).or_usage()?;
    if args.publish || args.publish_only {
        publish::check(plan.preset).or_usage()?;
    }
    if args.publish_only {
        let summary = Summary::read(&args.out.join(SUMMARY_FILE)).or_usage()?;
        summary.is_of(plan.preset, &args.out).or_usage()?;
        return publish::publish(&summary, &args.out).or_run();
    }
    let _lock = RunLock::take(&args.out).or_usage()?;
    let stop = session::stop_on_signal()?;
    let (summary, _) = one(args, &plan, &args.out, &stop, &mut Shared::default())?;
    summary.print(&args.out);
    if let Some(bar) = args.check {
        summary.check(bar).or_run()?;
    }
    match args.publish {
        true => publish::publish(&summary, &args.out).or_run(),
        false => Ok(()),
    }
}

/// A preset with what the command says of its data and seed.
fn experiment(preset: &str, args: &DemoArgs) -> Result<Experiment> {
    let mut experiment = Experiment::read(&Source::find(preset)?, &[format!("train.seed={}", args.seed)])?;
    match (args.data, &args.images) {
        (DemoData::Fashion, Some(images)) => experiment.set_data(images),
        (DemoData::Fashion, None) => bail!(
            "--data fashion is not bundled: name the folder of its four IDX files with --images (Debian's package \
             dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist)"
        ),
        (_, Some(_)) => bail!("--images is for --data fashion; {} is bundled", args.data.name()),
        (_, None) => {}
    }
    Ok(experiment)
}

/// What several recipes of one data set have in common: it is made for the first that needs it.
#[derive(Default)]
struct Shared {
    ground: Option<Ground>,
    teacher: Option<Teacher>,
}

/// The data, and what measures samples against it.
struct Ground {
    data: Sets,
    yardstick: Yardstick,
}

impl Shared {
    fn ground(&mut self, experiment: &Experiment, seed: u64) -> Result<&Ground> {
        if self.ground.is_none() {
            eprintln!("measuring the data: a small classifier, a Gaussian fit, noise");
            let data = Sets::open(experiment)?;
            let yardstick = data.yardstick(seed)?;
            self.ground = Some(Ground { data, yardstick });
        }
        self.ground.as_ref().context("the data was just measured")
    }

    /// The teacher of the preset, trained in the folder `out` where it is not there yet.
    fn teacher(
        &mut self,
        preset: &'static str,
        train: impl FnOnce() -> Outcome<Teacher>,
    ) -> Outcome<&Teacher> {
        if self.teacher.as_ref().is_none_or(|teacher| teacher.preset != preset) {
            self.teacher = Some(train()?);
        }
        Ok(self.teacher.as_ref().context("the teacher was just trained")?)
    }
}

/// Trains and measures one recipe, and leaves everything about it in `out`. Returns its one-step samples too.
fn one(
    args: &DemoArgs,
    plan: &Plan,
    out: &Path,
    stop: &AtomicBool,
    shared: &mut Shared,
) -> Outcome<(Summary, Tensor)> {
    let device = session::device(&args.device).or_usage()?;
    let run_folder = out.join("run");
    clear(&run_folder).or_usage()?;
    let begun = Instant::now();
    let mut experiment = experiment(plan.preset, args).or_usage()?;
    shared.ground(&experiment, args.seed)?;
    let before = begun.elapsed().as_secs_f64();
    let seconds = args.seconds.unwrap_or(plan.seconds);
    if let Some(preset) = plan.teacher {
        let teacher = shared.teacher(preset, || teacher::train(preset, args, seconds, &args.out, stop))?;
        experiment.teacher = Some(teacher.model.clone());
    }
    let taught = shared.teacher.as_ref().filter(|_| plan.teacher.is_some());
    let Ground { data, yardstick } = shared.ground.as_ref().context("the data was measured above")?;

    let started = Instant::now();
    let models = Start::read(&experiment, false)?;
    let left = seconds * (1.0 - RESERVE) - before;
    fit_to_time(&mut experiment, &models, device, left, args.seconds.is_some())?;
    let (trainer, snapshots) = train(&experiment, &models, device, &run_folder, stop)?;
    let train_seconds = started.elapsed().as_secs_f64();

    let (one, two) = samples(&experiment, &trainer, plan)?;
    let seconds = before + started.elapsed().as_secs_f64();
    let summary = Summary {
        preset: plan.preset.to_owned(),
        seed: args.seed,
        device: crate::ui::device_name(device),
        threads: device::threads(),
        parameters: trainer.student().params().num_parameters(),
        speed: Speed::new(&experiment, trainer.steps_done(), train_seconds, seconds),
        teacher: taught.map(|teacher| teacher.speed.clone()),
        second_sigma: plan.second_sigma,
        judge: data.judge(yardstick)?,
        figures: data.figures(yardstick, &one, two.as_ref(), taught.map(|t| &t.images), args.seed)?,
    };
    let drawn = Drawn { plan, one: &one, two: two.as_ref(), real: data.held_out(), snapshots: &snapshots };
    drawn.write(out, &run_folder)?;
    copy_model(&run_folder, &out.join("model.safetensors"))?;
    summary.write(&out.join(SUMMARY_FILE))?;
    Ok((summary, one))
}

trait OrRun {
    fn or_run(self) -> Outcome;
}

impl OrRun for Result<()> {
    fn or_run(self) -> Outcome {
        self.map_err(Failure::Run)
    }
}

/// Makes room for the run: an earlier demo's run goes, anything else stays and is an error.
fn clear(run_folder: &Path) -> Result<()> {
    if run_folder.exists() {
        if !run_folder.join(MARK).is_file() {
            bail!("{}: it is there and was not made by a demo; choose another --out", run_folder.display());
        }
        std::fs::remove_dir_all(run_folder).with_context(|| format!("removing {}", run_folder.display()))?;
        // What else an earlier demo left would pass for this one's.
        if let Some(out) = run_folder.parent() {
            OWN_FILES.iter().for_each(|name| drop(std::fs::remove_file(out.join(name))));
        }
    }
    std::fs::create_dir_all(run_folder).with_context(|| format!("creating {}", run_folder.display()))?;
    Ok(std::fs::write(run_folder.join(MARK), "This folder is replaced by the next demo.\n")?)
}

/// Sets the run's length: the preset's, or less where it would not fit into `seconds`; with `stretch` as much as
/// fits. Schedules scale with the length.
fn fit_to_time(
    experiment: &mut Experiment,
    models: &Start,
    device: Device,
    seconds: f64,
    stretch: bool,
) -> Result<()> {
    let per_step = time_of_a_step(experiment, models, device)?;
    let fitting = (seconds / per_step).floor();
    if fitting < 20.0 {
        bail!(
            "a step takes {per_step:.2} s here, and {seconds:.0} s are left for training: give more --seconds"
        );
    }
    let total = experiment.train.total_steps;
    experiment.set_steps(if stretch { fitting as u64 } else { total.min(fitting as u64) });
    let total = experiment.train.total_steps;
    experiment.run.sample_every = total.div_ceil(SNAPSHOTS);
    experiment.run.checkpoint_every = total.div_ceil(4);
    experiment.run.log_every = (total / 100).max(1);
    Ok(())
}

/// Seconds of one training step on made-up images, the faster half of a few, behind a warm-up.
fn time_of_a_step(experiment: &Experiment, models: &Start, device: Device) -> Result<f64> {
    let mut trainer = session::build_trainer(experiment, models, device)?;
    let shape = Trainable::shape(trainer.student());
    let ids: Vec<u64> = (0..experiment.train.batch as u64).collect();
    let site = Site { samples: &ids, step: 0, purpose: Purpose::Synthetic };
    let images = Philox { seed: 0, device }.normal(shape, &site)?.tanh();
    let batch = Batch { images, cond: cm_model::Cond::none() };
    trainer.step(&batch)?;
    let mut times = Vec::new();
    let started = Instant::now();
    while times.len() < 3 || (times.len() < 12 && started.elapsed().as_secs_f64() < 4.0) {
        let step = Instant::now();
        trainer.step(&batch)?;
        times.push(step.elapsed().as_secs_f64());
    }
    let median = times.len() / 2;
    Ok(*times.select_nth_unstable_by(median, f64::total_cmp).1)
}

type Snapshots = Vec<(u64, Tensor)>;

fn train(
    experiment: &Experiment,
    models: &Start,
    device: Device,
    run_folder: &Path,
    stop: &AtomicBool,
) -> Outcome<(Trainer<Net>, Snapshots)> {
    let mut trainer = session::build_trainer(experiment, models, device)?;
    let mut snapshots = Vec::new();
    let ending = {
        let mut keep = |step: u64, images: &Tensor| {
            snapshots.push((step, images.shallow_clone()));
            Ok(())
        };
        let mut view = View::new(experiment, run_folder, 0).with_samples(&mut keep);
        let data = experiment.data.open()?;
        Run { experiment, data, folder: run_folder, stop }.train(&mut trainer, &mut view)?
    };
    match ending {
        Ending::Finished => Ok((trainer, snapshots)),
        Ending::Stopped => Err(Failure::Interrupted("the demo was stopped before its samples".into())),
    }
}

/// One-step and, where the model has them, two-step samples of the run's first average, in [-1, 1] on the CPU.
fn samples(experiment: &Experiment, trainer: &Trainer<Net>, plan: &Plan) -> Result<(Tensor, Option<Tensor>)> {
    let seeds: Vec<u64> = (FIRST_SEED..FIRST_SEED + plan.measured).collect();
    let request = Request { batch: 250, ..Request::new(&seeds) };
    let (rho, steps) = (experiment.precond.rho, experiment.student_steps(trainer.steps_done()));
    let draw = |model: &Net| -> Result<(Tensor, Option<Tensor>)> {
        let two = match (model, plan.second_sigma) {
            (Net::Consistency(f), Some(sigma)) => {
                let times = Times::Sigmas(vec![f.sigma_range.max(), sigma]);
                Some(multistep(f, &times, &request)?.to_device(Device::Cpu))
            }
            _ => None,
        };
        Ok((model.draw(&request, rho, steps)?.to_device(Device::Cpu), two))
    };
    match trainer.ema_names().next().map(str::to_owned) {
        Some(name) => trainer.with_ema(&name, draw)?,
        None => draw(trainer.student()),
    }
}

/// What the demo draws.
struct Drawn<'a> {
    plan: &'a Plan,
    one: &'a Tensor,
    two: Option<&'a Tensor>,
    real: &'a Tensor,
    snapshots: &'a [(u64, Tensor)],
}

impl Drawn<'_> {
    fn write(&self, out: &Path, run_folder: &Path) -> Result<()> {
        let (columns, count) = self.plan.grid;
        let grid =
            |images: &Tensor| pictures::grid(&images.narrow(0, 0, count.min(images.size()[0])), columns);
        pictures::save_png(&grid(self.one)?, &out.join("one-step.png"))?;
        if let Some(two) = self.two {
            pictures::save_png(&grid(two)?, &out.join("two-step.png"))?;
        }
        pictures::save_png(&grid(self.real)?, &out.join("real.png"))?;
        pictures::save_png(&pictures::strip(self.snapshots)?, &out.join("training.png"))?;
        pictures::save_png(&loss_chart(run_folder)?.draw(), &out.join("loss.png"))
    }
}

/// The loss against the step, out of the run's `progress.csv`.
fn loss_chart(run_folder: &Path) -> Result<Chart> {
    let path = run_folder.join(PROGRESS_FILE);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    let column =
        |name: &str| names.iter().position(|n| *n == name).with_context(|| format!("no column {name}"));
    let (step, loss) = (column("step")?, column("loss")?);
    let value = |row: &[&str], at: usize| row.get(at).and_then(|v| v.parse().ok()).unwrap_or(f64::NAN);
    let rows = lines.map(|line| line.split(',').collect::<Vec<_>>());
    let points = rows.map(|row| (value(&row, step), value(&row, loss))).collect();
    Ok(Chart {
        title: "training loss".into(),
        x_label: "step".into(),
        series: vec![Series::new("loss", points)],
        ..Chart::default()
    })
}

fn copy_model(run_folder: &Path, to: &Path) -> Result<()> {
    let (newest, _) = Checkpoints::of_run(run_folder).newest_whole()?;
    newest.context("the run has no checkpoint")?;
    let from: PathBuf = crate::runs::find_model(run_folder, None)?;
    let bytes = std::fs::read(&from)?;
    Ok(cm_model::files::write_atomic(to, |file| std::io::Write::write_all(file, &bytes))?)
}
