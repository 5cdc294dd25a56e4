//! Which transforms there are, what is drawn for them, and the maps that they come to, in f64.

use std::f64::consts::PI;
use std::ops::Mul;

use cm_schedule::rng::{Purpose, Stream};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An image is scaled by 2^(0.2·w), with w standard normal.
const SCALE_STD: f64 = 0.2;
/// Its sides are scaled by 2^(0.2·w) and 2^(−0.2·w).
const ANISO_STD: f64 = 0.2;
/// Probability that the stretched axis is not the horizontal one but a random one.
const ANISO_ROTATE_PROB: f64 = 0.5;
/// An image is moved by 0.125·w of its width and height.
const TRANSLATE_STD: f64 = 0.125;

/// The section `[augment]` of a config: which transforms an image may get, and how often.
///
/// A transform happens with probability `min(multiplier · p, 1)`, each on its own; a flip that happens is a fair
/// coin. A multiplier of 0 turns a transform off, and its labels with it.
///
/// ```
/// use cm_data::AugmentSpec;
/// let spec: AugmentSpec = toml::from_str("p = 0.12\nxflip = 1e8\nscale = 1").unwrap();
/// assert_eq!((spec.rotate, spec.label_dim()), (0.0, 2));
/// assert_eq!(AugmentSpec::edm_cifar10().label_dim(), 9);
/// ```
///
/// # Source
/// Karras et al. 2022, section 5, "augmentation regularization", and its released code for the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AugmentSpec {
    /// Probability of a transform whose multiplier is 1, in 0..=1.
    pub p: f64,
    /// Mirroring left and right; label: 0 or 1.
    #[serde(default)]
    pub xflip: f64,
    /// Mirroring top and bottom; label: 0 or 1.
    #[serde(default)]
    pub yflip: f64,
    /// Scaling by 2^(0.2·w), w ~ N(0, 1); label: w.
    #[serde(default)]
    pub scale: f64,
    /// Rotation by w ~ U(−π, π); labels: cos w − 1, sin w.
    #[serde(default)]
    pub rotate: f64,
    /// Stretching by 2^(0.2·w) along one axis and shrinking by as much across it, w ~ N(0, 1). The axis is the
    /// horizontal one or, with probability ½, turned by r ~ U(−π, π); labels: w·cos r, w·sin r.
    #[serde(default)]
    pub aniso: f64,
    /// Moving by 0.125·w of width and height, w ~ N(0, 1) for each; labels: both w.
    #[serde(default)]
    pub translate: f64,
}

impl AugmentSpec {
    /// EDM's setting for CIFAR-10: every image may be mirrored, anything else has a probability of 0.12.
    #[must_use]
    pub const fn edm_cifar10() -> Self {
        Self { p: 0.12, xflip: 1e8, yflip: 1.0, scale: 1.0, rotate: 1.0, aniso: 1.0, translate: 1.0 }
    }

    /// The transforms in the order of their labels: key, multiplier, number of labels.
    const fn transforms(&self) -> [(&'static str, f64, i64); 6] {
        [
            ("xflip", self.xflip, 1),
            ("yflip", self.yflip, 1),
            ("scale", self.scale, 1),
            ("rotate", self.rotate, 2),
            ("aniso", self.aniso, 2),
            ("translate", self.translate, 2),
        ]
    }

    /// Number of labels: what the network's `augment_dim` has to be.
    #[must_use]
    pub fn label_dim(&self) -> i64 {
        self.transforms().iter().filter(|(_, multiplier, _)| *multiplier > 0.0).map(|(_, _, dim)| dim).sum()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Augment`] that names the key, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let fault = |key, value: f64, reason| Err(Error::Augment { key, value, reason });
        if !(0.0..=1.0).contains(&self.p) {
            return fault("p", self.p, "expected a probability, 0 to 1");
        }
        for (key, multiplier, _) in self.transforms() {
            if !(multiplier.is_finite() && multiplier >= 0.0) {
                return fault(key, multiplier, "expected a finite multiplier of p, 0 or more");
            }
        }
        if self.label_dim() == 0 {
            let reason = "every transform is off: set one of xflip, yflip, scale, rotate, aniso, translate, or \
                          remove the section";
            return fault("p", self.p, reason);
        }
        Ok(())
    }
}

/// The value drawn for a transform, and the uniform number that decides whether it happens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gated<T> {
    /// The value.
    pub value: T,
    /// The transform happens where this is below multiplier · p.
    pub gate: f64,
}

impl<T: Default> Gated<T> {
    /// The value, or zero where the transform does not happen.
    fn open(self, multiplier: f64, p: f64) -> T {
        if self.gate < multiplier * p { self.value } else { T::default() }
    }
}

/// Everything that is drawn for one image, whichever transforms are on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draws {
    /// A fair coin.
    pub xflip: Gated<bool>,
    /// A fair coin.
    pub yflip: Gated<bool>,
    /// Standard normal.
    pub scale: Gated<f64>,
    /// u ~ U(0, 1); the angle is (2u − 1)·π.
    pub rotate: Gated<f64>,
    /// Standard normal.
    pub aniso: Gated<f64>,
    /// u ~ U(0, 1); the angle of the stretched axis is (2u − 1)·π,
    pub aniso_angle: f64,
    /// where this, ~ U(0, 1), is below ½; else it is 0.
    pub aniso_turned: f64,
    /// Standard normal, x and y.
    pub translate: Gated<[f64; 2]>,
}

impl Draws {
    /// The draws of image `sample` of the batch of `step`: a function of these and the seed, through
    /// [`Purpose::Augment`].
    ///
    /// Each has a place of its own in the stream, so that turning a transform on or off leaves the others as they
    /// are. Which place is part of the random layout and never changes.
    ///
    /// ```
    /// use cm_data::augment::Draws;
    /// assert_eq!(Draws::at(0, 3, 7), Draws::at(0, 3, 7));
    /// assert_ne!(Draws::at(0, 3, 7), Draws::at(0, 3, 8));
    /// ```
    #[must_use]
    pub fn at(seed: u64, step: u32, sample: u64) -> Self {
        let stream = Stream { seed, purpose: Purpose::Augment, step, sample };
        let coin = |block| stream.below(block, 2) == 1;
        let uniform = |block| stream.uniform(block);
        // Uniform numbers are blocks 0 to 10; block 16 holds normal numbers 64 to 67.
        let normal = |i: u32| stream.normal(64 + i);
        Self {
            xflip: Gated { value: coin(0), gate: uniform(1) },
            yflip: Gated { value: coin(2), gate: uniform(3) },
            scale: Gated { value: normal(0), gate: uniform(4) },
            rotate: Gated { value: uniform(5), gate: uniform(6) },
            aniso: Gated { value: normal(1), gate: uniform(7) },
            aniso_angle: uniform(8),
            aniso_turned: uniform(9),
            translate: Gated { value: [normal(2), normal(3)], gate: uniform(10) },
        }
    }

    /// What happens to the image.
    #[must_use]
    pub fn transform(&self, spec: &AugmentSpec) -> Transform {
        let angle = |u: f64| (2.0 * u - 1.0) * PI;
        let rotate = Gated { value: angle(self.rotate.value), ..self.rotate };
        let turned = self.aniso_turned < ANISO_ROTATE_PROB;
        Transform {
            xflip: self.xflip.open(spec.xflip, spec.p),
            yflip: self.yflip.open(spec.yflip, spec.p),
            scale: self.scale.open(spec.scale, spec.p),
            rotate: rotate.open(spec.rotate, spec.p),
            aniso: self.aniso.open(spec.aniso, spec.p),
            aniso_angle: if turned { angle(self.aniso_angle) } else { 0.0 },
            translate: self.translate.open(spec.translate, spec.p),
        }
    }
}

/// What happens to one image: flips first, then one affine map.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Transform {
    /// Mirrored left and right.
    pub xflip: bool,
    /// Mirrored top and bottom.
    pub yflip: bool,
    /// Scaled by 2^(0.2·this).
    pub scale: f64,
    /// Rotated by this angle.
    pub rotate: f64,
    /// Stretched by 2^(0.2·this).
    pub aniso: f64,
    /// The angle of the axis along which it is stretched.
    pub aniso_angle: f64,
    /// Moved by 0.125·this of width and height.
    pub translate: [f64; 2],
}

impl Transform {
    /// The labels that tell the network what was done: those of the transforms that are on. All are 0 for an image
    /// that stays as it is.
    #[must_use]
    pub fn labels(&self, spec: &AugmentSpec) -> Vec<f32> {
        let flip = |on: bool| f64::from(u8::from(on));
        let (angle, [x, y]) = (self.aniso_angle, self.translate);
        let groups: [&[f64]; 6] = [
            &[flip(self.xflip)],
            &[flip(self.yflip)],
            &[self.scale],
            &[self.rotate.cos() - 1.0, self.rotate.sin()],
            &[self.aniso * angle.cos(), self.aniso * angle.sin()],
            &[x, y],
        ];
        let on =
            spec.transforms().into_iter().zip(groups).filter(|((_, multiplier, _), _)| *multiplier > 0.0);
        on.flat_map(|(_, group)| group).map(|&label| label as f32).collect()
    }

    /// From a place in the result to its place in the image; both in pixels from the centre of an image of
    /// `height` × `width`.
    ///
    /// Transforms that do not happen leave no rounding behind: without any, this is [`Affine::IDENTITY`].
    pub(super) fn inverse(&self, height: i64, width: i64) -> Affine {
        let mut map = Affine::IDENTITY;
        if self.scale != 0.0 {
            let shrink = (-SCALE_STD * self.scale).exp2();
            map = map * Affine::scale(shrink, shrink);
        }
        if self.rotate != 0.0 {
            map = map * Affine::rotate(self.rotate);
        }
        if self.aniso != 0.0 {
            let (stretch, angle) = ((ANISO_STD * self.aniso).exp2(), self.aniso_angle);
            map =
                map * Affine::rotate(-angle) * Affine::scale(1.0 / stretch, stretch) * Affine::rotate(angle);
        }
        if self.translate != [0.0; 2] {
            let [x, y] = self.translate;
            map = map
                * Affine::translate(-TRANSLATE_STD * x * width as f64, -TRANSLATE_STD * y * height as f64);
        }
        map
    }
}

/// An affine map of the plane: the upper two rows of its matrix in homogeneous coordinates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine(pub(super) [[f64; 3]; 2]);

impl Affine {
    pub(super) const IDENTITY: Self = Self([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]);

    pub(super) fn translate(x: f64, y: f64) -> Self {
        Self([[1.0, 0.0, x], [0.0, 1.0, y]])
    }

    pub(super) fn scale(x: f64, y: f64) -> Self {
        Self([[x, 0.0, 0.0], [0.0, y, 0.0]])
    }

    pub(super) fn rotate(angle: f64) -> Self {
        let (sin, cos) = angle.sin_cos();
        Self([[cos, -sin, 0.0], [sin, cos, 0.0]])
    }

    /// Where the point (x, y) goes.
    pub(super) fn at(&self, x: f64, y: f64) -> [f64; 2] {
        self.0.map(|[a, b, c]| a * x + b * y + c)
    }
}

/// The map that does `other` first.
impl Mul for Affine {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        let [top, bottom] = other.0;
        Self(self.0.map(|[a, b, c]| {
            let column = |j: usize| a * top[j] + b * bottom[j];
            [column(0), column(1), column(2) + c]
        }))
    }
}
