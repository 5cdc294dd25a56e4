//! How good samples are, as a number that is lower for better ones.

use anyhow::{Result, bail};
use cm_data::{Dataset, batch};
use cm_eval::{Divisor, Moments, MomentsStream, frechet_distance};
use cm_model::ImageShape;
use tch::{Device, Tensor};

use crate::args::ScoreKind;

/// Most values of an image for which a covariance matrix is made: at 64×64 in colour it would take 1.2 GB, and minutes
/// for each score.
const MOST_VALUES: i64 = 4096;
/// Images of the data that are in memory at a time.
const CHUNK: usize = 512;

/// A score, with what it knows of the data.
pub enum Score {
    /// See [`ScoreKind::Pixels`].
    Pixels {
        /// Mean and covariance of the data's pixels.
        data: Moments,
    },
}

/// A score in the making, of samples that come in batches.
pub enum Running<'a> {
    /// See [`ScoreKind::Pixels`].
    Pixels {
        /// Those of the data.
        data: &'a Moments,
        /// Those of the samples so far.
        samples: MomentsStream,
    },
}

impl Score {
    /// Looks at the data, whose images must have the shape of the samples.
    pub fn of(kind: ScoreKind, set: &dyn Dataset, shape: ImageShape) -> Result<Self> {
        let ScoreKind::Pixels = kind;
        if ImageShape::from(set.shape()) != shape {
            bail!("{}: images of {}, and the model makes {shape}", set.source(), set.shape());
        }
        if shape.numel() > MOST_VALUES {
            bail!(
                "--score pixels: images of {shape} have {} values each; expected at most {MOST_VALUES}",
                shape.numel()
            );
        }
        let mut moments = MomentsStream::default();
        let values = set.shape().values();
        for first in (0..set.len()).step_by(CHUNK) {
            let mut pixels = vec![0; CHUNK.min(set.len() - first) * values];
            for (index, out) in pixels.chunks_exact_mut(values).enumerate() {
                set.read(first + index, out)?;
            }
            moments.add(&flat(&batch::to_tensor(&pixels, set.shape(), Device::Cpu)?))?;
        }
        Ok(Self::Pixels { data: moments.finish(Divisor::CountLessOne)? })
    }

    /// The score of samples that are still to come.
    pub fn start(&self) -> Running<'_> {
        let Self::Pixels { data } = self;
        Running::Pixels { data, samples: MomentsStream::default() }
    }
}

impl Running<'_> {
    /// Takes in samples `[B, C, H, W]` in [-1, 1].
    pub fn add(&mut self, images: &Tensor) -> Result<()> {
        let Self::Pixels { samples, .. } = self;
        Ok(samples.add(&flat(images))?)
    }

    /// The score of all of them.
    pub fn finish(self) -> Result<f64> {
        let Self::Pixels { data, samples } = self;
        Ok(frechet_distance(data, &samples.finish(Divisor::CountLessOne)?)?)
    }
}

fn flat(images: &Tensor) -> Tensor {
    images.flatten(1, -1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_itself_has_the_lowest_score() {
        let digits = cm_data::SourceSpec::new(cm_data::SourceKind::Digits, None).open().unwrap();
        let shape = ImageShape::square(1, 8);
        let score = Score::of(ScoreKind::Pixels, digits.as_ref(), shape).unwrap();
        let of = |batches: &[Tensor]| {
            let mut running = score.start();
            batches.iter().for_each(|batch| running.add(batch).unwrap());
            running.finish().unwrap()
        };
        let mut pixels = vec![0; digits.len() * 64];
        pixels.chunks_exact_mut(64).enumerate().for_each(|(index, out)| digits.read(index, out).unwrap());
        let images = batch::to_tensor(&pixels, digits.shape(), Device::Cpu).unwrap();
        let halves = images.split(1000, 0);
        assert!(of(&halves) < 1e-9, "the moments are the data's");
        // The mean image is 64 grey levels away: 64·0.1².
        assert!((of(&[&images + 0.1]) - 0.64).abs() < 1e-6);
        assert!(of(&halves[..1]) > 1e-3, "a part has moments of its own");
        let other = Score::of(ScoreKind::Pixels, digits.as_ref(), ImageShape::square(1, 16));
        assert!(other.err().unwrap().to_string().contains("the model makes 1×16×16"));
    }
}
