use cm_model::{Cond, Denoiser, ImageShape, Sigma};
use cm_schedule::SigmaRange;
use tch::{Device, Tensor};

use crate::{Error, Result};

/// Classifier-free guidance: a denoiser that follows its class more (w > 1) or less (w < 1) closely.
///
/// D_w(x; σ, c) = D(x; σ, ∅) + w (D(x; σ, c) − D(x; σ, ∅)), for a denoiser that was trained with label dropout and so
/// knows the answer ∅ without a class beside those with one. w = 1 is the denoiser as it is, at its own cost; any other
/// w doubles the batch of each evaluation. Labels are wanted for every image.
///
/// On Gaussian data with the means m_c around 0 and one covariance, D_w is the exact denoiser of data around w·m_c.
///
/// # Source
/// Ho and Salimans, *Classifier-free diffusion guidance* (arXiv 2207.12598) eq. 6, whose weight is w − 1.
///
/// ```
/// use cm_sampler::{Error, Guided, model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// let d = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// assert!(matches!(Guided::new(&d, 3.0), Err(Error::GuidanceWithoutClasses)));
/// ```
#[derive(Clone, Copy)]
pub struct Guided<'a> {
    model: &'a dyn Denoiser,
    weight: f64,
}

impl<'a> Guided<'a> {
    /// A denoiser that is guided with weight w.
    ///
    /// # Errors
    /// [`Error::GuidanceWithoutClasses`] for an unconditional model; [`Error::Guidance`] for a weight that is not
    /// finite.
    pub fn new(model: &'a dyn Denoiser, weight: f64) -> Result<Self> {
        if model.num_classes() == 0 {
            return Err(Error::GuidanceWithoutClasses);
        }
        if !weight.is_finite() {
            return Err(Error::Guidance { weight });
        }
        Ok(Self { model, weight })
    }

    /// The weight w.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.weight
    }
}

impl Denoiser for Guided<'_> {
    fn shape(&self) -> ImageShape {
        self.model.shape()
    }
    fn num_classes(&self) -> i64 {
        self.model.num_classes()
    }
    fn sigma_range(&self) -> SigmaRange {
        self.model.sigma_range()
    }
    fn device(&self) -> Device {
        self.model.device()
    }

    fn denoise(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> cm_model::Result<Tensor> {
        if cond.labels.is_none() {
            return Err(cm_model::Error::Value {
                what: "class labels".into(),
                expected: "a class for each image, which guidance steers towards".into(),
                got: "none".into(),
            });
        }
        if self.weight == 1.0 {
            return self.model.denoise(x, sigma, cond);
        }
        let batch = self.shape().check("images to denoise", x)?;
        let rows = cond.one_hot(batch, self.num_classes(), x.device())?;
        let twice = |t: &Tensor| Tensor::cat(&[t, t], 0);
        let both = Cond {
            labels: Some(Tensor::cat(&[&rows, &rows.zeros_like()], 0)),
            augment: cond.augment.as_ref().map(twice),
        };
        let levels;
        let sigma = match sigma {
            Sigma::One(_) => sigma,
            Sigma::Each(each) => {
                levels = [each, each].concat();
                Sigma::Each(&levels)
            }
        };
        let answers = self.model.denoise(&twice(x), sigma, &both)?;
        let [with_class, without] = [0, batch].map(|start| answers.narrow(0, start, batch));
        Ok(&without + (with_class - &without) * self.weight)
    }
}

impl std::fmt::Debug for Guided<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guided").field("weight", &self.weight).finish_non_exhaustive()
    }
}
