//! Laws of the losses: where their optima lie, what they compare, and through what no gradient flows.
//!
//! docs/derivations.md derives what the tests on Gaussian data expect.

mod closed_form;
mod consistency;
mod denoising;
mod gaussian;
mod progressive;
mod targets;
mod training;
