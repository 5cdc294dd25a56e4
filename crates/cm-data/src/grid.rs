//! Pictures for people: images side by side, enlarged until they can be seen.

use std::collections::BTreeSet;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use cm_model::files;
use image::{DynamicImage, GrayImage, ImageFormat, Rgb, RgbImage, imageops};

use crate::dataset::{Dataset, Shape};
use crate::error::{Error, Result};
use crate::limits::MAX_PIXELS;
use crate::loader::Batch;
use crate::transform::{Channels, Plain};

/// How images are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GridStyle {
    /// Images in a row.
    pub columns: usize,
    /// Pixels between images and around them.
    pub gap: u32,
    /// Each pixel becomes a square of this side.
    pub scale: u32,
    /// The colour between images.
    pub background: [u8; 3],
}

impl GridStyle {
    /// A layout for `count` images of `shape`: about as many columns as rows, cells of at least 64 pixels.
    pub fn readable(shape: Shape, count: usize) -> Self {
        let columns = (count as f64).sqrt().ceil().max(1.0) as usize;
        Self::with_columns(shape, columns)
    }

    /// A layout with a given number of columns, cells of at least 64 pixels.
    pub fn with_columns(shape: Shape, columns: usize) -> Self {
        let scale = 64_usize.div_ceil(shape.height.min(shape.width).max(1)) as u32;
        Self { columns, gap: 4, scale, background: [96, 96, 96] }
    }
}

/// NCHW `pixels` row by row in a grid.
///
/// # Errors
/// [`Error::Argument`] if `pixels` are not whole images of 1 or 3 channels, or columns or scale are 0;
/// [`Error::TooLarge`] if the picture would be.
pub fn grid(pixels: &[u8], shape: Shape, style: &GridStyle) -> Result<RgbImage> {
    let argument = |what, expected: String, got: String| Err(Error::Argument { what, expected, got });
    if shape.values() == 0 || !pixels.len().is_multiple_of(shape.values()) {
        return argument(
            "grid of images",
            format!("whole images of {shape}"),
            format!("{} bytes", pixels.len()),
        );
    }
    if style.columns == 0 || style.scale == 0 {
        return argument("grid style", "at least 1 column and scale 1".into(), format!("{style:?}"));
    }
    let count = pixels.len() / shape.values();
    let columns = style.columns.min(count.max(1)) as u64;
    let rows = (count as u64).div_ceil(columns);
    let (gap, scale) = (u64::from(style.gap), u64::from(style.scale));
    let (cell_width, cell_height) = (shape.width as u64 * scale, shape.height as u64 * scale);
    let side = |cells: u64, cell: u64| cells.saturating_mul(cell.saturating_add(gap)).saturating_add(gap);
    let (width, height) = (side(columns, cell_width), side(rows, cell_height));
    let claimed = width.saturating_mul(height);
    if claimed > MAX_PIXELS {
        let file = format!("grid of {count} images");
        return Err(Error::TooLarge { file, what: "pixels", claimed, limit: MAX_PIXELS });
    }
    let mut out = RgbImage::from_pixel(width as u32, height as u32, Rgb(style.background));
    for (i, chw) in pixels.chunks_exact(shape.values()).enumerate() {
        let Some(image) = Plain::from_chw(shape, chw) else {
            return argument("channels", "1 or 3".into(), shape.channels.to_string());
        };
        let Plain::Rgb(cell) = image.into_channels(Channels::Rgb) else { continue };
        let cell =
            imageops::resize(&cell, cell_width as u32, cell_height as u32, imageops::FilterType::Nearest);
        let (column, row) = (i as u64 % columns, i as u64 / columns);
        let place = |at: u64, cell: u64| (gap + at * (cell + gap)) as i64;
        imageops::replace(&mut out, &cell, place(column, cell_width), place(row, cell_height));
    }
    Ok(out)
}

/// Examples of a set: one row of up to 12 per class if it has at most 20 classes, else up to 100 images at equal
/// distances.
///
/// # Errors
/// Whatever hinders reading one of them.
pub fn contact_sheet(set: &dyn Dataset) -> Result<RgbImage> {
    let (indices, columns) = sheet_indices(set.len(), set.labels(), set.num_classes());
    let batch = Batch::gather(set, indices)?;
    grid(&batch.pixels, batch.shape, &GridStyle::with_columns(batch.shape, columns))
}

/// The images of a contact sheet, and its number of columns. Only classes with at least as many images as a row
/// holds give a row, so that rows and classes stay in step.
pub(crate) fn sheet_indices(len: usize, labels: Option<&[u32]>, classes: usize) -> (Vec<u32>, usize) {
    const ROW: usize = 12;
    if let Some(labels) = labels.filter(|_| (2..=20).contains(&classes)) {
        let mut rows = vec![Vec::new(); classes];
        for (index, &label) in labels.iter().enumerate() {
            let row: &mut Vec<u32> = &mut rows[label as usize];
            if row.len() < ROW {
                row.push(index as u32);
            }
        }
        if rows.iter().all(|row| row.len() == ROW) {
            return (rows.concat(), ROW);
        }
    }
    let shown = len.min(100);
    ((0..shown).map(|i| (i * len / shown) as u32).collect(), 10)
}

/// A PNG of one CHW image, grey or RGB as it is.
///
/// # Errors
/// [`Error::Argument`] if the values are not one image of 1 or 3 channels.
pub fn encode_png(chw: &[u8], shape: Shape) -> Result<Vec<u8>> {
    let whole = chw.len() == shape.values();
    match Plain::from_chw(shape, chw).filter(|_| whole) {
        Some(Plain::Grey(image)) => png(DynamicImage::from(image)),
        Some(Plain::Rgb(image)) => png(DynamicImage::from(image)),
        None => {
            let expected = "C·H·W bytes, 1 or 3 channels".into();
            Err(Error::Argument { what: "image", expected, got: format!("{} bytes for {shape}", chw.len()) })
        }
    }
}

fn png(image: DynamicImage) -> Result<Vec<u8>> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, ImageFormat::Png).map_err(|e| Error::corrupt("PNG encoder", e))?;
    Ok(bytes.into_inner())
}

/// Writes a picture as PNG, whole or not at all.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn save_png(path: &Path, image: &RgbImage) -> Result<()> {
    let bytes = png(DynamicImage::from(image.clone()))?;
    write_whole(path, |out| std::io::Write::write_all(out, &bytes))
}

/// Writes a grey picture as PNG, whole or not at all.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn save_grey_png(path: &Path, image: &GrayImage) -> Result<()> {
    let bytes = png(DynamicImage::from(image.clone()))?;
    write_whole(path, |out| std::io::Write::write_all(out, &bytes))
}

/// Where the image of `seed` goes: `000042.png`, with `subdirs` in a folder per 1,000 as EDM's tools have it.
///
/// ```
/// use std::path::Path;
/// let path = cm_data::grid::sample_path(Path::new("out"), 12_042, true);
/// assert_eq!(path, Path::new("out/012000/012042.png"));
/// ```
pub fn sample_path(folder: &Path, seed: u64, subdirs: bool) -> PathBuf {
    let folder = if subdirs { folder.join(format!("{:06}", seed - seed % 1000)) } else { folder.into() };
    folder.join(format!("{seed:06}.png"))
}

/// Writes each image of NCHW `pixels` to the [`sample_path`] of its seed, each whole or not at all.
///
/// # Errors
/// [`Error::Argument`] if there are not as many images as seeds; [`Error::Io`] with the file.
pub fn save_samples(folder: &Path, pixels: &[u8], shape: Shape, seeds: &[u64], subdirs: bool) -> Result<()> {
    if pixels.len() != seeds.len() * shape.values() {
        let expected = format!("{} images of {shape}, one per seed", seeds.len());
        return Err(Error::Argument { what: "samples", expected, got: format!("{} bytes", pixels.len()) });
    }
    let mut folders = BTreeSet::new();
    for (chw, &seed) in pixels.chunks_exact(shape.values()).zip(seeds) {
        let path = sample_path(folder, seed, subdirs);
        let png = encode_png(chw, shape)?;
        let written = files::write_beside(&path, |out| std::io::Write::write_all(out, &png));
        written.map_err(|error| not_written(&path, error))?;
        folders.extend(path.parent().map(Path::to_path_buf));
    }
    folders.iter().try_for_each(|place| files::sync_folder(place).map_err(|error| not_written(place, error)))
}

/// [`cm_model::files::write_atomic`] with this crate's error.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut std::io::BufWriter<&std::fs::File>) -> std::io::Result<()>,
) -> Result<()> {
    files::write_atomic(path, write).map_err(|error| not_written(path, error))
}

fn not_written(path: &Path, error: cm_model::Error) -> Error {
    let (path, cause) = match error {
        cm_model::Error::Io { path, source, .. } => (path, source),
        other => (path.into(), std::io::Error::other(other.to_string())),
    };
    Error::Io { action: "write", path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Labels, MemorySet};
    use crate::transform::decode;

    const STYLE: GridStyle = GridStyle { columns: 2, gap: 1, scale: 3, background: [9, 9, 9] };

    #[test]
    fn cells_are_enlarged_apart_and_in_reading_order() {
        let shape = Shape { channels: 1, height: 1, width: 2 };
        let out = grid(&[10, 20, 30, 40, 50, 60], shape, &STYLE).unwrap();
        // 2 columns of 6 with 3 gaps of 1, and 2 rows of 3.
        assert_eq!(out.dimensions(), (15, 9));
        for (x, y, value) in
            [(1, 1, 10), (3, 3, 10), (4, 2, 20), (8, 1, 30), (13, 3, 40), (1, 5, 50), (6, 7, 60)]
        {
            assert_eq!(out.get_pixel(x, y).0, [value; 3], "at {x},{y}");
        }
        for (x, y) in [(0, 0), (7, 2), (14, 8), (3, 4), (8, 6)] {
            assert_eq!(out.get_pixel(x, y).0, [9, 9, 9], "at {x},{y}");
        }
    }

    #[test]
    fn small_images_become_visible() {
        for (resolution, scale) in [(8, 8), (28, 3), (32, 2), (64, 1), (256, 1)] {
            assert_eq!(GridStyle::readable(Shape::square(3, resolution), 64).scale, scale);
        }
        assert_eq!(GridStyle::readable(Shape::square(3, 8), 50).columns, 8);
    }

    #[test]
    fn what_makes_no_picture_is_an_error() {
        let shape = Shape::square(1, 2);
        assert!(grid(&[0; 7], shape, &STYLE).is_err());
        assert!(grid(&[0; 8], Shape::square(2, 2), &STYLE).is_err());
        assert!(grid(&[0; 8], shape, &GridStyle { columns: 0, ..STYLE }).is_err());
        let huge = GridStyle { scale: u32::MAX, ..STYLE };
        assert!(matches!(grid(&[0; 8], shape, &huge), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn a_labelled_sheet_has_a_row_per_class() {
        let labels: Vec<i64> = (0..60).map(|i| i % 3).collect();
        let labels = Labels::new("t", &labels, None).unwrap();
        let (indices, columns) = sheet_indices(60, Some(&labels.values), 3);
        assert_eq!((indices.len(), columns), (36, 12));
        assert!(indices.chunks(12).zip(0..).all(|(row, class)| row.iter().all(|i| i % 3 == class)));
        assert_eq!(sheet_indices(1000, None, 0).0[..3], [0, 10, 20]);
        assert_eq!(sheet_indices(3, None, 0), (vec![0, 1, 2], 10));
        let set = MemorySet::new("t", Shape::square(1, 1), vec![7; 60], Some(labels)).unwrap();
        assert_eq!(contact_sheet(&set).unwrap().width(), 12 * 68 + 4);
    }

    #[test]
    fn samples_are_pngs_named_by_seed() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { channels: 3, height: 2, width: 1 };
        save_samples(dir.path(), &(0..12).collect::<Vec<_>>(), shape, &[3, 1999], true).unwrap();
        let bytes = std::fs::read(dir.path().join("001000/001999.png")).unwrap();
        let mut chw = [0; 6];
        decode(&bytes, "a").unwrap().write_chw(&mut chw);
        assert_eq!(chw, [6, 7, 8, 9, 10, 11]);
        assert!(dir.path().join("000000/000003.png").is_file());
        assert!(save_samples(dir.path(), &[0; 6], shape, &[1, 2], false).is_err());
        assert!(encode_png(&[0; 5], shape).is_err());
        // Nothing lies beside them, and one that cannot take its place leaves nothing.
        std::fs::create_dir_all(dir.path().join("000009.png/x")).unwrap();
        let error = save_samples(dir.path(), &[0; 6], shape, &[9], false).unwrap_err().to_string();
        assert!(error.contains("000009.png"), "{error}");
        let names = |folder: &str| std::fs::read_dir(dir.path().join(folder)).unwrap().count();
        assert_eq!((names("000000"), names("001000"), names("")), (1, 1, 3));
    }

    #[test]
    fn a_picture_is_written_into_a_new_folder_and_its_place_is_named_if_not() {
        let dir = tempfile::tempdir().unwrap();
        let picture = grid(&[1, 2], Shape::square(1, 1), &STYLE).unwrap();
        save_png(&dir.path().join("a/b.png"), &picture).unwrap();
        assert_eq!(image::open(dir.path().join("a/b.png")).unwrap().into_rgb8(), picture);
        std::fs::write(dir.path().join("file"), "x").unwrap();
        let error = save_png(&dir.path().join("file/b.png"), &picture).unwrap_err().to_string();
        assert!(error.contains("file"), "{error}");
    }
}
