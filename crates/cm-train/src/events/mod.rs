//! Event files of TensorBoard.
//!
//! A file is a row of records, each a length (u64), the checksum of the length, the data and the checksum of the data,
//! all little-endian; the data is a message `Event` in the wire format of protocol buffers (TensorFlow,
//! `tensorflow/core/lib/io/record_writer.h` and `core/util/event.proto`).

mod wire;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use wire::{Message, masked_crc32c};

use crate::{Error, LogEntry, Result};

/// The log as TensorBoard reads it. One file a run: what follows `tfevents` in its name is free.
pub const EVENTS_FILE: &str = "events.out.tfevents.cm";

/// What the first event of a file says, and TensorBoard looks for.
const VERSION: &str = "brain.Event:2";
/// Bytes of a record beside its data: the length and two checksums.
const FRAME: u64 = 8 + 4 + 4;

// Numbers of the fields of the messages.
const WALL_TIME: u64 = 1;
const STEP: u64 = 2;
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SUMMARY_VALUE: u64 = 1;
const TAG: u64 = 1;
const SIMPLE_VALUE: u64 = 2;
const IMAGE: u64 = 4;
const IMAGE_HEIGHT: u64 = 1;
const IMAGE_WIDTH: u64 = 2;
const IMAGE_COLORSPACE: u64 = 3;
const IMAGE_ENCODED: u64 = 4;
const RGB: u64 = 3;

/// A run's event file, to which events are added.
///
/// [`run`](fn@crate::run) opens it where the run begins or goes on, and writes the columns of `progress.csv` into it.
/// An [`Observer`](crate::Observer) may add images of its own, in between:
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let png = [0u8; 8];
/// let mut events = cm_train::EventFile::of_run(folder.path())?;
/// events.image(100, "samples/raw", [64, 64], &png)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// The event file of the run in `folder`, to add to what it holds; a new one where there is none.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened or written.
    pub fn of_run(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
        let path = folder.join(EVENTS_FILE);
        let opened = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = opened.map_err(|e| Error::io(&path, "opening", e))?;
        let mut events = Self { path, file };
        let size = events.file.metadata().map_err(|e| Error::io(&events.path, "reading", e))?.len();
        if size == 0 {
            events.add(0, |event| event.text(FILE_VERSION, VERSION))?;
        }
        Ok(events)
    }

    /// The event file of the run in `folder`, to go on behind `step`: events of later steps and a torn last record
    /// are cut off.
    pub(crate) fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join(EVENTS_FILE);
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            opened => {
                // In place, so that a TensorBoard that watches the run keeps its hold of the file.
                let cut = opened.and_then(|file| file.set_len(length_up_to(&file, step)?));
                cut.map_err(|e| Error::io(&path, "cutting off later events", e))?;
            }
        }
        Self::of_run(folder)
    }

    /// Adds the columns of `progress.csv`.
    pub(crate) fn entry(&mut self, entry: &LogEntry) -> Result<()> {
        let optional = [("num_scales", entry.num_scales.map(|n| n as f64)), ("mu", entry.mu)];
        let mut scalars = vec![
            ("images", entry.images as f64),
            ("loss", entry.loss),
            ("grad_norm", entry.grad_norm),
            ("lr", entry.lr),
            ("images_per_second", entry.images_per_second),
            ("seconds", entry.seconds),
        ];
        scalars.extend(optional.into_iter().filter_map(|(tag, value)| Some((tag, value?))));
        self.scalars(entry.step, &scalars)
    }

    /// Adds named numbers of one step. TensorBoard keeps them as float32.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in scalars {
            let mut entry = Message::default();
            entry.text(TAG, tag);
            entry.float(SIMPLE_VALUE, *value as f32);
            summary.message(SUMMARY_VALUE, &entry);
        }
        self.add(step, |event| event.message(SUMMARY, &summary))
    }

    /// Adds a picture: `size` is its `[width, height]` and `png` the bytes of a PNG file.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, size: [u32; 2], png: &[u8]) -> Result<()> {
        let mut image = Message::default();
        image.integer(IMAGE_HEIGHT, size[1].into());
        image.integer(IMAGE_WIDTH, size[0].into());
        image.integer(IMAGE_COLORSPACE, RGB);
        image.bytes(IMAGE_ENCODED, png);
        let mut entry = Message::default();
        entry.text(TAG, tag);
        entry.message(IMAGE, &image);
        let mut summary = Message::default();
        summary.message(SUMMARY_VALUE, &entry);
        self.add(step, |event| event.message(SUMMARY, &summary))
    }

    /// One write for one record, so that records are whole even if two handles write.
    fn add(&mut self, step: u64, what: impl FnOnce(&mut Message)) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = Message::default();
        event.double(WALL_TIME, now.as_secs_f64());
        event.integer(STEP, step);
        what(&mut event);
        self.file.write_all(&record(event.as_bytes())).map_err(|e| Error::io(&self.path, "writing", e))
    }
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + FRAME as usize);
    record.extend(length);
    record.extend(masked_crc32c(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc32c(data).to_le_bytes());
    record
}

/// The length of the whole records at the start of `file` that are of `step` or before; 0 if it does not begin as an
/// event file.
fn length_up_to(file: &File, step: u64) -> io::Result<u64> {
    let size = file.metadata()?.len();
    let mut reader = BufReader::new(file);
    let mut kept = 0;
    while let Some(event) = next_event(&mut reader, size - kept)? {
        let first = kept == 0;
        let stays = wire::step_of(&event, WALL_TIME, STEP).is_some_and(|of_event| of_event <= step);
        if !stays || (first && !event.ends_with(VERSION.as_bytes())) {
            break;
        }
        kept += event.len() as u64 + FRAME;
    }
    Ok(kept)
}

/// The data of the next record; `None` at the end of the file (which has `left` bytes more) and where it is torn.
fn next_event(reader: &mut impl Read, left: u64) -> io::Result<Option<Vec<u8>>> {
    if left < FRAME {
        return Ok(None);
    }
    let (mut length, mut check) = ([0; 8], [0; 4]);
    reader.read_exact(&mut length)?;
    reader.read_exact(&mut check)?;
    let size = u64::from_le_bytes(length);
    if u32::from_le_bytes(check) != masked_crc32c(&length) || size > left - FRAME {
        return Ok(None);
    }
    let mut data = vec![0; size as usize];
    reader.read_exact(&mut data)?;
    reader.read_exact(&mut check)?;
    Ok((u32::from_le_bytes(check) == masked_crc32c(&data)).then_some(data))
}

#[cfg(test)]
mod tests;
