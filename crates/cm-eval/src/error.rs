/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in an evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The images or labels do not fit the evaluation.
    #[error("{what}: expected {expected}, got {got}")]
    Input {
        /// What was handed over.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A model or its shapes do not fit.
    #[error(transparent)]
    Model(#[from] cm_model::Error),
    /// A network does not take the images.
    #[cfg(feature = "nets")]
    #[error(transparent)]
    Net(#[from] cm_net::Error),
    /// What tch lacks failed.
    #[error(transparent)]
    Backend(#[from] cm_torch::Error),
    /// libtorch refused an operation.
    #[error("libtorch: {}", .0.to_string().lines().next().unwrap_or_default())]
    Torch(#[from] tch::TchError),
}
