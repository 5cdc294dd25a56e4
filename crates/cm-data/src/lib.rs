//! Image data sets to batches.
//!
//! | question | module |
//! | --- | --- |
//! | what does a config say about its data, and what set is that? | [`spec`] |
//! | what does a set look like from outside? | [`dataset`] |
//! | in which forms do images lie on disk? | [`formats`] |
//! | how does an encoded image become pixels of one size? | [`transform`], [`resize`] |
//! | which image stands where in a run? | [`order`] |
//! | how do they become batches, and tensors? | [`loader`], [`batch`] |
//! | how are they augmented, and what is the network told? | [`mod@augment`] |
//! | what lies at this path? | [`inspect`](mod@inspect) |
//! | how is a published set fetched? | [`download`] |
//! | how are pictures and samples written? | [`grid`], [`npz`] |
//!
//! The data of step k is a function of (seed, k): order and mirroring come from the counter-based generator of
//! `cm-schedule`, so a run that resumes needs no state of its loader. Pixels stay uint8 until [`batch`]; it and
//! [`mod@augment`] are the modules that know of tensors.
//!
//! Nothing here panics on data, and nothing is allocated because a header says so ([`limits`]). Errors say what was
//! expected, what came, where, and what to do; an error in the loader's thread reaches the consumer.
//!
//! What is absent on purpose: augmentation whose parameters the network is not told, other than mirroring; and
//! skipping: a corrupt image stops the run and is named.

#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod augment;
pub mod batch;
mod corrupt;
pub mod dataset;
pub mod digest;
pub mod download;
pub mod error;
pub mod formats;
pub mod grid;
pub mod inspect;
pub mod limits;
pub mod loader;
mod names;
pub mod order;
pub mod pixels;
pub mod resize;
pub mod spec;
pub mod transform;

pub use augment::{Augment, AugmentSpec};
pub use dataset::{Dataset, Labels, MemorySet, Sample, Shape, Subset};
pub use error::{Error, Result};
pub use formats::labels::LabelRule;
pub use formats::{arrays, cifar, idx, npz, shards};
pub use grid::{GridStyle, contact_sheet};
pub use inspect::{InspectOptions, Inspection, Report, inspect};
pub use loader::{Batch, Batches, Loader, LoaderSpec};
pub use pixels::{from_uint8, to_uint8};
pub use resize::{Filter, Fit};
pub use spec::{SourceKind, SourceSpec, Split};
pub use transform::Channels;
