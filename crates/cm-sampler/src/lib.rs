//! Sampling of consistency models, and of the denoisers that they are distilled from.
//!
//! ```
//! use cm_sampler::{Request, Times, model::{GaussianOracle, ImageShape}, multistep, one_step, schedule::SigmaRange};
//! // Any `ConsistencyFn`: a network that was loaded from a file, one of your own, or, here, a closed form.
//! let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
//! let seeds: Vec<u64> = (0..16).collect();
//! let quick = one_step(&f, &Request::new(&seeds))?;
//! let better = multistep(&f, &Times::Sigmas(vec![80.0, 0.8]), &Request::new(&seeds))?;
//! assert_eq!(quick.size(), better.size());
//! # Ok::<(), cm_sampler::Error>(())
//! ```
//!
//! [`Method`] is a model with the steps in which it is used: jumps of a consistency function, or an ODE solver for a
//! denoiser. [`sample`] makes images by it, [`Method::stream`] shows them in the making, [`Sampler`] makes those of many
//! requests in one batch, and [`Guided`] is a denoiser that follows its class more closely.
//!
//! The noise of an image is a function of its seed, the same to the last bit at any batch size; the image itself
//! is the same up to the rounding that libtorch's kernels do at different batch sizes (a relative 1e-5 in
//! float32). No global generator is read or seeded.
//!
//! This crate is the only dependency that a project needs: [`model`] has the traits and types of models,
//! [`schedule`] the noise levels, [`tch`] the tensors. With the default feature `nets` there are also `nets`, the
//! networks, and `load`, which makes a denoiser or a consistency function of a model in any published form.
//!
//! Models can be sent to another thread and not be shared: they are `Send` and not `Sync`, as libtorch's tensors
//! are. A service loads one for each worker, or gives one to a thread that takes requests from a channel.
#![deny(missing_docs)]

mod batch;
pub mod edit;
mod error;
mod guided;
#[cfg(feature = "nets")]
mod load;
mod method;
mod model_ref;
mod request;
mod sample;
pub mod search;
mod stream;

pub use cm_model as model;
#[cfg(feature = "nets")]
pub use cm_net::{self as nets, Model, Role, import::Kind};
pub use cm_schedule as schedule;
pub use tch;

pub use batch::{Job, Sampler, SamplerOptions};
pub use edit::edit;
pub use error::{Error, Result};
pub use guided::Guided;
#[cfg(feature = "nets")]
pub use load::{load, load_as};
pub use method::{Method, Solver, Steps, Times};
pub use model_ref::ModelRef;
pub use request::{Hooks, Precision, Progress, Request};
pub use sample::{multistep, one_step, sample, sample_batches};
pub use stream::{Evaluation, Stream};
