//! A file that several threads read at once, each at its own place, without a lock and without a memory map.

use std::fs::File;
use std::io::{Read, Result, Seek, SeekFrom};
use std::sync::Arc;

const BUFFER: usize = 8192;

/// A reader with a position of its own over a shared file; a clone starts with an empty buffer.
pub(crate) struct Positioned {
    file: Arc<File>,
    length: u64,
    position: u64,
    buffer: Vec<u8>,
    buffer_at: u64,
}

impl Positioned {
    pub(crate) fn new(file: File) -> Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), length, position: 0, buffer: Vec::new(), buffer_at: 0 })
    }

    pub(crate) fn length(&self) -> u64 {
        self.length
    }
}

impl Clone for Positioned {
    fn clone(&self) -> Self {
        Self { file: self.file.clone(), buffer: Vec::new(), ..*self }
    }
}

impl Read for Positioned {
    fn read(&mut self, out: &mut [u8]) -> Result<usize> {
        let buffered = self.buffer_at..self.buffer_at + self.buffer.len() as u64;
        if !buffered.contains(&self.position) {
            if out.len() >= BUFFER {
                let got = read_at(&self.file, out, self.position)?;
                self.position += got as u64;
                return Ok(got);
            }
            self.buffer.resize(BUFFER, 0);
            let got = read_at(&self.file, &mut self.buffer, self.position);
            self.buffer.truncate(*got.as_ref().unwrap_or(&0));
            self.buffer_at = self.position;
            got?;
        }
        let ready = &self.buffer[(self.position - self.buffer_at) as usize..];
        let got = ready.len().min(out.len());
        out[..got].copy_from_slice(&ready[..got]);
        self.position += got as u64;
        Ok(got)
    }
}

impl Seek for Positioned {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.length.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = target.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::InvalidInput))?;
        Ok(self.position)
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
    use std::io::Write;

    #[test]
    fn clones_read_independently_what_the_file_holds() {
        let bytes: Vec<u8> = (0..30_000_u32).map(|i| (i * i % 251) as u8).collect();
        let mut temp = tempfile::NamedTempFile::new().unwrap();
        temp.write_all(&bytes).unwrap();
        let one = Positioned::new(temp.reopen().unwrap()).unwrap();
        let mut two = one.clone();
        let mut one = std::io::BufReader::with_capacity(7, one);
        let mut all = Vec::new();
        two.seek(SeekFrom::End(-100)).unwrap();
        let mut tail = Vec::new();
        two.read_to_end(&mut tail).unwrap();
        one.read_to_end(&mut all).unwrap();
        assert_eq!(all, bytes);
        assert_eq!(tail, bytes[29_900..]);
        two.seek(SeekFrom::Start(5)).unwrap();
        let mut few = [0; 3];
        two.read_exact(&mut few).unwrap();
        assert_eq!(few, bytes[5..8]);
        assert!(two.seek(SeekFrom::Current(-9)).is_err());
        two.seek(SeekFrom::Start(40_000)).unwrap();
        assert_eq!(two.read(&mut few).unwrap(), 0);
    }
}
