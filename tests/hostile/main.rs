//! Hostile input: whatever the bytes, a parser gives what they say or an error of one line, in the memory that their
//! length allows.
//!
//! Parsers inside of programs are tested where they are, with the same mutator: `crates/cm-cli/src/hostile.rs` and
//! `crates/cm-train/src/tests/hostile.rs`. docs/reliability.md lists them all.

mod archives;
#[path = "../../crates/cm-net/tests/common/mod.rs"]
mod common;
mod data;
mod images;
mod models;
mod mutate;
mod safetensors;
mod torch;
