use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between a caller and a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor does not have the shape that the operation needs.
    #[error("{what}: expected shape {expected}, got {got:?}")]
    Shape {
        /// What the tensor is for.
        what: String,
        /// The shape that was expected, in words.
        expected: String,
        /// The shape that came.
        got: Vec<i64>,
    },
    /// A value lies outside what is allowed.
    #[error("{what}: expected {expected}, got {got}")]
    Value {
        /// What the value is for.
        what: String,
        /// The allowed values.
        expected: String,
        /// The value that came.
        got: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {action} failed: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The operating system's reason.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// Weights do not fit the network.
    #[error("weights do not fit the network: {}", some(.differences))]
    Weights {
        /// Every difference: missing, unexpected, of another shape or dtype.
        differences: Vec<String>,
    },
    /// Recorded noise was asked for more often, or in other shapes, than it was recorded.
    #[error("recorded noise: {0}")]
    Recorded(String),
    /// Two parameters of one network have the same name.
    #[error("the network registers the parameter '{0}' twice")]
    DuplicateParameter(String),
    /// libtorch refused an operation.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[source] tch::TchError),
    /// What tch lacks failed.
    #[error(transparent)]
    Backend(#[from] cm_torch::Error),
    /// A schedule was given values that it cannot hold.
    #[error(transparent)]
    Schedule(#[from] cm_schedule::Error),
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Torch(error)
    }
}

impl Error {
    pub(crate) fn shape(what: impl Into<String>, expected: impl Into<String>, got: &[i64]) -> Self {
        Error::Shape { what: what.into(), expected: expected.into(), got: got.to_vec() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), action, source }
    }
}

/// Most differences that a message lists: a file may describe a network of thousands of weights and hold none.
const LISTED: usize = 40;

fn some(differences: &[String]) -> String {
    let mut text = differences.iter().take(LISTED).map(String::as_str).collect::<Vec<_>>().join("; ");
    if differences.len() > LISTED {
        text += &format!("; and {} more", differences.len() - LISTED);
    }
    text
}

/// libtorch's texts carry a C++ backtrace of thousands of characters behind their first line.
fn first_line(error: &tch::TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
