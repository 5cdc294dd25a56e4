use cm_model::{Cond, ConsistencyFn, Sigma};
use tch::{Kind, Tensor};

use super::known::{check_images, check_shape, shape_error};
use crate::{Error, Result};

/// Takes noise of standard deviation σ away in one jump: f(x, σ), clamped to [−1, 1].
///
/// # Shapes
/// `images` `[B, C, H, W]`, pictures in [−1, 1] plus noise; the result has the same shape, float32. `labels`: a class
/// for each image, for a conditional model.
///
/// # Errors
/// [`Error::Level`] for a level outside the model's range; [`Error::Model`] and [`Error::NumLabels`] for images and
/// labels that do not fit it.
///
/// ```
/// use cm_sampler::{edit::denoise, model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// use cm_sampler::tch::{Device, Kind, Tensor};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let noisy = Tensor::ones([1, 3, 8, 8], (Kind::Float, Device::Cpu));
/// let clean = denoise(&f, &noisy, 0.5, None)?;
/// assert!((clean.double_value(&[0, 0, 0, 0]) - 0.5f64.sqrt()).abs() < 1e-4);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn denoise(f: &dyn ConsistencyFn, images: &Tensor, sigma: f64, labels: Option<&[i64]>) -> Result<Tensor> {
    let range = f.sigma_range();
    if !range.contains(sigma) {
        return Err(Error::Level { sigma, min: range.min(), max: range.max() });
    }
    let batch = check_shape("noisy images", images, f.shape())? as usize;
    let cond = match labels {
        None => Cond::none(),
        Some(_) if f.num_classes() == 0 => return Err(Error::Unconditional),
        Some(labels) if labels.len() != batch => {
            return Err(Error::NumLabels { labels: labels.len(), seeds: batch });
        }
        Some(labels) => Cond::labels(labels, f.num_classes(), f.device())?,
    };
    let _no_grad = tch::no_grad_guard();
    let x = images.to_device(f.device()).to_kind(Kind::Float);
    let clean = f.jump(&x, Sigma::One(sigma), &cond)?;
    check_images("denoised images", &clean, f.shape(), batch)?;
    Ok(clean.clamp(-1.0, 1.0))
}

/// The 0.75 quantile of the standard normal distribution: the median of |z|.
const MEDIAN_OF_NORMAL: f64 = 0.674_489_750_196_082;

/// The noise level of each image, from its finest details: the median of |d|/0.6745 over the diagonal Haar
/// coefficients d = (a − b − c + d)/2 of all 2×2 windows, averaged over channels.
///
/// Smooth areas and straight edges have d ≈ 0, and the median passes over the few windows that do not. Texture counts
/// as noise, so that the estimate is **too high** on it: on a clean picture it is the level of its finest texture. It
/// is **too low** where noise was clipped when the picture was saved, which takes half of it from white and black
/// areas. On smooth pictures with noise that was not clipped it is right to 2 % on average and to 8 % for one picture
/// of 32×32 pixels.
///
/// # Shapes
/// `images` `[B, C, H, W]`, at least 2×2 pixels; one level for each image, in units of the data.
///
/// # Errors
/// [`Error::Model`] if the images are smaller or no batch.
///
/// # Source
/// Donoho and Johnstone 1994 (Biometrika 81), with windows that overlap.
///
/// ```
/// use cm_sampler::{edit::estimate_sigma, schedule::{Purpose, Stream}, tch::Tensor};
/// let noise: Vec<f64> = (0..64 * 64)
///     .map(|i| 0.1 * Stream { seed: 1, purpose: Purpose::Synthetic, step: 0, sample: 0 }.normal(i))
///     .collect();
/// let sigma = estimate_sigma(&Tensor::from_slice(&noise).view([1, 1, 64, 64]))?;
/// assert!((sigma[0] - 0.1).abs() < 0.005, "{sigma:?}");
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn estimate_sigma(images: &Tensor) -> Result<Vec<f64>> {
    let (batch, channels, height, width) = match images.size()[..] {
        [b, c, h, w] if b > 0 && c > 0 && h > 1 && w > 1 => (b, c, h - 1, w - 1),
        ref size => return Err(shape_error("noisy images", "[B, C, H, W] of 2×2 pixels or more", size)),
    };
    let x = images.detach().to_kind(Kind::Double);
    let corner = |down: i64, right: i64| x.narrow(2, down, height).narrow(3, right, width);
    let diagonal = (corner(0, 0) - corner(0, 1) - corner(1, 0) + corner(1, 1)) / 2.0;
    let (middle, _) = diagonal.abs().reshape([batch, channels, height * width]).median_dim(2, false);
    let sigma = middle.mean_dim([1i64].as_slice(), false, Kind::Double) / MEDIAN_OF_NORMAL;
    Ok(Vec::try_from(sigma)?)
}
