//! End-to-end tests: whatever a user can do with `cm`, done through `cm`.

mod data;
mod distill;
mod edit;
mod eval;
mod inform;
mod lpips;
mod model;
mod private;
mod ranks;
mod report;
mod sample;
mod search;
mod shares;
mod solvers;
mod sweep;
mod train;
mod wrong;
