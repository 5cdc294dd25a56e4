use cm_model::{ConsistencyFn, NoiseSource, Philox, Site};
use cm_schedule::rng::Purpose;
use tch::{Kind, Tensor};

use super::known::{shape_error, value_error};
use super::{Stroke, edit_from};
use crate::{Hooks, Request, Result, Times};

/// The point at `share` of the way from `a` (0) to `b` (1), along the arc between them.
///
/// sin((1 − t)ψ)/sin ψ·a + sin(tψ)/sin ψ·b, where ψ is the angle between the **whole** tensors, with the cosine clipped
/// to [−1, 1]. Neither is normalised: at t = 0 and t = 1 the result is `a` and `b` to the last bit. Noise keeps the
/// length that the model expects, which a straight line between the two would lose in the middle.
///
/// Where a and b point the same way or against each other there is no one arc; the straight line is taken then.
///
/// # Shapes
/// `a`, `b` and the result: any one shape. A batch is one tensor: give it image by image where each has its own angle.
///
/// # Errors
/// [`crate::Error::Model`] if the shapes differ or `share` is not within 0 to 1.
///
/// # Source
/// Song et al. 2023, appendix D.
///
/// ```
/// use cm_sampler::{edit::slerp, tch::Tensor};
/// let (a, b) = (Tensor::from_slice(&[2.0, 0.0]), Tensor::from_slice(&[0.0, 2.0]));
/// let middle = slerp(&a, &b, 0.5)?;
/// assert!((middle.double_value(&[0]) - 2f64.sqrt()).abs() < 1e-12);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn slerp(a: &Tensor, b: &Tensor, share: f64) -> Result<Tensor> {
    if a.size() != b.size() {
        return Err(shape_error(
            "end of the interpolation",
            format!("{:?}, as its start", a.size()),
            &b.size(),
        ));
    }
    if !(0.0..=1.0).contains(&share) {
        return Err(value_error("share of the way", "0 to 1", share));
    }
    let (wide_a, wide_b) = (a.to_kind(Kind::Double), b.to_device(a.device()).to_kind(Kind::Double));
    let dot = |x: &Tensor, y: &Tensor| (x * y).sum(Kind::Double).double_value(&[]);
    let lengths = (dot(&wide_a, &wide_a) * dot(&wide_b, &wide_b)).sqrt();
    let angle = (dot(&wide_a, &wide_b) / lengths).clamp(-1.0, 1.0).acos();
    let (of_a, of_b) = match angle.sin() {
        sin if sin > 1e-6 => (((1.0 - share) * angle).sin() / sin, (share * angle).sin() / sin),
        _ => (1.0 - share, share),
    };
    Ok((wide_a * of_a + wide_b * of_b).to_kind(a.kind()))
}

/// Images along the arc between the noises of two seeds: `frames` of them, the first and the last being the one-step
/// samples of the seeds.
///
/// `request` says how: its seeds are the two ends; labels, if there are any, are one class twice, since all images
/// between share it.
///
/// # Shapes
/// `[frames, C, H, W]` on the model's device, as one-step samples.
///
/// # Errors
/// [`crate::Error::Model`] for fewer than 2 frames, for other than 2 seeds or for 2 classes; as one-step sampling.
///
/// ```
/// use cm_sampler::{Request, edit::interpolate, model::{GaussianOracle, ImageShape}, one_step, schedule::SigmaRange};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let ends = Request::new(&[3, 8]);
/// let way = interpolate(&f, 5, &ends)?;
/// assert_eq!(way.size(), [5, 3, 8, 8]);
/// let gap = (way.narrow(0, 4, 1) - one_step(&f, &Request::new(&[8]))?).abs().max();
/// assert!(gap.double_value(&[]) < 1e-5);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn interpolate(f: &dyn ConsistencyFn, frames: usize, request: &Request<'_>) -> Result<Tensor> {
    request.check(f.num_classes())?;
    if request.seeds.len() != 2 {
        return Err(value_error("seeds of an interpolation", "two, its ends", request.seeds.len()));
    }
    if frames < 2 {
        return Err(value_error("frames of an interpolation", "2 or more", frames));
    }
    let class = match request.labels {
        Some([a, b]) if a != b => {
            return Err(value_error(
                "class of an interpolation",
                "one for all frames",
                format!("{a} and {b}"),
            ));
        }
        labels => labels.and_then(|labels| labels.first().copied()),
    };
    let start = f.sigma_range().max();
    let site = Site { samples: request.seeds, step: 0, purpose: Purpose::Sample };
    let noise =
        Philox { seed: 0, device: f.device() }.normal(f.shape(), &site)?.to_kind(Kind::Double) * start;
    let ends = [noise.narrow(0, 0, 1), noise.narrow(0, 1, 1)];
    let share = |frame: usize| frame as f64 / (frames - 1) as f64;
    let starts =
        (0..frames).map(|frame| slerp(&ends[0], &ends[1], share(frame))).collect::<Result<Vec<_>>>()?;
    let starts = Tensor::cat(&starts, 0);
    // No noise is drawn: the seeds only count the frames.
    let (counted, labels): (Vec<u64>, Option<Vec<i64>>) =
        ((0..frames as u64).collect(), class.map(|class| vec![class; frames]));
    let request = Request { seeds: &counted, labels: labels.as_deref(), ..*request };
    edit_from(f, &Stroke::new(&starts)?, &Times::Sigmas(vec![start]), &starts, &request, Hooks::default())
}
