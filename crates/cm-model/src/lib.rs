//! The traits that samplers, trainers and networks meet at, and the file format of a model.
//!
//! A sampler needs one of two things: a [`Denoiser`] `D(x; σ) ≈ E[x₀ | x]` for the ODE solvers, or a
//! [`ConsistencyFn`] `f(x, σ)` with `f(x, σ_min) = x` for one-step and multistep sampling. They are two
//! traits rather than one with a flag, so that handing the wrong one to a sampler does not compile.
//!
//! A network is a [`Backbone`] (the raw `F(c_in·x, c_noise)`), and [`Preconditioned`] makes a denoiser or a
//! consistency function of it, depending on the scalings it is given. Weights live in [`Params`], files in
//! [`Bundle`]s, randomness in a [`NoiseSource`] that is named by (seed, sample, step, purpose) and never
//! drawn from a global generator.
#![deny(missing_docs)]

mod bundle;
mod cond;
mod error;
pub mod files;
mod graphed;
mod noise;
mod oracle;
mod params;
mod perceptual;
mod precond;
mod shape;
mod text;
mod traits;

pub use bundle::{Bundle, TensorInfo, tensor_bytes};
pub use cm_schedule as schedule;
pub use cm_torch as torch;
pub use cond::{Cond, Mode, Sigma};
pub use error::{Error, Result};
pub use graphed::Graphed;
pub use noise::{NoiseSource, Philox, Recorded, Site};
pub use oracle::GaussianOracle;
pub use params::{Cast, Init, ParamPath, Params, ParamsBuilder, TensorMap};
pub use perceptual::{ImageDistance, LpipsNet, LpipsReading, LpipsSpec};
pub use precond::{Compute, Preconditioned};
pub use shape::ImageShape;
pub use text::{short, short_to};
pub use traits::{Backbone, ConsistencyFn, Denoiser};
