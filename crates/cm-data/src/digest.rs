//! What a file or a set holds, as one number: SHA-256 in hexadecimal digits.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use md5::Digest;
use sha2::Sha256;

use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::loader::Batch;

/// Images that are in memory at a time.
const CHUNK: usize = 256;

/// A file's digest of any kind.
pub(crate) fn file<D: Digest>(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let mut hash = D::new();
    let mut piece = vec![0; 1 << 16];
    loop {
        let got = file.read(&mut piece).map_err(Error::io("read", path))?;
        if got == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&piece[..got]);
    }
}

/// The SHA-256 of a file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn of_file(path: &Path) -> Result<String> {
    file::<Sha256>(path)
}

/// The SHA-256 of bytes that come in pieces.
pub fn of_bytes<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    pieces.into_iter().for_each(|piece| hash.update(piece));
    hex(&hash.finalize())
}

/// The SHA-256 of a set: of its number and shape of images, and of their pixels in order. Where the set lies, in which
/// form, and its labels do not matter.
///
/// Every image is read once; `watch` is told how many have been.
///
/// # Errors
/// As [`Dataset::read`].
pub fn of_set(set: &dyn Dataset, watch: &mut dyn FnMut(usize)) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{} images of {}\n", set.len(), set.shape()));
    for start in (0..set.len()).step_by(CHUNK) {
        let end = set.len().min(start + CHUNK);
        hash.update(&Batch::gather(set, start as u32..end as u32)?.pixels);
        watch(end);
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Labels, MemorySet, Shape};

    #[test]
    fn bytes_have_their_published_digest() {
        let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(of_bytes([&b"a"[..], b"bc"]), want);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        assert_eq!(of_file(file.path()).unwrap(), want);
    }

    #[test]
    fn a_set_is_its_pixels_and_their_shape() {
        let set = |height, pixels: Vec<u8>, labels: Option<&[i64]>| {
            let shape = Shape { channels: 1, height, width: 2 };
            let labels = labels.map(|l| Labels::new("l", l, None).unwrap());
            let set = MemorySet::new("s", shape, pixels, labels).unwrap();
            of_set(&set, &mut |_| ()).unwrap()
        };
        let pixels: Vec<u8> = (0..=255).cycle().take(1200).collect();
        let plain = set(2, pixels.clone(), None);
        assert_eq!(plain, set(2, pixels.clone(), Some(&[1; 300])));
        assert_ne!(plain, set(1, pixels.clone(), None));
        let mut other = pixels;
        other[1199] ^= 1;
        assert_ne!(plain, set(2, other, None));
    }
}
