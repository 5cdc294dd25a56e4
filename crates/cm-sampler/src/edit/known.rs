//! What was measured, kept in float64, and the checks of shapes that all measurements share.

use std::ops::Range;

use cm_model::ImageShape;
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Measured values `[N, c, h, w]`: N is 1 for one picture of which each seed makes a variation, or the number of
/// seeds.
#[derive(Debug)]
pub(super) struct Known {
    what: &'static str,
    values: Tensor,
}

impl Known {
    /// Takes the values over, in float64.
    pub fn new(what: &'static str, values: &Tensor) -> Result<Self> {
        match values.size()[..] {
            [n, c, h, w] if n > 0 && c > 0 && h > 0 && w > 0 => {
                let values = values.detach().to_kind(Kind::Double);
                match values.isfinite().all().int64_value(&[]) {
                    1 => Ok(Self { what, values }),
                    _ => Err(value_error(what, "finite values", "NaN or infinity")),
                }
            }
            ref size => Err(shape_error(what, "[N, C, H, W], none of them 0", size)),
        }
    }

    /// Their shape without the number of pictures.
    pub fn shape(&self) -> ImageShape {
        let size = self.values.size();
        ImageShape { channels: size[1], height: size[2], width: size[3] }
    }

    /// All of them.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Those of the images at the positions `images`.
    pub fn rows(&self, images: &Range<usize>) -> Result<Tensor> {
        let pictures = self.values.size()[0];
        if pictures == 1 {
            return Ok(self.values.shallow_clone());
        }
        if images.start > images.end || images.end as i64 > pictures {
            let expected = format!("one picture, or one for each seed up to position {}", images.end);
            return Err(shape_error(self.what, expected, &self.values.size()));
        }
        Ok(self.values.narrow(0, images.start as i64, images.len() as i64))
    }

    /// Those of the images at the positions `images`, in the dtype and on the device of `x`.
    pub fn like(&self, x: &Tensor, images: &Range<usize>) -> Result<Tensor> {
        Ok(self.rows(images)?.to_device(x.device()).to_kind(x.kind()))
    }
}

/// Checks that `x` is a batch of images of `shape` and returns their number.
pub(super) fn check_shape(what: &str, x: &Tensor, shape: ImageShape) -> Result<i64> {
    Ok(shape.check(what, x)?)
}

/// Checks that `x` is `count` images of `shape`.
pub(super) fn check_images(what: &str, x: &Tensor, shape: ImageShape, count: usize) -> Result<()> {
    match check_shape(what, x, shape)? == count as i64 {
        true => Ok(()),
        false => Err(shape_error(what, format!("{:?}", shape.batch(count as i64)), &x.size())),
    }
}

/// A shape that does not fit.
pub(super) fn shape_error(what: &str, expected: impl Into<String>, got: &[i64]) -> Error {
    Error::Model(cm_model::Error::Shape { what: what.into(), expected: expected.into(), got: got.to_vec() })
}

/// A value that does not fit.
pub(super) fn value_error(what: &str, expected: impl Into<String>, got: impl ToString) -> Error {
    let (expected, got) = (expected.into(), got.to_string());
    Error::Model(cm_model::Error::Value { what: what.into(), expected, got })
}

/// Largest magnitude; NaN if there is one.
pub(super) fn largest(x: &Tensor) -> f64 {
    if x.numel() == 0 { 0.0 } else { x.abs().max().double_value(&[]) }
}
