//! `cm-golden --dir DIR`: the command around [`cm_golden::run`].
#![allow(clippy::print_stdout, reason = "the table is what the command is for")]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Check this project against numbers recorded from the reference implementations.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Folder with *.safetensors files; may be given more than once.
    #[arg(long, required = true, value_name = "DIR")]
    dir: Vec<PathBuf>,
    /// Check only the files whose names begin with this, such as 03 or 04b.
    #[arg(long, value_name = "PREFIX")]
    only: Option<String>,
    /// Print every comparison before the table.
    #[arg(long)]
    verbose: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let Arguments { dir, only, verbose } = Arguments::parse();
    let report = cm_golden::run(&dir, only.as_deref()).map_err(|problem| anyhow::anyhow!(problem.0))?;
    if verbose {
        println!("{}", report.comparisons());
    }
    println!("{report}");
    Ok(if report.num_failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
