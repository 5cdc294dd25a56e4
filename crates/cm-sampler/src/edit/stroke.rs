use std::ops::Range;

use tch::Tensor;

use super::Measurement;
use super::known::{Known, check_images};
use crate::Result;

/// A drawing is the start, and nothing of it is imposed: SDEdit (Meng et al. 2022, arXiv 2108.01073).
///
/// y is the drawing. The noise of the first level takes its details away and the model puts others in their place:
/// the lower the level, the more of the drawing stays. See [`super::stroke_sigma`].
///
/// # Source
/// Song et al. 2023, appendix D. The paper's Algorithm 4, read to the letter, would set y to 0 here, since everything
/// is to be made anew; the drawing must enter the start, and does.
#[derive(Debug)]
pub struct Stroke {
    drawing: Known,
}

impl Stroke {
    /// Starts from a drawing.
    ///
    /// # Shapes
    /// `[N, C, H, W]` in [−1, 1], N being 1 or the number of seeds.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if it is no batch of images.
    pub fn new(drawing: &Tensor) -> Result<Self> {
        Ok(Self { drawing: Known::new("drawing", drawing)? })
    }
}

impl Measurement for Stroke {
    fn measure(&self, images: Range<usize>) -> Result<Tensor> {
        self.drawing.rows(&images)
    }

    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
        check_images("estimate", x, self.drawing.shape(), images.len())?;
        Ok(x.shallow_clone())
    }
}
