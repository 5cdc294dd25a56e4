use std::ops::Range;

use cm_model::{Cond, ImageShape, NoiseSource, Philox, Site};
use cm_schedule::rng::Purpose;
use cm_schedule::solver::{Ask, Walk};
use tch::{Kind, Tensor};

use crate::edit::{Measurement, impose, measured};
use crate::model_ref::same_shape;
use crate::sample::{Tensors, clipped};
use crate::{Method, Request, Result};

/// One evaluation of the model, as it happened.
#[derive(Debug)]
pub struct Evaluation {
    /// The images at work, as positions in [`Request::seeds`].
    pub images: Range<usize>,
    /// Number of images in the whole request.
    pub total: usize,
    /// Which evaluation of these images it was, from 0.
    pub evaluation: usize,
    /// Number of evaluations that each image takes.
    pub evaluations: usize,
    /// The noise level.
    pub sigma: f64,
    /// The noisy images at that level, `[B, C, H, W]` float64: image + σ·noise.
    pub x: Tensor,
    /// The model's estimate of the clean images, of the same shape, clamped if the request says so; in an edit with what
    /// is known put back.
    pub estimate: Tensor,
    /// The images themselves, behind their last evaluation: `[B, C, H, W]` in the dtype of [`crate::sample`].
    pub finished: Option<Tensor>,
}

/// Images in the making: an iterator over the evaluations of the model, each of which is computed when it is asked for.
///
/// Batches of [`Request::batch`] images follow one another; the last evaluation of each brings its images with it. After an
/// error nothing more comes.
///
/// ```
/// use cm_sampler::{Method, Request, Solver, model::{GaussianOracle, ImageShape}};
/// use cm_sampler::schedule::{KarrasGrid, SigmaRange, solver::Churn};
/// let d = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let heun = Method::solver(&d, Solver::Heun { churn: Churn::NONE }, &KarrasGrid::EDM.with_zero(5))?;
/// let mut stream = heun.stream(&Request::new(&[1, 2, 3]))?;
/// let first = stream.next().unwrap()?;
/// assert_eq!((first.sigma, first.estimate.size()), (80.0, vec![3, 3, 8, 8]));
/// assert_eq!(stream.len(), 8, "as many are left");
/// let last = stream.last().unwrap()?;
/// assert_eq!(last.finished.unwrap().size(), [3, 3, 8, 8]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub struct Stream<'m, 'h> {
    method: &'m Method<'m>,
    request: Request<'m>,
    /// What is known of the images, in an edit.
    measurement: Option<&'m dyn Measurement>,
    /// Where images begin, if not in noise.
    start: Option<&'m Tensor>,
    noise: Option<&'h mut dyn NoiseSource>,
    of_the_seeds: Philox,
    /// The first image that is not begun.
    next: usize,
    at_work: Option<AtWork<'m>>,
}

/// A batch between two evaluations.
struct AtWork<'m> {
    images: Range<usize>,
    cond: Cond,
    evaluation: usize,
    walk: Walk<'m, Tensor>,
}

impl Method<'_> {
    /// Samples evaluation by evaluation, for a caller that shows the images in the making.
    ///
    /// # Errors
    /// [`crate::Error`] for a request that does not fit the model.
    pub fn stream<'m>(&'m self, request: &Request<'m>) -> Result<Stream<'m, 'm>> {
        Stream::new(self, request, None)
    }

    /// Edits evaluation by evaluation; [`crate::edit()`] says how an edit goes.
    ///
    /// # Errors
    /// [`crate::Error::NeedsConsistency`] for a method that solves an ODE; [`crate::Error`] for a request that does not fit
    /// the model; those of the measurement come with the evaluations.
    pub fn stream_edit<'m>(
        &'m self,
        measurement: &'m dyn Measurement,
        request: &Request<'m>,
    ) -> Result<Stream<'m, 'm>> {
        Stream::of_edit(self, measurement, None, request, None)
    }
}

impl<'m, 'h> Stream<'m, 'h> {
    /// No image begun yet. Noise is that of the seeds where no other source is given.
    pub(crate) fn new(
        method: &'m Method<'m>,
        request: &Request<'m>,
        noise: Option<&'h mut dyn NoiseSource>,
    ) -> Result<Self> {
        request.check(method.num_classes())?;
        let of_the_seeds = Philox { seed: 0, device: method.device() };
        let request = *request;
        let (measurement, start) = (None, None);
        Ok(Self { method, request, measurement, start, noise, of_the_seeds, next: 0, at_work: None })
    }

    /// An edit, that begins in `start` `[seeds, C, H, W]` if there is one.
    pub(crate) fn of_edit(
        method: &'m Method<'m>,
        measurement: &'m dyn Measurement,
        start: Option<&'m Tensor>,
        request: &Request<'m>,
        noise: Option<&'h mut dyn NoiseSource>,
    ) -> Result<Self> {
        method.model().consistency()?;
        Ok(Self { measurement: Some(measurement), start, ..Self::new(method, request, noise)? })
    }

    /// The next batch, where its walk first needs the model.
    fn begin(&mut self) -> Result<AtWork<'m>> {
        let (method, total) = (self.method, self.request.seeds.len());
        let images = self.next..total.min(self.next + self.request.batch);
        self.next = images.end;
        let cond = self.request.cond(images.clone(), method.num_classes(), method.device())?;
        let start = self.start(&images)?;
        let mut walk = Walk::new(method.plan(), start);
        self.add_noise(&images, &mut walk)?;
        Ok(AtWork { images, cond, evaluation: 0, walk })
    }

    /// The states at the first level: noise, or what is known and noise (Song et al. 2023, Algorithm 4).
    fn start(&mut self, images: &Range<usize>) -> Result<Tensor> {
        let method = self.method;
        if let Some(start) = self.start {
            let rows = start.narrow(0, images.start as i64, images.len() as i64);
            return Ok(rows.to_device(method.device()).to_kind(Kind::Double));
        }
        let noise = self.draw(images, 0)? * method.start();
        match self.measurement {
            Some(measurement) => Ok(measured(measurement, method, images)? + noise),
            None => Ok(noise),
        }
    }

    /// The next evaluation and all that follows from it; `None` at the end.
    fn advance(&mut self) -> Result<Option<Evaluation>> {
        let total = self.request.seeds.len();
        let mut work = match self.at_work.take() {
            Some(work) => work,
            None if self.next < total => self.begin()?,
            None => return Ok(None),
        };
        let Ask::Model { x, sigma } = work.walk.ask() else { return Ok(None) };
        let x = x.shallow_clone();
        let precision = self.request.precision.model_kind();
        let estimate = self.method.evaluate(&x.to_kind(precision), sigma, &work.cond)?;
        let mut estimate = clipped(estimate.to_kind(Kind::Double), self.request.clip);
        if let Some(measurement) = self.measurement {
            estimate = impose(measurement, &estimate, self.method.shape(), &work.images)?;
        }
        work.walk.answer(&Tensors, estimate.shallow_clone());
        self.add_noise(&work.images, &mut work.walk)?;
        let (images, evaluation) = (work.images.clone(), work.evaluation);
        work.evaluation += 1;
        let finished = match work.walk.ask() {
            // The last draw of noise, or the last step of a solver, may leave the range that the estimates are in; but
            // what is known of an edited image stays as it is.
            Ask::Nothing => {
                let clip = self.request.clip && self.measurement.is_none();
                Some(clipped(work.walk.into_state(), clip).to_kind(precision))
            }
            _ => {
                self.at_work = Some(work);
                None
            }
        };
        let evaluations = self.method.num_evaluations();
        Ok(Some(Evaluation { images, total, evaluation, evaluations, sigma, x, estimate, finished }))
    }

    /// Gives a walk the noise that it asks for, until it needs the model or is at its end.
    fn add_noise(&mut self, images: &Range<usize>, walk: &mut Walk<'_, Tensor>) -> Result<()> {
        while let Ask::Noise { step } = walk.ask() {
            let noise = self.draw(images, step + 1)?;
            walk.answer(&Tensors, noise);
        }
        Ok(())
    }

    fn draw(&mut self, images: &Range<usize>, index: usize) -> Result<Tensor> {
        let source: &mut dyn NoiseSource = match self.noise.as_deref_mut() {
            Some(noise) => noise,
            None => &mut self.of_the_seeds,
        };
        draw(source, self.method.shape(), &self.request.seeds[images.clone()], index)
    }
}

/// Draw 0 of an image is its start, draw k + 1 belongs to step k of its plan.
pub(crate) fn draw(
    source: &mut dyn NoiseSource,
    shape: ImageShape,
    samples: &[u64],
    index: usize,
) -> Result<Tensor> {
    let site = Site { samples, step: index as u32, purpose: Purpose::Sample };
    let noise = source.normal(shape, &site)?;
    same_shape("noise", &noise, &shape.batch(samples.len() as i64))?;
    Ok(noise.to_kind(Kind::Double))
}

impl Iterator for Stream<'_, '_> {
    type Item = Result<Evaluation>;

    fn next(&mut self) -> Option<Self::Item> {
        let _no_grad = tch::no_grad_guard();
        let item = self.advance().transpose();
        if let Some(Err(_)) = item {
            self.next = self.request.seeds.len();
        }
        item
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let evaluations = self.method.num_evaluations();
        let batches = (self.request.seeds.len() - self.next).div_ceil(self.request.batch);
        let left = self.at_work.as_ref().map_or(0, |work| evaluations - work.evaluation);
        (batches * evaluations + left, Some(batches * evaluations + left))
    }
}

impl ExactSizeIterator for Stream<'_, '_> {}

impl std::fmt::Debug for Stream<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("method", self.method)
            .field("left", &self.len())
            .finish_non_exhaustive()
    }
}
