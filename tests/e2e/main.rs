//! End-to-end tests: whatever a user can do with `cm`, done through `cm`.

mod data;
mod distill;
mod edit;
mod eval;
mod inform;
mod lpips;
mod model;
mod ranks;
mod report;
mod sample;
mod search;
mod solvers;
mod sweep;
mod train;
mod wrong;
