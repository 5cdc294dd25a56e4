//! The bytes of a pickle.

use std::io::{BufRead, Read};

use super::Result;

/// Longest pickle that is read: state dicts have about 150 bytes a tensor.
pub(in crate::import) const MAX_BYTES: u64 = 64 << 20;

/// Bytes that a pickle is read from, with what is left of them.
pub(in crate::import) struct Input<R> {
    reader: R,
    left: u64,
}

impl<R: BufRead> Input<R> {
    /// At most `available` bytes of `reader`.
    pub(in crate::import) fn new(reader: R, available: u64) -> Self {
        Self { reader, left: available.min(MAX_BYTES) }
    }

    fn take(&mut self, bytes: u64) -> Result<()> {
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => return Err(format!("the pickle needs {bytes} bytes more where {} are left", self.left)),
        }
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|e| format!("the pickle ends early ({e})"))?;
        Ok(bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn bytes(&mut self, length: u64) -> Result<Vec<u8>> {
        self.take(length)?;
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(length).read_to_end(&mut bytes);
        match read {
            Ok(n) if n as u64 == length => Ok(bytes),
            Ok(n) => Err(format!("the pickle ends early ({n} of {length} bytes)")),
            Err(e) => Err(format!("the pickle cannot be read ({e})")),
        }
    }

    pub(super) fn text(&mut self, length: u64) -> Result<String> {
        String::from_utf8(self.bytes(length)?).map_err(|_| "the pickle has a text that is not UTF-8".into())
    }

    /// A name up to the end of its line.
    pub(super) fn line(&mut self) -> Result<String> {
        let mut bytes = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => break,
                byte if bytes.len() < 256 => bytes.push(byte),
                _ => return Err("the pickle has a name of more than 256 bytes".into()),
            }
        }
        String::from_utf8(bytes).map_err(|_| "the pickle has a name that is not UTF-8".into())
    }
}
