//! Files that are either whole or not there.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
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

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}
