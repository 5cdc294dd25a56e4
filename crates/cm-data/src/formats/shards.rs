//! Shards: NumPy arrays of decoded images that are read in place, for sets that are too large for memory and too slow to
//! decode.
//!
//! A folder holds `*.npy` files of uint8 images (N, H, W, 3), (N, H, W, 1) or (N, H, W), all of one size, taken in the
//! order of their names; and `labels.npy`, integers, one for each image of all files, if there are labels.

use std::fs::File;
use std::io::{BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::npy::{self, IntArray, IntType};
use super::positioned::Positioned;
use crate::dataset::{Dataset, Labels, Shape, check_read};
use crate::error::{Error, Result, listing};
use crate::grid::write_whole;
use crate::limits::{Bounded, claimed_bytes};
use crate::transform::{deinterleave, interleave};

/// The file of the labels.
const LABELS: &str = "labels.npy";

/// A file of images.
struct Shard {
    file: Positioned,
    path: PathBuf,
    /// Where the first image starts in the file.
    start: u64,
    /// The number of images before it.
    first: usize,
    count: usize,
}

/// Images in `.npy` files that are read in place.
pub struct Shards {
    source: String,
    shards: Vec<Shard>,
    shape: Shape,
    labels: Option<Labels>,
}

impl Shards {
    /// Opens the shards of a folder, or a single `.npy` file, and reads their headers. `labelled = false` leaves the labels
    /// unread; `classes` bounds them.
    ///
    /// # Errors
    /// [`Error::Missing`] without arrays; [`Error::Format`] if they are not uint8 images of one size; [`Error::Length`] if
    /// a file is not as long as its header says; [`Error::Label`] on a label outside.
    pub fn open(path: &Path, labelled: bool, classes: Option<u32>) -> Result<Self> {
        let is_folder = path.is_dir();
        let files = if is_folder { arrays_in(path)? } else { vec![path.to_path_buf()] };
        if files.is_empty() || !(is_folder || path.is_file()) {
            return Err(Error::Missing {
                what: "shards",
                path: path.into(),
                expected: "a folder of .npy files of uint8 images, or one such file".into(),
                found: listing(path),
                remedy: "make them of any set with `cm data pack`".into(),
            });
        }
        let source = format!("shards {}", path.display());
        let mut set = Self { source, shards: Vec::new(), shape: Shape::square(3, 0), labels: None };
        for file in files {
            let (shard, shape) = open_shard(file, set.len())?;
            if set.shards.is_empty() {
                set.shape = shape;
            } else if shape != set.shape {
                let what = shard.path.display().to_string();
                return Err(Error::Shape { what, expected: set.shape, got: shape });
            }
            set.shards.push(shard);
        }
        let labels = path.join(LABELS);
        if labelled && is_folder && labels.is_file() {
            set.labels = Some(read_labels(&labels, set.len(), classes)?);
        }
        Ok(set)
    }

    /// The shard that holds an image.
    fn shard(&self, index: usize) -> &Shard {
        let after = self.shards.partition_point(|shard| shard.first <= index);
        &self.shards[after.saturating_sub(1)]
    }
}

/// Whether a folder holds arrays of images, and nothing else.
pub(crate) fn is_folder_of_arrays(folder: &Path) -> Result<bool> {
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.extension().is_none_or(|e| e != "npy") {
            return Ok(false);
        }
    }
    Ok(!arrays_in(folder)?.is_empty())
}

/// The arrays of a folder but its labels, by name.
fn arrays_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io("list", folder))? {
        let path = entry.map_err(Error::io("list", folder))?.path();
        let is_array = path.extension().is_some_and(|e| e == "npy");
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if is_array && !hidden && path.file_name().is_some_and(|name| name != LABELS) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn bounded(path: &Path) -> Result<Bounded<File>> {
    let reader = File::open(path).map_err(Error::io("read", path))?;
    let capacity = reader.metadata().map_err(Error::io("read", path))?.len();
    Ok(Bounded { reader, capacity, file: path.display().to_string() })
}

fn open_shard(path: PathBuf, first: usize) -> Result<(Shard, Shape)> {
    let mut input = bounded(&path)?;
    let length = input.capacity;
    let header = npy::read_header(&mut input)?;
    let name = input.file;
    let start = length - input.capacity;
    let (count, shape) = match header.shape[..] {
        [n, height, width] => (n, Shape { channels: 1, height: height as usize, width: width as usize }),
        [n, height, width, channels @ (1 | 3)] => {
            (n, Shape { channels: channels as usize, height: height as usize, width: width as usize })
        }
        _ => (0, Shape::square(0, 0)),
    };
    if IntType::parse(&header.descr) != Some(IntType::U8)
        || header.fortran_order
        || count == 0
        || shape.values() == 0
    {
        let expected = "uint8 images (N, H, W, 3), (N, H, W, 1) or (N, H, W) in C order";
        return Err(Error::format(&name, expected, format!("{} of shape {:?}", header.descr, header.shape)));
    }
    let dims = [shape.height as u64, shape.width as u64, shape.channels as u64];
    let claimed = claimed_bytes(&name, &dims)?.checked_mul(count).filter(|bytes| *bytes == input.capacity);
    if claimed.is_none() {
        let what = format!("of {} array {:?}", header.descr, header.shape);
        let expected = dims.iter().fold(count, |product, dim| product.saturating_mul(*dim));
        return Err(Error::Length { file: name, what, expected, got: input.capacity });
    }
    let shard = Shard { file: Positioned::open(&path)?, path, start, first, count: count as usize };
    Ok((shard, shape))
}

fn read_labels(path: &Path, images: usize, classes: Option<u32>) -> Result<Labels> {
    let array = IntArray::read(&mut bounded(path)?)?;
    let name = path.display().to_string();
    if array.shape != [images as u64] {
        let expected = format!("one label per image, shape ({images},)");
        return Err(Error::format(&name, expected, format!("shape {:?}", array.shape)));
    }
    Labels::new(&name, &array.to_i64(), classes)
}

impl Dataset for Shards {
    fn source(&self) -> &str {
        &self.source
    }

    fn len(&self) -> usize {
        self.shards.last().map_or(0, |shard| shard.first + shard.count)
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn num_classes(&self) -> usize {
        self.labels.as_ref().map_or(0, |labels| labels.classes as usize)
    }

    fn labels(&self) -> Option<&[u32]> {
        self.labels.as_ref().map(|labels| labels.values.as_slice())
    }

    fn name(&self, index: usize) -> String {
        let shard = self.shard(index);
        format!("{}, image {}", shard.path.display(), index - shard.first)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<()> {
        check_read(self.len(), self.shape, index, out)?;
        let shard = self.shard(index);
        let at = shard.start + (index - shard.first) as u64 * self.shape.values() as u64;
        let failed = Error::io("read", &shard.path);
        if self.shape.channels == 1 {
            return shard.file.read_exact_at(out, at).map_err(failed);
        }
        let mut rows = vec![0; out.len()];
        shard.file.read_exact_at(&mut rows, at).map_err(failed)?;
        deinterleave(self.shape, &rows, out);
        Ok(())
    }
}

/// How a set is written as shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Images in a file.
    pub per_shard: usize,
    /// So many images that do not decode are left out; one more is an error.
    pub max_corrupt: usize,
}

/// Writes a set as shards into the new folder `folder`, which appears when all is written, and returns what is wrong with
/// the images that were left out. `watch` is told how many images are done and says whether to go on; if not, nothing is
/// left and `None` is returned.
///
/// # Errors
/// [`Error::Argument`] for shards of no images or a folder that is there; [`Error::TooManyCorrupt`]; those of reading the
/// set; [`Error::Io`].
pub fn pack(
    set: &dyn Dataset,
    folder: &Path,
    packing: Packing,
    watch: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<Vec<String>>> {
    let argument =
        |what, expected: &str, got: String| Error::Argument { what, expected: expected.into(), got };
    if packing.per_shard == 0 {
        return Err(argument("images in a shard", "at least 1", "0".into()));
    }
    if folder.exists() {
        return Err(argument("folder of shards", "a new one", format!("{} is there", folder.display())));
    }
    let place = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(place).map_err(Error::io("create", place))?;
    // A name of its own beside the place: whatever fails, it is removed, and two that pack at once do not meet.
    let partial = temporary_folder(place)?;
    let mut packer = Packer {
        folder: partial.path(),
        shape: set.shape(),
        per_shard: packing.per_shard,
        file: None,
        shards: 0,
    };
    let (mut labels, mut left_out) = (Vec::new(), Vec::new());
    for first in (0..set.len()).step_by(CHUNK) {
        let end = set.len().min(first + CHUNK);
        // Decoding is what takes time.
        let images: Vec<Result<Vec<u8>>> =
            (first..end).into_par_iter().map(|index| Ok(set.get(index)?.pixels)).collect();
        for (index, image) in (first..end).zip(images) {
            match image {
                Ok(pixels) => packer.add(&pixels)?,
                Err(error) if error.is_of_image() && packing.max_corrupt > 0 => {
                    left_out.push(error.to_string());
                    let (count, most) = (left_out.len(), packing.max_corrupt);
                    if count > most {
                        return Err(Error::TooManyCorrupt { last: error.to_string(), count, most });
                    }
                    continue;
                }
                Err(other) => return Err(other),
            }
            labels.extend(set.labels().map(|all| all[index]));
        }
        if !watch(end) {
            return Ok(None);
        }
    }
    packer.finish()?;
    if packer.shards == 0 {
        let reason = format!("none of {} images decodes", set.len());
        return Err(Error::Empty { place: set.source().into(), reason });
    }
    if !labels.is_empty() {
        let values: Vec<u8> = labels.iter().flat_map(|&label| i64::from(label).to_le_bytes()).collect();
        write_whole(&partial.path().join(LABELS), |file| {
            npy::write(file, IntType::I64, &[labels.len()], &values)
        })?;
    }
    std::fs::rename(partial.path(), folder).map_err(Error::io("rename", folder))?;
    Ok(Some(left_out))
}

/// A folder with the permissions that an ordinary new one would get.
fn temporary_folder(place: &Path) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".packing-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(place).map_err(Error::io("create", place))
}

/// Images that are decoded at a time.
const CHUNK: usize = 256;

/// Writes shard after shard.
struct Packer<'a> {
    folder: &'a Path,
    shape: Shape,
    per_shard: usize,
    /// The shard in the making, and how many images it holds.
    file: Option<(BufWriter<File>, PathBuf, usize)>,
    shards: usize,
}

impl Packer<'_> {
    fn add(&mut self, pixels: &[u8]) -> Result<()> {
        let (mut file, path, count) = match self.file.take() {
            Some(open) => open,
            None => {
                let path = self.folder.join(format!("images-{:05}.npy", self.shards));
                let mut file = BufWriter::new(File::create(&path).map_err(Error::io("write", &path))?);
                // How many there are is known at the end; the header of the most takes the same place.
                self.header(&mut file, self.per_shard).map_err(Error::io("write", &path))?;
                self.shards += 1;
                (file, path, 0)
            }
        };
        let mut rows = vec![0; pixels.len()];
        interleave(self.shape, pixels, &mut rows);
        file.write_all(&rows).map_err(Error::io("write", &path))?;
        self.file = Some((file, path, count + 1));
        if count + 1 == self.per_shard { self.finish() } else { Ok(()) }
    }

    fn header(&self, out: &mut impl Write, count: usize) -> std::io::Result<()> {
        npy::write(out, IntType::U8, &[count, self.shape.height, self.shape.width, self.shape.channels], &[])
    }

    /// Ends the shard in the making.
    fn finish(&mut self) -> Result<()> {
        let Some((file, path, count)) = self.file.take() else { return Ok(()) };
        let ended = file.into_inner().map_err(std::io::IntoInnerError::into_error).and_then(|mut file| {
            file.rewind()?;
            self.header(&mut file, count)?;
            file.sync_all()
        });
        ended.map_err(Error::io("write", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::MemorySet;

    fn set() -> MemorySet {
        let shape = Shape { channels: 3, height: 2, width: 4 };
        let labels = Labels::new("t", &[3, 0, 1, 2, 3, 0, 1], None).unwrap();
        MemorySet::new("t", shape, (0..7 * 24).map(|v| v as u8).collect(), Some(labels)).unwrap()
    }

    fn of(per_shard: usize) -> Packing {
        Packing { per_shard, max_corrupt: 0 }
    }

    fn message(result: Result<Shards>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn a_packed_set_comes_back_image_for_image() {
        let dir = tempfile::tempdir().unwrap();
        // A slash behind the name, as a shell completes it.
        let folder = dir.path().join("new/packed/");
        let mut seen = Vec::new();
        pack(&set(), &folder, of(3), &mut |done| {
            seen.push(done);
            true
        })
        .unwrap();
        assert_eq!(seen, [7]);
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1, "nothing else is left");
        let back = Shards::open(&folder, true, None).unwrap();
        assert_eq!((back.shards.len(), back.len(), back.shape()), (3, 7, set().shape()));
        assert_eq!(back.labels(), set().labels());
        for index in 0..7 {
            assert_eq!(back.get(index).unwrap(), set().get(index).unwrap());
        }
        assert!(back.name(5).ends_with("images-00001.npy, image 2"));
        assert!(matches!(back.get(7), Err(Error::Argument { .. })));
        assert_eq!(Shards::open(&folder, false, None).unwrap().labels(), None);
        let one = Shards::open(&folder.join("images-00001.npy"), true, None).unwrap();
        assert_eq!((one.len(), one.get(0).unwrap().pixels), (3, set().get(3).unwrap().pixels));
        assert!(pack(&set(), &folder, of(3), &mut |_| true).unwrap_err().to_string().contains("is there"));
    }

    #[test]
    fn packing_that_is_stopped_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(pack(&set(), &dir.path().join("packed"), of(3), &mut |_| false).unwrap(), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_was_packed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let [packed, plain] = ["packed", "plain"].map(|name| dir.path().join(name));
        pack(&set(), &packed, of(3), &mut |_| true).unwrap();
        std::fs::create_dir(&plain).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&packed), mode(&plain));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(message(Shards::open(dir.path(), true, None)).contains("cm data pack"));
        let folder = dir.path().join("packed");
        pack(&set(), &folder, of(4), &mut |_| true).unwrap();
        let error = message(Shards::open(&folder, true, Some(3)));
        assert!(error.ends_with("labels.npy: image 0: label 3 is outside 0..=2"), "{error}");
        let second = folder.join("images-00001.npy");
        let bytes = std::fs::read(&second).unwrap();
        std::fs::write(&second, &bytes[..bytes.len() - 1]).unwrap();
        let error = message(Shards::open(&folder, true, None));
        assert!(error.contains("images-00001.npy: expected 72 bytes") && error.contains("got 71"), "{error}");
        std::fs::remove_file(&second).unwrap();
        let error = message(Shards::open(&folder, true, None));
        assert!(error.contains("labels.npy: expected one label per image, shape (4,)"), "{error}");
        let mut other = Vec::new();
        npy::write(&mut other, IntType::U8, &[1, 3, 3, 3], &[0; 27]).unwrap();
        std::fs::write(&second, &other).unwrap();
        assert!(matches!(Shards::open(&folder, true, None), Err(Error::Shape { .. })));
        let mut other = Vec::new();
        npy::write(&mut other, IntType::I64, &[1], &[0; 8]).unwrap();
        std::fs::write(&second, &other).unwrap();
        assert!(message(Shards::open(&folder, true, None)).contains("expected uint8 images"));
    }

    #[test]
    fn a_file_that_shrinks_later_is_an_error_and_no_crash() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("packed");
        pack(&set(), &folder, of(7), &mut |_| true).unwrap();
        let set = Shards::open(&folder, true, None).unwrap();
        std::fs::write(folder.join("images-00000.npy"), b"").unwrap();
        assert!(matches!(set.get(3), Err(Error::Io { .. })));
    }
}
