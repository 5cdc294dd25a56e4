//! Files that are either whole or not there.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use crate::{Error, Result};

/// Writes a file beside its place, syncs it and renames it, so that a reader sees the old file or the new one
/// and never a part, whatever happens in between.
///
/// # Errors
/// [`Error::Io`] with the path and the step that failed; the old file is then untouched.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> Result<()> {
    write_beside(path, write)?;
    sync_folder(folder_of(path))
}

/// [`write_atomic`] without the last of its syncs, for many files of one folder: [`sync_folder`] belongs behind them.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_beside(path: &Path, write: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>) -> Result<()> {
    let folder = folder_of(path);
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
    let temp = named_temp(folder, path)?;
    let mut writer = BufWriter::new(temp.as_file());
    let written = write(&mut writer).and_then(|()| writer.flush());
    drop(writer);
    written.map_err(|e| Error::io(path, "writing", e))?;
    give_name(temp, path)
}

/// A temporary file in `folder` with the permissions that an ordinary new file would get.
pub(crate) fn named_temp(folder: &Path, path: &Path) -> Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder).map_err(|e| Error::io(path, "creating a temporary file beside it", e))
}

/// Syncs `temp` to the disk and gives it its name.
pub(crate) fn persist(temp: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    give_name(temp, path)?;
    sync_folder(folder_of(path))
}

fn give_name(temp: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    temp.as_file().sync_all().map_err(|e| Error::io(path, "syncing to the disk", e))?;
    temp.persist(path).map(drop).map_err(|e| Error::io(path, "renaming into place", e.error))
}

/// Makes a rename in `folder` durable.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let sync = || File::open(folder)?.sync_all();
    if cfg!(unix) { sync().map_err(|e| Error::io(folder, "syncing the folder", e)) } else { Ok(()) }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A writer that fails once: behind its first error it takes everything and writes nothing.
///
/// It is for writers of archives that finish their file when they are dropped, and print to the terminal where that
/// fails again. What they have written is thrown away then, as [`write_atomic`] does.
#[derive(Debug)]
pub struct FailsOnce<W> {
    inner: W,
    failed: bool,
    /// Where the next byte goes, and where the last one went: who seeks must find that it all adds up.
    at: u64,
    end: u64,
}

impl<W: Write + Seek> FailsOnce<W> {
    /// Around a writer that stands at the beginning of an empty file.
    pub fn new(inner: W) -> Self {
        Self { inner, failed: false, at: 0, end: 0 }
    }

    fn note<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        self.failed |= result.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        result
    }
}

impl<W: Write + Seek> Write for FailsOnce<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = if self.failed { Ok(bytes.len()) } else { self.inner.write(bytes) };
        let written = self.note(written)?;
        self.at += written as u64;
        self.end = self.end.max(self.at);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = if self.failed { Ok(()) } else { self.inner.flush() };
        self.note(flushed)
    }
}

impl<W: Write + Seek> Seek for FailsOnce<W> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        let place = place.ok_or(io::ErrorKind::InvalidInput)?;
        let sought = if self.failed { Ok(place) } else { self.inner.seek(SeekFrom::Start(place)) };
        self.at = self.note(sought)?;
        Ok(self.at)
    }
}
