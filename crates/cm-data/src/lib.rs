//! Image data sets to batches.
#![deny(missing_docs)]
pub mod batch;
pub mod dataset;
pub mod download;
pub mod error;
pub mod formats;
pub mod grid;
pub mod limits;
pub mod loader;
pub mod order;
pub mod pixels;
pub mod resize;
pub mod spec;
pub mod transform;

pub use dataset::{Dataset, Labels, MemorySet, Sample, Shape, Subset};
pub use error::{Error, Result};
pub use formats::labels::LabelRule;
pub use formats::{cifar, idx, npz};
pub use grid::{GridStyle, contact_sheet};
pub use loader::{Batch, Batches, Loader, LoaderSpec};
pub use pixels::{from_uint8, to_uint8};
pub use resize::{Filter, Fit};
pub use spec::{SourceKind, SourceSpec, Split};
pub use transform::Channels;
