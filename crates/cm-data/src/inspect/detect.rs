//! Which form the data at a path has.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result, listing};
use crate::formats::{cifar, idx, lmdb, shards};
use crate::limits::open_maybe_gz;
use crate::spec::SourceKind;

/// The form of what lies at `path`, told by its content first and by names where content cannot tell.
///
/// # Errors
/// [`Error::Missing`] if nothing is there, [`Error::Format`] if it is nothing that this crate reads.
pub fn detect(path: &Path) -> Result<SourceKind> {
    match path.to_str() {
        Some("digits") if !path.exists() => return Ok(SourceKind::Digits),
        Some("emoji") if !path.exists() => return Ok(SourceKind::Emoji),
        _ => {}
    }
    if path.is_dir() {
        return Ok(if cifar::find(path).is_ok() {
            SourceKind::Cifar10
        } else if idx::find(path).is_ok() {
            SourceKind::Idx
        } else if path.join(lmdb::FILE).is_file() {
            SourceKind::Lmdb
        } else if shards::is_folder_of_arrays(path)? {
            SourceKind::Shards
        } else {
            SourceKind::Folder
        });
    }
    if !path.is_file() {
        return Err(Error::Missing {
            what: "data",
            path: path.into(),
            expected: "a folder or zip of images, CIFAR-10's folder or archive, IDX files, LSUN's lmdb, shards, npz, or the word digits or emoji".into(),
            found: listing(path),
            remedy: "check the path".into(),
        });
    }
    detect_file(path)
}

fn detect_file(path: &Path) -> Result<SourceKind> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut start = Vec::new();
    file.take(8).read_to_end(&mut start).map_err(Error::io("read", path))?;
    if start.starts_with(b"\x93NUMPY") {
        return Ok(SourceKind::Npz);
    }
    if path.extension().is_some_and(|e| e == "mdb") {
        return Ok(SourceKind::Lmdb);
    }
    if start.starts_with(b"PK") {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let archive = zip::ZipArchive::new(std::io::BufReader::new(file));
        let archive = archive.map_err(|e| Error::unpacking(path, path.display().to_string(), &e))?;
        let arrays = archive.file_names().any(|n| n.ends_with(".npy"));
        return Ok(if arrays { SourceKind::Npz } else { SourceKind::Zip });
    }
    let mut inside = Vec::new();
    // A broken gzip stream is named by the reader of its form.
    let _ = open_maybe_gz(path)?.reader.take(4).read_to_end(&mut inside);
    match inside[..] {
        [0, 0, 8, 3] => Ok(SourceKind::Idx),
        _ if start.starts_with(&[0x1f, 0x8b]) => Ok(SourceKind::Cifar10),
        _ => {
            let expected =
                "a zip, npz, npy, IDX or CIFAR-10 archive (a single image is no set: give its folder)";
            Err(Error::format(
                &path.display().to_string(),
                expected,
                format!("a file that starts with {start:02x?}"),
            ))
        }
    }
}
