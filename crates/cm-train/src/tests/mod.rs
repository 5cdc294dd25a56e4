//! Tests that need several modules: the laws of the losses, steps, checkpoints, stages and runs; and what others
//! may have written.

mod checkpoints;
mod finite;
mod hostile;
mod laws;
mod ranks;
mod recipes;
mod runs;
mod stages;
mod steps;
