//! The U-Nets of the published diffusion and consistency models, and files of models that carry their own
//! description.
//!
//! | network | models | module's source |
//! | --- | --- | --- |
//! | [`SongUnet`] | DDPM++ and NCSN++: CIFAR-10, FFHQ, AFHQv2 | Song et al. 2021, Karras et al. 2022 |
//! | [`DhariwalUnet`] | ADM as EDM has it: ImageNet-64 | Dhariwal and Nichol 2021, Karras et al. 2022 |
//! | [`OpenaiUnet`] | ADM as Consistency Models has it: ImageNet-64, LSUN-256 | Song et al. 2023 |
//!
//! A network is described by a [`NetSpec`], which is plain data; [`build`] makes a [`cm_model::Backbone`] of it.
//! Weights have the names of the published files. [`save_model`] writes weights together with a [`ModelSpec`]
//! into one safetensors file, and [`load`] makes a denoiser or a consistency function of such a file.
//!
//! [`Lpips`] measures how far apart two images look, for training and evaluation; [`Inception`] gives the features that
//! FID and its relatives compare sets of images by.
//!
//! What is absent: no layer draws noise, reads a file or knows a training recipe.
#![deny(missing_docs)]

mod body;
mod dhariwal_unet;
mod embedding;
mod error;
pub mod import;
pub mod inception;
mod layers;
pub mod lpips;
mod model;
mod openai_unet;
mod part;
mod presets;
pub mod reference;
mod song_unet;
mod spec;
mod unet_block;

pub use dhariwal_unet::DhariwalUnet;
pub use error::{Error, Result};
pub use inception::Inception;
pub use lpips::Lpips;
pub use model::{
    Model, ModelFile, ModelInfo, ModelSpec, PrecondSpec, Role, inspect, load, save_model, save_tensors,
};
pub use openai_unet::OpenaiUnet;
pub use song_unet::SongUnet;
pub use spec::{
    AttnHeads, Decoder, DhariwalUnetSpec, Encoder, NetSpec, NoiseEmbedding, OpenaiUnetSpec, SongUnetSpec,
    build,
};

/// Is shown the output of each block of a network, under the name that the published code gives the block.
pub type Probe<'a> = &'a mut dyn FnMut(&str, &tch::Tensor);
