//! Installs a set of wheels so that it is either whole or not there.
//!
//! The wheels go into `site.partial-<pid>`, are checked against the wheels' own lists of files, get their manifest,
//! and only then take the name `site`. A lock keeps two setups apart, and whoever holds it clears what a killed one
//! left behind.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, bail};

use crate::pip;
use crate::progress::Progress;
use crate::tools::{self, Python};
use crate::wheels::{self, Depth, Manifest, State, WheelSet, inspect};

/// The folder that holds everything that setup installs.
#[derive(Clone, Debug)]
pub struct Home {
    pub base: PathBuf,
}

impl Home {
    /// `.libtorch` of this checkout.
    pub fn of_workspace() -> Self {
        Self { base: tools::workspace_root().join(".libtorch") }
    }

    /// The installed wheels.
    pub fn site(&self) -> PathBuf {
        self.base.join("site")
    }

    /// What `LIBTORCH` points at.
    pub fn torch(&self) -> PathBuf {
        self.site().join("torch")
    }

    /// The virtual environment that can `import torch`.
    pub fn python(&self) -> PathBuf {
        self.base.join("python")
    }

    /// A place for temporary files, cleared by the next setup if this one is killed.
    pub fn scratch(&self) -> PathBuf {
        self.base.join(format!("tmp.partial-{}", process::id()))
    }

    /// Waits for other setups in this folder and keeps them out until the file is dropped.
    pub fn lock(&self) -> Result<File> {
        fs::create_dir_all(&self.base).with_context(|| format!("cannot create {}", self.base.display()))?;
        let path = self.base.join("setup.lock");
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("another setup is at work in {}, waiting for it", self.base.display());
                file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(file)
    }
}

/// What is wanted of the install.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub set: WheelSet,
    pub force: bool,
    pub whole: bool,
}

/// The install in place and whether this call made it.
#[derive(Debug)]
pub struct Installed {
    pub manifest: Manifest,
    pub fresh: bool,
}

/// Makes sure that `home` holds a whole install of at least the wanted set. `python` is asked for only if something
/// has to be installed.
pub fn ensure(home: &Home, wanted: Wanted, python: impl FnOnce() -> Result<Python>) -> Result<Installed> {
    let depth = if wanted.whole { Depth::Whole } else { Depth::Quick };
    let site = home.site();
    let serves = |state: &State| matches!(state, State::Ready(m) if m.set >= wanted.set && !wanted.force);
    if let State::Ready(manifest) = inspect(&site, depth)
        && serves(&State::Ready(manifest.clone()))
        && wheels::has_manifest(&site)
    {
        return Ok(Installed { manifest, fresh: false });
    }
    let _lock = home.lock()?;
    // Another setup may have finished while this one waited.
    let mut state = inspect(&site, depth);
    if !serves(&state) {
        recover(home, wanted)?;
        state = inspect(&site, depth);
    }
    clear_leftovers(home)?;
    match state {
        State::Ready(manifest) if serves(&State::Ready(manifest.clone())) => {
            // An install made by hand gets the manifest that it lacks.
            manifest.write(&site)?;
            return Ok(Installed { manifest, fresh: false });
        }
        State::Ready(_) if wanted.force => eprintln!("installing again, as asked"),
        State::Ready(manifest) => {
            eprintln!("{} holds the {}; replacing it", site.display(), manifest.set.describe());
        }
        State::Faulty(why) => eprintln!("{}: {why}; installing again", site.display()),
        State::Absent => {}
    }
    let manifest = install(home, wanted.set, &python()?)?;
    Ok(Installed { manifest, fresh: true })
}

/// Takes over a staged install that was finished but not yet renamed when its setup was killed.
fn recover(home: &Home, wanted: Wanted) -> Result<()> {
    if wanted.force {
        return Ok(());
    }
    for staged in leftovers(home)? {
        if wheels::has_manifest(&staged)
            && matches!(inspect(&staged, Depth::Whole), State::Ready(m) if m.set >= wanted.set)
        {
            return swap_in(home, &staged);
        }
    }
    Ok(())
}

/// Staging folders that other setups left behind; called under the lock.
fn leftovers(home: &Home) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(&home.base).with_context(|| format!("cannot list {}", home.base.display()))?;
    let ours =
        |name: &str| ["site.partial-", "site.old-", "tmp.partial-"].iter().any(|p| name.starts_with(p));
    let mut found: Vec<PathBuf> =
        entries.flatten().filter(|e| ours(&e.file_name().to_string_lossy())).map(|e| e.path()).collect();
    found.sort();
    Ok(found)
}

/// The pip of a killed setup may still be writing, so that a folder cannot go yet: the next setup takes it away.
fn clear_leftovers(home: &Home) -> Result<()> {
    for folder in leftovers(home)? {
        if let Err(why) = fs::remove_dir_all(&folder) {
            eprintln!("{} stays until the next setup ({why})", folder.display());
        }
    }
    Ok(())
}

/// Gives a finished staging folder the name `site`.
fn swap_in(home: &Home, staged: &Path) -> Result<()> {
    let site = home.site();
    let old = home.base.join(format!("site.old-{}", process::id()));
    if site.exists() {
        fs::rename(&site, &old).with_context(|| format!("cannot move {} away", site.display()))?;
    }
    fs::rename(staged, &site).with_context(|| format!("cannot move {} into place", staged.display()))?;
    if old.exists() {
        fs::remove_dir_all(&old).with_context(|| format!("cannot remove {}", old.display()))?;
    }
    Ok(())
}

fn install(home: &Home, set: WheelSet, python: &Python) -> Result<Manifest> {
    let (peak_mb, final_mb) = set.peak_and_final_mb();
    check_space(&home.base, peak_mb)?;
    let staged = home.base.join(format!("site.partial-{}", process::id()));
    let scratch = home.scratch();
    eprintln!(
        "installing libtorch {}, {} (about {} MB to fetch, {final_mb} MB on disk)",
        wheels::required_torch(),
        set.describe(),
        peak_mb - final_mb
    );
    let mut attempt = 1;
    let manifest = loop {
        let outcome = install_once(set, python, &staged, &scratch, peak_mb)?;
        match outcome {
            Ok(manifest) => break manifest,
            Err(failure) if failure.try_again && attempt < 2 => {
                eprintln!("{}; trying once more", failure.message);
                attempt += 1;
            }
            Err(failure) => {
                clear_leftovers(home)?;
                bail!("libtorch could not be installed: {}", failure.message)
            }
        }
    };
    manifest.write(&staged)?;
    swap_in(home, &staged)?;
    clear_leftovers(home)?;
    Ok(manifest)
}

fn install_once(
    set: WheelSet,
    python: &Python,
    staged: &Path,
    scratch: &Path,
    peak_mb: u64,
) -> Result<Result<Manifest, pip::Failure>> {
    for folder in [staged, scratch] {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let progress = Progress::watch("libtorch", vec![staged.to_path_buf(), scratch.to_path_buf()], peak_mb);
    let failure = pip::install_set(python, set, staged, scratch)?;
    drop(progress);
    if let Some(failure) = failure {
        return Ok(Err(failure));
    }
    let checked = Manifest::survey(staged, set)
        .and_then(|m| wheels::check_version(&m.torch, &staged.display().to_string()).map(|()| m));
    Ok(checked.map_err(|why| pip::Failure {
        message: format!("the install is not whole: {why:#}"),
        try_again: true,
    }))
}

/// Stops before a disk runs full halfway.
pub fn check_space(folder: &Path, needed_mb: u64) -> Result<()> {
    let Some(free) = tools::free_bytes(folder) else { return Ok(()) };
    let free_mb = free / 1_000_000;
    if free_mb < needed_mb {
        bail!(
            "{} has {free_mb} MB free and the install needs {needed_mb} MB: make room, or choose another place with \
             `cargo xtask setup --dir DIR`",
            folder.display()
        );
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests;
