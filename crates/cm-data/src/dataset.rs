//! What every source of images looks like from outside: a list of uint8 CHW images with optional labels.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::limits::MAX_CLASSES;

/// Channels, height and width of an image in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Shape {
    /// A square image.
    pub const fn square(channels: usize, resolution: usize) -> Self {
        Self { channels, height: resolution, width: resolution }
    }

    /// Values in one image, C·H·W.
    pub const fn values(&self) -> usize {
        self.channels * self.height * self.width
    }

    /// Pixels of one channel, H·W.
    pub const fn plane(&self) -> usize {
        self.height * self.width
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}x{} (channels x height x width)", self.channels, self.height, self.width)
    }
}

/// One image and its label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// uint8 values, CHW.
    pub pixels: Vec<u8>,
    /// The class, if the set is labelled.
    pub label: Option<u32>,
}

/// A set of images of one shape, readable in any order from any thread.
///
/// An implementation reads; it neither shuffles nor augments, which is the [`Loader`](crate::Loader)'s work. Labels
/// are known when the set opens, so that a class histogram or a class filter decodes no image.
pub trait Dataset: Send + Sync {
    /// The set in one line, for people: its form, its part and its place.
    fn source(&self) -> &str;

    /// Number of images; below 2³².
    fn len(&self) -> usize;

    /// Whether there is no image. Sets from [`SourceSpec::open`](crate::SourceSpec::open) never are.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape of every image.
    fn shape(&self) -> Shape;

    /// Number of classes; 0 if unlabelled.
    fn num_classes(&self) -> usize;

    /// One label per image, each below [`num_classes`](Self::num_classes).
    fn labels(&self) -> Option<&[u32]>;

    /// Names of the classes where the source has some, one per class.
    fn class_names(&self) -> Option<&[String]> {
        None
    }

    /// Where image `index` comes from: a file, or a file and a position in it.
    fn name(&self, index: usize) -> String;

    /// Writes image `index` into `out` as uint8 CHW.
    ///
    /// # Errors
    /// [`Error::Argument`] if `index` or the length of `out` does not fit; otherwise whatever hinders reading,
    /// naming the file.
    fn read(&self, index: usize, out: &mut [u8]) -> Result<()>;

    /// Whether reading is a copy from memory, so that spreading it over threads gains nothing.
    fn is_resident(&self) -> bool {
        false
    }

    /// Image `index` with its label.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn get(&self, index: usize) -> Result<Sample> {
        let mut pixels = vec![0; self.shape().values()];
        self.read(index, &mut pixels)?;
        Ok(Sample { pixels, label: self.labels().map(|l| l[index]) })
    }
}

/// Checks the arguments of [`Dataset::read`].
pub(crate) fn check_read(len: usize, shape: Shape, index: usize, out: &[u8]) -> Result<()> {
    if index >= len {
        let expected = format!("below {len}");
        return Err(Error::Argument { what: "image index", expected, got: index.to_string() });
    }
    if out.len() != shape.values() {
        let expected = format!("{} bytes for {shape}", shape.values());
        return Err(Error::Argument { what: "image buffer", expected, got: out.len().to_string() });
    }
    Ok(())
}

/// Labels with the number and, where known, the names of their classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Labels {
    /// One class per image.
    pub values: Vec<u32>,
    /// Number of classes, at least 1.
    pub classes: u32,
    /// One name per class.
    pub names: Option<Vec<String>>,
}

impl Labels {
    /// Checks each of `values` against `classes`, or against the crate's limit and then takes max + 1 for it.
    ///
    /// # Errors
    /// [`Error::Label`] that names `file` and the first image whose label is outside.
    pub fn new(file: &str, values: &[i64], classes: Option<u32>) -> Result<Self> {
        let limit = classes.unwrap_or(MAX_CLASSES);
        let mut checked = Vec::with_capacity(values.len());
        for (index, &value) in values.iter().enumerate() {
            match u32::try_from(value) {
                Ok(label) if label < limit => checked.push(label),
                _ => return Err(Error::Label { file: file.into(), index, value, classes: limit }),
            }
        }
        let classes = classes.unwrap_or_else(|| checked.iter().max().map_or(1, |m| m + 1));
        Ok(Self { values: checked, classes, names: None })
    }
}

/// A set held in memory as one uint8 NCHW block.
#[derive(Clone)]
pub struct MemorySet {
    source: String,
    shape: Shape,
    pixels: Arc<Vec<u8>>,
    labels: Option<Labels>,
}

impl MemorySet {
    /// A set from NCHW `pixels`.
    ///
    /// # Errors
    /// [`Error::Empty`] without images; [`Error::Argument`] if the lengths of `pixels` and `labels` do not belong
    /// to one number of images.
    pub fn new(
        source: impl Into<String>,
        shape: Shape,
        pixels: Vec<u8>,
        labels: Option<Labels>,
    ) -> Result<Self> {
        let source = source.into();
        if pixels.is_empty() || shape.values() == 0 {
            return Err(Error::Empty { place: source, reason: format!("0 images of {shape}") });
        }
        let images = pixels.len() / shape.values();
        if images * shape.values() != pixels.len() {
            let expected = format!("a multiple of {} bytes", shape.values());
            return Err(Error::Argument { what: "pixels", expected, got: pixels.len().to_string() });
        }
        if let Some(labels) = labels.as_ref().filter(|l| l.values.len() != images) {
            let got = labels.values.len().to_string();
            return Err(Error::Argument {
                what: "labels",
                expected: format!("{images}, one per image"),
                got,
            });
        }
        Ok(Self { source, shape, pixels: Arc::new(pixels), labels })
    }

    /// The pixels of image `index`, CHW.
    pub(crate) fn image(&self, index: usize) -> &[u8] {
        let n = self.shape.values();
        &self.pixels[index * n..(index + 1) * n]
    }

    /// The labels with their class names.
    pub(crate) fn label_set(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }
}

impl std::fmt::Debug for MemorySet {
    /// Without the pixels, which fill a screen already for the smallest set.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemorySet({}, {} images of {})", self.source, self.len(), self.shape)
    }
}

impl Dataset for MemorySet {
    fn source(&self) -> &str {
        &self.source
    }

    fn len(&self) -> usize {
        self.pixels.len() / self.shape.values()
    }

    fn shape(&self) -> Shape {
        self.shape
    }

    fn num_classes(&self) -> usize {
        self.labels.as_ref().map_or(0, |l| l.classes as usize)
    }

    fn labels(&self) -> Option<&[u32]> {
        self.labels.as_ref().map(|l| l.values.as_slice())
    }

    fn class_names(&self) -> Option<&[String]> {
        self.labels.as_ref()?.names.as_deref()
    }

    fn name(&self, index: usize) -> String {
        format!("{}, image {index}", self.source)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<()> {
        check_read(self.len(), self.shape, index, out)?;
        out.copy_from_slice(self.image(index));
        Ok(())
    }

    fn is_resident(&self) -> bool {
        true
    }
}

/// Some images of another set, in a given order.
pub struct Subset {
    inner: Arc<dyn Dataset>,
    source: String,
    indices: Vec<u32>,
    labels: Option<Vec<u32>>,
}

impl Subset {
    /// The images of `inner` at `indices`; `part` is added to the set's description.
    ///
    /// # Errors
    /// [`Error::Empty`] without indices, [`Error::Argument`] on one that `inner` lacks.
    pub fn new(inner: Arc<dyn Dataset>, part: &str, indices: Vec<u32>) -> Result<Self> {
        let source = format!("{}, {part}", inner.source());
        if indices.is_empty() {
            return Err(Error::Empty {
                place: source,
                reason: format!("none of {} images selected", inner.len()),
            });
        }
        if let Some(bad) = indices.iter().find(|&&i| i as usize >= inner.len()) {
            let expected = format!("below {}", inner.len());
            return Err(Error::Argument { what: "subset index", expected, got: bad.to_string() });
        }
        let labels = inner.labels().map(|all| indices.iter().map(|&i| all[i as usize]).collect());
        Ok(Self { inner, source, indices, labels })
    }

    /// The images at positions `range` of `inner`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn range(inner: Arc<dyn Dataset>, range: Range<u32>) -> Result<Self> {
        let part = format!("images {}..{}", range.start, range.end);
        Self::new(inner, &part, range.collect())
    }
}

impl Dataset for Subset {
    fn source(&self) -> &str {
        &self.source
    }

    fn len(&self) -> usize {
        self.indices.len()
    }

    fn shape(&self) -> Shape {
        self.inner.shape()
    }

    fn num_classes(&self) -> usize {
        self.inner.num_classes()
    }

    fn labels(&self) -> Option<&[u32]> {
        self.labels.as_deref()
    }

    fn class_names(&self) -> Option<&[String]> {
        self.inner.class_names()
    }

    fn name(&self, index: usize) -> String {
        self.inner.name(self.indices[index] as usize)
    }

    fn read(&self, index: usize, out: &mut [u8]) -> Result<()> {
        check_read(self.len(), self.shape(), index, out)?;
        self.inner.read(self.indices[index] as usize, out)
    }

    fn is_resident(&self) -> bool {
        self.inner.is_resident()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> MemorySet {
        let labels = Labels::new("t", &[2, 0, 1], None).unwrap();
        MemorySet::new("t", Shape::square(1, 2), (0..12).collect(), Some(labels)).unwrap()
    }

    #[test]
    fn a_subset_carries_pixels_and_labels_together() {
        let all = set();
        let part = Subset::new(Arc::new(all.clone()), "part", vec![2, 0]).unwrap();
        assert_eq!(part.get(0).unwrap(), all.get(2).unwrap());
        assert_eq!(part.get(1).unwrap(), all.get(0).unwrap());
        assert_eq!(part.labels(), Some(&[1, 2][..]));
        assert_eq!(part.num_classes(), 3);
    }

    #[test]
    fn arguments_outside_are_errors() {
        let all = set();
        assert!(matches!(all.get(3), Err(Error::Argument { .. })));
        assert!(matches!(all.read(0, &mut [0; 3]), Err(Error::Argument { .. })));
        assert!(matches!(Subset::new(Arc::new(set()), "p", vec![3]), Err(Error::Argument { .. })));
        assert!(matches!(Subset::new(Arc::new(set()), "p", vec![]), Err(Error::Empty { .. })));
        assert!(matches!(
            MemorySet::new("t", Shape::square(1, 2), vec![0; 7], None),
            Err(Error::Argument { .. })
        ));
    }

    #[test]
    fn a_label_outside_is_named_with_its_file_index_and_range() {
        let error = Labels::new("labels.gz", &[0, 9, 10], Some(10)).unwrap_err().to_string();
        assert_eq!(error, "labels.gz: image 2: label 10 is outside 0..=9");
        assert!(Labels::new("l", &[-1], None).is_err());
        // A claim of four billion classes would make every histogram a large allocation.
        assert!(Labels::new("l", &[u32::MAX.into()], None).is_err());
    }
}
