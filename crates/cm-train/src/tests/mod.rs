//! Tests that need several modules: the laws of the losses, steps, checkpoints and runs.

mod checkpoints;
mod laws;
mod recipes;
mod runs;
mod steps;
