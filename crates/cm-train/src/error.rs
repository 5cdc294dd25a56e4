use std::path::PathBuf;

use cm_model::LpipsNet;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the caller's own code, such as a data source.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting of the run cannot be used.
    #[error("{key} = {got}: expected {expected}; {advice}")]
    Setting {
        /// The setting, as it stands in a config file.
        key: &'static str,
        /// What came.
        got: String,
        /// What was expected.
        expected: String,
        /// What to do about it.
        advice: String,
    },
    /// LPIPS without the weights of its network.
    #[error(
        "train.metric = lpips needs the weights in {}: `cargo xtask fetch lpips{}` downloads them, or `cm model \
         import FILE --as {} -o {}` makes them of torchvision's; without them, --set train.metric=l2",
        .file.display(),
        net_option(*.net),
        .net.file_stem(),
        .file.display()
    )]
    MissingWeights {
        /// The network.
        net: LpipsNet,
        /// The file that was expected.
        file: PathBuf,
    },
    /// A tensor that was handed in does not fit.
    #[error("{what}: expected {expected}, got {got}")]
    Input {
        /// What the tensor or list is for.
        what: &'static str,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// The loss or a gradient was NaN or infinite. Weights, averages and moments are as before the step.
    #[error("step {step}: {what} is not finite, so the step was not taken")]
    NonFinite {
        /// The step that was not taken; the first step of a run is 1.
        step: u64,
        /// What holds the NaN or infinity: an image of the batch, a weight, a gradient, by name; else the loss.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// A step whose loss and gradients were finite made weights, averages or moments that are not.
    #[error("after step {step}: {what} is not finite, so this state was not saved")]
    Spoilt {
        /// The last step that was taken.
        step: u64,
        /// The first tensor that holds a NaN or infinity.
        what: String,
        /// What to do about it.
        advice: String,
    },
    /// A run stopped because of [`Error::NonFinite`] or [`Error::Spoilt`].
    #[error(
        "{source}; {}; {}",
        match .checkpoint {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "no checkpoint had been written yet".to_owned(),
        },
        .source.advice()
    )]
    Diverged {
        /// Which step, which tensor, and what to do.
        source: Box<Error>,
        /// The last checkpoint that was written before it.
        checkpoint: Option<PathBuf>,
    },
    /// A checkpoint cannot be used.
    #[error("checkpoint {path}: {problem}")]
    Checkpoint {
        /// The checkpoint's folder, or the file in it.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {action} failed: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The source of batches failed.
    #[error("the batch of step {step}: {source}")]
    Batch {
        /// The step whose batch was asked for.
        step: u64,
        /// The source's reason.
        #[source]
        source: BoxError,
    },
    /// An observer failed, such as one that writes a picture.
    #[error("after step {step}: {source}")]
    Observer {
        /// The last step that was taken.
        step: u64,
        /// The observer's reason.
        #[source]
        source: BoxError,
    },
    /// A network, file or noise source failed.
    #[error(transparent)]
    Model(#[from] cm_model::Error),
    /// The optimiser failed.
    #[error(transparent)]
    Backend(#[from] cm_torch::Error),
    /// A schedule was given values that it cannot hold.
    #[error(transparent)]
    Schedule(#[from] cm_schedule::Error),
}

/// How the download of a network's weights is told which.
fn net_option(net: LpipsNet) -> String {
    if net == LpipsNet::Vgg16 { String::new() } else { format!(" --net {net}") }
}

impl Error {
    /// What may keep a run from going on to diverge; empty for other errors.
    fn advice(&self) -> &str {
        match self {
            Error::NonFinite { advice, .. } | Error::Spoilt { advice, .. } => advice,
            _ => "",
        }
    }

    pub(crate) fn setting(
        key: &'static str,
        got: impl std::fmt::Display,
        expected: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Error::Setting { key, got: got.to_string(), expected: expected.into(), advice: advice.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), action, source }
    }

    pub(crate) fn checkpoint(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.into(), problem: problem.into() }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Model(error.into())
    }
}
