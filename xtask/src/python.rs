//! `cargo xtask setup --python`: a virtual environment that can `import torch`, for comparisons with Python programs
//! and for making fixtures. Nothing is linked against it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::install::{Home, check_space};
use crate::pip;
use crate::progress::Progress;
use crate::tools::{self, Python, Tool, install_command, two_numbers};
use crate::wheels::{check_version, required_torch};

/// CPython versions that torch 2.11.0 has wheels for.
const SUPPORTED: std::ops::RangeInclusive<(u32, u32)> = (3, 10)..=(3, 14);
/// MB while the wheels and the unpacked files lie side by side, measured on Linux x86-64.
const PEAK_MB: u64 = 7_750;
/// Written last: a folder without it is made anew.
const DONE: &str = "cm-done";

/// Makes the environment, or finds that it is there and works.
pub fn ensure(home: &Home, force: bool) -> Result<()> {
    let venv = home.python();
    let _lock = home.lock()?;
    if !force && venv.join(DONE).exists() {
        match import_torch(&venv) {
            Ok(version) => {
                println!("python    torch {version} in {} (already in place)", venv.display());
                return Ok(());
            }
            Err(why) => eprintln!("{}: {why:#}; installing again", venv.display()),
        }
    }
    let base = Python::find()?;
    check_python(&base.version)?;
    check_space(&home.base, PEAK_MB)?;
    let start = Instant::now();
    if venv.exists() {
        fs::remove_dir_all(&venv).with_context(|| format!("cannot remove {}", venv.display()))?;
    }
    make_venv(&base, &venv)?;
    let scratch = home.scratch();
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let torch = format!("torch=={}", required_torch());
    eprintln!("installing {torch}, numpy and safetensors for Python {}", base.version);
    let inside = Python::at(interpreter(&venv).into_os_string())?;
    let progress = Progress::watch("python", vec![venv.clone(), scratch.clone()], PEAK_MB);
    let failure = pip::install_packages(&inside, &[&torch, "numpy", "safetensors"], &scratch)?;
    drop(progress);
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    if let Some(failure) = failure {
        bail!("the Python environment could not be made: {}; run the same command again", failure.message);
    }
    let version = import_torch(&venv)?;
    fs::write(venv.join(DONE), format!("{version}\n")).context("cannot finish the Python environment")?;
    println!("python    torch {version} in {} ({} s)", venv.display(), start.elapsed().as_secs());
    println!("          use it as {}", interpreter(&venv).display());
    Ok(())
}

fn check_python(version: &str) -> Result<()> {
    match two_numbers(version) {
        Some(found) if SUPPORTED.contains(&found) => Ok(()),
        _ => bail!(
            "torch {} has wheels for Python {}.{} to {}.{}, and this one is {version}: name another with PYTHON=...",
            required_torch(),
            SUPPORTED.start().0,
            SUPPORTED.start().1,
            SUPPORTED.end().0,
            SUPPORTED.end().1
        ),
    }
}

/// Makes an empty virtual environment.
pub fn make_venv(base: &Python, venv: &Path) -> Result<()> {
    let mut command = Command::new(&base.program);
    command.args(["-m", "venv"]).arg(venv);
    let output = command.output().with_context(|| format!("cannot start {:?}", base.program))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!(
            "python -m venv failed ({}). Install the venv module with: {}",
            why.lines().last().unwrap_or("no message").trim(),
            install_command(Tool::Venv)
        );
    }
    Ok(())
}

/// The interpreter of a virtual environment.
pub fn interpreter(venv: &Path) -> PathBuf {
    venv.join(if cfg!(windows) { "Scripts/python.exe" } else { "bin/python" })
}

fn import_torch(venv: &Path) -> Result<String> {
    let script = "import torch, numpy, safetensors; print(torch.__version__)";
    let version = tools::first_line(Command::new(interpreter(venv)).args(["-c", script]))
        .context("torch cannot be imported")?;
    check_version(&version, &venv.display().to_string())?;
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versions_with_wheels_are_taken() {
        for good in ["3.10.0", "3.12.1", "3.14.2"] {
            assert!(check_python(good).is_ok(), "{good}");
        }
        for bad in ["3.9.18", "3.15.0", "2.7.18", "unknown"] {
            let error = check_python(bad).unwrap_err().to_string();
            assert!(error.contains("Python 3.10 to 3.14") && error.contains(bad), "{error}");
        }
    }
}
