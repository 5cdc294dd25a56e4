//! Pure f64 mathematics of consistency models: noise grids, preconditioning, curricula, solver plans and
//! counter-based random numbers.
//!
//! This crate does no I/O and links no libtorch, so it builds in seconds and holds most of the assertions. Its
//! numbers are scalars; what broadcasts them over images lives in the crates above.
//!
//! | question | module |
//! | --- | --- |
//! | which noise levels are there? | [`sigma`] |
//! | which of them does a training image get? | [`sigma_dist`] |
//! | how is a network wrapped at one level? | [`precond`] |
//! | how much does a level count? | [`weighting`] |
//! | what changes as training goes? | [`curriculum`], [`ema`], [`lr`] |
//! | how does a sampler walk down the levels? | [`solver`] |
//! | which random number belongs here? | [`rng`] |
//!
//! Names: `sigma` is always a noise level in data units, `step` an optimisation step, `index` a position on a grid
//! and `u` a position in [0, 1].

#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod curriculum;
pub mod ema;
pub mod error;
pub mod lr;
pub mod precond;
pub mod rng;
pub mod sigma;
pub mod sigma_dist;
pub mod solver;
pub mod weighting;

pub use curriculum::{Ect, EctAdjust, NumScales, Reading, TargetEma};
pub use ema::EmaRule;
pub use error::{Error, Result};
pub use lr::LrRule;
pub use precond::{Boundary, Edm, NoiseCond, Precond, Scalings, reference};
pub use rng::{Purpose, Stream};
pub use sigma::{KarrasGrid, SigmaRange};
pub use sigma_dist::{IndexDist, IndexTable, LogNormal};
pub use weighting::Weighting;
