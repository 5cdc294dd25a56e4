//! Folders, zips and LMDB databases of images, decoded when an image is asked for.
//!
//! In folders and zips the images are those whose names end in a known extension, in the order of their sorted relative names. Hidden
//! files, `__MACOSX` and other files are passed over and counted.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::labels::{self, LabelRule};
use super::lmdb::Lmdb;
use super::zipped::{self, ZipScan, Zipped};
use crate::dataset::{Dataset, Labels, Shape, check_read};
use crate::error::{Error, Result, listing};
use crate::limits::{MAX_ENCODED, MAX_JSON, read_file};
use crate::names::Names;
use crate::resize::{Filter, Fit, fit};
use crate::transform::{Channels, Plain, decode};

/// The file names that count as images.
pub const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "webp", "bmp", "gif"];
/// Folders within folders beyond this depth are not looked into.
const MAX_DEPTH: usize = 32;

/// How a folder or zip is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileOptions {
    /// Side of the square images, in pixels; the first image's size if absent.
    pub resolution: Option<usize>,
    /// Colour; the first image's if absent.
    pub channels: Option<Channels>,
    /// What is done with images of another size.
    pub fit: Fit,
    /// The kernel for that.
    pub filter: Filter,
    /// Where labels come from.
    pub labels: LabelRule,
    /// Number of classes; the largest label + 1, or the number of names, if absent.
    pub classes: Option<u32>,
    /// So many of the first images may not decode where the shape is looked for.
    pub max_corrupt: usize,
}

enum Store {
    Folder(PathBuf),
    Zip(Zipped),
    Lmdb(Lmdb),
}

/// Image files in a folder, a zip or an LMDB database.
///
/// An entry costs its name, four bytes beside it and four of a label; in a zip 40 more, and in a database 8 and no name.
pub struct ImageFiles {
    source: String,
    store: Store,
    /// Relative names; none of a database, whose keys stay in it.
    names: Names,
    ignored: Vec<String>,
    labels: Option<Labels>,
    rule: LabelRule,
    shape: Shape,
    options: FileOptions,
}

/// What a scan finds.
struct Scan {
    store: Store,
    names: Names,
    ignored: Vec<String>,
    json: Option<(String, Vec<u8>)>,
}

impl ImageFiles {
    /// Lists the images of a folder or zip, reads their labels and decodes the first one for its shape.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Empty`] without images; [`Error::UnsafeName`] if a member's name leads out of
    /// the zip or holds control characters; what is wrong with labels; [`Error::Corrupt`] if the first image does not
    /// decode.
    pub fn open(path: &Path, options: FileOptions) -> Result<Self> {
        let is_folder = path.is_dir();
        let scan = match is_folder {
            true => scan_folder(path)?,
            false if path.is_file() => {
                let ZipScan { zipped, names, ignored, json } = zipped::scan(path)?;
                Scan { store: Store::Zip(zipped), names, ignored, json }
            }
            false => {
                return Err(Error::Missing {
                    what: "images",
                    path: path.into(),
                    expected: format!("a folder or a zip of images ({})", EXTENSIONS.join(", ")),
                    found: listing(path),
                    remedy: "set path to it".into(),
                });
            }
        };
        let place = path.display().to_string();
        if scan.names.is_empty() {
            let found =
                if is_folder { listing(path) } else { format!("{} other members", scan.ignored.len()) };
            let reason = format!("expected files ending in {}; found {found}", EXTENSIONS.join(", "));
            return Err(Error::Empty { place, reason });
        }
        let json = scan.json.as_ref().map(|(file, bytes)| labels::Json { file, bytes });
        let labels = labels::resolve(options.labels, &scan.names, json, options.classes, &place)?;
        let (labels, rule) = labels.map_or((None, LabelRule::None), |(l, r)| (Some(l), r));
        let mut set = Self {
            source: format!("{} {place}", if is_folder { "folder" } else { "zip" }),
            store: scan.store,
            names: scan.names,
            ignored: scan.ignored,
            labels,
            rule,
            shape: Shape::square(3, 0),
            options,
        };
        set.shape = set.find_shape()?;
        Ok(set)
    }

    /// Lists the images of an LMDB database and decodes the first one for its shape. It has no labels.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Format`] or [`Error::Corrupt`] if it is no database that can be read;
    /// [`Error::Corrupt`] if the first image does not decode.
    pub fn open_lmdb(path: &Path, options: FileOptions) -> Result<Self> {
        let lmdb = Lmdb::open(path)?;
        let mut set = Self {
            source: format!("lmdb {}", path.display()),
            store: Store::Lmdb(lmdb),
            names: Names::default(),
            ignored: Vec::new(),
            labels: None,
            rule: LabelRule::None,
            shape: Shape::square(3, 0),
            options,
        };
        set.shape = set.find_shape()?;
        Ok(set)
    }

    fn find_shape(&self) -> Result<Shape> {
        if let (Some(resolution), Some(channels)) = (self.options.resolution, self.options.channels) {
            return Ok(Shape::square(channels.count(), resolution));
        }
        // As in training, a few images that do not decode are passed over.
        let most = self.options.max_corrupt.min(self.len().saturating_sub(1));
        let mut first = self.decode(0);
        for index in 1..=most {
            match &first {
                Err(error) if error.is_of_image() => first = self.decode(index),
                _ => break,
            }
        }
        let first = first?;
        let channels = self.options.channels.unwrap_or(first.channels()).count();
        let (height, width) = self.options.resolution.map_or(first.size(), |r| (r, r));
        Ok(Shape { channels, height, width })
    }

    /// The files that were passed over, relative to the set.
    pub fn ignored(&self) -> &[String] {
        &self.ignored
    }

    /// The rule that gave the labels; [`LabelRule::None`] if there are none.
    pub fn label_rule(&self) -> LabelRule {
        self.rule
    }

    /// Image `index` as it is in its file: in its own size and colour.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such image; [`Error::Io`] or [`Error::Corrupt`] that names the file.
    pub fn decode(&self, index: usize) -> Result<Plain> {
        check_read(self.len(), Shape::square(0, 0), index, &[])?;
        decode(&self.bytes(index)?, &self.name(index))
    }

    fn bytes(&self, index: usize) -> Result<Vec<u8>> {
        let name = self.names.get(index);
        match &self.store {
            Store::Folder(root) => read_file(&root.join(name), "bytes of an image file", MAX_ENCODED),
            Store::Zip(zipped) => zipped.read(index, name),
            Store::Lmdb(lmdb) => lmdb.value(index),
        }
    }
}

impl Dataset for ImageFiles {
    fn source(&self) -> &str {
        &self.source
    }

    fn len(&self) -> usize {
        match &self.store {
            Store::Lmdb(lmdb) => lmdb.len(),
            Store::Folder(_) | Store::Zip(_) => self.names.len(),
        }
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn num_classes(&self) -> usize {
        self.labels.as_ref().map_or(0, |l| l.classes as usize)
    }

    fn labels(&self) -> Option<&[u32]> {
        self.labels.as_ref().map(|l| l.values.as_slice())
    }

    fn class_names(&self) -> Option<&[String]> {
        self.labels.as_ref()?.names.as_deref()
    }

    fn name(&self, index: usize) -> String {
        let name = self.names.get(index);
        match &self.store {
            Store::Folder(root) => root.join(name).display().to_string(),
            Store::Zip(zipped) => format!("{}: {name}", zipped.place().display()),
            Store::Lmdb(lmdb) => format!("{}: {}", lmdb.path().display(), lmdb.name(index)),
        }
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<()> {
        check_read(self.len(), self.shape, index, out)?;
        let channels = if self.shape.channels == 1 { Channels::Grey } else { Channels::Rgb };
        let image = self.decode(index)?.into_channels(channels);
        let (height, width) = (self.shape.height, self.shape.width);
        fit(image, height, width, self.options.fit, self.options.filter, &self.name(index))?.write_chw(out);
        Ok(())
    }
}

pub(crate) fn is_image(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
    EXTENSIONS.iter().any(|e| extension.eq_ignore_ascii_case(e))
}

/// Hidden files and the shadow folder that macOS puts into zips.
pub(crate) fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.') || part == "__MACOSX")
}

fn scan_folder(root: &Path) -> Result<Scan> {
    let (mut names, mut ignored, mut json) = (Names::default(), Vec::new(), None);
    let mut visited = HashSet::new();
    let mut pending = vec![(root.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = pending.pop() {
        // Links to folders are followed, each real folder once, so that a ring of links ends.
        let real = folder.canonicalize().map_err(Error::io("list", &folder))?;
        if depth > MAX_DEPTH || !visited.insert(real) {
            continue;
        }
        for entry in std::fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let entry = entry.map_err(Error::io("list", &folder))?;
            let base = entry.file_name();
            let Some(base) = base.to_str() else {
                let file = entry.path().display().to_string();
                return Err(Error::format(&file, "a file name in UTF-8", "other bytes"));
            };
            if is_hidden(base) {
                continue;
            }
            let name = format!("{prefix}{base}");
            // What a listing says of an entry costs nothing; a look at each of a million files takes seconds.
            let kind = entry.file_type().map_err(Error::io("list", &folder))?;
            if kind.is_dir() || (kind.is_symlink() && entry.path().is_dir()) {
                pending.push((entry.path(), format!("{name}/"), depth + 1));
            } else if is_image(base) {
                if has_controls(&name) {
                    let expected = "a file name without control characters";
                    return Err(Error::format(&root.display().to_string(), expected, format!("{name:?}")));
                }
                names.push(&name)?;
            } else if name == "dataset.json" {
                let path = entry.path();
                let bytes = read_file(&path, "bytes of dataset.json", MAX_JSON)?;
                json = Some((path.display().to_string(), bytes));
            } else {
                ignored.push(shown(&name));
            }
        }
    }
    ignored.sort();
    Ok(Scan { store: Store::Folder(root.into()), names: names.sorted(0)?.0, ignored, json })
}

/// Whether a name would move the cursor of a terminal that shows it.
pub(crate) fn has_controls(name: &str) -> bool {
    name.chars().any(char::is_control)
}

/// A name that is only shown. Control characters do occur there: macOS calls the icon of a folder `Icon\r`.
pub(crate) fn shown(name: &str) -> String {
    if has_controls(name) { name.escape_debug().to_string() } else { name.to_owned() }
}
