use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{Error, Result};

/// Channels, height and width of an image; a batch of them is NCHW.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageShape {
    /// Number of channels: 1 for grey, 3 for RGB.
    pub channels: i64,
    /// Rows of pixels.
    pub height: i64,
    /// Columns of pixels.
    pub width: i64,
}

impl ImageShape {
    /// A square image.
    pub fn square(channels: i64, side: i64) -> Self {
        Self { channels, height: side, width: side }
    }

    /// Values in one image, `C·H·W`.
    pub fn numel(&self) -> i64 {
        self.channels * self.height * self.width
    }

    /// The NCHW shape of a batch.
    pub fn batch(&self, batch: i64) -> [i64; 4] {
        [batch, self.channels, self.height, self.width]
    }

    /// Checks that `x` is a batch of such images and returns the batch size.
    ///
    /// # Errors
    /// [`Error::Shape`] that names `what`, the expected and the actual shape.
    pub fn check(&self, what: &str, x: &Tensor) -> Result<i64> {
        let size = x.size();
        if size.len() == 4 && size[1..] == [self.channels, self.height, self.width] {
            return Ok(size[0]);
        }
        let expected = format!("[B, {}, {}, {}]", self.channels, self.height, self.width);
        Err(Error::shape(what, expected, &size))
    }
}

impl std::fmt::Display for ImageShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}×{}×{}", self.channels, self.height, self.width)
    }
}
