/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can be wrong with a model, or with a request for samples.
///
/// The functions of this crate return it alone: what the crates below say is in it, and turns into it with `?`.
///
/// ```
/// # #[cfg(feature = "nets")] {
/// use cm_sampler::{Error, load, tch::Device};
/// let error = load("no-such-file.safetensors", Device::Cpu).unwrap_err();
/// assert!(matches!(error, Error::Model(cm_sampler::model::Error::Io { .. })));
/// assert!(error.to_string().starts_with("no-such-file.safetensors: "));
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is nothing to draw.
    #[error("no seeds were given: each image needs one")]
    NoSeeds,
    /// A seed has no noise of its own.
    #[error("seed {seed} is too large: seeds run from 0 to 2^56 − 1")]
    Seed {
        /// The seed.
        seed: u64,
    },
    /// A batch of nothing.
    #[error("batch = 0: expected at least one image at a time")]
    EmptyBatch,
    /// Labels do not go with the seeds.
    #[error("{labels} class labels for {seeds} seeds: expected one label for each image")]
    NumLabels {
        /// Number of labels.
        labels: usize,
        /// Number of seeds.
        seeds: usize,
    },
    /// A model without classes was asked for one.
    #[error("class labels were given, and the model has no classes: leave the labels out")]
    Unconditional,
    /// A noise level that the model does not know.
    #[error("noise level {sigma}: the model knows levels from σ_min = {min} to σ_max = {max}")]
    Level {
        /// The level.
        sigma: f64,
        /// The model's lowest.
        min: f64,
        /// The model's highest.
        max: f64,
    },
    /// A plan of an ODE solver for a consistency function.
    #[error(
        "a consistency function can only jump, and the plan has steps of an ODE solver, which need a denoiser"
    )]
    Plan,
    /// Steps of an ODE solver with a consistency function.
    #[error(
        "the model is a consistency function, and this sampler is an ODE solver, which needs a denoiser; sample in \
         one step or in several (multistep)"
    )]
    NeedsDenoiser,
    /// Jumps with a denoiser.
    #[error(
        "the model is a denoiser, and this sampler needs a consistency function; sample with an ODE solver such as \
         Heun's"
    )]
    NeedsConsistency,
    /// Guidance that has no meaning.
    #[error(
        "guidance {weight}: expected a finite number; 1 is the model as it is, more follows the class more closely"
    )]
    Guidance {
        /// The weight w.
        weight: f64,
    },
    /// A model without classes was to be guided towards one.
    #[error("guidance steers towards a class, and the model has no classes")]
    GuidanceWithoutClasses,
    /// One of several requests cannot be met.
    #[error("job {index}: {source}")]
    Job {
        /// Its position in the list.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: Box<Error>,
    },
    /// Measurements of one edit that no picture has together.
    #[error(
        "the measurements contradict each other: after imposing them in turn they are still {gap:.1e} apart, and no picture has all that they know; measure them on one picture"
    )]
    Contradiction {
        /// How far apart, in units of the largest value.
        gap: f64,
    },
    /// Time points or noise levels that no sampler can walk along.
    #[error(transparent)]
    Schedule(#[from] cm_schedule::Error),
    /// More time points than there is room for.
    #[error(
        "{points} time points on a grid of {steps}: expected from 1 to {}, since the ends of the grid are not \
         searched", .steps.saturating_sub(2)
    )]
    NoRoom {
        /// Number of points that were asked for.
        points: usize,
        /// Number of levels of the grid.
        steps: usize,
    },
    /// A score that cannot be compared with others.
    #[error("the score of time points {ts:?} is {score}: expected a finite number")]
    Score {
        /// The time points.
        ts: Vec<usize>,
        /// The score.
        score: f64,
    },
    /// The model or the noise source refused.
    #[error(transparent)]
    Model(#[from] cm_model::Error),
    /// A file holds no model that can be used, or its weights do not say enough.
    #[cfg(feature = "nets")]
    #[error(transparent)]
    Nets(cm_net::Error),
}

#[cfg(feature = "nets")]
impl From<cm_net::Error> for Error {
    fn from(error: cm_net::Error) -> Self {
        match error {
            cm_net::Error::Model(error) => Error::Model(error),
            cm_net::Error::WrongRole { wanted: cm_net::Role::Denoiser, .. } => Error::NeedsDenoiser,
            cm_net::Error::WrongRole { wanted: cm_net::Role::Consistency, .. } => Error::NeedsConsistency,
            error => Error::Nets(error),
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Model(error.into())
    }
}
