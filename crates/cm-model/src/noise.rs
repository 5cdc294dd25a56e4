use std::collections::VecDeque;

use cm_schedule::rng::Purpose;
use cm_torch::philox::{self, NormalSpec};
use tch::{Device, Kind, Tensor};

use crate::{Error, ImageShape, Result};

/// Where a draw of noise is used: it names the draw, so that the draw needs no generator state.
#[derive(Debug, Clone, Copy)]
pub struct Site<'a> {
    /// One id for each image of the batch.
    pub samples: &'a [u64],
    /// Step of the sampler or of the training run.
    pub step: u32,
    /// What the noise is for.
    pub purpose: Purpose,
}

/// A source of standard normal noise.
///
/// A sampler asks it only for noise that it uses; [`Recorded`] turns a draw too many or too few into an error.
pub trait NoiseSource {
    /// Noise `[B, C, H, W]` float32 for the images `site.samples`.
    ///
    /// # Errors
    /// [`Error`] if the source cannot give the draw.
    fn normal(&mut self, shape: ImageShape, site: &Site<'_>) -> Result<Tensor>;
}

/// Counter-based noise: the noise of an image is a function of (seed, sample id, step, purpose), bit-equal at
/// any batch size and whatever was drawn before.
#[derive(Debug, Clone, Copy)]
pub struct Philox {
    /// Seed of the run.
    pub seed: u64,
    /// Where the noise is needed.
    pub device: Device,
}

impl NoiseSource for Philox {
    fn normal(&mut self, shape: ImageShape, site: &Site<'_>) -> Result<Tensor> {
        let spec = NormalSpec {
            seed: self.seed,
            purpose: site.purpose,
            step: site.step,
            samples: site.samples,
            per_sample: shape.numel() as usize,
        };
        let noise = philox::normals(&spec, self.device)?;
        Ok(noise.view(shape.batch(site.samples.len() as i64)))
    }
}

/// Replays noise that was recorded elsewhere, in order.
#[derive(Debug)]
pub struct Recorded {
    draws: VecDeque<Tensor>,
    given: usize,
}

impl Recorded {
    /// The draws in the order in which they will be asked for.
    pub fn new(draws: impl IntoIterator<Item = Tensor>) -> Self {
        Self { draws: draws.into_iter().collect(), given: 0 }
    }

    /// Checks that every draw was used.
    ///
    /// # Errors
    /// [`Error::Recorded`] with the number of draws left over.
    pub fn finish(self) -> Result<()> {
        match self.draws.len() {
            0 => Ok(()),
            left => Err(Error::Recorded(format!("{left} draws were not used after {} were", self.given))),
        }
    }
}

impl NoiseSource for Recorded {
    fn normal(&mut self, shape: ImageShape, site: &Site<'_>) -> Result<Tensor> {
        let draw = self.draws.pop_front().ok_or_else(|| {
            Error::Recorded(format!("draw {} was asked for, and no more were recorded", self.given + 1))
        })?;
        let batch = shape.check("recorded noise", &draw)?;
        if batch != site.samples.len() as i64 {
            let expected = format!("{:?}", shape.batch(site.samples.len() as i64));
            return Err(Error::shape("recorded noise", expected, &draw.size()));
        }
        self.given += 1;
        Ok(draw.to_kind(Kind::Float))
    }
}
