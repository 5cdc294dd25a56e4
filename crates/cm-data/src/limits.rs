//! Sizes that a header may claim before anything is allocated for it.
//!
//! A claim is first held against the bytes that are really there: a plain file cannot hold more than its length,
//! and a deflate stream not more than [`DEFLATE_RATIO`] times its own. Only then is memory reserved, so a small
//! file never causes a large allocation. The constants below bound what a large file may ask for.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::error::{Error, Result, of_system};

/// Longest side of an encoded image, in pixels.
pub const MAX_SIDE: u32 = 16_384;
/// Most pixels of an encoded image.
pub const MAX_PIXELS: u64 = 1 << 27;
/// Longest encoded image, in bytes.
pub const MAX_ENCODED: u64 = 1 << 28;
/// Longest `dataset.json`, in bytes.
pub const MAX_JSON: u64 = 1 << 29;
/// Largest set that is held in memory, in bytes.
pub const MAX_RESIDENT: u64 = 1 << 36;
/// Most classes of a labelled set.
pub const MAX_CLASSES: u32 = 1 << 20;
/// Most pixels that a byte of an encoded image can stand for in every form but WebP: a PNG of one bit a pixel comes out
/// of deflate, and the others make less of a byte. A WebP of one colour has no such bound.
pub const PIXELS_A_BYTE: u64 = 8 * DEFLATE_RATIO;
/// The most that deflate can expand its input: a 258-byte match from 2 bits (RFC 1951), that is 1032 to 1.
pub const DEFLATE_RATIO: u64 = 1032;

/// The most that an array in an archive may be larger than its deflated form: what deflates to less than a hundredth is all
/// but blank, and a few megabytes of it would fill the memory.
pub const MAX_EXPANSION: u64 = 100;
/// An array of so many bytes is read whatever it deflates to.
pub const SMALL_ARRAY: u64 = 1 << 28;

/// The product of `dims`, or an error if it exceeds [`MAX_RESIDENT`].
pub(crate) fn claimed_bytes(file: &str, dims: &[u64]) -> Result<u64> {
    let too_large = |claimed| Error::TooLarge {
        file: file.into(),
        what: "bytes of pixels",
        claimed,
        limit: MAX_RESIDENT,
    };
    let product =
        dims.iter().try_fold(1_u64, |acc, &d| acc.checked_mul(d)).ok_or_else(|| too_large(u64::MAX))?;
    if product > MAX_RESIDENT { Err(too_large(product)) } else { Ok(product) }
}

/// A byte stream with an upper bound on how much it can still yield.
pub(crate) struct Bounded<R> {
    /// The stream.
    pub reader: R,
    /// No more than this many bytes can come out of it.
    pub capacity: u64,
    /// The file, for messages.
    pub file: String,
}

impl<R: Read> Bounded<R> {
    /// Reads exactly `claimed` bytes.
    ///
    /// A claim beyond the stream's capacity is an error before any memory is taken.
    pub fn take(&mut self, claimed: u64, what: &str) -> Result<Vec<u8>> {
        let short =
            |got| Error::Length { file: self.file.clone(), what: what.into(), expected: claimed, got };
        if claimed > self.capacity {
            return Err(short(self.capacity));
        }
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(claimed as usize).map_err(|_| Error::TooLarge {
            file: self.file.clone(),
            what: "bytes",
            claimed,
            limit: MAX_RESIDENT,
        })?;
        self.reader
            .by_ref()
            .take(claimed)
            .read_to_end(&mut bytes)
            .map_err(|cause| self.broken(what, cause))?;
        if (bytes.len() as u64) < claimed {
            return Err(Error::Length {
                file: self.file.clone(),
                what: what.into(),
                expected: claimed,
                got: bytes.len() as u64,
            });
        }
        self.capacity -= claimed;
        Ok(bytes)
    }

    /// Errors unless the stream is at its end.
    pub fn finish(&mut self, what: &str, expected: u64) -> Result<()> {
        let mut rest = [0_u8; 4096];
        let mut extra = 0_u64;
        loop {
            match self.reader.read(&mut rest) {
                Ok(0) => break,
                // One block tells that there is more; how much more is of no use and may be endless.
                Ok(n) if extra + n as u64 > 65_536 => {
                    extra += n as u64;
                    break;
                }
                Ok(n) => extra += n as u64,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(self.broken(what, cause)),
            }
        }
        if extra == 0 {
            return Ok(());
        }
        Err(Error::Length { file: self.file.clone(), what: what.into(), expected, got: expected + extra })
    }

    fn broken(&self, what: &str, cause: std::io::Error) -> Error {
        match of_system(&cause) {
            // What the system refuses is no fault of the bytes.
            Some(cause) => Error::Io { action: "read", path: self.file.clone().into(), cause },
            None => Error::corrupt(self.file.clone(), format!("{what}: {cause}")),
        }
    }
}

/// Opens a file that may be gzip-compressed, which its first two bytes tell.
pub(crate) fn open_maybe_gz(path: &Path) -> Result<Bounded<Box<dyn Read + Send>>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let stored = file.metadata().map_err(Error::io("read", path))?.len();
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let gz =
        std::io::BufRead::fill_buf(&mut reader).map_err(Error::io("read", path))?.starts_with(&[0x1f, 0x8b]);
    let name = path.display().to_string();
    Ok(if gz {
        gunzip(reader, stored, name)
    } else {
        Bounded { reader: Box::new(reader), capacity: stored, file: name }
    })
}

/// Wraps a gzip stream of `stored` compressed bytes.
pub(crate) fn gunzip(
    reader: impl std::io::BufRead + Send + 'static,
    stored: u64,
    file: String,
) -> Bounded<Box<dyn Read + Send>> {
    let capacity = stored.saturating_mul(DEFLATE_RATIO);
    Bounded { reader: Box::new(flate2::bufread::MultiGzDecoder::new(reader)), capacity, file }
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_file(path: &Path, what: &'static str, limit: u64) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let claimed = file.metadata().map_err(Error::io("read", path))?.len();
    let name = path.display().to_string();
    if claimed > limit {
        return Err(Error::TooLarge { file: name, what, claimed, limit });
    }
    let mut bytes = Vec::with_capacity(claimed as usize);
    file.take(limit).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(bytes)
}
