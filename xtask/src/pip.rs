//! Calls of pip.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::tools::Python;
use crate::wheels::{CUDA_REQUIREMENTS, LEAN_REQUIREMENTS, WheelSet};

/// Why pip failed, with whether another try can help.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    pub try_again: bool,
}

/// Unpacks the wheels of `set` into `target`. `scratch` takes pip's temporary files, so that they lie on the same
/// disk and go when the install is cleaned up.
pub fn install_set(python: &Python, set: WheelSet, target: &Path, scratch: &Path) -> Result<Option<Failure>> {
    let mut lists = vec![("lean.txt", LEAN_REQUIREMENTS)];
    if set == WheelSet::Full {
        lists.push(("cuda.txt", CUDA_REQUIREMENTS));
    }
    install_lists(python, &lists, target, scratch)
}

/// Unpacks the wheels of these lists of requirements, each with a name, as [`install_set`].
pub fn install_lists(
    python: &Python,
    lists: &[(&str, &str)],
    target: &Path,
    scratch: &Path,
) -> Result<Option<Failure>> {
    let mut command = pip(python, scratch);
    // The wheels of CPython 3.12 for this machine, by hash: one file for everybody, whatever Python is here.
    command.args(["--no-deps", "--no-compile", "--require-hashes", "--only-binary=:all:"]);
    command.args(["--python-version", "3.12", "--implementation", "cp"]);
    for platform in platforms()? {
        command.args(["--platform", &platform]);
    }
    command.arg("--target").arg(target);
    for (name, text) in lists {
        let path = scratch.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        command.arg("-r").arg(path);
    }
    run(command)
}

/// Installs `packages` with all that they need into the environment of `python`.
pub fn install_packages(python: &Python, packages: &[&str], scratch: &Path) -> Result<Option<Failure>> {
    let mut command = pip(python, scratch);
    command.args(packages);
    run(command)
}

fn pip(python: &Python, scratch: &Path) -> Command {
    let mut command = Command::new(&python.program);
    // The cache would hold a second copy of files that are half a gigabyte and more.
    command.args(["-m", "pip", "install", "--quiet", "--no-cache-dir"]);
    command.env("TMPDIR", scratch).env("TEMP", scratch).env("TMP", scratch);
    command
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        .env("PIP_NO_INPUT", "1");
    // Settings for a user's own environments, which pip refuses beside --target or outside one.
    command.env("PIP_USER", "0").env("PIP_REQUIRE_VIRTUALENV", "0");
    command
}

/// The wheel tags that this machine runs; none means that pip finds out.
fn platforms() -> Result<Vec<String>> {
    if !cfg!(target_os = "linux") {
        return Ok(Vec::new());
    }
    let machine = match std::env::consts::ARCH {
        machine @ ("x86_64" | "aarch64") => machine,
        other => bail!(
            "there is no libtorch wheel for {other}: build libtorch 2.11.0 and set LIBTORCH to its folder"
        ),
    };
    let numbered = (17..=28).rev().map(|minor| format!("manylinux_2_{minor}_{machine}"));
    Ok(numbered.chain([format!("manylinux2014_{machine}")]).collect())
}

/// Runs pip, passes its warnings and errors on, and keeps the last error for the message.
fn run(mut command: Command) -> Result<Option<Failure>> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let mut errors = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let line = line.trim_end();
            if line.starts_with("ERROR:") {
                errors.push(line.trim_start_matches("ERROR:").trim().to_owned());
            } else if !line.is_empty() {
                // In a terminal the progress line is written over.
                eprintln!("{}pip: {line}", if std::io::stderr().is_terminal() { "\r\x1b[2K" } else { "" });
            }
        }
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(None);
    }
    Ok(Some(describe(&errors, &status.to_string())))
}

fn describe(errors: &[String], status: &str) -> Failure {
    let absent = errors
        .iter()
        .any(|e| e.contains("No matching distribution") || e.contains("Could not find a version"));
    let message = if absent {
        format!(
            "pip found no wheel to fetch ({}). Is there a network? Behind a mirror set PIP_INDEX_URL; with a libtorch \
             2.11.0 of your own set LIBTORCH",
            errors[0]
        )
    } else {
        format!("pip failed ({})", errors.first().map_or(status, String::as_str))
    };
    Failure { message, try_again: !absent }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Writes an executable script and returns its path.
    #[cfg(unix)]
    pub fn write_script(path: &Path, body: &str) -> std::path::PathBuf {
        use std::os::unix::fs::PermissionsExt;
        // Through a rename, so that no other thread's fork holds the file open for writing when it is started.
        let part = path.with_extension("part");
        fs::write(&part, body).unwrap();
        fs::set_permissions(&part, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&part, path).unwrap();
        path.to_path_buf()
    }

    #[test]
    fn a_missing_wheel_is_not_tried_again_and_names_the_ways_out() {
        let errors = ["Could not find a version that satisfies the requirement torch==2.11.0".to_owned()];
        let failure = describe(&errors, "exit status: 1");
        assert!(!failure.try_again);
        assert!(failure.message.contains("PIP_INDEX_URL") && failure.message.contains("LIBTORCH"));
        let torn = describe(&["connection broken".to_owned()], "exit status: 2");
        assert!(torn.try_again);
        assert_eq!(torn.message, "pip failed (connection broken)");
        assert_eq!(describe(&[], "exit status: 2").message, "pip failed (exit status: 2)");
    }

    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    #[test]
    fn platforms_begin_with_the_one_of_the_wheel() {
        let tags = platforms().unwrap();
        assert_eq!(tags[0], format!("manylinux_2_28_{}", std::env::consts::ARCH));
        assert_eq!(tags.len(), 13);
    }
}
