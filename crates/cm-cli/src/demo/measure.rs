//! The demo's figures: real images, a Gaussian fit and noise beside the samples.

use anyhow::Result;
use cm_data::{Batch, Dataset, LabelRule, Split};
use cm_eval::{Classifier, ClassifierSpec, Figures, Yardstick, gaussian_fit, noise};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::experiment::Experiment;

/// The first so many images of a large set are what samples are measured against.
const TRAIN_IMAGES: usize = 20_000;
/// And so many held-out ones.
const HELD_OUT_IMAGES: usize = 2_000;

/// Training and held-out images of the demo's data, with their labels where there are some.
pub struct Sets {
    train: Tensor,
    held_out: Tensor,
    train_labels: Vec<i64>,
    held_out_labels: Vec<i64>,
    classes: i64,
}

/// The figures of the samples and of what they are compared with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Compared {
    /// One-step samples.
    pub one_step: Figures,
    /// Two-step samples, where the model has them.
    pub two_step: Option<Figures>,
    /// Samples of the teacher, where there is one, by Heun's method with 18 levels.
    pub teacher: Option<Figures>,
    /// Held-out real images.
    pub held_out_real: Figures,
    /// Draws from a Gaussian with the training data's mean and covariance.
    pub gaussian_fit: Figures,
    /// Noise.
    pub noise: Figures,
}

/// Who judges.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Judge {
    /// The classifier's share of right answers on held-out images, where the data has classes.
    pub classifier_accuracy: Option<f64>,
    /// Number of held-out images.
    pub held_out_images: i64,
    /// A sample is near if its distance to the training images is below this.
    pub near_threshold: f64,
}

impl Sets {
    /// Opens both parts of the experiment's data, with labels if the data has some.
    pub fn open(experiment: &Experiment) -> Result<Self> {
        let part = |split| -> Result<(Tensor, Vec<i64>, i64)> {
            let mut spec = experiment.data.clone();
            (spec.split, spec.labels) = (split, LabelRule::Auto);
            let set = spec.open()?;
            // Distances between all images of a large set would take longer than a short training.
            let most = if split == Split::Train { TRAIN_IMAGES } else { HELD_OUT_IMAGES };
            let all = Batch::gather(&*set, 0..set.len().min(most) as u32)?;
            let labels = all.labels.iter().flatten().map(|&label| i64::from(label)).collect();
            Ok((all.to_images(Device::Cpu)?, labels, Dataset::num_classes(&*set) as i64))
        };
        let (train, train_labels, classes) = part(Split::Train)?;
        let (held_out, held_out_labels, _) = part(Split::Test)?;
        Ok(Self { train, held_out, train_labels, held_out_labels, classes })
    }

    /// The held-out images.
    pub fn held_out(&self) -> &Tensor {
        &self.held_out
    }

    /// What measures: a classifier that is trained here, where there are labels, and distances to the training
    /// images.
    pub fn yardstick(&self, seed: u64) -> Result<Yardstick> {
        // Twenty passes over a small set, two over a large one.
        let most = ClassifierSpec::default();
        let epochs =
            (2 * TRAIN_IMAGES / self.train_labels.len().max(1)).clamp(2, most.epochs as usize) as u32;
        let spec = ClassifierSpec { seed, epochs, ..most };
        let train = || Classifier::train(&self.train, &self.train_labels, self.classes, spec);
        let classifier = (self.classes > 0).then(train).transpose()?;
        Ok(Yardstick::new(&self.train, &self.held_out, classifier)?)
    }

    /// How good the yardstick is.
    pub fn judge(&self, yardstick: &Yardstick) -> Result<Judge> {
        let accuracy = yardstick.classifier().map(|c| c.accuracy(&self.held_out, &self.held_out_labels));
        Ok(Judge {
            classifier_accuracy: accuracy.transpose()?,
            held_out_images: self.held_out.size()[0],
            near_threshold: yardstick.near_threshold(),
        })
    }

    /// The figures of samples and of everything that stands beside them.
    pub fn figures(
        &self,
        yardstick: &Yardstick,
        one: &Tensor,
        two: Option<&Tensor>,
        teacher: Option<&Tensor>,
        seed: u64,
    ) -> Result<Compared> {
        let measure = |images: &Tensor| yardstick.measure(images);
        let count = one.size()[0] as usize;
        Ok(Compared {
            one_step: yardstick.measure(one)?,
            two_step: two.map(measure).transpose()?,
            teacher: teacher.map(measure).transpose()?,
            held_out_real: yardstick.measure(&self.held_out)?,
            gaussian_fit: yardstick.measure(&gaussian_fit(&self.train, count, seed)?)?,
            noise: yardstick.measure(&noise(&self.train, count, seed)?)?,
        })
    }
}
