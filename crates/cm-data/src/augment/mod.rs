//! EDM's augmentation: geometric transforms whose parameters the network is told, so that they do not leak into
//! samples.
//!
//! An image is mirrored, scaled, rotated, stretched and moved, each with a small probability, and the network gets
//! what was done as *labels*, up to nine numbers. When sampling the labels are 0, which asks for images as they are.
//!
//! | question | file |
//! | --- | --- |
//! | which transforms, how often, what is drawn, which map does it come to? | `transform.rs`, in f64 |
//! | how do pixels move? | `resample.rs`, on the device |
//!
//! What is drawn for an image is a function of (seed, step, sample) and of nothing else. So is which images are
//! resampled: those with a transform other than a flip, whatever the others are; the rest keep their bits. One thing
//! is shared, as in the released code: before they are resampled, images are widened by their reflection as far as
//! the farthest-reaching one of the batch needs. An image shows of that what the outermost taps of the filter make of
//! it, less than 1e-4 of values in [−1, 1].
//!
//! # Source
//! Karras et al. 2022, section 5, "augmentation regularization"; Karras et al. 2020 (arXiv 2006.06676), appendix B, for
//! the resampling.

mod resample;
mod transform;

#[cfg(test)]
mod tests;

pub use transform::{AugmentSpec, Draws, Gated, Transform};

use std::ops::Range;

use resample::Margins;
use tch::{Kind, TchError, Tensor};

use crate::error::{Error, Result};

/// The augmentation that a spec describes.
///
/// ```
/// use cm_data::augment::{Augment, AugmentSpec, Draws};
/// use tch::{Device, Kind, Tensor};
/// let augment = Augment::new(AugmentSpec::edm_cifar10()).unwrap();
/// let images = Tensor::rand([4, 3, 32, 32], (Kind::Float, Device::Cpu)) * 2 - 1;
/// let draws: Vec<Draws> = (0..4).map(|sample| Draws::at(0, 0, sample)).collect();
/// let (images, labels) = augment.apply(&images, &draws).unwrap();
/// assert_eq!((images.size(), labels.size()), (vec![4, 3, 32, 32], vec![4, 9]));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Augment {
    spec: AugmentSpec,
}

impl Augment {
    /// The augmentation of a spec that holds.
    ///
    /// # Errors
    /// [`Error::Augment`] as [`AugmentSpec::validate`].
    pub fn new(spec: AugmentSpec) -> Result<Self> {
        spec.validate()?;
        Ok(Self { spec })
    }

    /// What it does, and how often.
    #[must_use]
    pub fn spec(&self) -> &AugmentSpec {
        &self.spec
    }

    /// Augments a batch: the images, and the labels of what was done to each.
    ///
    /// Images to which nothing happens come back bit for bit. Values may go past [−1, 1] a little where the filter
    /// overshoots, as in the released code.
    ///
    /// # Shapes
    /// `images` float32 `[B, C, H, W]` in [−1, 1], on any device; one of `draws` for each. The results are float32
    /// `[B, C, H, W]` and `[B, label_dim]` on the same device.
    ///
    /// # Errors
    /// [`Error::Argument`] for images of another form or another number of draws; [`Error::Torch`].
    pub fn apply(&self, images: &Tensor, draws: &[Draws]) -> Result<(Tensor, Tensor)> {
        self.apply_rows(images, draws, 0..draws.len())
    }

    /// [`apply`](Self::apply) for the images `rows` of a batch, of whose images `draws` has one each: what comes out
    /// are those rows of the whole batch augmented.
    ///
    /// # Errors
    /// As [`apply`](Self::apply); [`Error::Argument`] if the rows lie outside the batch.
    pub fn apply_rows(
        &self,
        images: &Tensor,
        draws: &[Draws],
        rows: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let shape = images.size();
        let fault =
            |what, expected: &str, got: String| Error::Argument { what, expected: expected.into(), got };
        let (batch, height, width) = match shape[..] {
            [batch, _, height, width] if images.kind() == Kind::Float => (batch, height, width),
            _ => {
                let got = format!("{:?} {shape:?}", images.kind());
                return Err(fault("images to augment", "Float [B, C, H, W]", got));
            }
        };
        if shape.contains(&0) {
            return Err(fault("images to augment", "at least one image with pixels", format!("{shape:?}")));
        }
        let all: Vec<Transform> = draws.iter().map(|draws| draws.transform(&self.spec)).collect();
        let whole: Vec<_> = all.iter().map(|t| t.inverse(height, width)).collect();
        let (Some(transforms), Some(inverses)) = (all.get(rows.clone()), whole.get(rows.clone())) else {
            let expected = format!("a range within 0..{}", draws.len());
            return Err(fault("rows of a batch to augment", &expected, format!("{rows:?}")));
        };
        if transforms.len() as i64 != batch {
            let expected = format!("one for each of {batch} images");
            return Err(fault("draws of an augmentation", &expected, transforms.len().to_string()));
        }
        let margins = Margins::of(&whole, height, width);
        let apply = || {
            let _no_grad = tch::no_grad_guard();
            let flipped = flip(images, transforms.iter().map(|t| t.xflip), 3)?;
            let flipped = flip(&flipped, transforms.iter().map(|t| t.yflip), 2)?;
            Ok((resample::resample(&flipped, inverses, margins)?, self.labels(transforms, images)?))
        };
        apply().map_err(|cause: TchError| Error::Torch { what: "augmenting images", cause })
    }

    fn labels(&self, transforms: &[Transform], images: &Tensor) -> Result<Tensor, TchError> {
        let labels: Vec<f32> = transforms.iter().flat_map(|t| t.labels(&self.spec)).collect();
        let labels =
            Tensor::f_from_slice(&labels)?.f_view([transforms.len() as i64, self.spec.label_dim()])?;
        labels.f_to_device(images.device())
    }
}

/// The images, those that are `chosen` mirrored along `axis`.
fn flip(images: &Tensor, chosen: impl Iterator<Item = bool>, axis: i64) -> Result<Tensor, TchError> {
    let chosen: Vec<bool> = chosen.collect();
    if !chosen.contains(&true) {
        return Ok(images.shallow_clone());
    }
    let mask = Tensor::f_from_slice(&chosen)?.f_view([-1, 1, 1, 1])?.f_to_device(images.device())?;
    images.f_flip([axis])?.f_where_self(&mask, images)
}
