//! A training run from its parts: networks, data, trainer, and what is drawn while it goes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cm_data::Dataset;
use cm_net::ModelSpec;
use cm_sampler::Request;
use cm_torch::device::{DeviceSpec, Resolved};
use cm_train::{
    BatchSource, BoxError, Ending, EventFile, Networks, Observer, RankLog, Session, StepReport, Trainable,
    Trainer, Weights,
};
use tch::{Device, Tensor};

use super::batches::Batches;
use crate::experiment::Experiment;
use crate::lpips;
use crate::net::Net;
use crate::pictures;
use crate::ranks::without_places;
use crate::runs::CONFIG_FILE;
use crate::sources::Start;
use crate::ui::{self, Bar};

/// The device that was asked for; says what `auto` chose and why.
pub fn device(spec: &DeviceSpec) -> Result<Device> {
    said(&cm_torch::device::resolve_with_note(spec)?)
}

/// The device, after why it is this one has been said.
///
/// On CUDA float32 is float32 from here on: libtorch's default lets cuDNN round the inputs of convolutions.
pub fn said(resolved: &Resolved) -> Result<Device> {
    if resolved.device.is_cuda() {
        cm_torch::device::set_tf32(false)?;
    }
    if let Some(note) = &resolved.note {
        ui::say(&format!("device: {:?} ({note})", resolved.device));
    }
    Ok(resolved.device)
}

/// A trainer before its first step, on networks that start as `start` says.
pub fn build_trainer(experiment: &Experiment, start: &Start, device: Device) -> Result<Trainer<Net>> {
    experiment.switch(device)?;
    let shape = experiment.network.image_shape();
    let perceptual = lpips::load_metric(&experiment.train.metric, shape, device)?;
    let student = Net::build(experiment, device)?;
    start.load(&student)?;
    let target = experiment.train.target.has_network().then(|| Net::build(experiment, device)).transpose()?;
    let teacher = start.denoiser(experiment, device)?;
    let networks = Networks { student, target, teacher, perceptual };
    Ok(Trainer::new(networks, &experiment.train, experiment.levels()?)?)
}

/// Signals so soon behind the first are the same request: a launcher passes a Ctrl-C on that its ranks have had.
const ONE_REQUEST: Duration = Duration::from_secs(1);

/// A stop flag that Ctrl-C (and a request to terminate) sets; the second one ends the process at once.
pub fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let mut first: Option<Instant> = None;
    ctrlc::set_handler(move || {
        match first {
            Some(first) if first.elapsed() > ONE_REQUEST => std::process::exit(130),
            Some(_) => return,
            None => first = Some(Instant::now()),
        }
        flag.store(true, Ordering::Relaxed);
        ui::say("\nstopping at the next place to go on from; press Ctrl-C again to stop at once");
    })
    .context("setting up Ctrl-C")?;
    Ok(stop)
}

/// Writes the experiment with every value resolved into the run's folder.
pub fn write_config(experiment: &Experiment, folder: &Path) -> Result<()> {
    let text = experiment.to_toml()?;
    Ok(cm_model::files::write_atomic(&folder.join(CONFIG_FILE), |file| {
        std::io::Write::write_all(file, text.as_bytes())
    })?)
}

/// Everything that a run is made of.
pub struct Run<'a> {
    /// The experiment, resolved.
    pub experiment: &'a Experiment,
    /// The images.
    pub data: Arc<dyn Dataset>,
    /// The run's folder.
    pub folder: &'a Path,
    /// Set by Ctrl-C.
    pub stop: &'a AtomicBool,
}

impl Run<'_> {
    /// Trains to the end or until told to stop, with a progress bar, logs, checkpoints and sample grids.
    pub fn train(&self, trainer: &mut Trainer<Net>, view: &mut View<'_>) -> Result<Ending> {
        if trainer.writes() {
            write_config(self.experiment, self.folder)?;
        }
        let device = trainer.device();
        let mut source = Batches::open(self.experiment, self.data.clone(), device, trainer.rows())?;
        if let Some(group) = trainer.group() {
            let log = RankLog::open(self.folder, group.rank(), group.size(), trainer.steps_done())?;
            source = source.with_log(log);
        } else if self.folder.join("ranks").is_dir() {
            // What several ranks wrote behind the checkpoint is not theirs any more.
            RankLog::open(self.folder, 0, 1, trainer.steps_done())?;
        }
        let spec = self.experiment.model_spec();
        // A model file travels: the places of data and of weights on this machine stay here.
        let portable = without_places(self.experiment).to_toml()?;
        let metadata = |weights: Weights<'_>, step: u64| {
            let steps = match weights {
                Weights::Target => self.experiment.teacher_steps(step),
                _ => self.experiment.student_steps(step),
            };
            describe(&spec, &portable, weights, step, steps)
        };
        let session =
            Session { folder: self.folder, spec: &self.experiment.run, stop: self.stop, metadata: &metadata };
        let ending = cm_train::run(trainer, &mut source, &session, view);
        view.finish();
        if let count @ 1.. = source.passed_over() {
            eprintln!(
                "WARNING: {count} images do not decode and were passed over in this session of the run"
            );
        }
        Ok(ending?)
    }
}

/// The key under which a model file says how many steps its student was progressively distilled to.
pub const STUDENT_STEPS: &str = "student_steps";

/// What a model file of the run says about itself.
fn describe(
    spec: &ModelSpec,
    config: &str,
    weights: Weights<'_>,
    step: u64,
    student_steps: Option<usize>,
) -> BTreeMap<String, String> {
    let which = match weights {
        Weights::Raw => "raw".to_owned(),
        Weights::Ema(rate) => format!("ema {rate}"),
        Weights::Target => "target".to_owned(),
    };
    let mut spec = spec.clone();
    spec.about = BTreeMap::from([
        ("weights".to_owned(), which),
        ("step".to_owned(), step.to_string()),
        ("config".to_owned(), config.to_owned()),
    ]);
    spec.about.extend(student_steps.map(|n| (STUDENT_STEPS.to_owned(), n.to_string())));
    spec.metadata()
}

/// A hook that sees the samples of each sample point: the step and images `[N, C, H, W]` of the first average.
pub type OnSamples<'a> = dyn FnMut(u64, &Tensor) -> Result<()> + 'a;

/// Draws a run: a bar in the terminal, sample grids in the run's folder and its event file.
pub struct View<'a> {
    experiment: &'a Experiment,
    bar: Option<Bar>,
    folder: &'a Path,
    loss: f64,
    on_samples: Option<&'a mut OnSamples<'a>>,
    announce: bool,
}

/// Seeds of the sample grids: the same at every point of a run, so that one sees them change.
const GRID_SEEDS: std::ops::Range<u64> = 0..64;

impl<'a> View<'a> {
    /// A view of a run in `folder` that goes on from step `first`.
    pub fn new(experiment: &'a Experiment, folder: &'a Path, first: u64) -> Self {
        let bar = (!ui::is_quiet()).then(|| Bar::new("train", "steps", first, experiment.train.total_steps));
        Self { experiment, bar, folder, loss: f64::NAN, on_samples: None, announce: true }
    }

    /// Hands the samples of each sample point to `hook` too, and leaves out the lines about files.
    pub fn with_samples(mut self, hook: &'a mut OnSamples<'a>) -> Self {
        self.on_samples = Some(hook);
        self.announce = false;
        self
    }

    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }

    fn draw(&mut self, trainer: &Trainer<Net>) -> Result<()> {
        let step = trainer.steps_done();
        let seeds: Vec<u64> = GRID_SEEDS.collect();
        let classes = trainer.student().num_classes();
        let labels: Option<Vec<i64>> =
            (classes > 0).then(|| seeds.iter().map(|&seed| seed as i64 % classes).collect());
        let request = Request { labels: labels.as_deref(), ..Request::new(&seeds) };
        let (rho, student_steps) = (self.experiment.precond.rho, self.experiment.student_steps(step));
        let draw = |net: &Net| net.draw(&request, rho, student_steps);
        let averages: Vec<String> = trainer.ema_names().map(str::to_owned).collect();
        let mut first = None;
        for name in &averages {
            let images = trainer.with_ema(name, draw)??;
            self.write(step, &format!("ema-{name}"), &images)?;
            first.get_or_insert(images);
        }
        let raw = draw(trainer.student())?;
        self.write(step, "raw", &raw)?;
        match &mut self.on_samples {
            Some(hook) => hook(step, first.as_ref().unwrap_or(&raw)),
            None => Ok(()),
        }
    }

    fn write(&self, step: u64, name: &str, images: &Tensor) -> Result<()> {
        let path = self.folder.join("samples").join(format!("step-{step:08}-{name}.png"));
        let grid = pictures::grid(images, 8)?;
        pictures::save_png(&grid, &path)?;
        let png = std::fs::read(&path).with_context(|| format!("{}: reading failed", path.display()))?;
        let (size, tag) = ([grid.width(), grid.height()], format!("samples/{name}"));
        Ok(EventFile::of_run(self.folder)?.image(step, &tag, size, &png)?)
    }
}

impl Observer<Net> for View<'_> {
    fn on_step(&mut self, report: &StepReport) {
        // A smoothed loss: single batches jump too much to be read.
        self.loss = if self.loss.is_nan() { report.loss } else { 0.95 * self.loss + 0.05 * report.loss };
        let scale = report.num_scales.map(|n| format!("  N {n}")).unwrap_or_default();
        let Some(bar) = &mut self.bar else { return };
        let rate = bar.images_per_second(report.images / report.step.max(1), report.step);
        bar.set(report.step, format!("loss {:.4}{scale}  {rate:.0} img/s", self.loss));
    }

    fn on_checkpoint(&mut self, folder: &Path, _step: u64) {
        if let (Some(bar), true) = (&self.bar, self.announce) {
            bar.line(&format!("saved {}", folder.display()));
        }
    }

    fn on_set_aside(&mut self, folder: &Path) {
        let text = format!(
            "WARNING: the damaged checkpoint of a step that has been written anew is kept as {}; nothing reads it, and \
             it may be removed",
            folder.display()
        );
        match &self.bar {
            Some(bar) => bar.line(&text),
            None => eprintln!("{text}"),
        }
    }

    fn on_sample(&mut self, trainer: &Trainer<Net>) -> std::result::Result<(), BoxError> {
        self.draw(trainer).map_err(|error| format!("{error:#}").into())
    }
}
