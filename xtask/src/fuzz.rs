//! `cargo xtask fuzz`: coverage-guided fuzzing of the parsers in `fuzz/`, by cargo-fuzz and a nightly compiler.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cli::FuzzArgs;
use crate::runner::{code_of, status_of};
use crate::{setup, tools};

/// What there is to fuzz, each with the longest input that is of use.
const TARGETS: [(&str, u32); 10] = [
    ("cifar", 1 << 16),
    ("idx", 1 << 12),
    ("npz", 1 << 12),
    ("zip", 1 << 12),
    ("lmdb", 1 << 16),
    ("image", 1 << 12),
    ("safetensors", 1 << 13),
    ("torch", 1 << 14),
    ("config", 1 << 12),
    ("arguments", 1 << 7),
];

/// Their names.
pub fn targets() -> Vec<&'static str> {
    TARGETS.iter().map(|(name, _)| *name).collect()
}

/// Fuzzes one target or all of them, one after the other, and returns the code of the first that finds something.
pub fn run(args: &FuzzArgs) -> Result<u8> {
    let root = tools::workspace_root();
    check_tools()?;
    setup::ensure()?;
    let corpus = std::path::absolute(&args.corpus).context("the folder --corpus")?;
    for (target, longest) in
        TARGETS.iter().filter(|(name, _)| args.target.as_deref().is_none_or(|t| t == *name))
    {
        println!("==> {target}");
        let place = corpus.join(target);
        fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
        let mut fuzz = cargo(&["fuzz", "run", "--fuzz-dir", "fuzz", "--sanitizer", "none", target], &root);
        fuzz.env("CM_FUZZ_CORPUS", &place).arg(&place).arg("--").args([
            format!("-runs={}", args.runs),
            format!("-max_len={longest}"),
            "-rss_limit_mb=4096".to_owned(),
            "-timeout=20".to_owned(),
            "-print_final_stats=1".to_owned(),
        ]);
        let files = files_folder(target);
        let status = status_of(fuzz.env("CM_FUZZ_FILES", &files));
        // It holds the last input, which is kept elsewhere if it shows something.
        drop(fs::remove_dir_all(&files));
        let status = status?;
        if !status.success() {
            eprintln!("error: {target}: the input that shows it is under fuzz/artifacts/{target}");
            return Ok(code_of(status));
        }
    }
    Ok(0)
}

/// Where a target writes each input: in memory, where the system has a place for that.
fn files_folder(target: &str) -> PathBuf {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    place.join(format!("cm-fuzz-{}-{target}", std::process::id()))
}

/// rustup's cargo of the nightly compiler, whichever this program was started by.
fn cargo(args: &[&str], root: &Path) -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").args(args).current_dir(root).env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC");
    command
}

fn check_tools() -> Result<()> {
    let output =
        Command::new("cargo").args(["+nightly", "fuzz", "--version"]).env_remove("RUSTUP_TOOLCHAIN").output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            bail!(
                "`cargo +nightly fuzz` does not run ({}): rustup toolchain install nightly; cargo install cargo-fuzz",
                why.lines().next().unwrap_or("no message")
            )
        }
        Err(error) => bail!("cargo of rustup was not found ({error}): install Rust from https://rustup.rs"),
    }
}
