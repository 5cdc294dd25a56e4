//! End-to-end tests: whatever a user can do with `cm`, done through `cm`.

mod data;
mod inform;
mod model;
mod sample;
mod train;
mod wrong;
