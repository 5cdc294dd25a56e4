use tch::Kind;

use crate::device::DeviceSpec;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between Rust and libtorch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device was named that does not exist anywhere.
    #[error("device '{}' is not known; expected auto, cpu, cuda or cuda:N", .0.escape_debug())]
    DeviceName(String),
    /// A device was asked for and is not there.
    #[error("device {wanted} is not available: {reason}")]
    DeviceMissing {
        /// What was asked for.
        wanted: DeviceSpec,
        /// Why it is not there and what to do.
        reason: String,
    },
    /// The object of what needs CUDA's headers cannot be used.
    #[error(
        "{}: {reason}; `cargo xtask cuda-object` builds it, and CM_CUDA_OBJECT names one that lies elsewhere",
        .path.display()
    )]
    CudaObject {
        /// Where it was looked for.
        path: std::path::PathBuf,
        /// Why it does not serve.
        reason: String,
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
    /// A tensor does not have the shape that the operation needs.
    #[error("{what}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// What the tensor is for.
        what: String,
        /// The shape that was expected.
        expected: Vec<i64>,
        /// The shape that came.
        got: Vec<i64>,
    },
    /// A tensor has another element type than the operation needs.
    #[error("{what}: expected elements of kind {expected:?}, got {got:?}")]
    Dtype {
        /// What the tensor is for.
        what: String,
        /// The kind that was expected.
        expected: Kind,
        /// The kind that came.
        got: Kind,
    },
    /// An optimiser state does not belong to these parameters.
    #[error("the optimiser state does not fit: {}", .differences.join("; "))]
    State {
        /// Every difference: missing, unexpected, of another shape or kind.
        differences: Vec<String>,
    },
    /// A variable of the environment by which a launcher says who this process is cannot be used.
    #[error("{name}{}: expected {expected}; {advice}", .got.as_ref().map_or(" is not set".into(), |got| format!("={got}")))]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value, if it is set.
        got: Option<String>,
        /// What was expected.
        expected: String,
        /// What to do.
        advice: String,
    },
    /// Another rank, or this one, ended or stopped, and with it what all ranks do together.
    #[error("rank {rank}: {cause}")]
    Rank {
        /// The rank.
        rank: usize,
        /// What happened to it.
        cause: String,
    },
    /// The ranks could not meet, or lost one another, and it is not known which is to blame.
    #[error("{during}: {cause}")]
    Exchange {
        /// What they were doing.
        during: String,
        /// What went wrong.
        cause: String,
    },
    /// The operating system refused to tell or to do something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// libtorch refused an operation of this crate's C++.
    #[error("libtorch: {}", first_line(.text))]
    Cpp {
        /// The whole text.
        text: String,
    },
    /// libtorch refused an operation of tch.
    #[error("libtorch: {}", first_line(&.0.to_string()))]
    Torch(#[source] tch::TchError),
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Error::Torch(error)
    }
}

impl Error {
    pub(crate) fn value(what: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Self {
        Error::Value { what: what.into(), expected: expected.into(), got: got.to_string() }
    }
}

/// libtorch's texts carry a C++ backtrace of thousands of characters behind their first line.
fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    #[test]
    fn display_is_one_short_line() {
        let error = Error::from(Tensor::from_slice(&[1.0f32, 2.0]).f_view([3]).unwrap_err());
        let text = error.to_string();
        assert!(!text.contains('\n') && text.len() < 200, "{text}");
        assert!(text.contains("shape"), "{text}");
        // The rest is kept for whoever asks.
        assert!(format!("{error:?}").len() > text.len());
    }
}
