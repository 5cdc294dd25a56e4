//! Batches of images as NumPy archives: `arr_0` uint8 NHWC and optionally `arr_1` with labels, the form in which
//! samples of diffusion models are exchanged; or a single `.npy` with the images alone.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use cm_model::files::FailsOnce;
use zip::ZipArchive;
use zip::result::ZipError;
use zip::write::SimpleFileOptions;

use crate::dataset::{Labels, MemorySet, Shape};
use crate::error::{Error, Result};
use crate::formats::npy::{self, IntArray, IntType};
use crate::grid::write_whole;
use crate::limits::{Bounded, DEFLATE_RATIO, MAX_EXPANSION, SMALL_ARRAY};
use crate::transform::{deinterleave, interleave};

/// Reads an `.npz` or `.npy` file. `classes` bounds the labels; `labelled = false` leaves `arr_1` unread.
///
/// # Errors
/// [`Error::Format`] if the arrays are not images (and labels), [`Error::Length`] if the file is shorter than its
/// header says, [`Error::Label`] on a label outside.
pub fn read(path: &Path, labelled: bool, classes: Option<u32>) -> Result<MemorySet> {
    let name = path.display().to_string();
    let mut file = File::open(path).map_err(Error::io("read", path))?;
    let stored = file.metadata().map_err(Error::io("read", path))?.len();
    let mut start = [0_u8; 2];
    let got = file.read(&mut start).map_err(Error::io("read", path))?;
    file.rewind().map_err(Error::io("read", path))?;
    if &start[..got] == b"PK" {
        let mut archive =
            ZipArchive::new(std::io::BufReader::new(file)).map_err(|e| Error::unpacking(path, &name, &e))?;
        return read_archive(&mut archive, stored, &name, labelled, classes);
    }
    let images = IntArray::read(&mut Bounded { reader: file, capacity: stored, file: name.clone() })?;
    image_set(&name, images, None)
}

fn read_archive(
    archive: &mut ZipArchive<impl Read + Seek>,
    stored: u64,
    name: &str,
    labelled: bool,
    classes: Option<u32>,
) -> Result<MemorySet> {
    let has_labels = archive.index_for_name("arr_1.npy").is_some();
    let images = member(archive, stored, name, "arr_0.npy")?;
    let labels = match labelled && has_labels {
        true => {
            let array = member(archive, stored, name, "arr_1.npy")?;
            let file = format!("{name}: arr_1");
            if array.shape.len() != 1 || array.shape.first() != images.shape.first() {
                let expected =
                    format!("one label per image, shape ({},)", images.shape.first().unwrap_or(&0));
                return Err(Error::format(&file, expected, format!("shape {:?}", array.shape)));
            }
            Some(Labels::new(&file, &array.to_i64(), classes)?)
        }
        false => None,
    };
    image_set(name, images, labels)
}

fn member(
    archive: &mut ZipArchive<impl Read + Seek>,
    stored: u64,
    name: &str,
    member: &str,
) -> Result<IntArray> {
    let Some(index) = archive.index_for_name(member) else {
        let found = archive.file_names().take(8).collect::<Vec<_>>().join(", ");
        let expected = "arr_0 (uint8 images, NHWC) and optionally arr_1 (labels)";
        return Err(Error::format(name, expected, if found.is_empty() { "no arrays".into() } else { found }));
    };
    let file = format!("{name}: {}", member.trim_end_matches(".npy"));
    let entry = archive.by_index(index).map_err(|e| Error::unpacking(name.as_ref(), &file, &e))?;
    let capacity = capacity(&entry, stored, &file)?;
    IntArray::read(&mut Bounded { reader: entry, capacity, file })
}

/// The most bytes that a member of an archive of `stored` bytes can hold; an error for one that blows up beyond measure.
pub(crate) fn capacity<R: Read>(entry: &zip::read::ZipFile<'_, R>, stored: u64, file: &str) -> Result<u64> {
    // Both sizes are claims; the archive's own length is not.
    let (claimed, packed) = (entry.size(), entry.compressed_size().min(stored));
    let possible = claimed.min(packed.saturating_mul(DEFLATE_RATIO));
    let limit = packed.saturating_mul(MAX_EXPANSION).max(SMALL_ARRAY);
    if possible > limit {
        return Err(Error::TooLarge { file: file.to_owned(), what: "bytes unpacked", claimed, limit });
    }
    Ok(possible)
}

/// NHWC or NHW uint8 to a set.
fn image_set(name: &str, images: IntArray, labels: Option<Labels>) -> Result<MemorySet> {
    let fault = || {
        let expected = "uint8 images of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W)";
        Error::format(name, expected, format!("{:?} of shape {:?}", images.kind, images.shape))
    };
    let (n, shape) = match images.shape[..] {
        [n, height, width] => (n, Shape { channels: 1, height: height as usize, width: width as usize }),
        [n, height, width, channels @ (1 | 3)] => {
            (n, Shape { channels: channels as usize, height: height as usize, width: width as usize })
        }
        _ => return Err(fault()),
    };
    if images.kind != IntType::U8 {
        return Err(fault());
    }
    if n == 0 || shape.values() == 0 {
        return Err(Error::Empty {
            place: name.into(),
            reason: format!("arr_0 has shape {:?}", images.shape),
        });
    }
    let mut pixels = images.bytes;
    if shape.channels > 1 {
        let mut chw = vec![0; shape.values()];
        for image in pixels.chunks_exact_mut(shape.values()) {
            deinterleave(shape, image, &mut chw);
            image.copy_from_slice(&chw);
        }
    }
    MemorySet::new(format!("npz {name}"), shape, pixels, labels)
}

/// The name under which tools for diffusion models look for `count` samples: `samples_{N}x{H}x{W}x3.npz`.
///
/// ```
/// use cm_data::{Shape, npz};
/// assert_eq!(npz::samples_name(64, Shape::square(3, 32)), "samples_64x32x32x3.npz");
/// ```
pub fn samples_name(count: usize, shape: Shape) -> String {
    format!("samples_{count}x{}x{}x{}.npz", shape.height, shape.width, shape.channels)
}

/// Writes NCHW `pixels` as `arr_0` (uint8 NHWC) and `labels` as `arr_1` (int64), uncompressed as `numpy.savez` does.
///
/// # Errors
/// The writer's own; `InvalidInput` if `pixels` are not whole images or not as many as the labels.
pub fn write(
    out: impl Write + Seek,
    shape: Shape,
    pixels: &[u8],
    labels: Option<&[i64]>,
) -> std::io::Result<()> {
    let invalid = |text: String| std::io::Error::new(std::io::ErrorKind::InvalidInput, text);
    let values = shape.values().max(1);
    let count = pixels.len() / values;
    if count * values != pixels.len() {
        return Err(invalid(format!("{} bytes are no whole number of images of {shape}", pixels.len())));
    }
    if let Some(labels) = labels.filter(|l| l.len() != count) {
        return Err(invalid(format!("{} labels for {count} images", labels.len())));
    }
    let mut archive = zip::ZipWriter::new(FailsOnce::new(out));
    // Beyond 4 GiB an entry needs the 64-bit form, which has to be announced before its data.
    let options = SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .large_file(pixels.len() >= 1 << 31);
    let mut nhwc = vec![0; pixels.len()];
    for (from, to) in pixels.chunks_exact(values).zip(nhwc.chunks_exact_mut(values)) {
        interleave(shape, from, to);
    }
    archive.start_file("arr_0.npy", options).map_err(cause)?;
    npy::write(&mut archive, IntType::U8, &[count, shape.height, shape.width, shape.channels], &nhwc)?;
    if let Some(labels) = labels {
        let bytes: Vec<u8> = labels.iter().flat_map(|l| l.to_le_bytes()).collect();
        archive.start_file("arr_1.npy", options).map_err(cause)?;
        npy::write(&mut archive, IntType::I64, &[count], &bytes)?;
    }
    archive.finish().map(drop).map_err(cause)
}

/// The writer's own error, which an archive's shows as `i/o error` alone.
pub(crate) fn cause(error: ZipError) -> std::io::Error {
    match error {
        ZipError::Io(cause) => cause,
        other => other.into(),
    }
}

/// [`write()`] to a file, whole or not at all.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn save(path: &Path, shape: Shape, pixels: &[u8], labels: Option<&[i64]>) -> Result<()> {
    write_whole(path, |out| write(out, shape, pixels, labels))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use std::cell::Cell;
    use std::io::Cursor;

    fn written(shape: Shape, pixels: &[u8], labels: Option<&[i64]>) -> tempfile::NamedTempFile {
        let mut bytes = Cursor::new(Vec::new());
        write(&mut bytes, shape, pixels, labels).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes.get_ref()).unwrap();
        file
    }

    #[test]
    fn written_samples_are_read_back() {
        let shape = Shape { channels: 3, height: 2, width: 5 };
        let pixels: Vec<u8> = (0..90).collect();
        let file = written(shape, &pixels, Some(&[4, 0, 2]));
        let set = read(file.path(), true, None).unwrap();
        assert_eq!((set.len(), set.shape(), set.num_classes()), (3, shape, 5));
        assert_eq!(set.labels(), Some(&[4, 0, 2][..]));
        for i in 0..3 {
            assert_eq!(set.get(i).unwrap().pixels, pixels[i * 30..(i + 1) * 30]);
        }
        assert_eq!(read(file.path(), false, None).unwrap().labels(), None);
    }

    #[test]
    fn a_label_outside_names_file_image_and_range() {
        let file = written(Shape::square(1, 1), &[0, 0], Some(&[0, 10]));
        let error = read(file.path(), true, Some(10)).unwrap_err().to_string();
        assert!(error.ends_with("arr_1: image 1: label 10 is outside 0..=9"), "{error}");
    }

    #[test]
    fn a_cut_archive_is_an_error_that_names_it() {
        let file = written(Shape::square(3, 8), &[7; 1920], None);
        let bytes = std::fs::read(file.path()).unwrap();
        for keep in [bytes.len() - 1, bytes.len() / 2, 3] {
            std::fs::write(file.path(), &bytes[..keep]).unwrap();
            let error = read(file.path(), true, None).err().unwrap().to_string();
            assert!(error.contains(&file.path().display().to_string()), "{error}");
        }
    }

    /// A disk with room for so many bytes.
    struct Disk(Cursor<Vec<u8>>, u64);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            match self.0.position() + bytes.len() as u64 <= self.1 {
                true => self.0.write(bytes),
                false => Err(std::io::Error::from_raw_os_error(28)),
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_full_disk_is_told_in_the_systems_words_wherever_it_fills() {
        let (shape, pixels) = (Shape::square(3, 4), [7; 96]);
        let mut whole = Cursor::new(Vec::new());
        write(&mut whole, shape, &pixels, Some(&[1, 2])).unwrap();
        let whole = whole.into_inner();
        // In heads, arrays, the directory and its end.
        for room in 0..whole.len() as u64 {
            let disk = Disk(Cursor::new(Vec::new()), room);
            let error = write(disk, shape, &pixels, Some(&[1, 2])).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(28), "{room} of {} bytes: {error}", whole.len());
        }
        let mut enough = Disk(Cursor::new(Vec::new()), whole.len() as u64);
        write(&mut enough, shape, &pixels, Some(&[1, 2])).unwrap();
    }

    /// A file whose blocks cannot be read from `at` on.
    struct BadBlock<'a>(Cursor<&'a [u8]>, &'a Cell<u64>);

    impl Read for BadBlock<'_> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            let room = self.1.get().saturating_sub(self.0.position()).min(out.len() as u64) as usize;
            match room == 0 && !out.is_empty() {
                true => Err(std::io::Error::from_raw_os_error(5)),
                false => self.0.read(&mut out[..room]),
            }
        }
    }

    impl Seek for BadBlock<'_> {
        fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }

    #[test]
    fn a_block_that_cannot_be_read_is_no_damage_of_the_file() {
        let mut bytes = Cursor::new(Vec::new());
        write(&mut bytes, Shape::square(3, 4), &[7; 96], None).unwrap();
        let bytes = bytes.into_inner();
        let opened = ZipArchive::new(BadBlock(Cursor::new(&bytes), &Cell::new(20))).err().unwrap();
        let error = Error::unpacking("a.npz".as_ref(), "a.npz", &opened);
        assert!(matches!(&error, Error::Io { cause, .. } if cause.raw_os_error() == Some(5)), "{error}");
        // The directory, at the end, can be read, and the array's head or its bytes cannot.
        for bad in [0, 40, 150] {
            let (limit, length) = (Cell::new(u64::MAX), bytes.len() as u64);
            let mut archive = ZipArchive::new(BadBlock(Cursor::new(&bytes), &limit)).unwrap();
            limit.set(bad);
            let error = read_archive(&mut archive, length, "a.npz", false, None).err().unwrap();
            assert!(matches!(&error, Error::Io { .. }) && error.to_string().contains("a.npz"), "{error}");
        }
    }

    #[test]
    fn other_arrays_are_refused_with_what_was_found() {
        let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
        archive.start_file("mu.npy", SimpleFileOptions::default()).unwrap();
        let bytes = archive.finish().unwrap().into_inner();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&bytes).unwrap();
        let error = read(file.path(), true, None).err().unwrap().to_string();
        assert!(error.contains("expected arr_0") && error.contains("found mu.npy"), "{error}");
    }

    #[test]
    fn wrong_counts_are_not_written() {
        let shape = Shape::square(1, 2);
        assert!(write(Cursor::new(Vec::new()), shape, &[0; 7], None).is_err());
        assert!(write(Cursor::new(Vec::new()), shape, &[0; 8], Some(&[1])).is_err());
    }
}
