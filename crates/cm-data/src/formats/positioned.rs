//! A file that several threads read at once, each at its own place, without a lock and without a memory map: a map of a
//! file that somebody cuts short ends the program, a read of it is an error.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::path::Path;

use crate::error::Error;

/// An open file and its length when it was opened.
pub(crate) struct Positioned {
    file: File,
    length: u64,
}

impl Positioned {
    pub(crate) fn open(path: &Path) -> crate::error::Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let length = file.metadata().map_err(Error::io("read", path))?.len();
        Ok(Self { file, length })
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Fills `out` with what stands from `at` on.
    pub(crate) fn read_exact_at(&self, mut out: &mut [u8], mut at: u64) -> Result<()> {
        while !out.is_empty() {
            match read_at(&self.file, out, at) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(got) => {
                    out = &mut out[got..];
                    at += got as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The first `most` bytes, or all if there are fewer.
    pub(crate) fn start(&self, most: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; most.min(self.length) as usize];
        self.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], at: u64) -> Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, at)
}

#[cfg(windows)]
fn read_at(file: &File, out: &mut [u8], at: u64) -> Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_place_is_read_and_the_end_is_an_error() {
        let bytes: Vec<u8> = (0..30_000_u32).map(|i| (i * i % 251) as u8).collect();
        let temp = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(temp.path(), &bytes).unwrap();
        let file = Positioned::open(temp.path()).unwrap();
        let mut few = [0; 100];
        file.read_exact_at(&mut few, 29_900).unwrap();
        assert_eq!(few[..], bytes[29_900..]);
        assert_eq!(file.read_exact_at(&mut few, 29_901).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(file.start(7).unwrap(), bytes[..7]);
        assert_eq!(file.start(1 << 40).unwrap(), bytes);
    }
}
