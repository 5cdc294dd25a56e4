//! Folders and zips of images, decoded when an image is asked for.
//!
//! The images are those whose names end in a known extension, in the order of their sorted relative names. Hidden
//! files, `__MACOSX` and other files are passed over and counted.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use zip::ZipArchive;

use super::labels::{self, LabelRule};
use super::positioned::Positioned;
use crate::dataset::{Dataset, Labels, Shape, check_read};
use crate::error::{Error, Result, listing};
use crate::limits::{Bounded, DEFLATE_RATIO, MAX_ENCODED, MAX_JSON, read_file};
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
}

enum Store {
    Folder(PathBuf),
    Zip { archive: ZipArchive<Positioned>, stored: u64, members: Vec<u32> },
}

/// Image files in a folder or a zip.
pub struct ImageFiles {
    source: String,
    place: PathBuf,
    store: Store,
    names: Vec<String>,
    ignored: Vec<String>,
    labels: Option<Labels>,
    rule: LabelRule,
    shape: Shape,
    options: FileOptions,
}

/// What a scan of a folder or zip finds.
struct Scan {
    store: Store,
    names: Vec<String>,
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
            false if path.is_file() => scan_zip(path)?,
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
            place: path.into(),
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

    fn find_shape(&self) -> Result<Shape> {
        if let (Some(resolution), Some(channels)) = (self.options.resolution, self.options.channels) {
            return Ok(Shape::square(channels.count(), resolution));
        }
        let first = self.decode(0)?;
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
        match &self.store {
            Store::Folder(root) => {
                read_file(&root.join(&self.names[index]), "bytes of an image file", MAX_ENCODED)
            }
            Store::Zip { archive, stored, members } => {
                // Cloning shares the directory of the archive and opens a position of its own.
                let mut archive = archive.clone();
                read_member(&mut archive, members[index] as usize, *stored, &self.place, MAX_ENCODED)
            }
        }
    }
}

impl Dataset for ImageFiles {
    fn source(&self) -> &str {
        &self.source
    }

    fn len(&self) -> usize {
        self.names.len()
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
        let name = &self.names[index];
        match &self.store {
            Store::Folder(root) => root.join(name).display().to_string(),
            Store::Zip { .. } => format!("{}: {name}", self.place.display()),
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

fn is_image(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, e)| e);
    EXTENSIONS.iter().any(|e| extension.eq_ignore_ascii_case(e))
}

/// Hidden files and the shadow folder that macOS puts into zips.
fn is_hidden(name: &str) -> bool {
    name.split('/').any(|part| part.starts_with('.') || part == "__MACOSX")
}

fn scan_folder(root: &Path) -> Result<Scan> {
    let mut scan =
        Scan { store: Store::Folder(root.into()), names: Vec::new(), ignored: Vec::new(), json: None };
    let mut visited = HashSet::new();
    let mut pending = vec![(root.to_path_buf(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = pending.pop() {
        // Links to folders are followed, each real folder once, so that a ring of links ends.
        let real = folder.canonicalize().map_err(Error::io("list", &folder))?;
        if depth > MAX_DEPTH || !visited.insert(real) {
            continue;
        }
        for entry in std::fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = entry.map_err(Error::io("list", &folder))?.path();
            let Some(base) = path.file_name().and_then(|n| n.to_str()) else {
                return Err(Error::format(
                    &path.display().to_string(),
                    "a file name in UTF-8",
                    "other bytes",
                ));
            };
            if is_hidden(base) {
                continue;
            }
            let name = format!("{prefix}{base}");
            if path.is_dir() {
                pending.push((path, format!("{name}/"), depth + 1));
            } else if is_image(base) {
                if has_controls(&name) {
                    let expected = "a file name without control characters";
                    return Err(Error::format(&root.display().to_string(), expected, format!("{name:?}")));
                }
                scan.names.push(name);
            } else if name == "dataset.json" {
                let bytes = read_file(&path, "bytes of dataset.json", MAX_JSON)?;
                scan.json = Some((path.display().to_string(), bytes));
            } else {
                scan.ignored.push(shown(&name));
            }
        }
    }
    scan.names.sort();
    scan.ignored.sort();
    Ok(scan)
}

fn scan_zip(path: &Path) -> Result<Scan> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let reader = Positioned::new(file).map_err(Error::io("read", path))?;
    let stored = reader.length();
    let mut archive = ZipArchive::new(reader)
        .map_err(|e| Error::corrupt(path.display().to_string(), format!("as a zip: {e}")))?;
    let mut images = Vec::new();
    let mut ignored = Vec::new();
    let mut jsons = Vec::new();
    for index in 0..archive.len() {
        let Some(name) = archive.name_for_index(index) else { continue };
        if !is_enclosed(name) {
            return Err(Error::UnsafeName { archive: path.into(), name: name.into() });
        }
        let is_json = name.rsplit('/').next() == Some("dataset.json");
        match name {
            _ if name.ends_with('/') || is_hidden(name) => {}
            _ if (is_image(name) || is_json) && has_controls(name) => {
                return Err(Error::UnsafeName { archive: path.into(), name: name.into() });
            }
            _ if is_image(name) => images.push((name.to_string(), index as u32)),
            _ if is_json => jsons.push((name.to_string(), index)),
            _ => ignored.push(shown(name)),
        }
    }
    images.sort();
    ignored.sort();
    // A zip made of a folder has that folder's name before every member; dataset.json names files from beside itself.
    jsons.sort_by_key(|(name, _)| name.matches('/').count());
    let json = jsons.first().and_then(|(name, index)| {
        let folder = &name[..name.len() - "dataset.json".len()];
        images
            .iter()
            .all(|(image, _)| image.starts_with(folder))
            .then(|| (folder.to_string(), name.clone(), *index))
    });
    let mut names = Vec::with_capacity(images.len());
    let skip = json.as_ref().map_or(0, |(folder, _, _)| folder.len());
    let members = images.iter().map(|(_, index)| *index).collect();
    names.extend(images.into_iter().map(|(name, _)| name[skip..].to_string()));
    let json = match json {
        Some((_, name, index)) => {
            let bytes = read_member(&mut archive, index, stored, path, MAX_JSON)?;
            Some((format!("{}: {name}", path.display()), bytes))
        }
        None => None,
    };
    Ok(Scan { store: Store::Zip { archive, stored, members }, names, ignored, json })
}

/// Whether a name would move the cursor of a terminal that shows it.
fn has_controls(name: &str) -> bool {
    name.chars().any(char::is_control)
}

/// A name that is only shown. Control characters do occur there: macOS calls the icon of a folder `Icon\r`.
fn shown(name: &str) -> String {
    if has_controls(name) { name.escape_debug().to_string() } else { name.to_owned() }
}

/// Whether a member's name stays inside the archive on every system.
fn is_enclosed(name: &str) -> bool {
    let drive = name.as_bytes().get(1) == Some(&b':');
    let climbs = name.split(['/', '\\']).any(|part| part == "..");
    !(name.starts_with(['/', '\\']) || drive || climbs || name.contains('\0'))
}

fn read_member(
    archive: &mut ZipArchive<Positioned>,
    index: usize,
    stored: u64,
    place: &Path,
    limit: u64,
) -> Result<Vec<u8>> {
    let name = archive.name_for_index(index).unwrap_or_default();
    let file = format!("{}: {name}", place.display());
    let entry = archive.by_index(index).map_err(|e| Error::corrupt(&file, e))?;
    if entry.is_symlink() {
        let name = entry.name().to_owned();
        return Err(Error::UnsafeMember { archive: place.into(), name, what: "link" });
    }
    let claimed = entry.size();
    if claimed > limit {
        return Err(Error::TooLarge { file, what: "bytes for a member", claimed, limit });
    }
    // Both sizes are claims; the archive's own length is not.
    let capacity = entry.compressed_size().min(stored).saturating_mul(DEFLATE_RATIO);
    let mut input = Bounded { reader: entry, capacity, file };
    let bytes = input.take(claimed, "of a zip member")?;
    // Reading to the end also makes the zip reader compare the checksum.
    input.finish("of a zip member", claimed)?;
    input.reader.read(&mut [0]).map_err(|e| Error::corrupt(input.file, e))?;
    Ok(bytes)
}
