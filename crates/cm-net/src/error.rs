use std::path::PathBuf;

use cm_model::LpipsNet;

use crate::Role;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a description of a network and the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option of a network that it cannot have.
    #[error("network option {key} = {value}: expected {expected}")]
    Option {
        /// The option, as it stands in a config file.
        key: &'static str,
        /// What came.
        value: String,
        /// The allowed values.
        expected: String,
    },
    /// A model of the other kind was asked for.
    #[error("{what} is a {got} and a {wanted} was asked for; {advice}")]
    WrongRole {
        /// The file, or what else the model came from.
        what: String,
        /// What it is.
        got: Role,
        /// What was asked for.
        wanted: Role,
        /// What to do about it.
        advice: &'static str,
    },
    /// A safetensors file that is not one of our models, or of a later version of this program.
    #[error("{path}: {problem}")]
    NotAModel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// Images that a network of LPIPS cannot take.
    #[error("LPIPS with {net} needs images with {needs}, got {}×{}×{}", .got[0], .got[1], .got[2])]
    ImagesForLpips {
        /// The network.
        net: LpipsNet,
        /// What it needs.
        needs: String,
        /// Channels, height and width that came.
        got: [i64; 3],
    },
    /// The weights in a file do not fit the network that it describes.
    #[error("{path}: {source}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// Every difference.
        #[source]
        source: cm_model::Error,
    },
    /// A file in a published form that cannot be read, or that does not say enough.
    #[error("{path}: {problem}")]
    Import {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// A kind of model that there is not.
    #[error("kind '{}': expected {expected}", cm_model::short(.got))]
    Kind {
        /// What came.
        got: String,
        /// What there is.
        expected: String,
    },
    /// What the crates below refused.
    #[error(transparent)]
    Model(#[from] cm_model::Error),
}

impl From<cm_model::schedule::Error> for Error {
    fn from(error: cm_model::schedule::Error) -> Self {
        Error::Model(error.into())
    }
}

impl Error {
    pub(crate) fn option(
        key: &'static str,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Error::Option { key, value: value.to_string(), expected: expected.into() }
    }
}
