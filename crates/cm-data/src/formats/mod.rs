//! One module per form in which images lie on disk. Each reads into a [`MemorySet`](crate::MemorySet) or an
//! [`ImageFiles`](files::ImageFiles) and knows nothing of order, batches or tensors.

pub mod arrays;
pub mod bundled;
pub mod cifar;
pub mod files;
pub mod idx;
pub mod labels;
pub mod npy;
pub mod npz;
mod positioned;
