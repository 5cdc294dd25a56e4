use cm_model::{LpipsNet, LpipsReading};
use tch::{Kind, Tensor};

use super::features::smallest_side;
use crate::{Error, Result};

/// Images with a smaller width are enlarged where a [`Form`] says so.
const ENLARGED_BELOW: i64 = 256;
/// The side that they are enlarged to.
const ENLARGED_TO: i64 = 224;

/// How a network brings several pixels of a layer together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their maximum, as the networks were trained.
    Max,
    /// Their mean over the same windows, which gives smoother gradients.
    Average,
}

/// The values that stand for black and white.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PixelRange {
    /// −1 and 1.
    Symmetric,
    /// 0 and 1.
    Unit,
}

/// A reading of LPIPS, spelled out: everything that happens around the network.
///
/// [`Form::of`] gives the two that published results use; others exist for comparison alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Form {
    /// The range of the images that come.
    pub given: PixelRange,
    /// Whether images narrower than 256 pixels are enlarged to 224×224 (bilinear, corners not aligned). As in the
    /// released consistency-model code the width alone decides.
    pub enlarge: bool,
    /// The range that mean and standard deviation are for.
    pub range: PixelRange,
    /// What is taken from red, green and blue.
    pub mean: [f64; 3],
    /// What they are divided by then.
    pub std: [f64; 3],
    /// How the network pools.
    pub pooling: Pooling,
}

impl Form {
    /// The form of a published reading, for images in [-1, 1].
    ///
    /// Both take ImageNet's mean and standard deviation, the package on [-1, 1] and piq on [0, 1], which is the same
    /// up to roundings. They differ in pooling and size.
    #[must_use]
    pub fn of(reading: LpipsReading) -> Self {
        match reading {
            LpipsReading::Package => Self {
                given: PixelRange::Symmetric,
                enlarge: false,
                range: PixelRange::Symmetric,
                mean: [-0.030, -0.088, -0.188],
                std: [0.458, 0.448, 0.450],
                pooling: Pooling::Max,
            },
            LpipsReading::Piq => Self {
                given: PixelRange::Symmetric,
                enlarge: true,
                range: PixelRange::Unit,
                mean: [0.485, 0.456, 0.406],
                std: [0.229, 0.224, 0.225],
                pooling: Pooling::Average,
            },
        }
    }

    /// Images as they are before mean and standard deviation: enlarged, in the range [`Form::range`], grey ones
    /// repeated to three channels.
    ///
    /// # Shapes
    /// `[B, 1 or 3, H, W]` to `[B, 3, H', W']`, float32.
    pub fn pixels(&self, images: &Tensor) -> Tensor {
        let images = images.to_kind(Kind::Float);
        let sized = match self.enlarges(images.size()[3]) {
            true => images.upsample_bilinear2d([ENLARGED_TO, ENLARGED_TO], false, None, None),
            false => images,
        };
        let ranged = match (self.given, self.range) {
            (PixelRange::Symmetric, PixelRange::Unit) => (sized + 1.0) / 2.0,
            (PixelRange::Unit, PixelRange::Symmetric) => sized * 2.0 - 1.0,
            _ => sized,
        };
        if ranged.size()[1] == 1 { ranged.expand([-1, 3, -1, -1], false) } else { ranged }
    }

    fn enlarges(&self, width: i64) -> bool {
        self.enlarge && width < ENLARGED_BELOW
    }

    /// Checks that images of this shape have pixels left in every layer of `net`.
    ///
    /// # Errors
    /// [`Error::ImagesForLpips`] with what is needed.
    pub fn check(&self, net: LpipsNet, channels: i64, height: i64, width: i64) -> Result<()> {
        let refuse = |needs: String| Error::ImagesForLpips { net, needs, got: [channels, height, width] };
        if channels != 1 && channels != 3 {
            return Err(refuse("1 or 3 channels".to_owned()));
        }
        let side = smallest_side(net);
        if height.min(width) >= side || self.enlarges(width) && height > 0 && width > 0 {
            return Ok(());
        }
        let enlarged = if self.enlarge { "" } else { " (the reading piq enlarges small ones)" };
        Err(refuse(format!("at least {side}×{side} pixels{enlarged}")))
    }
}
