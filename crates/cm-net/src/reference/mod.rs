//! Variants that no published configuration uses, for the files of numbers that this project is checked against.
//!
//! Nothing here is in a preset. The other forms of preconditioning (VE, VP, iDDPM) that these variants go with
//! are in [`cm_model::schedule::reference`].

mod learned_variance;
mod skip;

pub use learned_variance::LearnedVariance;
pub(crate) use skip::{SkipDecoder, SkipEncoder};

pub use crate::layers::Direction;
pub use crate::unet_block::{BlockInit, BlockSpec, UnetBlock};
