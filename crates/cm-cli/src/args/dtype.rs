//! What a model that was loaded computes in.

use clap::ValueEnum;
use cm_model::Compute;
use tch::Kind;

/// Dtypes of a network's work; images, noise levels and preconditioning stay float32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// float32
    #[default]
    F32,
    /// bfloat16: 8 bits of mantissa, and for large networks several times as fast on processors with AMX
    Bf16,
}

impl Dtype {
    /// How the network computes.
    pub fn compute(self) -> Compute {
        match self {
            Self::F32 => Compute::default(),
            Self::Bf16 => {
                Compute { autocast: Some(Kind::BFloat16), channels_last: true, ..Compute::default() }
            }
        }
    }
}
