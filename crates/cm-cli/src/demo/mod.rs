//! `cm demo`: from nothing to a trained consistency model, measured and drawn, in minutes on a CPU.

mod measure;
mod publish;
mod summary;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cm_model::{ConsistencyFn, NoiseSource, Philox, Site};
use cm_sampler::{Request, Times, multistep, one_step};
use cm_schedule::rng::Purpose;
use cm_torch::device;
use cm_train::{Batch, Checkpoints, Ending, PROGRESS_FILE, Trainable, Trainer};
use tch::{Device, Tensor};

use crate::args::{DemoArgs, DemoData};
use crate::commands::session::{self, Net, Run, View};
use crate::config::Source;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::pictures::{self, Chart, Series};
use measure::Sets;
use summary::{Speed, Summary};

/// What differs between the demo's data sets.
struct Plan {
    preset: &'static str,
    /// Time for everything, in seconds.
    seconds: f64,
    /// The second noise level of two-step samples.
    second_sigma: f64,
    /// Images that are measured.
    measured: u64,
    /// Columns and number of images of the sample grids.
    grid: (usize, i64),
}

impl Plan {
    fn of(data: DemoData) -> Self {
        match data {
            DemoData::Digits => Self {
                preset: "digits-ct",
                seconds: 220.0,
                second_sigma: 0.5,
                measured: 1000,
                grid: (16, 160),
            },
            DemoData::Emoji => {
                Self { preset: "emoji-ct", seconds: 1500.0, second_sigma: 0.8, measured: 500, grid: (12, 96) }
            }
        }
    }
}

/// Points of a run at which its samples are kept for the strip.
const SNAPSHOTS: u64 = 8;
/// The share of the time that is left to sampling, measuring and drawing.
const RESERVE: f64 = 0.08;
/// Marks a run folder that the demo made and may replace.
const MARK: &str = ".made-by-cm-demo";
/// Measured and drawn images start from these seeds, apart from those of a run's grids.
const FIRST_SEED: u64 = 10_000;

/// Runs `cm demo`.
pub fn demo(args: &DemoArgs) -> Outcome {
    let started = Instant::now();
    let plan = Plan::of(args.data);
    if args.check.is_some() && args.data != DemoData::Digits {
        return Err(Failure::Usage(anyhow::anyhow!("--check is for --data digits, which has classes")));
    }
    if let Some(seconds) = args.seconds.filter(|s| !(*s >= 20.0 && s.is_finite())) {
        return Err(Failure::Usage(anyhow::anyhow!("--seconds {seconds}: expected 20 or more")));
    }
    if args.publish {
        publish::check(plan.preset).or_usage()?;
    }
    let device = session::device(&args.device).or_usage()?;
    let run_folder = args.out.join("run");
    clear(&run_folder).or_usage()?;
    let sets = [format!("train.seed={}", args.seed)];
    let mut experiment = Experiment::read(&Source::find(plan.preset)?, &sets)?;
    let stop = session::stop_on_signal()?;

    eprintln!("measuring the data: a small classifier, a Gaussian fit, noise");
    let data = Sets::open(&experiment)?;
    let yardstick = data.yardstick(args.seed)?;
    let left = args.seconds.unwrap_or(plan.seconds) * (1.0 - RESERVE) - started.elapsed().as_secs_f64();
    fit_to_time(&mut experiment, device, left, args.seconds.is_some())?;

    let training = Instant::now();
    let (trainer, snapshots) = train(&experiment, device, &run_folder, &stop)?;
    let train_seconds = training.elapsed().as_secs_f64();

    let (one, two) = samples(&trainer, &plan)?;
    let speed = Speed::new(&experiment, trainer.steps_done(), train_seconds, started.elapsed().as_secs_f64());
    let summary = Summary {
        preset: plan.preset.to_owned(),
        seed: args.seed,
        device: device_name(device),
        threads: device::threads(),
        parameters: trainer.student().params().num_parameters(),
        speed,
        second_sigma: plan.second_sigma,
        judge: data.judge(&yardstick)?,
        figures: data.figures(&yardstick, &one, &two, args.seed)?,
    };
    let drawn = Drawn { plan: &plan, one: &one, two: &two, real: data.held_out(), snapshots: &snapshots };
    drawn.write(&args.out, &run_folder)?;
    let model = args.out.join("model.safetensors");
    copy_model(&run_folder, &model)?;
    summary.write(&args.out.join("summary.json"))?;
    summary.print(&args.out);
    if args.publish {
        publish::publish(&summary, &args.out)?;
    }
    match args.check {
        Some(bar) => summary.check(bar).or_run(),
        None => Ok(()),
    }
}

/// The device in words, with the processor's name where the system tells it.
fn device_name(device: Device) -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    match (device, model) {
        (Device::Cpu, Some((_, name))) => format!("CPU ({})", name.trim()),
        _ => format!("{device:?}"),
    }
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
    }
    std::fs::create_dir_all(run_folder).with_context(|| format!("creating {}", run_folder.display()))?;
    Ok(std::fs::write(run_folder.join(MARK), "This folder is replaced by the next demo.\n")?)
}

/// Sets the run's length: the preset's, or less where it would not fit into `seconds`; with `stretch` as much as
/// fits. Schedules scale with the length.
fn fit_to_time(experiment: &mut Experiment, device: Device, seconds: f64, stretch: bool) -> Result<()> {
    let per_step = time_of_a_step(experiment, device)?;
    let fitting = (seconds / per_step).floor();
    if fitting < 20.0 {
        bail!(
            "a step takes {per_step:.2} s here, and {seconds:.0} s are left for training: give more --seconds"
        );
    }
    let train = &mut experiment.train;
    train.total_steps = if stretch { fitting as u64 } else { train.total_steps.min(fitting as u64) };
    experiment.run.sample_every = train.total_steps.div_ceil(SNAPSHOTS);
    experiment.run.checkpoint_every = train.total_steps.div_ceil(4);
    experiment.run.log_every = (train.total_steps / 100).max(1);
    Ok(())
}

/// Seconds of one training step on made-up images, the faster half of a few, behind a warm-up.
fn time_of_a_step(experiment: &Experiment, device: Device) -> Result<f64> {
    let mut trainer = session::build_trainer(experiment, device)?;
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
    device: Device,
    run_folder: &Path,
    stop: &AtomicBool,
) -> Outcome<(Trainer<Net>, Snapshots)> {
    let mut trainer = session::build_trainer(experiment, device)?;
    let mut snapshots = Vec::new();
    let ending = {
        let mut keep = |step: u64, images: &Tensor| {
            snapshots.push((step, images.shallow_clone()));
            Ok(())
        };
        let mut view = View::new(run_folder, 0, experiment.train.total_steps).with_samples(&mut keep);
        let data = experiment.data.open()?;
        Run { experiment, data, folder: run_folder, stop }.train(&mut trainer, &mut view)?
    };
    match ending {
        Ending::Finished => Ok((trainer, snapshots)),
        Ending::Stopped => Err(Failure::Interrupted("the demo was stopped before its samples".into())),
    }
}

/// One-step and two-step samples of the run's first average, in [-1, 1] on the CPU.
fn samples(trainer: &Trainer<Net>, plan: &Plan) -> Result<(Tensor, Tensor)> {
    let seeds: Vec<u64> = (FIRST_SEED..FIRST_SEED + plan.measured).collect();
    let request = Request { batch: 250, ..Request::new(&seeds) };
    let draw = |model: &Net| -> Result<(Tensor, Tensor)> {
        let times = Times::Sigmas(vec![model.sigma_range().max(), plan.second_sigma]);
        Ok((one_step(model, &request)?, multistep(model, &times, &request)?))
    };
    let average = trainer.ema_names().next().map(str::to_owned);
    let (one, two) = match average {
        Some(name) => trainer.with_ema(&name, draw)??,
        None => draw(trainer.student())?,
    };
    Ok((one.to_device(Device::Cpu), two.to_device(Device::Cpu)))
}

/// What the demo draws.
struct Drawn<'a> {
    plan: &'a Plan,
    one: &'a Tensor,
    two: &'a Tensor,
    real: &'a Tensor,
    snapshots: &'a [(u64, Tensor)],
}

impl Drawn<'_> {
    fn write(&self, out: &Path, run_folder: &Path) -> Result<()> {
        let (columns, count) = self.plan.grid;
        let grid =
            |images: &Tensor| pictures::grid(&images.narrow(0, 0, count.min(images.size()[0])), columns);
        pictures::save_png(&grid(self.one)?, &out.join("one-step.png"))?;
        pictures::save_png(&grid(self.two)?, &out.join("two-step.png"))?;
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
        log_y: false,
        series: vec![Series { name: "loss".into(), points }],
    })
}

fn copy_model(run_folder: &Path, to: &Path) -> Result<()> {
    let (newest, _) = Checkpoints::of_run(run_folder).newest_whole()?;
    newest.context("the run has no checkpoint")?;
    let from: PathBuf = crate::runs::find_model(run_folder, None)?;
    let bytes = std::fs::read(&from)?;
    Ok(cm_model::files::write_atomic(to, |file| std::io::Write::write_all(file, &bytes))?)
}
