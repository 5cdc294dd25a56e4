//! Images that do not decode: passed over up to a limit, and never silently.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::dataset::Dataset;
use crate::error::{Error, Result};

/// The images of a set that were found not to decode.
#[derive(Debug, Default)]
pub(crate) struct Corrupt {
    /// So many are passed over.
    most: usize,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    /// What is wrong, by the image's index.
    all: BTreeMap<u32, String>,
    /// What nobody has been told yet.
    news: Vec<String>,
}

impl Corrupt {
    pub fn new(most: usize) -> Self {
        Self { most, found: Mutex::default() }
    }

    /// Reads image `index`, or the next one that decodes where it does not, and returns which one it was: the choice
    /// depends on the set alone, so that a run that is repeated sees the same images.
    pub fn read(&self, set: &dyn Dataset, index: u32, out: &mut [u8]) -> Result<u32> {
        let mut at = index;
        // One more than may be corrupt is enough to find one that is not.
        for _ in 0..=self.most {
            match set.read(at as usize, out) {
                Ok(()) => return Ok(at),
                Err(error) if error.is_of_image() => self.note(at, error)?,
                Err(other) => return Err(other),
            }
            at = (u64::from(at) + 1).checked_rem(set.len() as u64).unwrap_or(0) as u32;
        }
        // The set has fewer images than may be corrupt, and all of them are.
        let (last, count) = (set.name(index as usize), set.len());
        Err(Error::TooManyCorrupt { last, count, most: self.most })
    }

    /// Remembers an image that does not decode; an error if it is one too many.
    fn note(&self, index: u32, error: Error) -> Result<()> {
        if self.most == 0 {
            return Err(error);
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let text = error.to_string();
        if found.all.insert(index, text.clone()).is_none() {
            found.news.push(text.clone());
        }
        let count = found.all.len();
        if count > self.most {
            return Err(Error::TooManyCorrupt { last: text, count, most: self.most });
        }
        Ok(())
    }

    /// How many were found so far.
    pub fn count(&self) -> usize {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).all.len()
    }

    /// What was found since this was last asked: one line for each image.
    pub fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner).news)
    }
}
