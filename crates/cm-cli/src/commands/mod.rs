//! One file a command.

mod batches;
pub mod data;
pub mod distill;
pub mod doctor;
pub mod dry_run;
pub mod edit;
pub mod eval;
pub mod fetch;
pub mod gallery;
pub mod launch;
pub mod model;
pub mod preset;
pub mod sample;
pub mod search_ts;
pub mod session;
pub mod sweep;
pub mod train;
