//! The driver of the workspace: `cargo xtask setup` installs the pinned libtorch, every other command sets it
//! up first and then calls cargo or the program `cm`. It never links libtorch itself, so it builds in seconds
//! on an empty machine.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a command line program: printing is its output

mod ci;
mod cli;
mod cuda_object;
mod doctor;
mod exports;
mod fuzz;
mod gpu;
mod install;
mod libtorch;
mod pip;
mod progress;
mod python;
mod race;
mod runner;
mod setup;
mod soak;
mod tidy;
mod tools;
mod torture;
mod wheels;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match cli::run(cli::Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
