//! LMDB databases of encoded images, as LSUN publishes its scenes: keys that name images, values that hold their files.
//!
//! A read-only reader of the one thing needed: all values of the main database in the order of their keys. It follows the
//! file's B+ tree with every number held against the file's length, since the C library trusts a file that it maps, and a
//! damaged one ends the program. Eight bytes are kept of an entry: where it stands.
//!
//! The format (LMDB 0.9, 64 bits, little-endian), of `struct MDB_meta`, `MDB_page` and `MDB_node` in its `mdb.c`: two meta
//! pages, of which the one of the later transaction counts; pages with a header of 16 bytes and an array of offsets of
//! nodes; nodes with a header of 8 bytes, the key, and the value or, for a large one, the number of its first page.

use std::path::{Path, PathBuf};

use super::positioned::Positioned;
use crate::error::{Error, Result, listing};
use crate::limits::MAX_ENCODED;

/// The file inside a database's folder.
pub(crate) const FILE: &str = "data.mdb";
const MAGIC: u32 = 0xBEEF_C0DE;
const VERSION: u32 = 1;
/// Bytes before the offsets of a page's nodes.
const PAGE_HEADER: usize = 16;
/// Bytes before a node's key.
const NODE_HEADER: usize = 8;
/// The longest key that LMDB is built with.
const MAX_KEY: usize = 511;
/// Page sizes that LMDB makes: those of operating systems.
const PAGE_SIZES: std::ops::RangeInclusive<u32> = 512..=65_536;
/// The deepest tree that LMDB walks.
const MAX_DEPTH: u16 = 32;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
const OVERFLOW: u16 = 0x04;
const META: u16 = 0x08;
/// A node's value lies in pages of its own.
const BIG: u16 = 0x01;
/// A node holds a database of its own, or several values.
const NESTED: u16 = 0x02 | 0x04;
/// The database flags of several values for a key, in whatever form.
const DUPLICATES: u16 = 0x04 | 0x10 | 0x20 | 0x40;

/// A database whose values are image files.
pub(crate) struct Lmdb {
    file: Positioned,
    path: PathBuf,
    page: u64,
    /// Where each node stands in the file.
    nodes: Vec<u64>,
}

/// The main database, as a meta page describes it.
struct Meta {
    transaction: u64,
    page: u32,
    flags: u16,
    depth: u16,
    entries: u64,
    root: u64,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    number(bytes, at).map(u64::from_le_bytes)
}

impl Meta {
    /// Reads a meta page; `None` if it is none.
    fn parse(page: &[u8]) -> Option<Self> {
        let body = page.get(PAGE_HEADER..)?;
        let known = u16_at(page, 10)? & META != 0 && u32_at(body, 0)? == MAGIC && u32_at(body, 4)? == VERSION;
        // Behind magic, version, address and size of the map: the database of free pages, and then the main one.
        let (free, main) = (24, 24 + 48);
        known.then_some(())?;
        Some(Self {
            transaction: u64_at(body, main + 48 + 8)?,
            // The first field of the database of free pages holds the size of all pages.
            page: u32_at(body, free)?,
            flags: u16_at(body, main + 4)?,
            depth: u16_at(body, main + 6)?,
            entries: u64_at(body, main + 32)?,
            root: u64_at(body, main + 40)?,
        })
    }
}

/// A node: its key, and where its value is.
struct Node<'a> {
    key: &'a [u8],
    size: u32,
    flags: u16,
    /// What stands behind the key, up to the page's end.
    rest: &'a [u8],
}

impl<'a> Node<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let key_size = usize::from(u16_at(bytes, 6)?);
        let rest = bytes.get(NODE_HEADER..)?;
        let size = u32::from(u16_at(bytes, 0)?) | u32::from(u16_at(bytes, 2)?) << 16;
        (key_size <= MAX_KEY && key_size <= rest.len()).then(|| {
            let (key, rest) = rest.split_at(key_size);
            Self { key, size, flags: u16::from_le_bytes([bytes[4], bytes[5]]), rest }
        })
    }

    /// The child of a branch page's node.
    fn child(&self) -> u64 {
        u64::from(self.size) | u64::from(self.flags) << 32
    }
}

impl Lmdb {
    /// Lists the entries of the database in the folder `path`, or in the file `path`.
    ///
    /// # Errors
    /// [`Error::Missing`] without a database; [`Error::Format`] if it is of another kind; [`Error::Corrupt`] if its tree is
    /// damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_path_buf() };
        if !path.is_file() {
            return Err(Error::Missing {
                what: "LMDB database",
                expected: format!("a folder with {FILE}, as LSUN's archives unpack to"),
                found: listing(path.parent().unwrap_or(&path)),
                remedy: "set path to it".into(),
                path,
            });
        }
        let file = Positioned::open(&path)?;
        let name = path.display().to_string();
        let other =
            |found: &str| Error::format(&name, "an LMDB database (version 0.9, little-endian)", found);
        let start = file.start(2 * 65_536).map_err(|e| Error::unpacking(&path, &name, &e))?;
        let first = Meta::parse(&start).ok_or_else(|| other("something else"))?;
        if !PAGE_SIZES.contains(&first.page) || !first.page.is_power_of_two() {
            return Err(other(&format!("pages of {} bytes", first.page)));
        }
        let second =
            start.get(first.page as usize..).and_then(Meta::parse).filter(|meta| meta.page == first.page);
        let meta = match second {
            Some(second) if second.transaction > first.transaction => second,
            _ => first,
        };
        if meta.flags & DUPLICATES != 0 {
            return Err(other("one with several values for a key"));
        }
        let mut lmdb = Self { file, path, page: meta.page.into(), nodes: Vec::new() };
        lmdb.nodes = lmdb.walk(&meta)?;
        Ok(lmdb)
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn broken(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(self.path.display().to_string(), format!("as an LMDB database: {what}"))
    }

    /// A read that failed: by the system, or behind the end of a file that is shorter than it was.
    fn unread(&self, cause: std::io::Error) -> Error {
        match cause.raw_os_error() {
            Some(_) => Error::io("read", &self.path)(cause),
            None => self.broken(cause),
        }
    }

    /// Reads the page `number` of the tree, which must be of one of the kinds `allowed`.
    fn read_page(&self, number: u64, allowed: u16, bytes: &mut [u8]) -> Result<u16> {
        let inside = |at: &u64| at.checked_add(self.page).is_some_and(|end| end <= self.file.length());
        let at = number.checked_mul(self.page).filter(inside);
        let at = at.ok_or_else(|| self.broken(format!("page {number} lies behind the file's end")))?;
        self.file.read_exact_at(bytes, at).map_err(|e| self.unread(e))?;
        let flags = u16_at(bytes, 10).unwrap_or(0) & (BRANCH | LEAF | OVERFLOW | META);
        if u64_at(bytes, 0) != Some(number) || flags & allowed == 0 || flags.count_ones() != 1 {
            return Err(self.broken(format!("page {number} is none of the tree")));
        }
        Ok(flags)
    }

    /// Where the nodes of a page start, in the page.
    fn offsets(page: &[u8]) -> Option<Vec<usize>> {
        let lower = usize::from(u16_at(page, 12)?);
        let count = lower.checked_sub(PAGE_HEADER)? / 2;
        let offsets = (0..count).map(|i| u16_at(page, PAGE_HEADER + 2 * i).map(usize::from));
        let offsets = offsets.collect::<Option<Vec<_>>>()?;
        offsets.iter().all(|&at| at >= lower && at + NODE_HEADER <= page.len()).then_some(offsets)
    }

    /// Walks the tree from its root and notes every entry, in the order of the keys.
    fn walk(&self, meta: &Meta) -> Result<Vec<u64>> {
        if meta.entries == 0 {
            let place = self.path.display().to_string();
            return Err(Error::Empty { place, reason: "the database has no entries".into() });
        }
        if meta.depth == 0 || meta.depth > MAX_DEPTH {
            return Err(self.broken(format!("a tree of depth {}", meta.depth)));
        }
        // An entry takes at least its header and an offset, so that a claim of more is none that a file can keep.
        let most = self.file.length() / (NODE_HEADER as u64 + 2);
        let mut nodes = Vec::new();
        let room = nodes.try_reserve_exact(meta.entries.min(most) as usize);
        room.map_err(|_| self.broken(format!("no memory for {} entries", meta.entries)))?;
        let mut bytes = vec![0; self.page as usize];
        // A page can be met once in a tree: a ring of pages would otherwise never end.
        let mut pages_left = self.file.length() / self.page;
        let mut pending = vec![(meta.root, 1_u16)];
        while let Some((number, depth)) = pending.pop() {
            pages_left = pages_left.checked_sub(1).ok_or_else(|| self.broken("pages in a ring"))?;
            let allowed = if depth == meta.depth { LEAF } else { BRANCH };
            self.read_page(number, allowed, &mut bytes)?;
            let damaged = || self.broken(format!("page {number} has nodes outside of itself"));
            let offsets = Self::offsets(&bytes).ok_or_else(damaged)?;
            for &at in offsets.iter().rev().filter(|_| allowed == BRANCH) {
                let node = Node::parse(&bytes[at..]).ok_or_else(damaged)?;
                pending.push((node.child(), depth + 1));
            }
            for &at in offsets.iter().filter(|_| allowed == LEAF) {
                let node = Node::parse(&bytes[at..]).ok_or_else(damaged)?;
                if node.flags & NESTED != 0 {
                    let name = self.path.display().to_string();
                    let found = "one that holds named databases, or several values for a key";
                    return Err(Error::format(&name, "an LMDB database of image files", found));
                }
                nodes.push(number * self.page + at as u64);
            }
            if nodes.len() as u64 > meta.entries {
                break;
            }
        }
        if nodes.len() as u64 != meta.entries {
            let found = nodes.len();
            return Err(self.broken(format!("{} entries are claimed and {found} found", meta.entries)));
        }
        Ok(nodes)
    }

    /// The bytes of a node and of what follows in its page, as far as a key and a page number can reach.
    fn node_bytes(&self, index: usize, most: usize) -> Result<Vec<u8>> {
        let at = *self.nodes.get(index).ok_or_else(|| self.broken(format!("no entry {index}")))?;
        let left = (self.page - at % self.page) as usize;
        let mut bytes = vec![0; left.min(most)];
        self.file.read_exact_at(&mut bytes, at).map_err(|e| self.unread(e))?;
        Ok(bytes)
    }

    /// The key of entry `index`, for people.
    pub fn name(&self, index: usize) -> String {
        let bytes = self.node_bytes(index, NODE_HEADER + MAX_KEY).unwrap_or_default();
        let key = Node::parse(&bytes).map(|node| node.key).unwrap_or_default();
        match std::str::from_utf8(key) {
            Ok(text) if text.chars().all(|c| c.is_ascii_graphic()) => text.to_owned(),
            _ => key.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    /// The value of entry `index`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if it leads outside of the file; [`Error::TooLarge`] if it is longer than an image may be.
    pub fn value(&self, index: usize) -> Result<Vec<u8>> {
        let bytes = self.node_bytes(index, self.page as usize)?;
        let damaged = || self.broken(format!("entry {} is damaged", self.name(index)));
        let node = Node::parse(&bytes).ok_or_else(damaged)?;
        let (size, claimed) = (node.size as usize, u64::from(node.size));
        if claimed > MAX_ENCODED {
            let file = format!("{}: {}", self.path.display(), self.name(index));
            return Err(Error::TooLarge {
                file,
                what: "bytes of an image file",
                claimed,
                limit: MAX_ENCODED,
            });
        }
        if node.flags & BIG == 0 {
            return Ok(node.rest.get(..size).ok_or_else(damaged)?.to_vec());
        }
        let first = u64_at(node.rest, 0).ok_or_else(damaged)?;
        let mut header = [0; PAGE_HEADER];
        let start = first.checked_mul(self.page).and_then(|at| at.checked_add(PAGE_HEADER as u64));
        let inside = |start: &u64| start.checked_add(claimed).is_some_and(|end| end <= self.file.length());
        let start = start.filter(inside).ok_or_else(damaged)?;
        self.file.read_exact_at(&mut header, start - PAGE_HEADER as u64).map_err(|e| self.unread(e))?;
        let flags = u16_at(&header, 10).unwrap_or(0);
        if u64_at(&header, 0) != Some(first) || flags & OVERFLOW == 0 {
            return Err(damaged());
        }
        let mut value = vec![0; size];
        self.file.read_exact_at(&mut value, start).map_err(|e| self.unread(e))?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// 160 WebP images under SHA-1 digests, written by LMDB 0.9.36; three of them in pages of their own.
    const IMAGES: &[u8] = include_bytes!("../../tests/fixtures/images.mdb");

    fn opened(bytes: &[u8]) -> Result<(tempfile::TempDir, Lmdb)> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), bytes).unwrap();
        let lmdb = Lmdb::open(dir.path())?;
        Ok((dir, lmdb))
    }

    fn message(bytes: &[u8]) -> String {
        opened(bytes).err().unwrap().to_string()
    }

    #[test]
    fn every_value_comes_in_the_order_of_its_key() {
        let (_dir, lmdb) = opened(IMAGES).unwrap();
        assert_eq!(lmdb.len(), 160);
        let mut hash = Sha256::new();
        for index in 0..lmdb.len() {
            hash.update(lmdb.name(index));
            hash.update(lmdb.value(index).unwrap());
        }
        // What Python's lmdb gives, key and value in turn.
        let want = "17d26957f85f287e9cf10ce341623acf6e0e13e77ac189da4cfdf4cc776c33f4";
        assert_eq!(hash.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>(), want);
        assert_eq!(lmdb.name(0), "008451a05e1e7aa32c75119df950d405265e0904");
    }

    #[test]
    fn the_later_of_two_meta_pages_counts() {
        // The other one says that the database is empty.
        let mut bytes = IMAGES.to_vec();
        let place = |page: usize| page * 4096 + PAGE_HEADER + 128;
        let of = |bytes: &[u8], page: usize| u64_at(bytes, place(page)).unwrap();
        let (later, earlier) = if of(&bytes, 0) > of(&bytes, 1) { (0, 1) } else { (1, 0) };
        bytes[place(later)..place(later) + 8].fill(0);
        bytes[place(earlier)..place(earlier) + 8].copy_from_slice(&9_u64.to_le_bytes());
        assert!(message(&bytes).contains("no entries"), "{}", message(&bytes));
    }

    #[test]
    fn what_is_damaged_is_one_line_that_names_the_file() {
        assert!(message(b"no database").contains("expected an LMDB database"));
        assert!(message(&IMAGES[..8192]).contains("behind the file's end"));
        let root = (0..IMAGES.len() / 4096)
            .find(|page| u16_at(IMAGES, page * 4096 + 10) == Some(BRANCH))
            .expect("160 entries take more than a page");
        // The first child of the root is the root itself.
        let mut ring = IMAGES.to_vec();
        let node = root * 4096 + usize::from(u16_at(IMAGES, root * 4096 + PAGE_HEADER).unwrap());
        ring[node..node + 2].copy_from_slice(&(root as u16).to_le_bytes());
        assert!(message(&ring).contains("none of the tree"), "{}", message(&ring));
        // A node behind its page's end.
        let mut outside = IMAGES.to_vec();
        outside[root * 4096 + PAGE_HEADER..][..2].copy_from_slice(&4095_u16.to_le_bytes());
        assert!(message(&outside).contains("outside of itself"));
        // A root whose place is beyond all numbers.
        let mut far = IMAGES.to_vec();
        for page in [0, 4096] {
            far[page + PAGE_HEADER + 112..][..8].copy_from_slice(&((1_u64 << 52) - 1).to_le_bytes());
        }
        assert!(message(&far).contains("behind the file's end"), "{}", message(&far));
        // A leaf's first node says that it holds a database.
        let leaf = (0..IMAGES.len() / 4096)
            .find(|page| u16_at(IMAGES, page * 4096 + 10) == Some(LEAF) && page * 4096 > 8192)
            .expect("entries lie in leaves");
        let mut named = IMAGES.to_vec();
        let node = leaf * 4096 + usize::from(u16_at(IMAGES, leaf * 4096 + PAGE_HEADER).unwrap());
        named[node + 4] |= 0x02;
        assert!(message(&named).contains("named databases"), "{}", message(&named));
        let missing = Lmdb::open(Path::new("nowhere")).err().unwrap().to_string();
        assert!(missing.contains("data.mdb"), "{missing}");
    }
}
