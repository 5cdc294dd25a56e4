use std::ops::Range;

use tch::{Kind, Tensor};

use super::Measurement;
use super::known::largest;
use crate::Result;

/// How far a value may stay outside of [−1, 1]: an eighth of a step of 8 bits.
const EXCESS: f64 = 1e-3;
const ROUNDS: usize = 300;

/// Brings results of an edit into [−1, 1] without giving up what is known: clamp, impose, and again, until no value
/// is more than 0.001 outside.
///
/// A clamp alone would change the luma or the patch means of bright and dark places when a result is saved with 8
/// bits. There is always a picture in the range with the known components if these come from a picture in the range;
/// where they do not, or after 300 rounds, what is left outside is left.
///
/// # Shapes
/// `x` and the result: `[B, C, H, W]`, the images at the positions `images` of the request that made them.
///
/// # Errors
/// As [`Measurement::impose`].
pub fn within_range(measurement: &dyn Measurement, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
    let mut y = x.to_kind(Kind::Double);
    for _ in 0..ROUNDS {
        if largest(&y) <= 1.0 + EXCESS {
            break;
        }
        y = measurement.impose(&y.clamp(-1.0, 1.0), images.clone())?;
    }
    Ok(y.to_kind(x.kind()))
}
