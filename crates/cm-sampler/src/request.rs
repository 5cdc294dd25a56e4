use std::ops::Range;

use cm_model::{Cond, NoiseSource};
use cm_schedule::rng::Stream;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Which images are wanted, apart from how they are made.
///
/// ```
/// use cm_sampler::{Error, Request, model::{GaussianOracle, ImageShape}, one_step, schedule::SigmaRange};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let seeds = [3, 1, 4];
/// let raw = one_step(&f, &Request { batch: 2, clip: false, ..Request::new(&seeds) })?;
/// assert_eq!(raw.size()[0], 3);
/// // What does not fit the model is said before anything is computed.
/// let of_a_class = Request { labels: Some(&[0, 0, 0]), ..Request::new(&seeds) };
/// assert!(matches!(one_step(&f, &of_a_class), Err(Error::Unconditional)));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// One image for each; below 2^56. The noise of a seed is the same at any batch size and in any company.
    pub seeds: &'a [u64],
    /// A class for each seed, for a conditional model; `None` asks for the unconditional answer.
    pub labels: Option<&'a [i64]>,
    /// Number of images that go through the model at a time.
    pub batch: usize,
    /// Clamp each estimate of the model, and the result, to [−1, 1], as the released models are run.
    pub clip: bool,
    /// Dtypes of the state and of what the model is given.
    pub precision: Precision,
}

impl<'a> Request<'a> {
    /// One image for each seed: 64 at a time, no classes, clamped, [`Precision::Mixed`].
    pub fn new(seeds: &'a [u64]) -> Self {
        Self { seeds, labels: None, batch: 64, clip: true, precision: Precision::Mixed }
    }

    /// Checks the request for a model of `num_classes` classes.
    pub(crate) fn check(&self, num_classes: i64) -> Result<()> {
        if self.seeds.is_empty() {
            return Err(Error::NoSeeds);
        }
        if self.batch == 0 {
            return Err(Error::EmptyBatch);
        }
        if let Some(&seed) = self.seeds.iter().find(|&&seed| seed > Stream::MAX_SAMPLE) {
            return Err(Error::Seed { seed });
        }
        let Some(labels) = self.labels else { return Ok(()) };
        if num_classes == 0 {
            return Err(Error::Unconditional);
        }
        if labels.len() != self.seeds.len() {
            return Err(Error::NumLabels { labels: labels.len(), seeds: self.seeds.len() });
        }
        // A label out of range is found before any image is made, not in the last batch.
        Cond::labels(labels, num_classes, Device::Cpu)?;
        Ok(())
    }

    /// The condition of the images `range`.
    pub(crate) fn cond(&self, range: Range<usize>, num_classes: i64, device: Device) -> Result<Cond> {
        match self.labels {
            Some(labels) => Ok(Cond::labels(&labels[range], num_classes, device)?),
            None => Ok(Cond::none()),
        }
    }
}

/// Dtypes of a sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// The state in float64, since σ runs over many decades; the model is given float32, as networks are.
    #[default]
    Mixed,
    /// Float64 for the model too, for models in closed form.
    Double,
}

impl Precision {
    /// The dtype of what the model is given.
    pub(crate) fn model_kind(self) -> Kind {
        match self {
            Precision::Mixed => Kind::Float,
            Precision::Double => Kind::Double,
        }
    }
}

/// What a callback sees after each evaluation of the model.
#[derive(Debug)]
pub struct Progress<'a> {
    /// The images at work, as positions in [`Request::seeds`].
    pub images: Range<usize>,
    /// Number of images in the whole request.
    pub total: usize,
    /// The evaluation just done, from 0.
    pub evaluation: usize,
    /// Number of evaluations that each image takes.
    pub evaluations: usize,
    /// The noise level of the evaluation.
    pub sigma: f64,
    /// The model's estimate of the clean images, `[B, C, H, W]`, clamped if the request says so.
    pub estimate: &'a Tensor,
}

/// What a caller may put into a run; [`Hooks::default`] is the noise of the seeds and no callback.
///
/// ```
/// use cm_sampler::{Hooks, Method, Progress, Request, Times, sample, schedule::SigmaRange};
/// use cm_sampler::model::{GaussianOracle, ImageShape, Philox};
/// use cm_sampler::tch::Device;
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let two_steps = Method::multistep(&f, &Times::Sigmas(vec![80.0, 0.8]))?;
/// let mut seen = Vec::new();
/// let mut show = |progress: &Progress<'_>| seen.push((progress.evaluation, progress.sigma));
/// // Noise of another run than seed 0's: of the same seeds, other images.
/// let mut noise = Philox { seed: 1, device: Device::Cpu };
/// let hooks = Hooks { noise: Some(&mut noise), on_evaluation: Some(&mut show) };
/// let other = sample(&two_steps, &Request::new(&[7]), hooks)?;
/// assert_eq!(seen, [(0, 80.0), (1, 0.8)]);
/// assert_ne!(other, sample(&two_steps, &Request::new(&[7]), Hooks::default())?);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
#[derive(Default)]
pub struct Hooks<'h> {
    /// Another source of noise than the seeds.
    pub noise: Option<&'h mut dyn NoiseSource>,
    /// Called after each evaluation.
    pub on_evaluation: Option<&'h mut dyn FnMut(&Progress<'_>)>,
}

impl std::fmt::Debug for Hooks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("noise", &self.noise.is_some())
            .field("on_evaluation", &self.on_evaluation.is_some())
            .finish()
    }
}
