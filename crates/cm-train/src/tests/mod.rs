//! Tests that need several modules: the laws of the losses, steps, checkpoints, stages and runs.

mod checkpoints;
mod laws;
mod ranks;
mod recipes;
mod runs;
mod stages;
mod steps;
