//! The small diffusion model that the demo of a distillation trains first.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use cm_sampler::Request;
use tch::{Device, Tensor};

use super::summary::Speed;
use super::{FIRST_SEED, clear, fit_to_time, train as train_in};
use crate::args::DemoArgs;
use crate::commands::session;
use crate::exit::{OrUsage, Outcome};
use crate::net::Net;
use crate::sources::{ModelSource, Start};

/// A trained teacher.
pub struct Teacher {
    /// The experiment that it comes from.
    pub preset: &'static str,
    /// Where it lies.
    pub model: ModelSource,
    /// How long it took.
    pub speed: Speed,
    /// Its samples, in [-1, 1] on the CPU.
    pub images: Tensor,
}

/// Images of the teacher that are measured: each takes 35 evaluations.
const MEASURED: u64 = 500;

/// Trains the teacher in at most `seconds`; it stays in the folder `teacher` of the demo.
pub fn train(
    preset: &'static str,
    args: &DemoArgs,
    seconds: f64,
    out: &Path,
    stop: &AtomicBool,
) -> Outcome<Teacher> {
    let started = Instant::now();
    let device = session::device(&args.device).or_usage()?;
    let folder = out.join("teacher");
    clear(&folder).or_usage()?;
    let mut experiment = super::experiment(preset, args).or_usage()?;
    let models = Start::default();
    fit_to_time(&mut experiment, &models, device, 0.9 * seconds, args.seconds.is_some())?;
    eprintln!("teacher: {preset}, {} steps", experiment.train.total_steps);
    let (trainer, _) = train_in(&experiment, &models, device, &folder, stop)?;
    let train_seconds = started.elapsed().as_secs_f64();
    let seeds: Vec<u64> = (FIRST_SEED..FIRST_SEED + MEASURED).collect();
    let request = Request { batch: 250, ..Request::new(&seeds) };
    let draw = |net: &Net| net.draw(&request, experiment.precond.rho, None);
    let images = match trainer.ema_names().next().map(str::to_owned) {
        Some(name) => trainer.with_ema(&name, draw)?,
        None => draw(trainer.student()),
    }?;
    let total = started.elapsed().as_secs_f64();
    Ok(Teacher {
        preset,
        model: ModelSource::at(&folder, None)?,
        speed: Speed::new(&experiment, trainer.steps_done(), train_seconds, total),
        images: images.to_device(Device::Cpu),
    })
}
