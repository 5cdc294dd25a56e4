//! Zips of images: a small record for each member instead of the whole directory, and members that several threads read.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rawzip::{CompressionMethod, FileReader, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveEntryWayfinder};

use super::files::{has_controls, is_hidden, is_image, shown};
use crate::error::{Error, Result, of_system};
use crate::limits::{Bounded, DEFLATE_RATIO, MAX_ENCODED, MAX_JSON};
use crate::names::Names;

/// The images of a zip.
pub(crate) struct Zipped {
    archive: ZipArchive<FileReader>,
    place: PathBuf,
    /// Bytes of the archive.
    stored: u64,
    members: Vec<Member>,
}

/// Where a member lies.
#[derive(Clone, Copy)]
struct Member {
    way: ZipArchiveEntryWayfinder,
    deflated: bool,
}

/// What a zip holds.
pub(crate) struct ZipScan {
    pub zipped: Zipped,
    pub names: Names,
    pub ignored: Vec<String>,
    /// The place and the bytes of `dataset.json`.
    pub json: Option<(String, Vec<u8>)>,
}

/// Lists a zip.
pub(crate) fn scan(path: &Path) -> Result<ZipScan> {
    let place = path.display().to_string();
    let broken = |error: rawzip::Error| match of_system(&error) {
        Some(cause) => Error::io("read", path)(cause),
        None => Error::corrupt(place.as_str(), format!("as a zip: {error}")),
    };
    let file = File::open(path).map_err(Error::io("read", path))?;
    let stored = file.metadata().map_err(Error::io("read", path))?.len();
    let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
    let archive = ZipArchive::from_file(file, &mut buffer).map_err(&broken)?;
    let (mut names, mut members) = (Names::default(), Vec::new());
    let (mut ignored, mut jsons) = (Vec::new(), Vec::new());
    let mut entries = archive.entries(&mut buffer);
    let mut count = 0_u64;
    while let Some(entry) = entries.next_entry().map_err(&broken)? {
        count += 1;
        let raw = entry.file_path();
        let Ok(name) = std::str::from_utf8(raw.as_ref()) else {
            return Err(Error::format(&place, "file names in UTF-8", String::from_utf8_lossy(raw.as_ref())));
        };
        if !is_enclosed(name) {
            return Err(Error::UnsafeName { archive: path.into(), name: name.into() });
        }
        if name.ends_with('/') || is_hidden(name) {
            continue;
        }
        let is_json = name.rsplit('/').next() == Some("dataset.json");
        if !is_json && !is_image(name) {
            ignored.push(shown(name));
            continue;
        }
        if has_controls(name) {
            return Err(Error::UnsafeName { archive: path.into(), name: name.into() });
        }
        if entry.mode().is_symlink() {
            return Err(Error::UnsafeMember { archive: path.into(), name: name.into(), what: "link" });
        }
        let method = entry.compression_method();
        let deflated = method == CompressionMethod::DEFLATE;
        let known = deflated || method == CompressionMethod::STORE;
        if !known || entry.flags().is_encrypted() {
            let found = if known { "an encrypted one".to_string() } else { format!("method {method:?}") };
            return Err(Error::format(&format!("{place}: {name}"), "a stored or deflated member", found));
        }
        let member = Member { way: entry.wayfinder(), deflated };
        if is_json {
            jsons.push((name.to_string(), member));
        } else {
            names.push(name)?;
            members.push(member);
        }
    }
    // Without the 64-bit form a directory counts its members in 16 bits, and some writers let that number run over.
    let claimed = archive.entries_hint();
    if claimed != count && claimed != count & 0xffff {
        return Err(Error::corrupt(
            place,
            format!("as a zip: {claimed} members are claimed and {count} found"),
        ));
    }
    ignored.sort();
    let zipped = Zipped { archive, place: path.into(), stored, members };
    finish(zipped, names, ignored, jsons)
}

/// Sorts the images, and finds the `dataset.json` that belongs to them.
fn finish(
    mut zipped: Zipped,
    names: Names,
    ignored: Vec<String>,
    mut jsons: Vec<(String, Member)>,
) -> Result<ZipScan> {
    // A zip made of a folder has that folder's name before every member; dataset.json names files from beside itself.
    jsons.sort_by_key(|(name, _)| name.matches('/').count());
    let json = jsons.into_iter().next().filter(|(name, _)| {
        let folder = &name[..name.len() - "dataset.json".len()];
        names.iter().all(|image| image.starts_with(folder))
    });
    let skip = json.as_ref().map_or(0, |(name, _)| name.len() - "dataset.json".len());
    let (names, order) = names.sorted(skip)?;
    zipped.members = order.iter().map(|&before| zipped.members[before as usize]).collect();
    let json = match json {
        Some((name, member)) => {
            let file = format!("{}: {name}", zipped.place.display());
            Some((file.clone(), zipped.read_member(member, file, MAX_JSON)?))
        }
        None => None,
    };
    Ok(ZipScan { zipped, names, ignored, json })
}

impl Zipped {
    /// The bytes of image `index`, which is called `name`.
    pub fn read(&self, index: usize, name: &str) -> Result<Vec<u8>> {
        self.read_member(self.members[index], format!("{}: {name}", self.place.display()), MAX_ENCODED)
    }

    pub fn place(&self) -> &Path {
        &self.place
    }

    fn read_member(&self, member: Member, file: String, limit: u64) -> Result<Vec<u8>> {
        let claimed = member.way.uncompressed_size_hint();
        if claimed > limit {
            return Err(Error::TooLarge { file, what: "bytes for a member", claimed, limit });
        }
        let entry =
            self.archive.get_entry(member.way).map_err(|e| Error::unpacking(&self.place, &file, &e))?;
        // Both sizes are claims; the archive's own length is not.
        let packed = member.way.compressed_size_hint().min(self.stored);
        let capacity = if member.deflated { packed.saturating_mul(DEFLATE_RATIO) } else { packed };
        let reader: Box<dyn Read + '_> = match member.deflated {
            true => Box::new(flate2::read::DeflateDecoder::new(entry.reader())),
            false => Box::new(entry.reader()),
        };
        // Reading to the end also makes the reader compare length and checksum.
        let mut input = Bounded { reader: entry.verifying_reader(reader), capacity, file };
        let bytes = input.take(claimed, "of a zip member")?;
        input.finish("of a zip member", claimed)?;
        Ok(bytes)
    }
}

/// Whether a member's name stays inside the archive on every system.
fn is_enclosed(name: &str) -> bool {
    let drive = name.as_bytes().get(1) == Some(&b':');
    let climbs = name.split(['/', '\\']).any(|part| part == "..");
    !(name.starts_with(['/', '\\']) || drive || climbs || name.contains('\0'))
}
