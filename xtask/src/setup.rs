//! `cargo xtask setup`, and the quiet form of it that precedes every command that needs libtorch.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::cli::SetupArgs;
use crate::gpu::Gpus;
use crate::install::{self, Home, Installed, Wanted};
use crate::libtorch::{self, Source};
use crate::tools::{self, Python};
use crate::wheels::WheelSet;
use crate::{exports, python};

/// The command.
pub fn run(args: &SetupArgs) -> Result<u8> {
    let start = Instant::now();
    let found = Python::find();
    let cxx = all_missing(tools::check_cxx(true), &found)?;
    match &found {
        Ok(python) => println!("tools     Python {}, pip {}, {cxx}", python.version, python.pip),
        Err(why) => println!("tools     {cxx}; {why:#} (only an install needs it)"),
    }
    if let Some(note) = untested_system() {
        println!("note      {note}");
    }
    let home = match &args.dir {
        Some(dir) => Home { base: std::path::absolute(dir).context("cannot make --dir absolute")? },
        None => Home::of_workspace(),
    };
    // A folder named on the command line is meant, whatever the environment says.
    let source = if args.dir.is_some() { Source::Managed } else { libtorch::source(&home)? };
    if let Some(theirs) = libtorch::check_theirs(&source)? {
        println!(
            "libtorch  {} in {}, chosen by {}; nothing to install",
            theirs.version,
            theirs.torch.display(),
            theirs.variable
        );
        if args.cuda || args.force {
            println!(
                "note      --cuda and --force concern the pinned wheel alone: unset {} to use it",
                theirs.variable
            );
        }
    } else {
        let set = wanted_set(args.cuda);
        let wanted = Wanted { set, force: args.force, whole: true };
        let Installed { manifest, fresh } = install_pinned(&home, wanted, || found)?;
        let how =
            if fresh { format!("{} s", start.elapsed().as_secs()) } else { "already in place".to_owned() };
        println!(
            "libtorch  {}, {}, in {} ({how})",
            manifest.torch,
            manifest.set.describe(),
            home.site().display()
        );
        if args.dir.is_some() {
            println!("use it    {}", exports::libtorch_line(&home.torch()));
        }
    }
    if args.python {
        python::ensure(&home, args.force)?;
    }
    Ok(0)
}

/// Makes sure that libtorch is there, saying nothing if it is.
pub fn ensure() -> Result<()> {
    if let Err(why) = tools::check_cxx(false) {
        all_missing(Err(why), &Python::find())?;
    }
    let home = Home::of_workspace();
    let source = libtorch::source(&home)?;
    if libtorch::check_theirs(&source)?.is_some() {
        return Ok(());
    }
    let wanted = Wanted { set: wanted_set(false), force: false, whole: false };
    install_pinned(&home, wanted, Python::find).map(drop)
}

/// Without a compiler nothing can be built; the error then names Python too if it is missing, so that one reading
/// tells all that has to be installed.
fn all_missing(cxx: Result<String>, python: &Result<Python>) -> Result<String> {
    match (cxx, python) {
        (Err(cxx), Err(python)) => bail!("{cxx:#}\nerror: {python:#}"),
        (cxx, _) => cxx,
    }
}

fn install_pinned(home: &Home, wanted: Wanted, python: impl FnOnce() -> Result<Python>) -> Result<Installed> {
    install::ensure(home, wanted, || {
        tools::check_glibc()?;
        python()
    })
}

fn wanted_set(cuda: bool) -> WheelSet {
    if !cfg!(target_os = "linux") {
        // Elsewhere the one wheel holds everything.
        return WheelSet::Lean;
    }
    if cuda || Gpus::probe().seen() { WheelSet::Full } else { WheelSet::Lean }
}

/// A plain word where this workspace was not tried.
pub fn untested_system() -> Option<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => None,
        ("linux", "aarch64") => Some(
            "Linux on arm64: the wheels were fetched and their libraries inspected, but nothing was run on it",
        ),
        ("macos", _) => {
            Some("macOS is untested: libtorch may install, and building and running were never tried")
        }
        ("windows", _) => {
            Some("Windows is untested: libtorch may install, and building and running were never tried")
        }
        _ => Some("this system is untested; set LIBTORCH to a libtorch 2.11.0 built for it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[test]
    fn everything_missing_is_named_at_once() {
        let python = || Err(anyhow!("python3 was not found"));
        let error = all_missing(Err(anyhow!("c++ was not found")), &python()).unwrap_err();
        assert_eq!(error.to_string(), "c++ was not found\nerror: python3 was not found");
        // Python alone matters only if something has to be installed.
        assert_eq!(all_missing(Ok("g++ 12".to_owned()), &python()).unwrap(), "g++ 12");
    }
}
