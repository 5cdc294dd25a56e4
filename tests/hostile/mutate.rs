//! Damage for parsers: what every test of outside bytes is written with, in whichever crate it is.
//!
//! A case is a whole file with a few edits (bits and bytes changed, pieces copied, put in or cut out, sizes and numbers
//! that lie), or the head of one with noise behind it, or noise alone.
#![allow(dead_code)] // each test binary uses a part of it

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// What every property of this kind runs with.
pub fn config() -> ProptestConfig {
    ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() }
}

/// Values that sizes and counts are replaced by.
const SIZES: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Texts that numbers in text are replaced by.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "0.5",
    "1e9",
    "1e999",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999",
    "00",
    "",
    "nan",
];

#[derive(Debug, Clone, Copy)]
struct Edit {
    what: u8,
    at: Index,
    from: Index,
    value: u8,
    length: usize,
}

fn edit() -> impl Strategy<Value = Edit> {
    (0_u8..9, any::<Index>(), any::<Index>(), any::<u8>(), 1_usize..48)
        .prop_map(|(what, at, from, value, length)| Edit { what, at, from, value, length })
}

impl Edit {
    fn apply(self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let at = self.place(bytes.len());
        let end = (at + self.length).min(bytes.len());
        let from = self.from.index(bytes.len());
        match self.what {
            0 => bytes[at] = self.value,
            1 => bytes[at] ^= 1 << (self.value % 8),
            2 => bytes.insert(at, self.value),
            3 => drop(bytes.drain(at..end)),
            // A piece of the file over another piece, or between two.
            4 => {
                let from = from.min(bytes.len() - (end - at));
                bytes.copy_within(from..from + end - at, at);
            }
            5 => {
                let piece = bytes[from..(from + self.length).min(bytes.len())].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            6 | 7 => self.lie(bytes, at),
            _ => self.misnumber(bytes, at),
        }
    }

    /// Headers stand in front or, in a zip, at the end: most edits go there.
    fn place(self, len: usize) -> usize {
        let near = self.at.index(len.min(256));
        match self.value % 4 {
            0 => self.at.index(len),
            1 => len - 1 - near,
            _ => near,
        }
    }

    /// A binary size of 1, 2, 4 or 8 bytes, in either order.
    fn lie(self, bytes: &mut [u8], at: usize) {
        let value = SIZES[self.length % SIZES.len()];
        let width = 1 << (self.value >> 2 & 3);
        let little = value.to_le_bytes();
        for (i, byte) in bytes[at..].iter_mut().take(width).enumerate() {
            *byte = little[if self.what == 6 { i } else { width - 1 - i }];
        }
    }

    /// A number in digits.
    fn misnumber(self, bytes: &mut Vec<u8>, at: usize) {
        let Some(skip) = bytes[at..].iter().position(u8::is_ascii_digit) else { return };
        let start = at + skip;
        let digits = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
        let number = NUMBERS[self.length % NUMBERS.len()];
        drop(bytes.splice(start..start + digits, number.bytes()));
    }
}

/// One of `originals`, damaged or, now and then, whole.
pub fn damaged(originals: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let edited =
        (select(originals.clone()), vec(edit(), 0..8), proptest::option::weighted(0.2, any::<Index>()));
    let edited = edited.prop_map(|(mut bytes, edits, cut)| {
        edits.into_iter().for_each(|edit| edit.apply(&mut bytes));
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        bytes
    });
    let noise = || vec(any::<u8>(), 0..200);
    let beheaded = (select(originals), any::<Index>(), noise()).prop_map(|(mut bytes, keep, noise)| {
        bytes.truncate(keep.index(bytes.len() + 1));
        bytes.extend(noise);
        bytes
    });
    prop_oneof![12 => edited, 1 => beheaded, 1 => noise()]
}

/// [`damaged`] text.
pub fn damaged_text(originals: &[&str]) -> impl Strategy<Value = String> + use<> {
    let originals = originals.iter().map(|text| text.as_bytes().to_vec()).collect();
    damaged(originals).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Asserts that an error is one line of a length that a terminal shows.
pub fn assert_one_line(text: &str) {
    assert!(!text.is_empty() && !text.contains(['\n', '\r']), "more than one line: {text:?}");
    assert!(text.len() < 4000, "{} bytes of error: {text:.200}", text.len());
}

/// Asserts that the process never asked for more than the caps on what one small file may claim allow: an allocation
/// by a size of a damaged header goes far beyond. Memory counts once it is reserved, touched or not.
pub fn assert_memory_bounded() {
    const MOST_KIB: u64 = 8 << 20;
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    assert!(peak.is_none_or(|peak: u64| peak < MOST_KIB), "{peak:?} KiB of address space");
}

/// A folder for the files of one case, in memory where the system has a place for that: thousands of small files are
/// no test of a disk.
pub fn scratch() -> tempfile::TempDir {
    let memory = std::path::Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.or_else(|_| tempfile::tempdir()).unwrap()
}
