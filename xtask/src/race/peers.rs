//! The virtual environment of the peers. It has no torch of its own: it looks into that of `setup --python`, so that
//! torch is there once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::install::Home;
use crate::pip;
use crate::python::{self, interpreter, make_venv};
use crate::tools::{self, Python};

/// What the peers need beside torch, numpy and safetensors.
const PACKAGES: [&str; 3] = ["diffusers==0.42.*", "pillow", "scipy"];
/// Written last, with the list of packages: a folder without it is made anew.
const DONE: &str = "cm-done";

/// Makes both environments, or finds that they are there, and returns the peers' interpreter.
pub fn ensure(home: &Home) -> Result<PathBuf> {
    python::ensure(home, false)?;
    let _lock = home.lock()?;
    let (base, venv) = (interpreter(&home.python()), home.base.join("peers"));
    let list = PACKAGES.join(" ");
    if fs::read_to_string(venv.join(DONE)).is_ok_and(|done| done.trim() == list) {
        return Ok(interpreter(&venv));
    }
    if venv.exists() {
        fs::remove_dir_all(&venv).with_context(|| format!("cannot remove {}", venv.display()))?;
    }
    make_venv(&Python::at(base.clone().into_os_string())?, &venv)?;
    let site = |python: &PathBuf| {
        let script = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
        tools::first_line(Command::new(python).args(["-c", script])).map(PathBuf::from)
    };
    let shared = site(&base)?;
    let link = site(&interpreter(&venv))?.join("cm-torch.pth");
    fs::write(&link, format!("{}\n", shared.display())).with_context(|| link.display().to_string())?;
    let scratch = home.scratch();
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    println!("peers     installing {list}");
    let inside = Python::at(interpreter(&venv).into_os_string())?;
    let failure = pip::install_packages(&inside, &PACKAGES, &scratch)?;
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    if let Some(failure) = failure {
        bail!("the peers' environment could not be made: {}; run the same command again", failure.message);
    }
    let script = "import torch, diffusers, scipy, PIL; print(diffusers.__version__)";
    tools::first_line(Command::new(interpreter(&venv)).args(["-c", script]))
        .context("the peers' environment does not work")?;
    fs::write(venv.join(DONE), format!("{list}\n")).context("cannot finish the peers' environment")?;
    Ok(interpreter(&venv))
}
