//! One module per form in which images lie on disk. Each reads into a [`MemorySet`](crate::MemorySet), an
//! [`ImageFiles`](files::ImageFiles) or [`Shards`](shards::Shards) and knows nothing of order, batches or tensors.

pub mod arrays;
pub mod bundled;
pub mod cifar;
pub mod files;
pub mod idx;
pub mod labels;
pub(crate) mod lmdb;
pub mod npy;
pub mod npz;
mod positioned;
pub mod shards;
mod zipped;
