use std::ops::Range;

use cm_model::ImageShape;
use tch::Tensor;

use super::Measurement;
use super::known::{Known, check_images, shape_error, value_error};
use crate::Result;

/// The mean of each p×p patch is known, in each channel: super-resolution by the factor p.
///
/// x ← x + U(m − D(x)), where D takes the means of patches and U repeats a value over its patch. In the paper's words
/// the first basis vector of a patch is constant, 1/p everywhere, and is the only known component.
///
/// # Source
/// Song et al. 2023, appendix D.
#[derive(Debug)]
pub struct SuperRes {
    means: Known,
    factor: i64,
}

impl SuperRes {
    /// Knows a picture of low resolution.
    ///
    /// # Shapes
    /// `[N, C, H/p, W/p]` in [−1, 1], N being 1 or the number of seeds.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if it is no batch of images, or for a factor below 2.
    pub fn from_low(low: &Tensor, factor: i64) -> Result<Self> {
        Ok(Self { means: Known::new("picture of low resolution", low)?, factor: checked(factor)? })
    }

    /// Degrades a full picture to the means of its patches: for demonstrations, and to compose.
    ///
    /// # Shapes
    /// `[N, C, H, W]` in [−1, 1].
    ///
    /// # Errors
    /// [`crate::Error::Model`] if height or width is no multiple of the factor, or for a factor below 2.
    pub fn of(picture: &Tensor, factor: i64) -> Result<Self> {
        let (factor, picture) = (checked(factor)?, Known::new("picture", picture)?);
        let ImageShape { height, width, .. } = picture.shape();
        if height % factor != 0 || width % factor != 0 {
            let expected = format!("height and width that are multiples of the factor {factor}");
            return Err(shape_error("picture", expected, &picture.values().size()));
        }
        Self::from_low(&patch_means(picture.values(), factor), factor)
    }

    /// The picture of low resolution `[N, C, H/p, W/p]`.
    pub fn low(&self) -> &Tensor {
        self.means.values()
    }
}

impl Measurement for SuperRes {
    fn measure(&self, images: Range<usize>) -> Result<Tensor> {
        Ok(repeated(&self.means.rows(&images)?, self.factor))
    }

    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
        let ImageShape { channels, height, width } = self.means.shape();
        let shape = ImageShape { channels, height: height * self.factor, width: width * self.factor };
        check_images("estimate", x, shape, images.len())?;
        Ok(x + repeated(&(self.means.like(x, &images)? - patch_means(x, self.factor)), self.factor))
    }
}

fn checked(factor: i64) -> Result<i64> {
    // Beyond this no picture is as large, and sizes would overflow.
    match (2..=1 << 16).contains(&factor) {
        true => Ok(factor),
        false => Err(value_error("factor of super-resolution", "2 to 65536", factor)),
    }
}

/// D: the means of p×p patches of `[N, C, H, W]`, whose sides are multiples of p.
fn patch_means(x: &Tensor, p: i64) -> Tensor {
    let size = x.size();
    let patches = x.reshape([size[0], size[1], size[2] / p, p, size[3] / p, p]);
    patches.mean_dim([3i64, 5].as_slice(), false, x.kind())
}

/// U: each value p×p times.
fn repeated(means: &Tensor, p: i64) -> Tensor {
    let size = means.size();
    let [n, c, h, w] = [size[0], size[1], size[2], size[3]];
    means.reshape([n, c, h, 1, w, 1]).expand([n, c, h, p, w, p], false).reshape([n, c, h * p, w * p])
}
