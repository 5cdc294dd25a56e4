use std::ops::Range;

use cm_model::ConsistencyFn;
use cm_schedule::solver::VectorSpace;
use tch::Tensor;

use crate::{Evaluation, Hooks, Method, Progress, Request, Result, Stream, Times};

/// One-step samples: `f(σ_max·z, σ_max)` for each seed.
///
/// # Shapes
/// The result is `[seeds, C, H, W]` float32 on the model's device, data in [−1, 1].
///
/// # Errors
/// [`crate::Error`] for a request that does not fit the model.
///
/// ```
/// use cm_sampler::{Request, model::{GaussianOracle, ImageShape}, one_step, schedule::SigmaRange};
/// let shape = ImageShape::square(3, 8);
/// let f = GaussianOracle { data_std: 0.5, shape, sigma_range: SigmaRange::EDM };
/// let images = one_step(&f, &Request::new(&[1, 2, 3]))?;
/// assert_eq!(images.size(), [3, 3, 8, 8]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn one_step(f: &dyn ConsistencyFn, request: &Request<'_>) -> Result<Tensor> {
    sample(&Method::one_step(f)?, request, Hooks::default())
}

/// Multistep samples (Song et al. 2023, Algorithm 1): jump to σ_min, go back to the next level with fresh noise,
/// and jump again.
///
/// # Shapes
/// As [`one_step`].
///
/// # Errors
/// [`crate::Error`] for times that the model cannot follow and for a request that does not fit it.
///
/// ```
/// use cm_sampler::{Request, Times, model::{GaussianOracle, ImageShape}, multistep, schedule::SigmaRange};
/// let shape = ImageShape::square(3, 8);
/// let f = GaussianOracle { data_std: 0.5, shape, sigma_range: SigmaRange::EDM };
/// let images = multistep(&f, &Times::Sigmas(vec![80.0, 0.8]), &Request::new(&[1, 2, 3]))?;
/// assert_eq!(images.size(), [3, 3, 8, 8]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn multistep(f: &dyn ConsistencyFn, times: &Times, request: &Request<'_>) -> Result<Tensor> {
    sample(&Method::multistep(f, times)?, request, Hooks::default())
}

/// Samples by any method; see [`sample_batches`] for more images than fit into memory.
///
/// # Shapes
/// `[seeds, C, H, W]` on the model's device, float32, or float64 with [`crate::Precision::Double`].
///
/// # Errors
/// [`crate::Error`] for a request that does not fit the model.
///
/// ```
/// use cm_sampler::{Hooks, Method, Request, Solver, sample, schedule::SigmaRange};
/// use cm_sampler::model::{GaussianOracle, ImageShape};
/// let d = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let method = Method::solver(&d, Solver::DpmPp2m, &[80.0, 8.0, 0.8, 0.08, 0.0])?;
/// assert_eq!(sample(&method, &Request::new(&[1, 2]), Hooks::default())?.size(), [2, 3, 8, 8]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn sample(method: &Method<'_>, request: &Request<'_>, hooks: Hooks<'_>) -> Result<Tensor> {
    let mut batches = Vec::new();
    sample_batches(method, request, hooks, &mut |_, images| {
        batches.push(images);
        Ok(())
    })?;
    Ok(Tensor::cat(&batches, 0))
}

/// Samples by any method and hands each batch on as it is finished, with its positions in [`Request::seeds`].
///
/// # Errors
/// [`crate::Error`] for a request that does not fit the model, and whatever `sink` returns.
///
/// ```
/// use cm_sampler::{Hooks, Method, Request, sample_batches, schedule::SigmaRange};
/// use cm_sampler::model::{GaussianOracle, ImageShape};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let seeds: Vec<u64> = (0..10).collect();
/// let request = Request { batch: 4, ..Request::new(&seeds) };
/// let mut written = Vec::new();
/// sample_batches(&Method::one_step(&f)?, &request, Hooks::default(), &mut |places, images| {
///     assert_eq!(places.len() as i64, images.size()[0]);
///     written.push(places);
///     Ok(())
/// })?;
/// assert_eq!(written, [0..4, 4..8, 8..10]);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn sample_batches(
    method: &Method<'_>,
    request: &Request<'_>,
    hooks: Hooks<'_>,
    sink: &mut dyn FnMut(Range<usize>, Tensor) -> Result<()>,
) -> Result<()> {
    let Hooks { noise, on_evaluation } = hooks;
    drain(Stream::new(method, request, noise)?, on_evaluation, sink)
}

/// Runs a stream to its end, shows each evaluation and hands on what is finished.
pub(crate) fn drain(
    stream: Stream<'_, '_>,
    mut on_evaluation: Option<&mut dyn FnMut(&Progress<'_>)>,
    sink: &mut dyn FnMut(Range<usize>, Tensor) -> Result<()>,
) -> Result<()> {
    for evaluation in stream {
        let Evaluation { images, total, evaluation, evaluations, sigma, estimate, finished, .. } =
            evaluation?;
        if let Some(look) = &mut on_evaluation {
            let images = images.clone();
            look(&Progress { images, total, evaluation, evaluations, sigma, estimate: &estimate });
        }
        if let Some(finished) = finished {
            sink(images, finished)?;
        }
    }
    Ok(())
}

pub(crate) fn clipped(images: Tensor, clip: bool) -> Tensor {
    if clip { images.clamp(-1.0, 1.0) } else { images }
}

/// Batches of images as vectors.
pub(crate) struct Tensors;

impl VectorSpace for Tensors {
    type Vector = Tensor;

    fn combine(&self, terms: &[(f64, &Tensor)]) -> Tensor {
        let scaled = |(a, v): &(f64, &Tensor)| if *a == 1.0 { v.shallow_clone() } else { *v * *a };
        let mut terms = terms.iter();
        let first = terms.next().map(scaled).unwrap_or_default();
        terms.fold(first, |sum, term| sum + scaled(term))
    }
}
