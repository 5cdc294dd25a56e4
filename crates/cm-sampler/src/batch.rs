use cm_model::{Cond, Philox, Sigma};
use cm_schedule::rng::Stream as Randomness;
use cm_schedule::solver::{Ask, Walk};
use tch::{Device, Kind, Tensor};

use crate::sample::{Tensors, clipped};
use crate::stream::draw;
use crate::{Error, Method, ModelRef, Precision, Result, Steps};

/// One image that somebody wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Seed of its noise, below 2^56.
    pub seed: u64,
    /// Its class; `None` asks for the answer without one.
    pub label: Option<i64>,
    /// How it is to be made.
    pub steps: Steps,
}

/// How a [`Sampler`] works, whatever it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerOptions {
    /// Largest number of images that go through the model at a time.
    pub batch: usize,
    /// Clamp each estimate of the model, and the result, to [−1, 1].
    pub clip: bool,
    /// Dtypes of the state and of what the model is given.
    pub precision: Precision,
}

impl Default for SamplerOptions {
    /// As [`crate::Request::new`]: 64 at a time, clamped, [`Precision::Mixed`].
    fn default() -> Self {
        Self { batch: 64, clip: true, precision: Precision::Mixed }
    }
}

/// Many requests, one model: what a service stands on.
///
/// Jobs with different seeds, labels and steps fill one batch. In each round every unfinished image's next (x, σ) goes
/// into the same call of the model; an image that is finished leaves its place to the next job. The noise of an image is
/// that of its seed to the last bit, and the image is the one that [`crate::sample`] makes of that seed, up to the
/// rounding of libtorch's kernels at different batch sizes (a relative 1e-5 in float32).
///
/// ```
/// use cm_sampler::{Job, ModelRef, Sampler, SamplerOptions, Steps, Times};
/// use cm_sampler::{model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let sampler = Sampler::new(ModelRef::Consistency(&f), SamplerOptions::default())?;
/// let quick = Job { seed: 7, label: None, steps: Steps::One };
/// let better = Job { seed: 8, label: None, steps: Steps::Multistep(Times::Sigmas(vec![80.0, 0.8])) };
/// let images = sampler.batch(&[quick, better])?;
/// assert_eq!(images[1].size(), [3, 8, 8]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Sampler<'a> {
    model: ModelRef<'a>,
    options: SamplerOptions,
}

/// A job that is begun.
struct AtWork<'m> {
    index: usize,
    job: &'m Job,
    walk: Walk<'m, Tensor>,
}

impl<'a> Sampler<'a> {
    /// A sampler for one model.
    ///
    /// # Errors
    /// [`Error::EmptyBatch`] for batches of nothing.
    pub fn new(model: ModelRef<'a>, options: SamplerOptions) -> Result<Self> {
        match options.batch {
            0 => Err(Error::EmptyBatch),
            _ => Ok(Self { model, options }),
        }
    }

    /// Says whether a job can be done, before anything is computed.
    ///
    /// # Errors
    /// [`Error`] with what is wrong: steps that the model cannot follow, a label that it does not know, a seed that is
    /// too large.
    pub fn check(&self, job: &Job) -> Result<()> {
        self.method(job).map(drop)
    }

    /// The images of the jobs, each `[C, H, W]`, in the order of the jobs.
    ///
    /// # Errors
    /// [`Error::Job`] with the first job that [`Sampler::check`] refuses, before anything is computed; else the model's.
    pub fn batch(&self, jobs: &[Job]) -> Result<Vec<Tensor>> {
        let mut images: Vec<Option<Tensor>> = jobs.iter().map(|_| None).collect();
        self.each(jobs, &mut |index, image| {
            images[index] = Some(image);
            Ok(())
        })?;
        Ok(images.into_iter().flatten().collect())
    }

    /// Hands each image on as it is finished, with the position of its job: those that take fewer steps come earlier.
    ///
    /// # Errors
    /// As [`Sampler::batch`], and whatever `sink` returns, after which no further image is made.
    pub fn each(&self, jobs: &[Job], sink: &mut dyn FnMut(usize, Tensor) -> Result<()>) -> Result<()> {
        let of_job =
            |(index, job)| self.method(job).map_err(|source| Error::Job { index, source: source.into() });
        let methods = jobs.iter().enumerate().map(of_job).collect::<Result<Vec<_>>>()?;
        let _no_grad = tch::no_grad_guard();
        self.check_company(jobs)?;
        let mut waiting = jobs.iter().zip(&methods).enumerate();
        let mut at_work = Vec::with_capacity(self.options.batch.min(jobs.len()));
        loop {
            let places = self.options.batch - at_work.len();
            for (index, (job, method)) in waiting.by_ref().take(places) {
                at_work.push(self.begin(index, job, method)?);
            }
            if at_work.is_empty() {
                return Ok(());
            }
            self.round(&mut at_work)?;
            let (finished, going): (Vec<_>, Vec<_>) =
                at_work.into_iter().partition(|work| matches!(work.walk.ask(), Ask::Nothing));
            at_work = going;
            for AtWork { index, walk, .. } in finished {
                let image = clipped(walk.into_state(), self.options.clip);
                sink(index, image.to_kind(self.options.precision.model_kind()).squeeze_dim(0))?;
            }
        }
    }

    fn method(&self, job: &Job) -> Result<Method<'a>> {
        if job.seed > Randomness::MAX_SAMPLE {
            return Err(Error::Seed { seed: job.seed });
        }
        if let Some(label) = job.label {
            if self.model.num_classes() == 0 {
                return Err(Error::Unconditional);
            }
            Cond::labels(&[label], self.model.num_classes(), Device::Cpu)?;
        }
        Method::new(self.model, &job.steps)
    }

    /// A job without a label meets a row of zeros beside labelled ones. A model that cannot do without labels would not
    /// notice; it is asked alone first, so that a job fares in company as it does alone.
    fn check_company(&self, jobs: &[Job]) -> Result<()> {
        let unlabelled = jobs.iter().position(|job| job.label.is_none());
        let (Some(index), true) = (unlabelled, jobs.iter().any(|job| job.label.is_some())) else {
            return Ok(());
        };
        let (shape, kind) = (self.model.shape().batch(1), self.options.precision.model_kind());
        let x = Tensor::zeros(shape, (kind, self.model.device()));
        let sigma = self.model.sigma_range().max();
        let alone = self.model.estimate(&x, Sigma::Each(&[sigma]), &Cond::none());
        alone.map(drop).map_err(|source| Error::Job { index, source: source.into() })
    }

    fn begin<'m>(&self, index: usize, job: &'m Job, method: &'m Method<'_>) -> Result<AtWork<'m>> {
        let start = self.draw(job, 0)? * method.start();
        let mut work = AtWork { index, job, walk: Walk::new(method.plan(), start) };
        self.add_noise(&mut work)?;
        Ok(work)
    }

    /// One evaluation of every image at work, in one call of the model.
    fn round(&self, at_work: &mut [AtWork<'_>]) -> Result<()> {
        let (mut states, mut sigmas) = (Vec::new(), Vec::new());
        for work in at_work.iter() {
            if let Ask::Model { x, sigma } = work.walk.ask() {
                states.push(x);
                sigmas.push(sigma);
            }
        }
        let x = Tensor::cat(&states, 0).to_kind(self.options.precision.model_kind());
        let cond = self.cond(at_work)?;
        let estimates = self.model.estimate(&x, Sigma::Each(&sigmas), &cond)?.to_kind(Kind::Double);
        let estimates = clipped(estimates, self.options.clip);
        for (row, work) in at_work.iter_mut().enumerate() {
            work.walk.answer(&Tensors, estimates.narrow(0, row as i64, 1));
            self.add_noise(work)?;
        }
        Ok(())
    }

    /// The classes of the images at work, and a row of zeros for each that has none beside others that have.
    fn cond(&self, at_work: &[AtWork<'_>]) -> Result<Cond> {
        let labels: Vec<Option<i64>> = at_work.iter().map(|work| work.job.label).collect();
        let (classes, device) = (self.model.num_classes(), self.model.device());
        if labels.iter().all(Option::is_none) {
            return Ok(Cond::none());
        }
        let known: Vec<i64> = labels.iter().map(|label| label.unwrap_or(0)).collect();
        let cond = Cond::labels(&known, classes, device)?;
        if labels.iter().all(Option::is_some) {
            return Ok(cond);
        }
        let there: Vec<f32> = labels.iter().map(|label| f32::from(u8::from(label.is_some()))).collect();
        let there = Tensor::from_slice(&there).to_device(device).view([-1, 1]);
        Ok(Cond { labels: Some(cond.one_hot(labels.len() as i64, classes, device)? * there), augment: None })
    }

    fn add_noise(&self, work: &mut AtWork<'_>) -> Result<()> {
        while let Ask::Noise { step } = work.walk.ask() {
            let noise = self.draw(work.job, step + 1)?;
            work.walk.answer(&Tensors, noise);
        }
        Ok(())
    }

    fn draw(&self, job: &Job, index: usize) -> Result<Tensor> {
        let mut of_the_seed = Philox { seed: 0, device: self.model.device() };
        draw(&mut of_the_seed, self.model.shape(), &[job.seed], index)
    }
}
