//! The Inception score, of any classifier.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::features::{rows, same_columns};
use crate::{Error, Result};

/// A score over chunks of the images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct InceptionScore {
    /// Mean over the chunks.
    pub mean: f64,
    /// Standard deviation over the chunks (population).
    pub std: f64,
}

/// The Inception score of images that come in batches: `exp(mean_i KL(p_i ‖ mean p))` over each of so many contiguous
/// chunks, and mean and deviation over the chunks. `p` are a classifier's probabilities.
///
/// Chunk s of S holds the images from ⌊s·n/S⌋ to ⌊(s + 1)·n/S⌋ of n. Memory is a few numbers for each class.
///
/// # Source
/// Salimans et al. 2016 (arXiv 1606.03498).
#[derive(Debug)]
pub struct InceptionScoreStream {
    total: u64,
    splits: u64,
    seen: u64,
    /// Σ p and Σ_i Σ_c p ln p of the chunk at hand.
    sums: Option<(Tensor, f64)>,
    scores: Vec<f64>,
}

impl InceptionScoreStream {
    /// A stream of `total` images in `splits` chunks; 10 are usual.
    ///
    /// # Errors
    /// [`Error::Input`] unless every chunk has an image.
    pub fn new(total: u64, splits: u64) -> Result<Self> {
        if splits == 0 || splits > total {
            let (expected, got) = (format!("1 to {total}, the number of images"), splits.to_string());
            return Err(Error::Input { what: "chunks of the Inception score", expected, got });
        }
        Ok(Self { total, splits, seen: 0, sums: None, scores: Vec::new() })
    }

    /// Takes the logits `[N ≥ 1, classes]` of the next images in.
    ///
    /// # Errors
    /// [`Error::Input`] for logits that are not finite or of another number of classes than those before, and for more
    /// images than were announced.
    pub fn add(&mut self, logits: &Tensor) -> Result<()> {
        let logits = rows("logits", logits, 1)?.f_to_device(Device::Cpu)?;
        let count = logits.size()[0] as u64;
        if let Some((sum, _)) = &self.sums {
            same_columns("logits", sum.size()[0], logits.size()[1])?;
        }
        if self.seen + count > self.total {
            let (expected, got) = (format!("{}", self.total), format!("{} or more", self.seen + count));
            return Err(Error::Input { what: "number of images", expected, got });
        }
        let log_p = logits.f_log_softmax(1, Kind::Double)?;
        let mut from = 0;
        while from < count {
            let end = self.end_of_chunk();
            let take = (end - self.seen).min(count - from);
            self.take_in(&log_p.f_narrow(0, from as i64, take as i64)?)?;
            (from, self.seen) = (from + take, self.seen + take);
            if self.seen == end {
                self.finish_chunk()?;
            }
        }
        Ok(())
    }

    /// The score.
    ///
    /// # Errors
    /// [`Error::Input`] if fewer images came than were announced.
    pub fn finish(self) -> Result<InceptionScore> {
        if self.seen != self.total {
            let (expected, got) = (self.total.to_string(), self.seen.to_string());
            return Err(Error::Input { what: "number of images", expected, got });
        }
        let count = self.scores.len() as f64;
        let mean = self.scores.iter().sum::<f64>() / count;
        let variance = self.scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / count;
        Ok(InceptionScore { mean, std: variance.sqrt() })
    }

    fn first_of(&self, chunk: u64) -> u64 {
        (u128::from(chunk) * u128::from(self.total) / u128::from(self.splits)) as u64
    }

    fn end_of_chunk(&self) -> u64 {
        self.first_of(self.scores.len() as u64 + 1)
    }

    fn take_in(&mut self, log_p: &Tensor) -> Result<()> {
        let p = log_p.f_exp()?;
        // p ln p is 0 where p is, however far below the logit lies.
        let entropies = p.f_mul(&log_p.f_clamp_min(f64::MIN)?)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        let sum = p.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
        self.sums = Some(match self.sums.take() {
            None => (sum, entropies),
            Some((before, total)) => (before.f_add(&sum)?, total + entropies),
        });
        Ok(())
    }

    /// mean_i KL(p_i ‖ p̄) = (Σ_i Σ_c p ln p)/n − Σ_c p̄ ln p̄.
    fn finish_chunk(&mut self) -> Result<()> {
        let Some((sum, entropies)) = self.sums.take() else { return Ok(()) };
        let chunk = self.scores.len() as u64;
        let count = (self.first_of(chunk + 1) - self.first_of(chunk)) as f64;
        let mean = sum / count;
        let log_mean = mean.f_clamp_min(f64::MIN_POSITIVE)?.f_log()?;
        let marginal = mean.f_mul(&log_mean)?.f_sum(Kind::Double)?.f_double_value(&[])?;
        self.scores.push((entropies / count - marginal).exp());
        Ok(())
    }
}

/// [`InceptionScoreStream`] of all images at once: logits `[N, classes]`.
///
/// # Errors
/// As [`InceptionScoreStream::new`] and [`InceptionScoreStream::add`].
pub fn inception_score(logits: &Tensor, splits: u64) -> Result<InceptionScore> {
    let count = logits.size().first().copied().unwrap_or(0);
    let mut stream = InceptionScoreStream::new(count as u64, splits)?;
    stream.add(logits)?;
    stream.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    #[test]
    fn certain_images_of_all_classes_score_their_number_and_equal_images_one() {
        let certain = Tensor::eye(7, (Kind::Double, Device::Cpu)) * 1e6;
        let score = inception_score(&certain, 1).unwrap();
        assert!((score.mean - 7.0).abs() < 1e-12 && score.std == 0.0, "{score:?}");
        let equal = normals(1, 7, 1).expand([20, 7], false);
        assert!((inception_score(&equal, 4).unwrap().mean - 1.0).abs() < 1e-12);
    }

    #[test]
    fn batches_give_what_all_images_give() {
        let logits = normals(103, 9, 2) * 3.0;
        let whole = inception_score(&logits, 10).unwrap();
        assert!(whole.mean > 1.5 && whole.std > 0.0);
        for batch in [1, 10, 37, 103] {
            let mut stream = InceptionScoreStream::new(103, 10).unwrap();
            for start in (0..103).step_by(batch) {
                stream.add(&logits.narrow(0, start, (batch as i64).min(103 - start))).unwrap();
            }
            let streamed = stream.finish().unwrap();
            assert!((streamed.mean - whole.mean).abs() < 1e-12 && (streamed.std - whole.std).abs() < 1e-12);
        }
    }

    /// The definition, image by image: Σ p (ln p − ln p̄).
    #[test]
    fn it_is_the_mean_divergence() {
        let logits = normals(30, 5, 3);
        let p = logits.softmax(1, Kind::Double);
        let mean = p.mean_dim([0i64].as_slice(), true, Kind::Double);
        let divergence = (&p * (p.log() - mean.log())).sum(Kind::Double) / 30.0;
        let want = divergence.double_value(&[]).exp();
        assert!((inception_score(&logits, 1).unwrap().mean - want).abs() < 1e-12);
    }

    #[test]
    fn wrong_counts_and_values_are_refused() {
        let logits = normals(10, 4, 4);
        assert!(inception_score(&logits, 0).is_err() && inception_score(&logits, 11).is_err());
        assert!(inception_score(&(&logits * f64::NAN), 1).is_err());
        let mut stream = InceptionScoreStream::new(12, 1).unwrap();
        stream.add(&logits).unwrap();
        assert!(stream.add(&logits).is_err(), "20 of 12");
        assert!(stream.add(&logits.narrow(1, 0, 3)).is_err());
        assert!(stream.finish().unwrap_err().to_string().ends_with("expected 12, got 10"));
    }
}
