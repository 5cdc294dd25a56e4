//! What the command `cm` does: train, sample and inspect consistency models. The program is [`main`]; libraries to build
//! upon are the other crates.

// This is the one place of the project that talks to a terminal.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod commands;
mod config;
mod demo;
mod exit;
mod experiment;
#[cfg(test)]
mod hostile;
mod lpips;
mod net;
#[doc(hidden)]
pub mod outside;
mod pictures;
#[cfg(test)]
mod published;
mod ranks;
mod report;
mod runs;
mod side;
mod sources;
mod ui;

use std::process::ExitCode;

use args::{Cli, Command};
use clap::Parser;

/// Runs the command that this process was given, and says what its exit code is.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    keep_memory();
    std::panic::set_hook(Box::new(exit::say_panic));
    match std::panic::catch_unwind(|| run(&command)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            if !(ui::is_quiet() && matches!(failure, exit::Failure::Interrupted(_))) {
                eprintln!("{failure}");
            }
            failure.code()
        }
        Err(_) => ExitCode::FAILURE,
    }
}

/// A command computes until it ends, so freed memory stays with it, unless the user has settings of their own.
fn keep_memory() {
    let settings = ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"];
    if settings.iter().all(|name| std::env::var_os(name).is_none()) {
        cm_torch::device::keep_memory();
    }
}

fn run(command: &Command) -> exit::Outcome {
    match command {
        Command::Train(args) => ranks::together(|ranks| commands::train::train(args, ranks)),
        Command::TrainCifar10(args) => ranks::together(|ranks| commands::train::train_cifar10(args, ranks)),
        Command::TrainTeacher(args) => ranks::together(|ranks| commands::train::train_teacher(args, ranks)),
        Command::Distill(args) => ranks::together(|ranks| commands::distill::distill(args, ranks)),
        Command::Launch(args) => commands::launch::launch(args),
        Command::Sample(args) => ranks::together(|ranks| commands::sample::sample(args, ranks)),
        Command::SearchTs(args) => ranks::alone("cm search-ts", || commands::search_ts::search_ts(args)),
        Command::Edit(command) => ranks::alone("cm edit", || commands::edit::edit(command)),
        Command::Gallery(args) => ranks::alone("cm gallery", || commands::gallery::gallery(args)),
        Command::Eval(args) => ranks::together(|ranks| commands::eval::eval(args, ranks)),
        Command::Demo(args) => demo::demo(args),
        Command::Report(args) => report::report(args),
        Command::Data(command) => commands::data::data(command),
        Command::Fetch(command) => commands::fetch::fetch(command),
        Command::Model(command) => commands::model::model(command),
        Command::Preset(command) => commands::preset::preset(command),
        Command::Doctor => commands::doctor::doctor(),
        Command::RaceSide(args) => side::side(args),
    }
}
