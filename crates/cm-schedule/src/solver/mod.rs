//! Samplers as data: a [`Plan`] lists the steps in f64, and a [`Walk`] goes along it.
//!
//! The plan knows every noise level, every standard deviation and every rule before a network is called, so that
//! grids, numbers of evaluations and noise are tested without one. A walk stops wherever it needs the model or noise,
//! so that many can share a call of the model; [`execute`] is the short loop that goes through with one. Both know
//! only linear combinations ([`VectorSpace`]), so that they run on a number, on a `Vec<f64>` and on tensors alike, and
//! their order of convergence is measured on a flow with a closed form.
//!
//! | plan | evaluations of N levels and 0 | order | needs |
//! | --- | --- | --- | --- |
//! | [`Plan::euler`] | N | 1 | a denoiser |
//! | [`Plan::heun`] | 2N − 1 | 2 | a denoiser |
//! | [`Plan::dpm2`] | 2N | 2 | a denoiser |
//! | [`Plan::dpmpp_2m`] | N | 2 | a denoiser |
//! | [`Plan::ancestral`] | N | – | a denoiser |
//! | [`Plan::multistep`] | N levels: N | – | a consistency function |
//!
//! Orders are those of the last error at σ_min; the step from σ_min to 0 adds an error that does not depend on N.
//! All start from x = σ_max·z, which the caller makes.

mod execute;
mod plan;
pub mod reference;
mod walk;

pub use execute::{Scalars, VectorSpace, execute};
pub use plan::{Churn, Plan, Renoise, Rule, Step};
pub use walk::{Ask, Walk};
