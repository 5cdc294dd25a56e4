//! Zero-shot editing: what a consistency model makes of a picture of which a part is known.
//!
//! All edits are one loop (Song et al. 2023, Algorithm 4): jump, put the known components back, add noise, jump
//! again. What is known, and in which components, is a [`Measurement`]:
//!
//! | edit | known | type |
//! | --- | --- | --- |
//! | inpainting, outpainting | pixels outside a mask | [`Inpaint`] |
//! | colouring | luma, one direction in the space of colours | [`Colorize`] |
//! | super-resolution | means of square patches | [`SuperRes`] |
//! | a drawing made real (SDEdit) | nothing; the drawing is the start | [`Stroke`] |
//! | several of them at once | all that they know | [`Compose`] |
//!
//! Denoising is one jump ([`denoise`], with [`estimate_sigma`] where the level is not known), and interpolation runs
//! along the sphere between two noises ([`interpolate`], [`slerp`]).
//!
//! The known components of a result are those of the measurement, to rounding. They are put back behind the clamp
//! to [−1, 1], so that a result of [`Colorize`] or [`SuperRes`] may leave that range a little; [`within_range`]
//! brings it back without giving up what is known, for pictures of 8 bits.

mod colorize;
mod compose;
mod denoise;
mod inpaint;
mod interpolate;
mod known;
mod range;
mod stroke;
mod superres;
mod times;

use std::ops::Range;

use cm_model::{ConsistencyFn, ImageShape};
use tch::{Kind, Tensor};

use crate::sample::drain;
use crate::stream::Stream;
use crate::{Hooks, Method, Request, Result, Times};

pub use colorize::{Colorize, LUMA};
pub use compose::Compose;
pub use denoise::{denoise, estimate_sigma};
pub use inpaint::{Inpaint, feather};
pub use interpolate::{interpolate, slerp};
pub use range::within_range;
pub use stroke::Stroke;
pub use superres::SuperRes;
pub use times::{default_times, stroke_sigma, stroke_times};

/// What is known of a picture: some of its components in an orthogonal basis.
///
/// A measurement is of one picture, of which each seed makes a variation, or of one picture for each seed; it is
/// told which seeds are at work by their positions in [`Request::seeds`].
///
/// ```
/// use std::ops::Range;
/// use cm_sampler::{Result, edit::Measurement, tch::Tensor};
/// /// Knows the mean of each picture, and nothing else.
/// struct Mean(f64);
/// impl Measurement for Mean {
///     fn measure(&self, _images: Range<usize>) -> Result<Tensor> {
///         Ok(Tensor::from(self.0).expand([1, 3, 8, 8], false))
///     }
///     fn impose(&self, x: &Tensor, _images: Range<usize>) -> Result<Tensor> {
///         Ok(x + (self.0 - x.mean_dim([1i64, 2, 3].as_slice(), true, None)))
///     }
/// }
/// let x = Mean(0.25).impose(&Tensor::from_slice(&[0.5; 192]).view([1, 3, 8, 8]), 0..1)?;
/// assert!((x.mean(None).double_value(&[]) - 0.25).abs() < 1e-12);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub trait Measurement {
    /// y: the picture that has the known components, and 0 in all others.
    ///
    /// # Shapes
    /// `[1, C, H, W]` for all images, or `[B, C, H, W]` for the images at the positions `images`.
    ///
    /// # Errors
    /// [`crate::Error`] if the measurement is not of as many pictures, or contradicts itself.
    fn measure(&self, images: Range<usize>) -> Result<Tensor>;

    /// The pictures with the known components in place of their own. Imposing twice is imposing once.
    ///
    /// # Shapes
    /// `x` and the result: `[B, C, H, W]`, the images at the positions `images`, of one dtype and device.
    ///
    /// # Errors
    /// [`crate::Error`] if `x` is of another shape than what was measured.
    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor>;
}

/// Edits a picture: one result for each seed (Song et al. 2023, Algorithm 4).
///
/// x ← f(y + t₁z, t₁), impose; then for each further level t: x ← f(x + √(t² − σ_min²)·z, t), impose. With
/// [`Request::clip`] each estimate is clamped to [−1, 1] before the known components are put back.
///
/// # Shapes
/// `[seeds, C, H, W]` on the model's device, float32, or float64 with [`crate::Precision::Double`]. The known
/// components are those of the measurement, to rounding; but [`Times::Indices`] whose last position is not
/// `steps − 1` leave the noise of that level on the whole result, as the released code does.
///
/// # Errors
/// [`crate::Error`] for times, a request or a measurement that do not fit the model.
///
/// ```
/// use cm_sampler::edit::{Inpaint, default_times};
/// use cm_sampler::{Hooks, Request, edit, model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// use cm_sampler::tch::{Device, Kind, Tensor};
/// let shape = ImageShape::square(3, 8);
/// let f = GaussianOracle { data_std: 0.5, shape, sigma_range: SigmaRange::EDM };
/// let picture = Tensor::full([1, 3, 8, 8], 0.5, (Kind::Float, Device::Cpu));
/// // The right half is made anew, in two ways.
/// let anew = Tensor::from_slice(&[0f32, 0., 0., 0., 1., 1., 1., 1.]).view([1, 1, 1, 8]).repeat([1, 1, 8, 1]);
/// let inpaint = Inpaint::new(&picture, &anew)?;
/// let results = edit(&f, &inpaint, &default_times(shape, 7.0), &Request::new(&[1, 2]), Hooks::default())?;
/// assert_eq!(results.size(), [2, 3, 8, 8]);
/// assert_eq!(results.double_value(&[1, 2, 7, 3]), 0.5);
/// assert_ne!(results.double_value(&[1, 2, 7, 4]), 0.5);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn edit(
    f: &dyn ConsistencyFn,
    measurement: &dyn Measurement,
    times: &Times,
    request: &Request<'_>,
    hooks: Hooks<'_>,
) -> Result<Tensor> {
    run(f, measurement, times, None, request, hooks)
}

/// [`edit`] that begins with `start`, a noisy picture at the first level, in place of y + t₁z: with whatever another
/// program or another step of the work has left.
///
/// # Shapes
/// `start` `[seeds, C, H, W]`; the result as that of [`edit`].
///
/// # Errors
/// As [`edit`], and if `start` is of another shape.
pub fn edit_from(
    f: &dyn ConsistencyFn,
    measurement: &dyn Measurement,
    times: &Times,
    start: &Tensor,
    request: &Request<'_>,
    hooks: Hooks<'_>,
) -> Result<Tensor> {
    known::check_images("start of the edit", start, f.shape(), request.seeds.len())?;
    run(f, measurement, times, Some(start), request, hooks)
}

fn run(
    f: &dyn ConsistencyFn,
    measurement: &dyn Measurement,
    times: &Times,
    start: Option<&Tensor>,
    request: &Request<'_>,
    hooks: Hooks<'_>,
) -> Result<Tensor> {
    let method = Method::multistep(f, times)?;
    let Hooks { noise, on_evaluation } = hooks;
    let stream = Stream::of_edit(&method, measurement, start, request, noise)?;
    let mut results = Vec::new();
    drain(stream, on_evaluation, &mut |_, images| {
        results.push(images);
        Ok(())
    })?;
    Ok(Tensor::cat(&results, 0))
}

/// y of the images at the positions `images`, checked to fit the model, in float64.
pub(crate) fn measured(
    measurement: &dyn Measurement,
    method: &Method<'_>,
    images: &Range<usize>,
) -> Result<Tensor> {
    let y = measurement.measure(images.clone())?;
    let all = known::check_shape("measurement", &y, method.shape())? == 1;
    if !all {
        known::check_images("measurement", &y, method.shape(), images.len())?;
    }
    Ok(y.to_device(method.device()).to_kind(Kind::Double))
}

/// The estimate with what is known put back, checked to still be images of the model.
pub(crate) fn impose(
    measurement: &dyn Measurement,
    estimate: &Tensor,
    shape: ImageShape,
    images: &Range<usize>,
) -> Result<Tensor> {
    let imposed = measurement.impose(estimate, images.clone())?;
    known::check_images("imposed estimate", &imposed, shape, images.len())?;
    Ok(imposed)
}
