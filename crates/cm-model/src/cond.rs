use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Noise levels of a batch, in units of the data (σ ∈ [σ_min, σ_max]).
///
/// They stay in f64 on the host, where the schedules are computed; only the finished scalings become tensors.
#[derive(Debug, Clone, Copy)]
pub enum Sigma<'a> {
    /// One level for the whole batch.
    One(f64),
    /// One level for each image.
    Each(&'a [f64]),
}

impl Sigma<'_> {
    /// Evaluates `g(σ)` and shapes it to be multiplied with a batch `[B, C, H, W]`: `[1, 1, 1, 1]` for one
    /// level, `[B, 1, 1, 1]` else, float32 on `device`.
    pub fn broadcast(&self, device: Device, g: impl Fn(f64) -> f64) -> Tensor {
        self.flat(device, g).view([-1, 1, 1, 1])
    }

    /// Evaluates `g(σ)` as float32 on `device`: `[1]` for one level, `[B]` else.
    pub fn flat(&self, device: Device, g: impl Fn(f64) -> f64) -> Tensor {
        let values: Vec<f32> = match self {
            Sigma::One(sigma) => vec![g(*sigma) as f32],
            Sigma::Each(sigmas) => sigmas.iter().map(|&sigma| g(sigma) as f32).collect(),
        };
        // Not waiting for the device keeps its queue filled; a list this short is staged when the call returns.
        Tensor::from_slice(&values).to_device_(device, Kind::Float, true, false)
    }

    /// Checks that every level is finite and positive and that there is one for each of `batch` images.
    ///
    /// # Errors
    /// [`Error::Value`] with the first level that is wrong, or the two lengths.
    pub fn check(&self, batch: i64) -> Result<()> {
        let levels = match self {
            Sigma::One(sigma) => std::slice::from_ref(sigma),
            Sigma::Each(sigmas) if sigmas.len() as i64 == batch => sigmas,
            Sigma::Each(sigmas) => {
                return Err(Error::Value {
                    what: "sigma".into(),
                    expected: format!("one noise level for each of {batch} images"),
                    got: format!("{} noise levels", sigmas.len()),
                });
            }
        };
        match levels.iter().find(|sigma| !(sigma.is_finite() && **sigma > 0.0)) {
            None => Ok(()),
            Some(sigma) => Err(Error::Value {
                what: "sigma".into(),
                expected: "a finite noise level above 0".into(),
                got: sigma.to_string(),
            }),
        }
    }
}

/// What a network is conditioned on beside the noise level.
#[derive(Debug, Default)]
pub struct Cond {
    /// Class labels: int64 `[B]`, or float `[B, classes]` for soft labels. `None` asks for the unconditional
    /// answer (zeros in EDM's networks; an error in networks that cannot do without).
    pub labels: Option<Tensor>,
    /// Parameters of the geometric augmentation, float `[B, 9]`; `None` means zeros, as when sampling.
    pub augment: Option<Tensor>,
}

impl Cond {
    /// No condition.
    pub fn none() -> Self {
        Self::default()
    }

    /// Class labels for a network of `num_classes` classes; an empty condition where that is 0.
    ///
    /// # Errors
    /// [`Error::Value`] for a label outside `0..num_classes`.
    pub fn labels(labels: &[i64], num_classes: i64, device: Device) -> Result<Self> {
        if num_classes == 0 {
            return Ok(Self::none());
        }
        if let Some(bad) = labels.iter().find(|label| !(0..num_classes).contains(*label)) {
            return Err(Error::Value {
                what: "class label".into(),
                expected: format!("0 to {}", num_classes - 1),
                got: bad.to_string(),
            });
        }
        Ok(Self { labels: Some(Tensor::from_slice(labels).to_device(device)), augment: None })
    }

    /// The same classes, and images that are not augmented: what a teacher is told, which is used as in sampling.
    #[must_use]
    pub fn without_augment(&self) -> Self {
        Self { labels: self.labels.as_ref().map(Tensor::shallow_clone), augment: None }
    }

    /// The rows `start..start + length` of the condition.
    pub fn narrow(&self, start: i64, length: i64) -> Self {
        let rows = |t: &Tensor| t.narrow(0, start, length);
        Self { labels: self.labels.as_ref().map(rows), augment: self.augment.as_ref().map(rows) }
    }

    /// Labels as float rows `[B, num_classes]`: one-hot for integer labels, as they are for soft ones, zeros
    /// where there are none.
    ///
    /// # Errors
    /// [`Error::Shape`] if the labels fit neither form.
    pub fn one_hot(&self, batch: i64, num_classes: i64, device: Device) -> Result<Tensor> {
        let Some(labels) = &self.labels else {
            return Ok(Tensor::zeros([batch, num_classes], (Kind::Float, device)));
        };
        match labels.size().as_slice() {
            [n] if *n == batch && labels.kind() == Kind::Int64 => {
                Ok(labels.to_device(device).f_one_hot(num_classes)?.to_kind(Kind::Float))
            }
            [n, classes] if *n == batch && *classes == num_classes => {
                Ok(labels.to_device(device).to_kind(Kind::Float))
            }
            size => Err(Error::shape(
                "class labels",
                format!("[{batch}] int64 or [{batch}, {num_classes}] float"),
                size,
            )),
        }
    }
}

/// Whether a network is evaluated or trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    Eval,
    /// Dropout, with masks that are a function of the seed: two calls with one seed, one batch shape and one
    /// network drop the same units, which is how student and target share their mask.
    Train {
        /// Seed of the masks.
        dropout_seed: u64,
    },
}
