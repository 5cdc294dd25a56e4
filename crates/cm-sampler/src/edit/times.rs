use cm_model::ImageShape;
use cm_schedule::SigmaRange;

use crate::Times;

/// Time points for edits that put known components back: the whole Karras grid, which edits need more than samples do,
/// because what is known spreads into what is not a little at each level.
///
/// The grid has as many levels as the released consistency models of that size were distilled on, and a model that was
/// distilled on N levels has seen no others: 18 for CIFAR-10 (images below 64 pixels), 40 for ImageNet-64 and LSUN-256,
/// where the paper's own edits use all 40 (appendix D). Models that were trained with more levels, or with all, take
/// these too. The last position is σ_min, so that a result has no noise: N − 1 evaluations.
///
/// ```
/// use cm_sampler::{edit::default_times, model::ImageShape, schedule::SigmaRange};
/// let sigmas = |side| default_times(ImageShape::square(3, side), 7.0).plan(SigmaRange::EDM).unwrap().evaluation_sigmas();
/// assert_eq!((sigmas(32).len(), sigmas(256).len(), sigmas(32)[0]), (17, 39, 80.0));
/// ```
#[must_use]
pub fn default_times(shape: ImageShape, rho: f64) -> Times {
    let steps = if shape.height.max(shape.width) < 64 { 18 } else { 40 };
    Times::Indices { ts: (0..steps).collect(), steps, rho }
}

/// The levels of the paper's stroke edits, on images of 256 pixels.
const PAPER: (f64, f64, f64) = (5.38, 2.24, 256.0);

/// The noise level at which a drawing starts, by the size of the images: 5.38·side/256, the paper's 5.38 at 256 pixels.
///
/// A shape that is a tenth of the picture is 26 pixels wide at 256 and 3 at 32; the noise of its mean is σ over its
/// width in pixels. A level in proportion to the side therefore hides shapes of the same share of the picture.
///
/// ```
/// use cm_sampler::{edit::stroke_sigma, model::ImageShape};
/// assert_eq!(stroke_sigma(ImageShape::square(3, 256)), 5.38);
/// assert!((stroke_sigma(ImageShape::square(3, 32)) - 0.6725).abs() < 1e-12);
/// ```
#[must_use]
pub fn stroke_sigma(shape: ImageShape) -> f64 {
    PAPER.0 * shape.height.max(shape.width) as f64 / PAPER.2
}

/// The two levels of a stroke edit that starts at `sigma`: the second in the paper's proportion, 2.24 to 5.38. It is
/// left out where the model does not know it.
///
/// ```
/// use cm_sampler::{Times, edit::stroke_times, schedule::SigmaRange};
/// assert_eq!(stroke_times(5.38, SigmaRange::EDM), Times::Sigmas(vec![5.38, 2.24]));
/// assert_eq!(stroke_times(0.003, SigmaRange::EDM), Times::Sigmas(vec![0.003]));
/// ```
#[must_use]
pub fn stroke_times(sigma: f64, range: SigmaRange) -> Times {
    let second = sigma * PAPER.1 / PAPER.0;
    Times::Sigmas(if second > range.min() { vec![sigma, second] } else { vec![sigma] })
}
