use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Classifier, Error, Result};

/// The figures of one set of images.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Share of images to which the classifier gives some class a probability above 0.9; `None` for data
    /// without classes.
    pub confident_share: Option<f64>,
    /// Share of images that lie nearer to a training image than the 95th percentile of held-out real images.
    pub near_share: f64,
    /// Entropy of the classes that the classifier assigns, in nats (ln 10 = 2.30 for ten equal classes).
    pub class_entropy: Option<f64>,
    /// Smallest distance of any image to a training image: L2 over pixels in [-1, 1]; 0 would be a copy.
    pub nearest_distance: f64,
    /// Median distance to the nearest training image.
    pub median_distance: f64,
}

/// Measures sets of images against a training set and held-out images of one data set.
#[derive(Debug)]
pub struct Yardstick {
    train: Tensor,
    near_threshold: f64,
    classifier: Option<Classifier>,
}

const CHUNK: i64 = 256;

impl Yardstick {
    /// A yardstick from images `[N, C, H, W]` in [-1, 1] on the CPU.
    ///
    /// # Errors
    /// [`Error::Input`] if the two sets are empty or differ in shape.
    pub fn new(train: &Tensor, held_out: &Tensor, classifier: Option<Classifier>) -> Result<Self> {
        let (a, b) = (train.size(), held_out.size());
        if a.len() != 4 || b.len() != 4 || a[1..] != b[1..] || a[0] == 0 || b[0] == 0 {
            return Err(Error::Input {
                what: "training and held-out images",
                expected: "two sets [N ≥ 1, C, H, W] of equal image shape".into(),
                got: format!("{a:?} and {b:?}"),
            });
        }
        let mut yardstick = Self { train: train.flatten(1, 3), near_threshold: f64::INFINITY, classifier };
        let mut distances = yardstick.distances(held_out)?;
        distances.sort_by(f64::total_cmp);
        yardstick.near_threshold = percentile(&distances, 0.95);
        Ok(yardstick)
    }

    /// The distance below which an image counts as near: the 95th percentile over held-out real images.
    pub fn near_threshold(&self) -> f64 {
        self.near_threshold
    }

    /// The classifier, where the data has classes.
    pub fn classifier(&self) -> Option<&Classifier> {
        self.classifier.as_ref()
    }

    /// The figures of `images` `[N, C, H, W]`.
    ///
    /// # Errors
    /// [`Error::Input`] for images that are empty, of another shape or not finite.
    pub fn measure(&self, images: &Tensor) -> Result<Figures> {
        let mut distances = self.distances(images)?;
        let near = distances.iter().filter(|d| **d < self.near_threshold).count();
        distances.sort_by(f64::total_cmp);
        let (mut confident_share, mut class_entropy) = (None, None);
        if let Some(classifier) = &self.classifier {
            let probabilities = classifier.probabilities(images)?;
            let (best, class) = probabilities.max_dim(1, false);
            confident_share = Some(best.gt(0.9).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]));
            class_entropy = Some(entropy(&Vec::<i64>::try_from(class)?));
        }
        Ok(Figures {
            confident_share,
            near_share: near as f64 / distances.len() as f64,
            class_entropy,
            nearest_distance: distances[0],
            median_distance: percentile(&distances, 0.5),
        })
    }

    /// Distance of each image to its nearest training image.
    fn distances(&self, images: &Tensor) -> Result<Vec<f64>> {
        let size = images.size();
        let numel = self.train.size()[1];
        if size.len() != 4 || size[0] == 0 || size[1] * size[2] * size[3] != numel {
            let expected = format!("[N ≥ 1, C, H, W] with C·H·W = {numel}");
            return Err(Error::Input { what: "images", expected, got: format!("{size:?}") });
        }
        if !bool::try_from(images.isfinite().all())? {
            let expected = "finite pixels in [-1, 1]".into();
            return Err(Error::Input { what: "images", expected, got: "NaN or infinity".into() });
        }
        let flat = images.detach().flatten(1, 3);
        let mut all = Vec::with_capacity(size[0] as usize);
        for start in (0..size[0]).step_by(CHUNK as usize) {
            let chunk = flat.narrow(0, start, CHUNK.min(size[0] - start));
            // Mode 2: the exact form; the matrix-product form cancels near 0, where copies would show.
            let nearest = Tensor::f_cdist(&chunk, &self.train, 2.0, 2)?.amin([1i64].as_slice(), false);
            all.extend(Vec::<f64>::try_from(nearest.to_kind(Kind::Double))?);
        }
        Ok(all)
    }
}

/// The value below which a share `q` of the sorted values lies, interpolated linearly.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let place = q * (sorted.len() - 1) as f64;
    let (low, high) = (place.floor() as usize, place.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

/// −Σ p ln p of the histogram of classes.
fn entropy(classes: &[i64]) -> f64 {
    let mut counts = std::collections::BTreeMap::new();
    for class in classes {
        *counts.entry(class).or_insert(0usize) += 1;
    }
    counts.values().map(|&n| n as f64 / classes.len() as f64).map(|p| -p * p.ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn points(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).view([-1, 1, 1, 1])
    }

    #[test]
    fn near_and_nearest_are_measured_against_the_training_set() {
        let yardstick = Yardstick::new(&points(&[0.0, 1.0]), &points(&[0.1, 0.8, 0.9]), None).unwrap();
        // Held-out distances are .1, .1, .2: the 95th percentile is .19.
        assert!((yardstick.near_threshold() - 0.19).abs() < 1e-6);
        let figures = yardstick.measure(&points(&[0.5, 0.05, -0.15, 3.0])).unwrap();
        assert_eq!(figures.near_share, 0.5);
        assert!((figures.nearest_distance - 0.05).abs() < 1e-6);
        assert!(figures.confident_share.is_none());
    }

    #[test]
    fn entropy_of_equal_classes_is_the_log_of_their_number() {
        assert!((entropy(&[0, 1, 2, 3]) - 4f64.ln()).abs() < 1e-12);
        assert_eq!(entropy(&[7, 7]), 0.0);
    }

    #[test]
    fn nan_and_wrong_shapes_are_refused() {
        let yardstick = Yardstick::new(&points(&[0.0, 1.0]), &points(&[0.1]), None).unwrap();
        assert!(matches!(yardstick.measure(&points(&[f32::NAN])), Err(Error::Input { .. })));
        let wide = Tensor::zeros([2, 1, 2, 2], (Kind::Float, Device::Cpu));
        assert!(matches!(yardstick.measure(&wide), Err(Error::Input { .. })));
    }
}
