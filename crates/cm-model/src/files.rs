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
pub fn write_atomic(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&File>) -> std::io::Result<()>,
) -> Result<()> {
    let folder = folder_of(path);
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
    let temp = named_temp(folder, path)?;
    let mut writer = BufWriter::new(temp.as_file());
    let written = write(&mut writer).and_then(|()| writer.flush());
    drop(writer);
    written.map_err(|e| Error::io(path, "writing", e))?;
    persist(temp, path)
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
    temp.as_file().sync_all().map_err(|e| Error::io(path, "syncing to the disk", e))?;
    temp.persist(path).map_err(|e| Error::io(path, "renaming into place", e.error))?;
    sync_folder(folder_of(path))
}

/// Makes a rename in `folder` durable.
///
/// # Errors
/// [`Error::Io`] if the folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<()> {
    let sync = || File::open(folder)?.sync_all();
    if cfg!(unix) { sync().map_err(|e| Error::io(folder, "syncing the folder", e)) } else { Ok(()) }
}

/// Takes what an encoder writes until writing fails, and then keeps the error and takes the rest as if all were well.
///
/// The writers of archives say less of an error than the system did, and speak up once more when they are dropped.
#[derive(Debug)]
pub struct UntilError<W> {
    inner: W,
    error: Option<io::Error>,
    /// Place and length, as the encoder is to see them.
    at: u64,
    length: u64,
}

impl<W: Write + Seek> UntilError<W> {
    /// From the beginning of `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, error: None, at: 0, length: 0 }
    }

    /// The first error.
    ///
    /// # Errors
    /// That one.
    pub fn finish(self) -> io::Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    /// Does `work` unless there was an error, and keeps the one that it returns.
    fn unless_failed<T>(&mut self, work: impl FnOnce(&mut W) -> io::Result<T>) -> Option<T> {
        if self.error.is_some() {
            return None;
        }
        match work(&mut self.inner) {
            Ok(done) => Some(done),
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }
}

impl<W: Write + Seek> Write for UntilError<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.unless_failed(|inner| inner.write_all(bytes).map(|()| bytes.len()));
        let written = written.unwrap_or(bytes.len());
        self.at += written as u64;
        self.length = self.length.max(self.at);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unless_failed(Write::flush);
        Ok(())
    }
}

impl<W: Write + Seek> Seek for UntilError<W> {
    fn seek(&mut self, place: SeekFrom) -> io::Result<u64> {
        let seen = match place {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
        };
        let seen = seen.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.at = self.unless_failed(|inner| inner.seek(place)).unwrap_or(seen);
        Ok(self.at)
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that has room for so many bytes.
    struct Small(io::Cursor<Vec<u8>>, u64);

    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0.position() + bytes.len() as u64 <= self.1 {
                true => self.0.write(bytes),
                false => Err(io::Error::from_raw_os_error(28)),
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Small {
        fn seek(&mut self, place: SeekFrom) -> io::Result<u64> {
            self.0.seek(place)
        }
    }

    #[test]
    fn the_first_error_is_the_one_that_is_reported() {
        let write = |room: u64| {
            let mut out = UntilError::new(Small(io::Cursor::default(), room));
            out.write_all(b"0123456789").unwrap();
            out.seek(SeekFrom::Start(2)).unwrap();
            out.write_all(b"ab").unwrap();
            assert_eq!(out.seek(SeekFrom::End(0)).unwrap(), 10);
            assert_eq!(out.seek(SeekFrom::Current(-4)).unwrap(), 6);
            out.flush().unwrap();
            out
        };
        let whole = write(10);
        assert_eq!(whole.inner.0.get_ref(), b"01ab456789");
        whole.finish().unwrap();
        assert_eq!(write(9).finish().unwrap_err().raw_os_error(), Some(28));
    }
}
