use std::ops::Range;

use tch::{Kind, Tensor};

use super::Measurement;
use super::known::{largest, value_error};
use crate::{Error, Result};

/// How far two measurements may be apart on one picture, in units of its largest value, and still agree.
const AGREE: f64 = 1e-6;
/// Residual at which the nearest picture that has everything counts as found.
const FOUND: f64 = 1e-12;
/// Steps of the search for it: one for each distinct angle between what is known would do.
const STEPS: usize = 400;

/// Several measurements together: mask and luma, mask and patch means, or all three.
///
/// [`Compose::impose`] gives the nearest picture that has the known components of all parts. Where the parts commute,
/// imposing one after the other gives it. Where they do not (a patch that is partly known), it is the limit of
/// imposing them in turn, x ← P₁…P_m…P₁x, which conjugate gradients on (1 − P₁…P_m…P₁) reach in a few steps.
///
/// Parts that contradict each other are an error; a part with a soft mask ([`Inpaint`](super::Inpaint)) knows every
/// pixel whose weight is below 1. The start is the first part's picture with all known components imposed.
///
/// # Source
/// Björck and Elfving 1979 (BIT 19), accelerated projection methods.
pub struct Compose<'a> {
    parts: Vec<Box<dyn Measurement + Send + 'a>>,
}

impl std::fmt::Debug for Compose<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Compose of {} parts", self.parts.len())
    }
}

impl<'a> Compose<'a> {
    /// All of `parts` at once.
    ///
    /// # Errors
    /// [`Error::Model`] if there are none.
    ///
    /// ```
    /// use cm_sampler::edit::{Colorize, Compose, Inpaint, Measurement};
    /// use cm_sampler::tch::{Device, Kind, Tensor};
    /// let picture = Tensor::linspace(-1., 1., 192, (Kind::Double, Device::Cpu)).view([1, 3, 8, 8]);
    /// let right_half = Tensor::from_slice(&[0., 0., 0., 0., 1., 1., 1., 1.]).view([1, 1, 1, 8]).repeat([1, 1, 8, 1]);
    /// // The left half is kept as it is; of the right half the luma is.
    /// let parts: Vec<Box<dyn Measurement + Send>> =
    ///     vec![Box::new(Inpaint::new(&picture, &right_half)?), Box::new(Colorize::of(&picture)?)];
    /// let x = Compose::new(parts)?.impose(&picture.zeros_like(), 0..1)?;
    /// assert!((x.double_value(&[0, 1, 5, 2]) - picture.double_value(&[0, 1, 5, 2])).abs() < 1e-9);
    /// # Ok::<(), cm_sampler::Error>(())
    /// ```
    pub fn new(parts: Vec<Box<dyn Measurement + Send + 'a>>) -> Result<Self> {
        match parts.is_empty() {
            true => Err(value_error("parts of a composition", "at least one measurement", 0)),
            false => Ok(Self { parts }),
        }
    }

    /// P_m…P₁x: the parts in turn, the last one exactly.
    fn in_turn(&self, x: &Tensor, images: &Range<usize>) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        for part in &self.parts {
            x = part.impose(&x, images.clone())?;
        }
        Ok(x)
    }

    /// P₁…P_m…P₁x.
    fn there_and_back(&self, x: &Tensor, images: &Range<usize>) -> Result<Tensor> {
        let mut x = self.in_turn(x, images)?;
        for part in self.parts.iter().rev().skip(1) {
            x = part.impose(&x, images.clone())?;
        }
        Ok(x)
    }

    /// How far `x` is from having the known components of every part, in units of its largest value.
    fn gap(&self, x: &Tensor, images: &Range<usize>) -> Result<f64> {
        let mut gap = 0.0;
        for part in &self.parts {
            let off = largest(&(part.impose(x, images.clone())? - x));
            if off.is_nan() {
                return Ok(f64::INFINITY);
            }
            gap = off.max(gap);
        }
        Ok(gap / (1.0 + largest(x)))
    }

    /// The nearest picture that has everything, or whatever the search ends with.
    fn nearest(&self, x: &Tensor, images: &Range<usize>) -> Result<Tensor> {
        let dot =
            |a: &Tensor, b: &Tensor| (a * b).sum_dim_intlist([1i64, 2, 3].as_slice(), true, Kind::Double);
        // An image that is there already has 0/0.
        let share = |a: &Tensor, b: &Tensor| (a / b).nan_to_num(0.0, 0.0, 0.0);
        let affine = self.there_and_back(x, images)?;
        // Both change in place.
        let (mut moved, mut residual) = (x.copy(), &affine - x);
        let (mut way, mut square) = (residual.copy(), dot(&residual, &residual));
        for _ in 0..STEPS {
            let bent = &way - (self.there_and_back(&(x + &way), images)? - &affine);
            let step = share(&square, &dot(&way, &bent));
            moved += &way * &step;
            residual -= bent * step;
            if largest(&residual) <= FOUND * (1.0 + largest(x)) {
                break;
            }
            let last = std::mem::replace(&mut square, dot(&residual, &residual));
            way = &residual + way * share(&square, &last);
        }
        self.in_turn(&moved, images)
    }
}

impl Measurement for Compose<'_> {
    fn measure(&self, images: Range<usize>) -> Result<Tensor> {
        let Some(first) = self.parts.first() else {
            return Err(value_error("parts of a composition", "at least one measurement", 0));
        };
        let y = first.measure(images.clone())?;
        // One picture for all images is imposed as if it were one image, unless other parts have one for each.
        match y.size().first() {
            Some(&1) => {
                let all = y.expand([images.len() as i64, -1, -1, -1], false);
                self.impose(&all, images)
            }
            _ => self.impose(&y, images),
        }
    }

    fn impose(&self, x: &Tensor, images: Range<usize>) -> Result<Tensor> {
        let wide = x.to_kind(Kind::Double);
        let turned = self.in_turn(&wide, &images)?;
        let mut gap = self.gap(&turned, &images)?;
        if gap <= AGREE * AGREE {
            return Ok(turned.to_kind(x.kind()));
        }
        let nearest = self.nearest(&wide, &images)?;
        if self.gap(&nearest, &images)? <= AGREE {
            return Ok(nearest.to_kind(x.kind()));
        }
        // What contradicts itself drives the search away; imposing in turn says by how much the parts differ.
        let mut x = turned;
        for _ in 0..100 {
            x = self.in_turn(&x, &images)?;
            gap = self.gap(&x, &images)?;
        }
        Err(Error::Contradiction { gap })
    }
}
