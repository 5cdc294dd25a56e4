//! How good samples are, as a number that is lower for better ones.

use anyhow::{Result, bail};
use cm_data::{Dataset, batch};
use cm_eval::{Divisor, Moments, MomentsStream, frechet_distance};
use cm_model::ImageShape;
use tch::{Device, Tensor};

use super::super::eval::input::{as_stored, digest_of};
use super::super::eval::judge::{Judge, shape_of};
use crate::args::{ScoreKind, SearchArgs};

/// Most values of an image for which a covariance matrix is made: at 64×64 in colour it would take 1.2 GB, and minutes
/// for each score.
const MOST_VALUES: i64 = 4096;
/// Images of the data that are in memory at a time.
const CHUNK: usize = 256;

/// A score: a Fréchet distance between features of the samples and of the data.
pub struct Score {
    /// What sees the images; the pixels themselves where there is nothing.
    net: Option<Judge>,
    /// Mean and covariance of the data's features.
    data: Moments,
}

/// A score in the making, of samples that come in batches.
pub struct Running<'a> {
    score: &'a Score,
    samples: MomentsStream,
}

impl Score {
    /// Looks at the data, whose images must have the shape of the samples.
    pub fn of(args: &SearchArgs, set: &dyn Dataset, shape: ImageShape, device: Device) -> Result<Self> {
        if ImageShape::from(set.shape()) != shape {
            bail!("{}: images of {}, and the model makes {shape}", set.source(), set.shape());
        }
        let net = match args.score {
            ScoreKind::Pixels if shape.numel() > MOST_VALUES => bail!(
                "--score pixels: images of {shape} have {} values each, expected at most {MOST_VALUES}; take fid, or fcd \
                 up to 64×64",
                shape.numel()
            ),
            ScoreKind::Pixels => None,
            ScoreKind::Fid => Some(Judge::inception(&args.weights, device)?),
            ScoreKind::Fcd => {
                let data = digest_of(set)?;
                Some(Judge::trained(Some(&args.cache), set, &data, shape_of(set))?.0)
            }
        };
        let mut moments = MomentsStream::default();
        let values = set.shape().values();
        for first in (0..set.len()).step_by(CHUNK) {
            let mut pixels = vec![0; CHUNK.min(set.len() - first) * values];
            for (index, out) in pixels.chunks_exact_mut(values).enumerate() {
                set.read(first + index, out)?;
            }
            let images = batch::to_tensor(&pixels, set.shape(), Device::Cpu)?;
            moments.add(&features(net.as_ref(), &images)?)?;
        }
        Ok(Self { net, data: moments.finish(Divisor::CountLessOne)? })
    }

    /// The weights of the network that looks at the images.
    pub fn judge(&self) -> Option<&str> {
        self.net.as_ref().map(|judge| judge.weights.as_str())
    }

    /// The score of samples that are still to come.
    pub fn start(&self) -> Running<'_> {
        Running { score: self, samples: MomentsStream::default() }
    }
}

impl Running<'_> {
    /// Takes in samples `[B, C, H, W]` in [-1, 1].
    pub fn add(&mut self, images: &Tensor) -> Result<()> {
        let features = match &self.score.net {
            None => features(None, images),
            // Networks see them as `cm eval` shows them: as they are once stored.
            judge => features(judge.as_ref(), &as_stored(images)?),
        }?;
        Ok(self.samples.add(&features)?)
    }

    /// The score of all of them.
    pub fn finish(self) -> Result<f64> {
        Ok(frechet_distance(&self.score.data, &self.samples.finish(Divisor::CountLessOne)?)?)
    }
}

fn features(net: Option<&Judge>, images: &Tensor) -> Result<Tensor> {
    match net {
        None => Ok(images.flatten(1, -1)),
        Some(judge) => Ok(judge.net.see(images)?.features),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// The options as they are where none is given.
    fn arguments() -> SearchArgs {
        #[derive(Parser)]
        struct Words {
            #[command(flatten)]
            args: SearchArgs,
        }
        Words::parse_from(["cm", "model"]).args
    }

    #[test]
    fn the_data_itself_has_the_lowest_score() {
        let digits = cm_data::SourceSpec::new(cm_data::SourceKind::Digits, None).open().unwrap();
        let shape = ImageShape::square(1, 8);
        let args = arguments();
        let score = Score::of(&args, digits.as_ref(), shape, Device::Cpu).unwrap();
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
        let other = Score::of(&args, digits.as_ref(), ImageShape::square(1, 16), Device::Cpu);
        assert!(other.err().unwrap().to_string().contains("the model makes 1×16×16"));
    }
}
