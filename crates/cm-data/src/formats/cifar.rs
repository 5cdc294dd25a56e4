//! CIFAR-10's binary version: records of one label byte and 3,072 bytes of a 32×32 image, planes red, green, blue.
//!
//! Either the unpacked folder `cifar-10-batches-bin`, or the archive `cifar-10-binary.tar.gz`, which is read in place,
//! or a folder that contains one of the two.
//!
//! # Source
//! A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
//! <https://www.cs.toronto.edu/~kriz/cifar.html>.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};

use crate::dataset::{Labels, MemorySet, Shape};
use crate::error::{Error, Result, listing, of_system, one_line};
use crate::limits::{Bounded, gunzip, read_file};
use crate::spec::Split;

/// The archive's file name.
pub const ARCHIVE: &str = "cifar-10-binary.tar.gz";
/// Where the archive is published.
pub const URL: &str = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz";
/// The archive's MD5, as published beside it.
pub const MD5: &str = "c32a1d4ab5d03f1284b67883e8d87530";
/// The folder inside the archive.
pub const FOLDER: &str = "cifar-10-batches-bin";
/// Images are 3×32×32.
pub const SHAPE: Shape = Shape::square(3, 32);

const CLASSES: [&str; 10] =
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];
const TRAIN: [&str; 5] =
    ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];
const TEST: [&str; 1] = ["test_batch.bin"];
const RECORD: usize = 1 + SHAPE.values();
/// A batch holds 10,000 records, 30 MB; a claim of more than this is no CIFAR-10.
const MAX_BATCH: u64 = 1 << 30;

/// The form in which the set lies on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The folder that holds `data_batch_1.bin`.
    Folder(PathBuf),
    /// The packed archive.
    Archive(PathBuf),
}

/// Finds the set at `path`: the folder, the archive, or a folder with one of them.
///
/// # Errors
/// [`Error::Missing`] that says which file goes where.
pub fn find(path: &Path) -> Result<Place> {
    if path.is_file() {
        return Ok(Place::Archive(path.into()));
    }
    for folder in [path.to_path_buf(), path.join(FOLDER)] {
        if TRAIN.iter().chain(&TEST).any(|name| folder.join(name).is_file()) {
            return Ok(Place::Folder(folder));
        }
    }
    let archive = path.join(ARCHIVE);
    if archive.is_file() {
        return Ok(Place::Archive(archive));
    }
    Err(missing(
        path,
        format!(
            "{ARCHIVE} or the folder {FOLDER} with data_batch_1.bin to data_batch_5.bin and test_batch.bin"
        ),
        listing(path),
    ))
}

fn missing(path: &Path, expected: String, found: String) -> Error {
    Error::Missing {
        what: "CIFAR-10",
        path: path.into(),
        expected,
        found,
        remedy: format!(
            "put {ARCHIVE} there (from {URL}), or run `cargo xtask demo`, which needs no download"
        ),
    }
}

/// Reads the training images, the test images or both.
///
/// # Errors
/// [`Error::Missing`] if a file of that part is not there, [`Error::Length`] if one is truncated, [`Error::Label`]
/// if a record's label exceeds 9.
pub fn read(path: &Path, split: Split, labelled: bool) -> Result<MemorySet> {
    let wanted: Vec<&str> = match split {
        Split::Train => TRAIN.to_vec(),
        Split::Test => TEST.to_vec(),
        Split::All => TRAIN.iter().chain(&TEST).copied().collect(),
    };
    let place = find(path)?;
    let mut batches = match &place {
        Place::Folder(folder) => read_folder(folder, &wanted)?,
        Place::Archive(archive) => read_archive(archive, &wanted)?,
    };
    let at = match &place {
        Place::Folder(p) | Place::Archive(p) => p,
    };
    let absent: Vec<&str> = wanted.iter().copied().filter(|name| !batches.contains_key(name)).collect();
    if !absent.is_empty() {
        let found = match batches.len() {
            0 => listing(at),
            _ => batches.values().map(|b| b.0.as_str()).collect::<Vec<_>>().join(", "),
        };
        return Err(missing(at, absent.join(", "), found));
    }
    let mut pixels = Vec::new();
    let mut labels = Vec::new();
    let mut first: Option<(String, usize)> = None;
    for name in &wanted {
        let (file, bytes) = batches.remove(name).unwrap_or_default();
        let (first_file, first_len) = first.get_or_insert_with(|| (file.clone(), bytes.len()));
        // The five training files hold equally many records; a file cut between two records shows only here.
        if TRAIN.contains(name) && bytes.len() != *first_len {
            let what = format!("of records, as {first_file} has");
            return Err(Error::Length { file, what, expected: *first_len as u64, got: bytes.len() as u64 });
        }
        parse(&file, &bytes, &mut pixels, &mut labels)?;
    }
    let source = format!("CIFAR-10 {} {}", split.name(), at.display());
    let labels = labelled.then(|| Labels {
        values: labels,
        classes: 10,
        names: Some(CLASSES.map(String::from).to_vec()),
    });
    MemorySet::new(source, SHAPE, pixels, labels)
}

/// Splits the records of one file into pixels and labels.
pub(crate) fn parse(file: &str, bytes: &[u8], pixels: &mut Vec<u8>, labels: &mut Vec<u32>) -> Result<()> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(RECORD) {
        let expected = (bytes.len().next_multiple_of(RECORD)).max(RECORD) as u64;
        let what = format!("(whole records of {RECORD})");
        return Err(Error::Length { file: file.into(), what, expected, got: bytes.len() as u64 });
    }
    pixels.reserve(bytes.len() / RECORD * SHAPE.values());
    for (index, record) in bytes.chunks_exact(RECORD).enumerate() {
        if record[0] > 9 {
            return Err(Error::Label { file: file.into(), index, value: record[0].into(), classes: 10 });
        }
        labels.push(record[0].into());
        pixels.extend_from_slice(&record[1..]);
    }
    Ok(())
}

type Batches<'a> = BTreeMap<&'a str, (String, Vec<u8>)>;

fn read_folder<'a>(folder: &Path, wanted: &[&'a str]) -> Result<Batches<'a>> {
    let mut batches = Batches::new();
    for &name in wanted {
        let path = folder.join(name);
        if path.is_file() {
            batches
                .insert(name, (path.display().to_string(), read_file(&path, "bytes of records", MAX_BATCH)?));
        }
    }
    Ok(batches)
}

fn read_archive<'a>(path: &Path, wanted: &[&'a str]) -> Result<Batches<'a>> {
    let name = path.display().to_string();
    let corrupt = |e: std::io::Error| match of_system(&e) {
        Some(cause) => Error::io("read", path)(cause),
        None => Error::corrupt(&name, format!("{e} (the archive is truncated or damaged)")),
    };
    let file = File::open(path).map_err(Error::io("read", path))?;
    let stored = file.metadata().map_err(Error::io("read", path))?.len();
    let input = gunzip(BufReader::with_capacity(1 << 16, file), stored, name.clone());
    let mut capacity = input.capacity;
    let mut archive = tar::Archive::new(input.reader);
    let mut batches = Batches::new();
    for entry in archive.entries().map_err(corrupt)? {
        let mut entry = entry.map_err(corrupt)?;
        let inside = entry.path().map_err(corrupt)?.into_owned();
        if inside.components().any(|c| !matches!(c, Component::Normal(_) | Component::CurDir)) {
            return Err(Error::UnsafeName { archive: path.into(), name: inside.display().to_string() });
        }
        let Some(&wanted) = wanted.iter().find(|w| inside.file_name().is_some_and(|n| n == **w)) else {
            continue;
        };
        let kind = entry.header().entry_type();
        if !kind.is_file() {
            let what = if kind.is_symlink() || kind.is_hard_link() { "link" } else { "folder or device" };
            let name = inside.display().to_string();
            return Err(Error::UnsafeMember { archive: path.into(), name, what });
        }
        let claimed = entry.size();
        let file = format!("{name}: {}", one_line(&inside.display().to_string()));
        if claimed > MAX_BATCH {
            return Err(Error::TooLarge { file, what: "bytes of records", claimed, limit: MAX_BATCH });
        }
        let bytes =
            Bounded { reader: entry.by_ref(), capacity, file: file.clone() }.take(claimed, "of records")?;
        capacity -= claimed;
        batches.insert(wanted, (file, bytes));
    }
    // The checksum stands at the end of the gzip stream, behind what tar has asked for.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink()).map_err(corrupt)?;
    Ok(batches)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use std::io::Write;

    /// One batch file of `count` records whose pixels tell batch, record and position.
    pub(crate) fn batch(number: u8, count: usize) -> Vec<u8> {
        (0..count)
            .flat_map(|i| {
                let label = ((usize::from(number) + i) % 10) as u8;
                let pixels = (0..3072_usize).map(move |p| (p / 1024 * 50 + i + usize::from(number)) as u8);
                std::iter::once(label).chain(pixels)
            })
            .collect()
    }

    /// The six files of a small set in the published layout.
    pub(crate) fn files(count: usize) -> Vec<(&'static str, Vec<u8>)> {
        TRAIN.iter().chain(&TEST).enumerate().map(|(i, name)| (*name, batch(i as u8, count))).collect()
    }

    fn write_folder(at: &Path, files: &[(&str, Vec<u8>)]) {
        std::fs::create_dir_all(at).unwrap();
        for (name, bytes) in files {
            std::fs::write(at.join(name), bytes).unwrap();
        }
    }

    /// The same set as an archive.
    pub(crate) fn archive(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gz);
        for (name, bytes) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, format!("{FOLDER}/{name}"), bytes.as_slice()).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn folder_archive_and_their_parents_give_the_same_set() {
        let dir = tempfile::tempdir().unwrap();
        let (unpacked, packed) = (dir.path().join("u"), dir.path().join("p"));
        write_folder(&unpacked.join(FOLDER), &files(3));
        std::fs::create_dir(&packed).unwrap();
        std::fs::write(packed.join(ARCHIVE), archive(&files(3))).unwrap();
        let want = read(&unpacked.join(FOLDER), Split::Train, true).unwrap();
        assert_eq!((want.len(), want.shape(), want.num_classes()), (15, SHAPE, 10));
        for path in [unpacked.clone(), packed.clone(), packed.join(ARCHIVE)] {
            let got = read(&path, Split::Train, true).unwrap();
            for i in 0..15 {
                assert_eq!(got.get(i).unwrap(), want.get(i).unwrap());
            }
        }
        assert_eq!(read(&packed, Split::Test, true).unwrap().labels(), Some(&[5, 6, 7][..]));
        assert_eq!(read(&packed, Split::All, false).unwrap().len(), 18);
        assert_eq!(want.class_names().unwrap()[3], "cat");
    }

    #[test]
    fn records_are_planes_of_red_green_blue() {
        let dir = tempfile::tempdir().unwrap();
        write_folder(dir.path(), &files(2));
        let image = read(dir.path(), Split::Train, true).unwrap().get(1).unwrap();
        assert_eq!(image.label, Some(1));
        assert_eq!([image.pixels[0], image.pixels[1024], image.pixels[3071]], [1, 51, 101]);
    }

    #[test]
    fn a_missing_set_says_which_file_goes_where_and_names_the_demo() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path(), Split::Train, true).err().unwrap().to_string();
        for part in ["expected cifar-10-binary.tar.gz", "found an empty folder", URL, "cargo xtask demo"] {
            assert!(error.contains(part), "{error} lacks {part}");
        }
        assert!(!error.contains('\n'));
        write_folder(dir.path(), &files(1)[..3]);
        let error = read(dir.path(), Split::Train, true).err().unwrap().to_string();
        assert!(error.contains("expected data_batch_4.bin, data_batch_5.bin"), "{error}");
    }

    #[test]
    fn truncation_is_noticed_inside_and_between_records() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = files(2);
        set[1].1.pop();
        write_folder(dir.path(), &set);
        let error = read(dir.path(), Split::Train, true).err().unwrap();
        assert!(matches!(error, Error::Length { expected: 6146, got: 6145, .. }), "{error}");
        set[1].1.truncate(RECORD);
        write_folder(dir.path(), &set);
        let error = read(dir.path(), Split::Train, true).err().unwrap().to_string();
        assert!(
            error.contains("data_batch_2.bin: expected 6146 bytes") && error.contains("truncated"),
            "{error}"
        );
    }

    #[test]
    fn a_cut_archive_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ARCHIVE);
        let bytes = archive(&files(20));
        for keep in [bytes.len() - 20, bytes.len() / 2, 100] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = read(&path, Split::All, true).err().unwrap().to_string();
            assert!(error.contains(ARCHIVE) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_label_outside_names_file_and_record() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = files(2);
        set[2].1[RECORD] = 17;
        write_folder(dir.path(), &set);
        let error = read(dir.path(), Split::Train, true).err().unwrap().to_string();
        assert!(error.ends_with("data_batch_3.bin: image 1: label 17 is outside 0..=9"), "{error}");
    }

    #[test]
    fn an_archive_that_climbs_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut header = tar::Header::new_old();
        header.set_size(1);
        header.as_old_mut().name[..10].copy_from_slice(b"../../evil");
        header.set_cksum();
        let mut tar = Vec::from(header.as_bytes().as_slice());
        tar.resize(2048, 0);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&tar).unwrap();
        let path = dir.path().join(ARCHIVE);
        std::fs::write(&path, gz.finish().unwrap()).unwrap();
        assert!(matches!(read(&path, Split::Train, true), Err(Error::UnsafeName { .. })));
    }
}
