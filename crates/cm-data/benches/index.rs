//! Does a set of millions of files open at once, and does its index fit beside the training?
//!
//! A folder, a zip and an LMDB database of many small images, which are a thousand images over and over (in the folder by
//! links to them), are opened as training opens them. Printed are the seconds, and the bytes of memory that an entry costs. Criterion is
//! of no use here: one opening is a second, and the memory is that of the first.
//!
//! ```text
//! cargo bench -p cm-data --bench index                        100,000 entries
//! CM_INDEX_ENTRIES=3000000 cargo bench -p cm-data --bench index
//! ```

#![allow(clippy::print_stdout)] // the figures are the answer

use std::fs::{self, File};
use std::io::{BufWriter, Seek, Write};
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

/// Bytes of a database's pages.
const PAGE: usize = 4096;
/// Bytes of a page before the offsets of its nodes, and of a node before its key.
const PAGE_HEADER: usize = 16;
const NODE_HEADER: usize = 8;
/// Kinds of pages.
const BRANCH: u16 = 1;
const LEAF: u16 = 2;
const META: u16 = 8;

/// A database as LMDB 0.9 lays one out that is filled in the order of its keys: full leaves, above them the branches, each
/// level behind the one below.
struct Database {
    out: BufWriter<File>,
    /// Pages that are written; the first two are for what describes the whole.
    pages: u64,
    /// Pages of branches and of leaves.
    kinds: [u64; 2],
}

/// A node: its first 6 bytes (the size of a value, or a child), its key and its value.
struct Node {
    start: [u8; 6],
    key: Vec<u8>,
    value: Vec<u8>,
}

impl Node {
    fn bytes(&self) -> usize {
        // Nodes begin at even places.
        (NODE_HEADER + self.key.len() + self.value.len()).next_multiple_of(2)
    }
}

impl Database {
    /// Writes the nodes of one level; returns one for each page, for the level above.
    fn level(&mut self, kind: u16, nodes: impl Iterator<Item = Node>) -> std::io::Result<Vec<Node>> {
        let (mut above, mut page, mut full) = (Vec::new(), Vec::new(), PAGE_HEADER);
        for node in nodes {
            if full + 2 + node.bytes() > PAGE {
                above.push(self.page(kind, &page)?);
                (page, full) = (Vec::new(), PAGE_HEADER);
            }
            full += 2 + node.bytes();
            page.push(node);
        }
        above.push(self.page(kind, &page)?);
        Ok(above)
    }

    /// Writes a page; returns the node that leads to it.
    fn page(&mut self, kind: u16, nodes: &[Node]) -> std::io::Result<Node> {
        let mut bytes = vec![0; PAGE];
        let mut upper = PAGE;
        for (i, node) in nodes.iter().enumerate() {
            upper -= node.bytes();
            let place = PAGE_HEADER + 2 * i;
            bytes[place..place + 2].copy_from_slice(&(upper as u16).to_le_bytes());
            // The first key of a branch counts as the least one and is left out.
            let key: &[u8] = if kind == BRANCH && i == 0 { &[] } else { &node.key };
            let parts = [&node.start, (key.len() as u16).to_le_bytes().as_slice(), key, &node.value].concat();
            bytes[upper..upper + parts.len()].copy_from_slice(&parts);
        }
        bytes[..8].copy_from_slice(&self.pages.to_le_bytes());
        bytes[10..12].copy_from_slice(&kind.to_le_bytes());
        bytes[12..14].copy_from_slice(&((PAGE_HEADER + 2 * nodes.len()) as u16).to_le_bytes());
        bytes[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        self.out.write_all(&bytes)?;
        self.kinds[usize::from(kind == LEAF)] += 1;
        let number = self.pages;
        self.pages += 1;
        let start = number.to_le_bytes();
        let start = [start[0], start[1], start[2], start[3], start[4], start[5]];
        let key = nodes.first().map(|node| node.key.clone()).unwrap_or_default();
        Ok(Node { start, key, value: Vec::new() })
    }

    /// A page that describes the whole.
    fn meta(&self, number: u64, depth: u16, root: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &number.to_le_bytes());
        put(10, &META.to_le_bytes());
        put(16, &0xBEEF_C0DE_u32.to_le_bytes());
        put(20, &1_u32.to_le_bytes());
        put(32, &(self.pages * PAGE as u64).to_le_bytes());
        // The database of free pages is empty; its first field is the size of a page.
        put(40, &(PAGE as u32).to_le_bytes());
        put(80, &u64::MAX.to_le_bytes());
        put(94, &depth.to_le_bytes());
        put(96, &self.kinds[0].to_le_bytes());
        put(104, &self.kinds[1].to_le_bytes());
        put(120, &(entries() as u64).to_le_bytes());
        put(128, &root.to_le_bytes());
        put(136, &(self.pages - 1).to_le_bytes());
        put(144, &number.to_le_bytes());
        bytes
    }
}

/// Keys of 40 digits, as LSUN's.
fn make_lmdb(folder: &Path, images: &[Vec<u8>]) -> std::io::Result<()> {
    fs::create_dir(folder)?;
    let path = folder.join("data.mdb");
    let mut database = Database { out: BufWriter::new(File::create(&path)?), pages: 2, kinds: [0; 2] };
    database.out.write_all(&vec![0; 2 * PAGE])?;
    let leaf = |entry: usize| {
        let value = images[entry % IMAGES].clone();
        let size = (value.len() as u32).to_le_bytes();
        Node { start: [size[0], size[1], size[2], size[3], 0, 0], key: format!("{entry:040x}").into(), value }
    };
    let (mut above, mut depth) = (database.level(LEAF, (0..entries()).map(leaf))?, 1);
    while above.len() > 1 {
        above = database.level(BRANCH, above.into_iter())?;
        depth += 1;
    }
    let root = database.pages - 1;
    let metas = [database.meta(0, depth, root), database.meta(1, depth, root)].concat();
    database.out.seek(std::io::SeekFrom::Start(0))?;
    database.out.write_all(&metas)?;
    database.out.flush()
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
    let database = dir.path().join("set_lmdb");
    make_lmdb(&database, &images).expect("room for a database");
    open(SourceKind::Lmdb, &database);
    fs::remove_dir_all(&database).expect("what was just made");
    make_folder(&folder, &images).expect("room for links");
    open(SourceKind::Folder, &folder);
    make_zip(&archive, &images).expect("room for a zip");
    open(SourceKind::Zip, &archive);
}
