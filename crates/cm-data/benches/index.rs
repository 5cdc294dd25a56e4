//! Does a set of millions of files open at once, and does its index fit beside the training?
//!
//! A folder and a zip of many small images, which are a thousand images over and over (in the folder by links to them),
//! are opened as training opens them. Printed are the seconds, and the bytes of memory that an entry costs. Criterion is
//! of no use here: one opening is a second, and the memory is that of the first.
//!
//! ```text
//! cargo bench -p cm-data --bench index                        100,000 entries
//! CM_INDEX_ENTRIES=3000000 cargo bench -p cm-data --bench index
//! ```

#![allow(clippy::print_stdout)] // the figures are the answer

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use cm_data::grid::encode_png;
use cm_data::{Channels, Shape, SourceKind, SourceSpec};

/// Images that are truly there.
const IMAGES: usize = 1000;
/// Entries of a folder's sub-folder, as EDM's tools and others have them.
const IN_A_FOLDER: usize = 1000;
/// What an entry may cost, in bytes, and what opening may take, in seconds.
const MOST: (f64, f64) = (64.0, 10.0);

fn entries() -> usize {
    std::env::var("CM_INDEX_ENTRIES").ok().and_then(|count| count.parse().ok()).unwrap_or(100_000)
}

fn images() -> Vec<Vec<u8>> {
    let shape = Shape::square(3, 4);
    let image = |i: usize| (0..shape.values()).map(|v| (v * i % 251) as u8).collect::<Vec<_>>();
    (0..IMAGES).map(|i| encode_png(&image(i), shape).expect("a small image")).collect()
}

fn name(entry: usize) -> String {
    format!("{:05}/img{entry:08}.png", entry / IN_A_FOLDER)
}

fn make_folder(root: &Path, images: &[Vec<u8>]) -> std::io::Result<()> {
    for entry in 0..entries() {
        let path = root.join(name(entry));
        if entry % IN_A_FOLDER == 0 {
            fs::create_dir_all(path.parent().expect("it lies in a folder"))?;
        }
        // A file of ext4 has at most 65,000 links: enough for 65 million entries.
        let first = root.join(name(entry % IMAGES));
        if first == path { fs::write(&path, &images[entry % IMAGES])? } else { fs::hard_link(first, &path)? }
    }
    Ok(())
}

fn make_zip(path: &Path, images: &[Vec<u8>]) -> Result<(), Box<dyn std::error::Error>> {
    let mut archive = rawzip::ZipArchiveWriter::new(BufWriter::new(File::create(path)?));
    for entry in 0..entries() {
        let (mut file, config) = archive.new_file(name(entry)).start()?;
        let mut writer = config.wrap(&mut file);
        writer.write_all(&images[entry % IMAGES])?;
        let (_, descriptor) = writer.finish()?;
        file.finish(descriptor)?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

/// Bytes of memory that the process holds.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    status.split_whitespace().nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(0.0) * 4096.0
}

fn open(kind: SourceKind, path: &Path) {
    let spec = SourceSpec {
        resolution: Some(4),
        channels: Some(Channels::Rgb),
        ..SourceSpec::new(kind, Some(path.to_owned()))
    };
    let (before, started) = (resident(), Instant::now());
    let set = spec.open().expect("what was just made");
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(set.len(), entries());
    let bytes = (resident() - before) / entries() as f64;
    println!("{}: {} entries open in {seconds:.2} s, {bytes:.0} bytes an entry", kind.name(), entries());
    // What the allocator keeps of the work counts too; of small sets that is more than the index.
    let counts = entries() >= 1_000_000;
    assert!(
        !counts || (bytes <= MOST.0 && seconds <= MOST.1),
        "more than {MOST:?} bytes an entry and seconds"
    );
}

fn main() {
    let dir = tempfile::tempdir().expect("a folder");
    let (images, folder, archive) = (images(), dir.path().join("set"), dir.path().join("set.zip"));
    make_folder(&folder, &images).expect("room for links");
    open(SourceKind::Folder, &folder);
    make_zip(&archive, &images).expect("room for a zip");
    open(SourceKind::Zip, &archive);
}
