//! The crate's one error type.

/// What can be wrong with a number that a caller, or a config file, hands to this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A number outside the range in which its formula has a meaning.
    #[error("{key} = {value}: expected {expected}; {advice}")]
    OutOfRange {
        /// The name of the number, as it stands in a config file.
        key: &'static str,
        /// What came.
        value: f64,
        /// The range that was expected.
        expected: String,
        /// What to do about it, or what would go wrong.
        advice: &'static str,
    },
    /// A list of noise levels that no sampler can walk along.
    #[error("sigmas[{index}] = {value}: {expected}")]
    Levels {
        /// Position in the list.
        index: usize,
        /// What stands there.
        value: f64,
        /// What was expected there.
        expected: &'static str,
    },
    /// A list with too few entries.
    #[error("{key} has {got} entries: expected at least {least}; {advice}")]
    TooFew {
        /// The name of the list.
        key: &'static str,
        /// Its length.
        got: usize,
        /// The least length that makes sense.
        least: usize,
        /// What to do about it.
        advice: &'static str,
    },
}

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// `Ok` if `ok`, otherwise the [`Error::OutOfRange`] made of the rest.
pub(crate) fn ensure(
    ok: bool,
    key: &'static str,
    value: f64,
    expected: impl Into<String>,
    advice: &'static str,
) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::OutOfRange { key, value, expected: expected.into(), advice }) }
}

/// A positive and finite number; NaN fails.
pub(crate) fn ensure_positive(key: &'static str, value: f64, advice: &'static str) -> Result<()> {
    ensure(value > 0.0 && value.is_finite(), key, value, "a finite number above 0", advice)
}

/// Serde for a type that derives it with `#[serde(remote = "Self")]`: what comes out of a file has passed
/// `validate`, so that a wrong number is reported with its place in the file and never travels on.
macro_rules! validated_serde {
    ($type:ty) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                <$type>::serialize(self, serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = <$type>::deserialize(deserializer)?;
                value.validate().map_err(serde::de::Error::custom)?;
                Ok(value)
            }
        }
    };
}
pub(crate) use validated_serde;
