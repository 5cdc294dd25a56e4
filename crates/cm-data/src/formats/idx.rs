//! The IDX form of MNIST and its relatives: big-endian header, then bytes; plain or gzip-compressed.
//!
//! Images (`…images-idx3-ubyte`, magic 0x00000803) and labels (`…labels-idx1-ubyte`, magic 0x00000801) are paired by
//! name. `train` in the name marks the training part, `t10k` or `test` the test part.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::dataset::{Labels, MemorySet, Shape};
use crate::error::{Error, Result, listing};
use crate::limits::{Bounded, claimed_bytes, open_maybe_gz};
use crate::spec::Split;

const EXPECTED: &str =
    "an images file like train-images-idx3-ubyte.gz with train-labels-idx1-ubyte.gz beside it";

/// Which part of a set a file holds, told by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The training images.
    Train,
    /// The test images.
    Test,
    /// A set that is not split.
    Whole,
}

/// An images file and its labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The part, by name.
    pub part: Part,
    /// The images.
    pub images: PathBuf,
    /// The labels, if a file of the paired name lies beside the images.
    pub labels: Option<PathBuf>,
}

/// Reads `count`, `height`, `width` and the pixels of an images file.
pub(crate) fn read_images<R: Read>(input: &mut Bounded<R>) -> Result<(Shape, Vec<u8>)> {
    let dims = header(input, 3, "images")?;
    let shape = Shape { channels: 1, height: dims[1] as usize, width: dims[2] as usize };
    let size = claimed_bytes(&input.file, &dims)?;
    if size == 0 {
        return Err(Error::Empty { place: input.file.clone(), reason: format!("the header says {dims:?}") });
    }
    let what = format!("for {} images of {}x{}", dims[0], dims[1], dims[2]);
    let pixels = input.take(size, &what)?;
    input.finish(&what, size)?;
    Ok((shape, pixels))
}

/// Reads a labels file of `count` labels.
pub(crate) fn read_labels<R: Read>(
    input: &mut Bounded<R>,
    count: usize,
    classes: Option<u32>,
) -> Result<Labels> {
    let claimed = header(input, 1, "labels")?[0];
    if claimed != count as u64 {
        return Err(Error::format(
            &input.file,
            format!("{count} labels, one per image"),
            format!("{claimed}"),
        ));
    }
    let bytes = input.take(claimed, "of labels")?;
    input.finish("of labels", claimed)?;
    let values: Vec<i64> = bytes.into_iter().map(i64::from).collect();
    Labels::new(&input.file, &values, classes)
}

/// The dimensions in a header of uint8 values.
fn header<R: Read>(input: &mut Bounded<R>, dims: u8, what: &str) -> Result<Vec<u64>> {
    let magic = input.take(4, "of IDX header")?;
    if magic != [0, 0, 8, dims] {
        let expected = format!(
            "IDX {what} (uint8, {dims} dimension{}, magic 0000080{dims})",
            if dims == 1 { "" } else { "s" }
        );
        let found = magic.iter().map(|b| format!("{b:02x}")).collect::<String>();
        return Err(Error::format(&input.file, expected, format!("magic {found}")));
    }
    let bytes = input.take(4 * u64::from(dims), "of IDX header")?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]).into()).collect())
}

/// Whether a file name reads like IDX images.
pub fn is_images_name(name: &str) -> bool {
    let name = name.to_lowercase();
    name.contains("images") && (name.contains("idx3") || name.contains(".idx"))
}

/// All pairs at `path`: an images file itself, or those in a folder (or in its `raw` folder, as torchvision has it).
///
/// # Errors
/// [`Error::Missing`] if there is none.
pub fn find(path: &Path) -> Result<Vec<Pair>> {
    if path.is_file() {
        return Ok(vec![Pair { part: Part::Whole, images: path.into(), labels: partner(path) }]);
    }
    let mut pairs = Vec::new();
    for folder in [path.to_path_buf(), path.join("raw")] {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut names: Vec<String> =
            entries.filter_map(|e| e.ok()).filter_map(|e| e.file_name().into_string().ok()).collect();
        // Sorted, so that of `x` and `x.gz` the plain one comes first and is kept.
        names.sort();
        names.retain(|n| is_images_name(n));
        names.dedup_by(|later, kept| later.strip_suffix(".gz") == Some(kept));
        for name in names {
            let part = part_of(&name);
            let images = folder.join(&name);
            let labels = partner(&images);
            pairs.push(Pair { part, images, labels });
        }
        if !pairs.is_empty() {
            pairs.sort_by_key(|pair: &Pair| pair.part);
            return Ok(pairs);
        }
    }
    Err(missing(path))
}

fn missing(path: &Path) -> Error {
    Error::Missing {
        what: "IDX images",
        path: path.into(),
        expected: EXPECTED.into(),
        found: listing(path),
        remedy: "set path to the folder that holds them or to the images file".into(),
    }
}

fn part_of(name: &str) -> Part {
    let name = name.to_lowercase();
    if name.contains("t10k") || name.contains("test") {
        Part::Test
    } else if name.contains("train") {
        Part::Train
    } else {
        Part::Whole
    }
}

/// The labels file that belongs to an images file, compressed or not.
fn partner(images: &Path) -> Option<PathBuf> {
    let name = images.file_name()?.to_str()?;
    let at = name.rfind("images")?;
    let labels = format!("{}labels{}", &name[..at], &name[at + 6..]).replace("idx3", "idx1");
    let bare = labels.strip_suffix(".gz").unwrap_or(&labels);
    [labels.clone(), bare.to_string(), format!("{bare}.gz")]
        .iter()
        .map(|n| images.with_file_name(n))
        .find(|p| p.is_file())
}

/// A set that was read, and whether its files split it into training and test images.
pub struct IdxSet {
    /// The images.
    pub set: MemorySet,
    /// Whether the split was made by the files.
    pub split_by_files: bool,
}

/// Reads the part of the set at `path` that `split` asks for; a set that is not split is read whole.
///
/// # Errors
/// [`Error::Missing`] if the files of that part are not there; otherwise what is wrong with them.
pub fn read(path: &Path, split: Split, labelled: bool, classes: Option<u32>) -> Result<IdxSet> {
    let pairs = find(path)?;
    let split_by_files = pairs.iter().all(|p| p.part != Part::Whole);
    let wanted = |pair: &&Pair| match (split_by_files, split) {
        (true, Split::Train) => pair.part == Part::Train,
        (true, Split::Test) => pair.part == Part::Test,
        (_, _) => true,
    };
    let chosen: Vec<&Pair> = pairs.iter().filter(wanted).collect();
    let clash = |part| chosen.iter().filter(|p| p.part == part).count() > 1;
    if [Part::Train, Part::Test, Part::Whole].into_iter().any(clash) {
        let names: Vec<_> = chosen.iter().map(|p| p.images.display().to_string()).collect();
        return Err(Error::Spec {
            key: "path",
            value: path.display().to_string(),
            reason: format!("several sets lie there: name one images file of {}", names.join(", ")),
        });
    }
    if chosen.is_empty() {
        return Err(missing(path));
    }
    let mut parts = Vec::new();
    for pair in &chosen {
        parts.push(read_pair(pair, labelled, classes)?);
    }
    let part = if split_by_files { format!(" {}", split.name()) } else { String::new() };
    let set = join(format!("IDX{part} {}", path.display()), parts, classes)?;
    Ok(IdxSet { set, split_by_files })
}

fn read_pair(pair: &Pair, labelled: bool, classes: Option<u32>) -> Result<(Shape, Vec<u8>, Option<Labels>)> {
    let (shape, pixels) = read_images(&mut open_maybe_gz(&pair.images)?)?;
    let count = pixels.len() / shape.values();
    let labels = match pair.labels.as_ref().filter(|_| labelled) {
        Some(path) => Some(read_labels(&mut open_maybe_gz(path)?, count, classes)?),
        None => None,
    };
    Ok((shape, pixels, labels))
}

/// Puts the parts of a set one after the other. Labels remain only if every part has them.
fn join(
    source: String,
    parts: Vec<(Shape, Vec<u8>, Option<Labels>)>,
    classes: Option<u32>,
) -> Result<MemorySet> {
    let shape = parts[0].0;
    let labelled = parts.iter().all(|p| p.2.is_some());
    let mut pixels = Vec::new();
    let mut labels = Vec::new();
    for (got, block, part) in parts {
        if got != shape {
            return Err(Error::Shape { what: source, expected: shape, got });
        }
        if pixels.is_empty() {
            pixels = block
        } else {
            pixels.extend(block)
        }
        labels.extend(part.into_iter().flat_map(|l| l.values).map(i64::from));
    }
    let labels = if labelled { Some(Labels::new(&source, &labels, classes)?) } else { None };
    MemorySet::new(source, shape, pixels, labels)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use std::io::Write;

    pub(crate) fn images(count: u32, height: u32, width: u32) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, 3];
        bytes.extend([count, height, width].iter().flat_map(|d| d.to_be_bytes()));
        bytes.extend((0..count * height * width).map(|i| i as u8));
        bytes
    }

    pub(crate) fn labels(values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, 1];
        bytes.extend((values.len() as u32).to_be_bytes());
        bytes.extend(values);
        bytes
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn mnist_like() -> tempfile::TempDir {
        folder(&[
            ("train-images-idx3-ubyte.gz", gz(&images(3, 2, 4))),
            ("train-labels-idx1-ubyte.gz", gz(&labels(&[3, 1, 0]))),
            ("t10k-images-idx3-ubyte", images(2, 2, 4)),
            ("t10k-labels-idx1-ubyte", labels(&[9, 2])),
        ])
    }

    #[test]
    fn parts_are_paired_by_name_plain_or_compressed() {
        let dir = mnist_like();
        let train = read(dir.path(), Split::Train, true, None).unwrap();
        assert!(train.split_by_files);
        assert_eq!(train.set.labels(), Some(&[3, 1, 0][..]));
        assert_eq!(train.set.get(1).unwrap().pixels, (8..16).collect::<Vec<u8>>());
        let test = read(dir.path(), Split::Test, true, Some(10)).unwrap().set;
        assert_eq!((test.labels(), test.num_classes()), (Some(&[9, 2][..]), 10));
        assert_eq!(
            read(dir.path(), Split::All, true, None).unwrap().set.labels(),
            Some(&[3, 1, 0, 9, 2][..])
        );
        assert_eq!(read(dir.path(), Split::All, false, None).unwrap().set.labels(), None);
    }

    #[test]
    fn torchvisions_raw_folder_is_found_and_its_double_files_are_one() {
        let outer = tempfile::tempdir().unwrap();
        let raw = outer.path().join("raw");
        std::fs::create_dir(&raw).unwrap();
        std::fs::write(raw.join("train-images-idx3-ubyte"), images(1, 2, 2)).unwrap();
        std::fs::write(raw.join("train-images-idx3-ubyte.gz"), gz(&images(1, 2, 2))).unwrap();
        assert_eq!(find(outer.path()).unwrap().len(), 1);
        assert_eq!(read(outer.path(), Split::Train, true, None).unwrap().set.len(), 1);
    }

    #[test]
    fn a_missing_part_says_what_was_found() {
        let dir = folder(&[("train-images-idx3-ubyte", images(1, 2, 2))]);
        let error = read(dir.path(), Split::Test, true, None).err().unwrap().to_string();
        assert!(
            error.contains("train-images-idx3-ubyte.gz with") && error.contains("found train-images"),
            "{error}"
        );
        let error = read(&dir.path().join("nowhere"), Split::All, true, None).err().unwrap().to_string();
        assert!(error.contains("does not exist"), "{error}");
    }

    #[test]
    fn wrong_lengths_are_told_apart_from_wrong_forms() {
        let short = folder(&[("a-images-idx3-ubyte", images(3, 2, 4)[..30].to_vec())]);
        let error = read(short.path(), Split::All, true, None).err().unwrap();
        assert!(matches!(error, Error::Length { expected: 24, got: 14, .. }), "{error}");
        let cut = gz(&images(30, 20, 4));
        let cut = folder(&[("a-images-idx3-ubyte.gz", cut[..cut.len() / 2].to_vec())]);
        assert!(matches!(read(cut.path(), Split::All, true, None), Err(Error::Corrupt { .. })));
        let long = folder(&[("a-images-idx3-ubyte", [images(3, 2, 4), vec![0]].concat())]);
        assert!(matches!(
            read(long.path(), Split::All, true, None),
            Err(Error::Length { expected: 24, got: 25, .. })
        ));
        let wrong = folder(&[("a-images-idx3-ubyte", labels(&[0; 9]))]);
        let error = read(wrong.path(), Split::All, true, None).err().unwrap().to_string();
        assert!(error.contains("found magic 00000801"), "{error}");
    }

    #[test]
    fn labels_are_counted_and_bounded() {
        let fewer =
            folder(&[("a-images-idx3-ubyte", images(3, 1, 1)), ("a-labels-idx1-ubyte", labels(&[0, 1]))]);
        let error = read(fewer.path(), Split::All, true, None).err().unwrap().to_string();
        assert!(error.contains("expected 3 labels, one per image, found 2"), "{error}");
        let wild =
            folder(&[("a-images-idx3-ubyte", images(2, 1, 1)), ("a-labels-idx1-ubyte", labels(&[0, 77]))]);
        let error = read(wild.path(), Split::All, true, Some(10)).err().unwrap().to_string();
        assert!(error.ends_with("a-labels-idx1-ubyte: image 1: label 77 is outside 0..=9"), "{error}");
    }

    #[test]
    fn a_header_cannot_make_it_allocate() {
        let mut bytes = vec![0, 0, 8, 3];
        bytes.extend([u32::MAX; 3].iter().flat_map(|d| d.to_be_bytes()));
        let dir = folder(&[("a-images-idx3-ubyte", bytes.clone())]);
        assert!(matches!(read(dir.path(), Split::All, true, None), Err(Error::TooLarge { .. })));
        bytes[4..16].copy_from_slice(&[0, 0, 255, 255, 0, 0, 1, 0, 0, 0, 1, 0]);
        let dir = folder(&[("a-images-idx3-ubyte.gz", gz(&bytes))]);
        assert!(matches!(read(dir.path(), Split::All, true, None), Err(Error::Length { .. })));
    }

    #[test]
    fn several_sets_in_one_folder_have_to_be_told_apart() {
        let dir =
            folder(&[("a-images-idx3-ubyte", images(1, 1, 1)), ("b-images-idx3-ubyte", images(1, 1, 1))]);
        let error = read(dir.path(), Split::All, true, None).err().unwrap().to_string();
        assert!(error.contains("a-images-idx3-ubyte, ") && error.contains("b-images"), "{error}");
        assert_eq!(
            read(&dir.path().join("b-images-idx3-ubyte"), Split::All, true, None).unwrap().set.len(),
            1
        );
    }
}
