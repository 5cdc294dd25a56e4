use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use cm_model::short;

use crate::{Error, Result};

/// The file by which a process holds a run's folder; empty while none does.
pub const LOCK_FILE: &str = ".lock";

/// The right to write into a run's folder, which one process at a time has.
///
/// The operating system takes the lock back when the process ends, however it ends: a run that was killed can be
/// resumed at once. The file says who holds it, for the one who finds it held. Files that a killed process left
/// half-written in the folder are removed when it is taken: nobody else can be writing them.
#[derive(Debug)]
pub struct RunLock {
    file: File,
}

impl RunLock {
    /// Takes the folder, which is made where it is not there.
    ///
    /// # Errors
    /// [`Error::Held`] with the process and the host that hold it; [`Error::Io`] if the file cannot be written.
    pub fn take(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
        let path = folder.join(LOCK_FILE);
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = opened.map_err(|e| Error::io(&path, "opening", e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(folder, &mut file)),
            Err(TryLockError::Error(e)) => return Err(Error::io(&path, "locking", e)),
        }
        let owner = format!("process {} on {}\n", std::process::id(), host());
        let written = file.set_len(0).and_then(|()| file.write_all(owner.as_bytes()));
        written.map_err(|e| Error::io(&path, "writing", e))?;
        remove_half_written(folder)?;
        Ok(Self { file })
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // The lock goes with the file; its text must not name a process that is gone. If that fails, the lock is free
        // all the same.
        let _ = self.file.set_len(0);
    }
}

/// Removes the temporary files of [`cm_model::files`], whose names nothing else has.
fn remove_half_written(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io(folder, "reading the folder", e))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') && name.ends_with(".partial") && path.is_file() {
            fs::remove_file(&path).map_err(|e| Error::io(&path, "removing", e))?;
        }
    }
    Ok(())
}

fn held(folder: &Path, file: &mut File) -> Error {
    let mut owner = String::new();
    let read = file.rewind().and_then(|()| file.take(200).read_to_string(&mut owner));
    let owner = match (read, owner.trim()) {
        (Ok(_), owner) if !owner.is_empty() => short(owner),
        _ => "it has not said which".to_owned(),
    };
    Error::Held { folder: PathBuf::from(folder), owner }
}

/// The name of this machine, where the system tells it without a call of C.
fn host() -> String {
    let name =
        fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| fs::read_to_string("/etc/hostname"));
    match name.as_deref().map(str::trim) {
        Ok(name) if !name.is_empty() => name.to_owned(),
        _ => "this machine".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner_who_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let lock = RunLock::take(&run).unwrap();
        // Another handle is to the system what another process is.
        let error = RunLock::take(&run).unwrap_err().to_string();
        assert!(error.contains(&format!("process {} on ", std::process::id())), "{error}");
        assert!(error.starts_with(&run.display().to_string()) && !error.contains('\n'), "{error}");
        drop(lock);
        assert_eq!(fs::read_to_string(run.join(LOCK_FILE)).unwrap(), "", "nobody holds it");
        drop(RunLock::take(&run).unwrap());
    }

    #[test]
    fn a_file_that_a_killed_process_left_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LOCK_FILE), "process 4194305 on a machine that was longer ago\n")
            .unwrap();
        for name in [".a1B2c3.partial", "mine.partial", ".hidden"] {
            fs::write(folder.path().join(name), "half").unwrap();
        }
        let _lock = RunLock::take(folder.path()).unwrap();
        let text = fs::read_to_string(folder.path().join(LOCK_FILE)).unwrap();
        assert_eq!(text, format!("process {} on {}\n", std::process::id(), host()));
        let left =
            [".a1B2c3.partial", "mine.partial", ".hidden"].map(|name| folder.path().join(name).is_file());
        assert_eq!(left, [false, true, true], "what the killed process wrote goes, and nothing else");
    }
}
