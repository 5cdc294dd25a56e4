//! Images to figures: a network that sees them, and what is kept of what it sees.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{Divisor, Error, InceptionScore, InceptionScoreStream, Moments, MomentsStream, Result};

/// What a network sees in a batch of images.
#[derive(Debug)]
pub struct Seen {
    /// Features `[B, D]`.
    pub features: Tensor,
    /// Features that keep their place in the image, `[B, D']`, of a network that has some.
    pub spatial: Option<Tensor>,
    /// Logits of classes `[B, classes]`.
    pub logits: Tensor,
}

/// A network that images are compared by.
pub trait FeatureNet {
    /// What it sees in images `[B, C, H, W]` in [-1, 1].
    ///
    /// # Errors
    /// [`crate::Error`] for images that it does not take.
    fn see(&self, images: &Tensor) -> Result<Seen>;

    /// Numbers in an image's features.
    fn features(&self) -> u64;

    /// Numbers in the features that keep their place, of a network that has some.
    fn spatial_features(&self) -> Option<u64>;
}

/// Images that Inception sees at a time: at 299×299 its first layers take a quarter of a gigabyte for so many.
#[cfg(feature = "nets")]
const CHUNK: i64 = 32;

#[cfg(feature = "nets")]
impl FeatureNet for cm_net::Inception {
    fn see(&self, images: &Tensor) -> Result<Seen> {
        let images = images.f_to_device(self.params().device())?;
        let (mut features, mut spatial, mut logits) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in images.f_split(CHUNK, 0)? {
            let seen = self.forward(&chunk)?;
            features.push(seen.pooled);
            spatial.push(seen.spatial);
            logits.push(seen.logits_unbiased);
        }
        let [features, spatial, logits] = [features, spatial, logits].map(|parts| Tensor::f_cat(&parts, 0));
        Ok(Seen { features: features?, spatial: Some(spatial?), logits: logits? })
    }

    fn features(&self) -> u64 {
        cm_net::inception::POOLED as u64
    }

    fn spatial_features(&self) -> Option<u64> {
        Some(cm_net::inception::SPATIAL as u64)
    }
}

/// What is kept of the images of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Parts {
    /// Mean and covariance of the features, for the Fréchet distance.
    pub moments: bool,
    /// The same of the features that keep their place.
    pub spatial: bool,
    /// The Inception score, over so many chunks.
    pub score: Option<u64>,
    /// The features themselves, for KID, precision and recall: four bytes a number.
    pub features: bool,
}

impl Parts {
    /// Whether what was kept for `self` has all of `other`.
    #[must_use]
    pub fn hold(&self, other: &Parts) -> bool {
        (self.moments || !other.moments)
            && (self.spatial || !other.spatial)
            && (self.features || !other.features)
            && (other.score.is_none() || self.score == other.score)
    }

    /// Everything that either has; of two Inception scores that of `self`.
    #[must_use]
    pub fn and(&self, other: &Parts) -> Parts {
        Parts {
            moments: self.moments || other.moments,
            spatial: self.spatial || other.spatial,
            score: self.score.or(other.score),
            features: self.features || other.features,
        }
    }
}

/// What was kept of the images of a set.
#[derive(Debug, Default)]
pub struct Measured {
    /// Number of images.
    pub count: Option<u64>,
    /// Moments of the features.
    pub moments: Option<Moments>,
    /// Moments of the features that keep their place.
    pub spatial: Option<Moments>,
    /// The Inception score.
    pub score: Option<InceptionScore>,
    /// Features `[N, D]` float32 on the CPU.
    pub features: Option<Tensor>,
}

/// Collects [`Parts`] of images that come in batches.
#[derive(Debug)]
pub struct Collector {
    parts: Parts,
    count: u64,
    moments: MomentsStream,
    spatial: MomentsStream,
    score: Option<InceptionScoreStream>,
    features: Vec<Tensor>,
}

impl Collector {
    /// Nothing yet of `total` images.
    ///
    /// # Errors
    /// [`Error::Input`] if the score has more chunks than there are images.
    pub fn new(parts: Parts, total: u64) -> Result<Self> {
        let score = parts.score.map(|splits| InceptionScoreStream::new(total, splits)).transpose()?;
        let (moments, spatial) = (MomentsStream::default(), MomentsStream::default());
        Ok(Self { parts, count: 0, moments, spatial, score, features: Vec::new() })
    }

    /// Takes a batch in.
    ///
    /// # Errors
    /// [`Error::Input`] for features that are not finite or that do not fit those before, and for a network without
    /// spatial features where they are wanted.
    pub fn add(&mut self, seen: &Seen) -> Result<()> {
        if self.parts.moments {
            self.moments.add(&seen.features)?;
        }
        if self.parts.spatial {
            let spatial = seen.spatial.as_ref().ok_or_else(|| Error::Input {
                what: "spatial features",
                expected: "a network that has some".into(),
                got: "none".into(),
            })?;
            self.spatial.add(spatial)?;
        }
        if let Some(score) = &mut self.score {
            score.add(&seen.logits)?;
        }
        if self.parts.features {
            self.features.push(seen.features.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.copy());
        }
        self.count += seen.features.size().first().copied().unwrap_or(0) as u64;
        Ok(())
    }

    /// What was kept. Covariances have divisor n − 1.
    ///
    /// # Errors
    /// [`Error::Input`] if there were too few images for what is wanted.
    pub fn finish(self) -> Result<Measured> {
        let moments = |wanted: bool, stream: MomentsStream| {
            wanted.then(|| stream.finish(Divisor::CountLessOne)).transpose()
        };
        let features = match self.features[..] {
            [] => None,
            _ => Some(Tensor::f_cat(&self.features, 0)?),
        };
        Ok(Measured {
            count: Some(self.count),
            moments: moments(self.parts.moments, self.moments)?,
            spatial: moments(self.parts.spatial, self.spatial)?,
            score: self.score.map(InceptionScoreStream::finish).transpose()?,
            features,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inception_score;
    use crate::testing::normals;

    fn seen(rows: std::ops::Range<i64>) -> Seen {
        let part = |x: Tensor| x.narrow(0, rows.start, rows.end - rows.start);
        let spatial = Some(part(normals(50, 5, 2)));
        Seen { features: part(normals(50, 4, 1)), spatial, logits: part(normals(50, 3, 3)) }
    }

    const ALL: Parts = Parts { moments: true, spatial: true, score: Some(5), features: true };

    #[test]
    fn batches_collect_to_what_all_images_give() {
        let mut collector = Collector::new(ALL, 50).unwrap();
        for rows in [0..7, 7..8, 8..50] {
            collector.add(&seen(rows)).unwrap();
        }
        let measured = collector.finish().unwrap();
        let all = seen(0..50);
        assert_eq!(measured.count, Some(50));
        assert!(
            measured.moments.unwrap().covariance().equal(Moments::of(&all.features).unwrap().covariance())
        );
        assert!(measured.spatial.unwrap().mean().equal(Moments::of(&all.spatial.unwrap()).unwrap().mean()));
        assert!(measured.features.unwrap().equal(&all.features.to_kind(Kind::Float)));
        let (score, whole) = (measured.score.unwrap(), inception_score(&all.logits, 5).unwrap());
        assert!((score.mean - whole.mean).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_wanted_is_not_kept_and_what_is_not_there_is_refused() {
        let mut collector = Collector::new(Parts::default(), 50).unwrap();
        collector.add(&seen(0..50)).unwrap();
        let none = collector.finish().unwrap();
        assert!(none.moments.is_none() && none.features.is_none() && none.score.is_none());
        let mut collector = Collector::new(ALL, 50).unwrap();
        assert!(collector.add(&Seen { spatial: None, ..seen(0..50) }).is_err());
        assert!(Collector::new(ALL, 4).is_err(), "5 chunks of 4 images");
    }

    #[test]
    fn parts_hold_their_parts() {
        let some = Parts { moments: true, ..Parts::default() };
        assert!(ALL.hold(&some) && ALL.hold(&ALL) && !some.hold(&ALL));
        assert!(!ALL.hold(&Parts { score: Some(10), ..some }));
        let other = Parts { spatial: true, score: Some(10), ..Parts::default() };
        assert_eq!(some.and(&other), Parts { moments: true, ..other });
        assert_eq!(ALL.and(&other), ALL);
    }
}
