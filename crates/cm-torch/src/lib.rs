//! What `tch` lacks for training consistency models, and the one place of this project with C++ and `unsafe`.
//!
//! | question | module |
//! | --- | --- |
//! | where do we compute, and why not there? | [`device`] |
//! | how are weights and their averages updated? | [`optim`] |
//! | where do reproducible Gaussian numbers come from? | [`philox`] |
//! | how is a network run in bfloat16? | [`autocast`] |
//! | how do student and target get the same dropout? | [`rng`] |
//! | how are images laid out in memory? | [`memory_format`] |
//! | how does the CPU normalise, add and convolve in fewer passes? | [`fused`] |
//! | how do processes train together? | [`dist`] |
//! | where is what needs CUDA's headers? | [`cuda`] |
//! | how does a backward pass do with less memory? | [`recompute`] |
//!
//! The C++ lies in `shim/`; it is compiled by the build script against the headers beside the libtorch that
//! torch-sys found. What needs CUDA's headers lies in `cuda/`, and is built apart. Every call goes through the private
//! module `shim`, which turns C++ exceptions into [`Error`]. Nothing here panics on a user's input.

#![deny(missing_docs)]
// The bridge to C++ is what this crate is for; every unsafe block says why it is sound.
#![allow(unsafe_code)]

pub mod autocast;
pub mod cuda;
pub mod device;
pub mod dist;
mod error;
pub mod fused;
pub mod memory_format;
pub mod optim;
pub mod philox;
pub mod recompute;
pub mod rng;
mod shim;

pub use error::{Error, Result};
pub use tch;
