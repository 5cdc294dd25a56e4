use std::ops::Range;

use tch::{Kind, Tensor};

use super::Measurement;
use super::known::{Known, check_images, shape_error};
use crate::Result;

/// Weights of red, green and blue in luma, as the paper and its released code print them.
pub const LUMA: [f64; 3] = [0.2989, 0.5870, 0.1140];

/// The luma of each pixel is known, and its colour is not.
///
/// With q = [`LUMA`]/‖LUMA‖: x ← x + q·(m − q·x), where m = q·y is the known component. The paper completes q to an
/// orthogonal basis; of the other two directions only that they are orthogonal matters, so none is chosen here.
/// y itself is q·m, which looks green and not grey; a grey picture has parts in the other two directions too.
///
/// # Source
/// Song et al. 2023, appendix D.
#[derive(Debug)]
pub struct Colorize {
    luma: Known,
}

impl Colorize {
    /// Knows the luma of a picture, be it grey in all three channels or in colour.
    ///
    /// # Shapes
    /// `[N, 3, H, W]` in [−1, 1], N being 1 or the number of seeds.
    ///
    /// # Errors
    /// [`crate::Error::Model`] for another number of channels.
    pub fn of(picture: &Tensor) -> Result<Self> {
        let picture = Known::new("picture", picture)?;
        if picture.shape().channels != 3 {
            let expected = "[N, 3, H, W]: only colour has luma";
            return Err(shape_error("picture to be coloured", expected, &picture.values().size()));
        }
        Ok(Self { luma: Known::new("luma", &along_luma(picture.values()))? })
    }

    /// Knows the luma of a grey picture: that of the picture with the same grey in all channels.
    ///
    /// # Shapes
    /// `[N, 1, H, W]` in [−1, 1].
    ///
    /// # Errors
    /// [`crate::Error::Model`] for another number of channels.
    pub fn from_grey(grey: &Tensor) -> Result<Self> {
        match grey.size()[..] {
            [_, 1, _, _] => Self::of(&grey.repeat([1, 3, 1, 1])),
            ref size => Err(shape_error("grey picture", "[N, 1, H, W]", size)),
        }
    }

    /// The grey picture `[N, 1, H, W]` whose luma this is.
    pub fn grey(&self) -> Tensor {
        self.luma.values() / direction(self.luma.values()).sum(Kind::Double)
    }
}

impl Measurement for Colorize {
    fn measure(&self, images: Range<usize>) -> Result<Tensor> {
        let luma = self.luma.rows(&images)?;
        Ok(&luma * direction(&luma))
    }

    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
        let shape = cm_model::ImageShape { channels: 3, ..self.luma.shape() };
        check_images("estimate", x, shape, images.len())?;
        Ok(x + direction(x) * (self.luma.like(x, &images)? - along_luma(x)))
    }
}

/// q, to be multiplied with `x`.
fn direction(x: &Tensor) -> Tensor {
    let norm = LUMA.iter().map(|w| w * w).sum::<f64>().sqrt();
    let q = Tensor::from_slice(&LUMA.map(|w| w / norm)).view([1, 3, 1, 1]);
    q.to_device_(x.device(), x.kind(), false, false)
}

/// q·x for each pixel, `[N, 1, H, W]`.
fn along_luma(x: &Tensor) -> Tensor {
    (x * direction(x)).sum_dim_intlist([1i64].as_slice(), true, x.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn the_direction_is_the_papers_first_column() {
        let q = Vec::<f64>::try_from(direction(&Tensor::zeros([1], (Kind::Double, Device::Cpu))).view([-1]));
        // The paper prints four places and cuts the rest off.
        for (got, want) in q.unwrap().into_iter().zip([0.4471, 0.8780, 0.1705]) {
            assert!((0.0..1e-4).contains(&(got - want)), "{got}");
        }
    }
}
