use std::ops::Range;

use cm_model::{ConsistencyFn, NoiseSource, Philox, Site};
use cm_schedule::rng::Purpose;
use cm_schedule::solver::{VectorSpace, execute};
use tch::{Kind, Tensor};

use crate::{Hooks, Method, Progress, Request, Result, Times};

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
pub fn sample_batches(
    method: &Method<'_>,
    request: &Request<'_>,
    mut hooks: Hooks<'_>,
    sink: &mut dyn FnMut(Range<usize>, Tensor) -> Result<()>,
) -> Result<()> {
    request.check(method.num_classes())?;
    let _no_grad = tch::no_grad_guard();
    let total = request.seeds.len();
    let mut of_the_seeds = Philox { seed: 0, device: method.device() };
    for start in (0..total).step_by(request.batch) {
        let images = start..total.min(start + request.batch);
        let noise: &mut dyn NoiseSource = match hooks.noise.as_deref_mut() {
            Some(noise) => noise,
            None => &mut of_the_seeds,
        };
        let result = batch(method, request, images.clone(), noise, &mut hooks.on_evaluation)?;
        sink(images, result)?;
    }
    Ok(())
}

type Callback<'a, 'h> = &'a mut Option<&'h mut dyn FnMut(&Progress<'_>)>;

/// The images at the positions `images` of the request.
fn batch(
    method: &Method<'_>,
    request: &Request<'_>,
    images: Range<usize>,
    noise: &mut dyn NoiseSource,
    on_evaluation: Callback<'_, '_>,
) -> Result<Tensor> {
    let cond = request.cond(images.clone(), method.num_classes(), method.device())?;
    let samples = &request.seeds[images.clone()];
    // Draw 0 is the start, draw k + 1 belongs to step k of the plan.
    let mut draw = |index: usize| -> Result<Tensor> {
        let site = Site { samples, step: index as u32, purpose: Purpose::Sample };
        Ok(noise.normal(method.shape(), &site)?.to_kind(Kind::Double))
    };
    let mut evaluation = 0;
    let mut model = |x: &Tensor, sigma: f64| -> Result<Tensor> {
        let x = x.to_kind(request.precision.model_kind());
        let estimate = clipped(method.evaluate(&x, sigma, &cond)?.to_kind(Kind::Double), request.clip);
        if let Some(on_evaluation) = on_evaluation {
            let (total, evaluations) = (request.seeds.len(), method.num_evaluations());
            let estimate = &estimate;
            on_evaluation(&Progress {
                images: images.clone(),
                total,
                evaluation,
                evaluations,
                sigma,
                estimate,
            });
        }
        evaluation += 1;
        Ok(estimate)
    };
    let start = draw(0)? * method.start();
    let end = execute(&Tensors, method.plan(), start, &mut model, |step| draw(step + 1))?;
    // The last draw of noise, or the last step of a solver, may leave the range that the estimates are in.
    Ok(clipped(end, request.clip).to_kind(request.precision.model_kind()))
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
