use std::ops::Range;

use cm_model::ImageShape;
use tch::{Kind, Tensor};

use super::Measurement;
use super::known::{Known, check_images, shape_error, value_error};
use crate::Result;

/// Pixels outside a mask are known: inpainting, and with [`Inpaint::outpaint`] outpainting.
///
/// x ← (1 − Ω)·y + Ω·x, with the paper's Ω: 1 where the picture is to be made anew, 0 where it is kept. Ω between 0
/// and 1 blends the two (see [`feather`]); only there imposing twice is more than imposing once.
#[derive(Debug)]
pub struct Inpaint {
    picture: Known,
    anew: Known,
}

impl Inpaint {
    /// Keeps `picture` where `anew` is 0.
    ///
    /// # Shapes
    /// `picture` `[N, C, H, W]` in [−1, 1], N being 1 or the number of seeds; `anew` `[N or 1, C or 1, H, W]`, 0 to 1.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the shapes do not fit each other or a weight is outside 0 to 1.
    pub fn new(picture: &Tensor, anew: &Tensor) -> Result<Self> {
        let (picture, anew) =
            (Known::new("picture", picture)?, Known::new("mask", &anew.to_device(picture.device()))?);
        let (shape, mask) = (picture.shape(), anew.shape());
        let pictures = picture.values().size()[0];
        let masks = anew.values().size()[0];
        let fits = (mask.height, mask.width) == (shape.height, shape.width)
            && [1, shape.channels].contains(&mask.channels)
            && (masks == 1 || pictures == 1 || masks == pictures);
        if !fits {
            let expected =
                format!("[{pictures} or 1, {} or 1, {}, {}]", shape.channels, shape.height, shape.width);
            return Err(shape_error("mask", expected, &anew.values().size()));
        }
        // Written so that NaN fails.
        let (low, high) = (anew.values().min().double_value(&[]), anew.values().max().double_value(&[]));
        if !(low >= 0.0 && high <= 1.0) {
            return Err(value_error("weights of the mask", "0 to 1", format!("{low} to {high}")));
        }
        Ok(Self { picture, anew })
    }

    /// Continues a picture beyond its edges: it is put on a larger canvas, `left` pixels from its left and `top` from
    /// its top, and the rest is made anew. `soft` pixels at the picture's own edges are blended (0 for none).
    ///
    /// # Shapes
    /// `picture` `[N, C, h, w]`, `canvas` the shape of the model's images.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if the picture, at that place, does not lie on the canvas.
    ///
    /// ```
    /// use cm_sampler::{edit::{Inpaint, Measurement}, model::ImageShape, tch::{Device, Kind, Tensor}};
    /// let picture = Tensor::ones([1, 1, 2, 2], (Kind::Float, Device::Cpu));
    /// let outpaint = Inpaint::outpaint(&picture, ImageShape::square(1, 4), 0, 1, 0)?;
    /// let y = outpaint.measure(0..1)?;
    /// assert_eq!(y.double_value(&[0, 0, 0, 0]), 0.0, "above the picture");
    /// assert_eq!(y.double_value(&[0, 0, 2, 1]), 1.0, "inside");
    /// # Ok::<(), cm_sampler::Error>(())
    /// ```
    pub fn outpaint(
        picture: &Tensor,
        canvas: ImageShape,
        left: usize,
        top: usize,
        soft: usize,
    ) -> Result<Self> {
        let known = Known::new("picture", picture)?;
        let shape = known.shape();
        let room = |size: i64, before: usize, whole: i64| {
            let before = i64::try_from(before).ok().filter(|&before| before <= whole)?;
            Some((before, whole - before - size)).filter(|(_, after)| *after >= 0)
        };
        let (across, down) = (room(shape.width, left, canvas.width), room(shape.height, top, canvas.height));
        let (Some((left, right)), Some((top, bottom)), true) =
            (across, down, shape.channels == canvas.channels)
        else {
            let expected = format!(
                "at most [N, {}, {}, {}] with {left} columns to its left and {top} rows above it",
                canvas.channels, canvas.height, canvas.width
            );
            return Err(shape_error("picture to be continued", expected, &picture.size()));
        };
        let around = [left, right, top, bottom];
        let placed = known.values().constant_pad_nd(around);
        let kept = known.values().narrow(0, 0, 1).narrow(1, 0, 1).ones_like().constant_pad_nd(around);
        Self::new(&placed, &feather(&(1.0 - kept), soft)?)
    }

    /// Ω, as it was given.
    pub fn anew(&self) -> &Tensor {
        self.anew.values()
    }
}

impl Measurement for Inpaint {
    fn measure(&self, images: Range<usize>) -> Result<Tensor> {
        Ok(self.picture.rows(&images)? * (1.0 - self.anew.rows(&images)?))
    }

    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
        check_images("estimate", x, self.picture.shape(), images.len())?;
        let (y, anew) = (self.picture.like(x, &images)?, self.anew.like(x, &images)?);
        Ok(y * (1.0 - &anew) + x * anew)
    }
}

/// Softens the edge of a mask: Ω falls in equal steps from 1 at its border to 0 at `radius` + 1 pixels outside it
/// (counted as a king walks on a chessboard).
///
/// What the mask marks stays to be made anew as a whole, so that nothing of it seeps into the result; the blend eats
/// into what is kept, which is exact from `radius` + 1 pixels off the mask on.
///
/// # Shapes
/// `anew` and the result: `[N, C, H, W]`, 0 to 1.
///
/// # Errors
/// [`crate::Error::Model`] if `anew` is no batch of masks, or if the radius is larger than they are.
pub fn feather(anew: &Tensor, radius: usize) -> Result<Tensor> {
    let mask = Known::new("mask", anew)?;
    let longest = mask.shape().height.max(mask.shape().width) as usize;
    if radius > longest {
        return Err(value_error("feather", format!("0 to {longest} pixels"), radius));
    }
    let mut grown = mask.values().shallow_clone();
    let mut sum = grown.copy();
    for _ in 0..radius {
        grown = grown.max_pool2d([3, 3], [1, 1], [1, 1], [1, 1], false);
        sum += &grown;
    }
    // The mask is in all of the grown ones, so that the mean is 1 inside it.
    Ok((sum / (radius + 1) as f64).to_kind(match anew.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }))
}
