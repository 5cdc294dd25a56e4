//! What lies at a path: the answer of `cm data inspect`.

use std::path::Path;

use image::RgbImage;
use rayon::prelude::*;

use crate::dataset::{Dataset, Shape};
use crate::error::{Error, Result};
use crate::formats::files::{FileOptions, ImageFiles};
use crate::formats::labels::LabelRule;
use crate::formats::shards::Shards;
use crate::formats::{bundled, cifar, idx, npz};
use crate::grid::{GridStyle, grid, sheet_indices};
use crate::resize::{Filter, Fit, fit};
use crate::spec::{SourceKind, Split};
use crate::transform::{Channels, Plain};

mod detect;
mod report;

pub use detect::detect;
pub use report::{ClassCount, Report, SizeCount};

/// Images of a contact sheet are shrunk to this side.
const THUMBNAIL: usize = 128;
/// Faults that a report spells out; the rest is counted.
const SPELLED_OUT: usize = 20;

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InspectOptions {
    /// Image files that are decoded, at equal distances through the set; sets in memory are looked at whole.
    pub max_images: usize,
    /// Where labels of a folder or zip come from.
    pub labels: LabelRule,
}

impl Default for InspectOptions {
    fn default() -> Self {
        Self { max_images: 20_000, labels: LabelRule::Auto }
    }
}

/// A report and the contact sheet that belongs to it.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// What was found.
    pub report: Report,
    /// Examples, a row per class where there are few.
    pub sheet: RgbImage,
}

/// Looks at the data at `path`, of whatever form; `digits` and `emoji` name the bundled sets.
///
/// Images that do not decode are problems in the report, not an error.
///
/// # Errors
/// Whatever hinders opening the set, or if not a single image decodes.
pub fn inspect(path: &Path, options: &InspectOptions) -> Result<Inspection> {
    let kind = detect(path)?;
    let labelled = options.labels != LabelRule::None;
    let mut problems = Vec::new();
    let source = match kind {
        SourceKind::Digits => Source::Set(Box::new(bundled::digits()?)),
        SourceKind::Emoji => Source::Set(Box::new(bundled::emoji()?)),
        SourceKind::Npz => Source::Set(Box::new(npz::read(path, labelled, None)?)),
        SourceKind::Cifar10 => {
            let read = |split| cifar::read(path, split, labelled);
            Source::Set(Box::new(all_or_train(read, &mut problems)?))
        }
        SourceKind::Idx => {
            let read = |split| idx::read(path, split, labelled, None).map(|r| r.set);
            Source::Set(Box::new(all_or_train(read, &mut problems)?))
        }
        SourceKind::Shards => Source::Set(Box::new(Shards::open(path, labelled, None)?)),
        SourceKind::Folder | SourceKind::Zip | SourceKind::Lmdb => {
            let options = FileOptions {
                labels: options.labels,
                resolution: Some(THUMBNAIL),
                channels: Some(Channels::Rgb),
                ..FileOptions::default()
            };
            let files = match kind {
                SourceKind::Lmdb => ImageFiles::open_lmdb(path, options)?,
                _ => ImageFiles::open(path, options)?,
            };
            Source::Files(Box::new(files))
        }
    };
    survey(kind, path, source, options, problems)
}

/// The whole set; if a part is missing or broken, the training part and a problem.
fn all_or_train<T>(read: impl Fn(Split) -> Result<T>, problems: &mut Vec<String>) -> Result<T> {
    match read(Split::All) {
        Ok(set) => Ok(set),
        Err(whole) => {
            let train = read(Split::Train).map_err(|_| whole)?;
            if let Err(test) = read(Split::Test) {
                problems.push(format!("only the training images: {test}"));
            }
            Ok(train)
        }
    }
}

enum Source {
    Set(Box<dyn Dataset>),
    Files(Box<ImageFiles>),
}

impl Source {
    fn set(&self) -> &dyn Dataset {
        match self {
            Source::Set(set) => &**set,
            Source::Files(files) => &**files,
        }
    }

    /// Image `index` in its own size and colour.
    fn image(&self, index: usize) -> Result<Plain> {
        match self {
            Source::Files(files) => files.decode(index),
            Source::Set(set) => {
                let sample = set.get(index)?;
                let what = || Error::Argument {
                    what: "channels",
                    expected: "1 or 3".into(),
                    got: set.shape().to_string(),
                };
                Plain::from_chw(set.shape(), &sample.pixels).ok_or_else(what)
            }
        }
    }
}

/// Sums over the values of one image.
struct Tally {
    size: (usize, usize),
    channels: usize,
    min: u8,
    max: u8,
    sum: [u64; 3],
    squares: [u64; 3],
}

impl Tally {
    fn of(image: &Plain) -> Self {
        let (raw, channels) = match image {
            Plain::Grey(i) => (i.as_raw(), 1),
            Plain::Rgb(i) => (i.as_raw(), 3),
        };
        let mut tally = Self { size: image.size(), channels, min: 255, max: 0, sum: [0; 3], squares: [0; 3] };
        for pixel in raw.chunks_exact(channels) {
            for (c, &value) in pixel.iter().enumerate() {
                tally.min = tally.min.min(value);
                tally.max = tally.max.max(value);
                tally.sum[c] += u64::from(value);
                tally.squares[c] += u64::from(value) * u64::from(value);
            }
        }
        tally
    }
}

fn survey(
    kind: SourceKind,
    path: &Path,
    source: Source,
    options: &InspectOptions,
    mut problems: Vec<String>,
) -> Result<Inspection> {
    let set = source.set();
    // Of a set in memory every image costs next to nothing.
    let most = if set.is_resident() { set.len() } else { options.max_images.max(1) };
    let looked_at = set.len().min(most);
    let tallies = tally(&source, looked_at, &mut problems)?;
    let sizes = count_sizes(&tallies);
    if sizes.len() > 1 {
        problems.push(format!("{} sizes or colours: set resolution, fit and channels", sizes.len()));
    }
    let classes = count_classes(set);
    let empty = classes.iter().filter(|c| c.count == 0).count();
    if empty > 0 {
        problems.push(format!("{empty} of {} classes have no image", classes.len()));
    }
    let (labels, ignored) = match &source {
        Source::Files(files) => (files.label_rule(), files.ignored().len()),
        Source::Set(set) if set.labels().is_some() => (LabelRule::Auto, 0),
        Source::Set(_) => (LabelRule::None, 0),
    };
    let (mean, std, sigma_data) = moments(&tallies);
    let report = Report {
        kind,
        source: set.source().into(),
        path: (!matches!(kind, SourceKind::Digits | SourceKind::Emoji)).then(|| path.into()),
        count: set.len(),
        looked_at,
        sizes,
        labels: (labels != LabelRule::None).then_some(labels),
        classes,
        min: tallies.iter().map(|t| t.min).min().unwrap_or(0),
        max: tallies.iter().map(|t| t.max).max().unwrap_or(0),
        mean,
        std,
        sigma_data,
        ignored,
        problems,
    };
    let sheet = draw_sheet(&source, &report)?;
    Ok(Inspection { report, sheet })
}

/// Decodes `looked_at` images at equal distances. Those that do not decode become problems; an error if none does.
fn tally(source: &Source, looked_at: usize, problems: &mut Vec<String>) -> Result<Vec<Tally>> {
    let set = source.set();
    let chosen: Vec<usize> =
        (0..looked_at).map(|i| (i as u128 * set.len() as u128 / looked_at as u128) as usize).collect();
    let results: Vec<Result<Tally>> =
        chosen.par_iter().map(|&i| source.image(i).map(|p| Tally::of(&p))).collect();
    let mut tallies = Vec::new();
    let mut faults = Vec::new();
    for result in results {
        match result {
            Ok(tally) => tallies.push(tally),
            Err(fault) => faults.push(fault),
        }
    }
    if tallies.is_empty() {
        let nothing = Error::Empty { place: set.source().into(), reason: "no image decodes".into() };
        return Err(faults.into_iter().next().unwrap_or(nothing));
    }
    problems.extend(faults.iter().take(SPELLED_OUT).map(ToString::to_string));
    if faults.len() > SPELLED_OUT {
        problems.push(format!("{} more images do not decode", faults.len() - SPELLED_OUT));
    }
    Ok(tallies)
}

fn count_sizes(tallies: &[Tally]) -> Vec<SizeCount> {
    let mut counts = std::collections::BTreeMap::new();
    for tally in tallies {
        *counts.entry((tally.size, tally.channels)).or_insert(0) += 1;
    }
    let mut sizes: Vec<SizeCount> = counts
        .into_iter()
        .map(|(((height, width), channels), count)| SizeCount { width, height, channels, count })
        .collect();
    sizes.sort_by_key(|s| std::cmp::Reverse(s.count));
    sizes
}

fn count_classes(set: &dyn Dataset) -> Vec<ClassCount> {
    let mut counts = vec![0; set.num_classes()];
    set.labels().unwrap_or_default().iter().for_each(|&l| counts[l as usize] += 1);
    let name = |class: usize| set.class_names().map(|names| names[class].clone());
    counts
        .into_iter()
        .enumerate()
        .map(|(class, count)| ClassCount { class, name: name(class), count })
        .collect()
}

/// Mean and standard deviation per channel and over all, of x/127.5 − 1. Grey images among colour ones count with
/// their value in each channel.
fn moments(tallies: &[Tally]) -> (Vec<f64>, Vec<f64>, f64) {
    let channels = tallies.iter().map(|t| t.channels).max().unwrap_or(1);
    let (mut sum, mut squares, mut count) = ([0_f64; 3], [0_f64; 3], 0_f64);
    for tally in tallies {
        count += (tally.size.0 * tally.size.1) as f64;
        for c in 0..channels {
            let from = c.min(tally.channels - 1);
            sum[c] += tally.sum[from] as f64;
            squares[c] += tally.squares[from] as f64;
        }
    }
    let of = |sum: f64, squares: f64, count: f64| {
        let mean = sum / count;
        (mean / 127.5 - 1.0, (squares / count - mean * mean).max(0.0).sqrt() / 127.5)
    };
    let each: Vec<(f64, f64)> = (0..channels).map(|c| of(sum[c], squares[c], count)).collect();
    let (_, all) = of(sum.iter().sum(), squares.iter().sum(), count * channels as f64);
    (each.iter().map(|m| m.0).collect(), each.iter().map(|m| m.1).collect(), all)
}

/// Examples in cells of one size; an image that does not decode leaves a white cell.
fn draw_sheet(source: &Source, report: &Report) -> Result<RgbImage> {
    let set = source.set();
    let (indices, columns) = sheet_indices(set.len(), set.labels(), set.num_classes());
    let side = match report.sizes[..] {
        [ref one] if one.width == one.height => one.width.min(THUMBNAIL),
        _ => THUMBNAIL,
    };
    let shape = Shape::square(3, side);
    let mut pixels = vec![255; indices.len() * shape.values()];
    pixels.par_chunks_exact_mut(shape.values()).zip(&indices).for_each(|(out, &index)| {
        let cell = source.image(index as usize).map(|image| image.into_channels(Channels::Rgb));
        let cell = cell.and_then(|image| fit(image, side, side, Fit::CenterCrop, Filter::Area, ""));
        if let Ok(cell) = cell {
            cell.write_chw(out);
        }
    });
    grid(&pixels, shape, &GridStyle::with_columns(shape, columns))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{DynamicImage, ImageFormat, Rgb};
    use std::io::Cursor;

    fn png(width: u32, height: u32, value: u8) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        let image = RgbImage::from_pixel(width, height, Rgb([value, 0, 255]));
        DynamicImage::from(image).write_to(&mut bytes, ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, bytes)| std::fs::write(dir.path().join(name), bytes).unwrap());
        dir
    }

    #[test]
    fn the_bundled_digits_are_described_and_shown_by_class() {
        let Inspection { report, sheet } = inspect(Path::new("digits"), &InspectOptions::default()).unwrap();
        assert_eq!((report.kind, report.count, report.looked_at), (SourceKind::Digits, 1797, 1797));
        assert_eq!(report.sizes, [SizeCount { width: 8, height: 8, channels: 1, count: 1797 }]);
        assert_eq!(report.classes.iter().map(|c| c.count).sum::<usize>(), 1797);
        assert_eq!((report.min, report.max, report.problems.len()), (0, 255, 0));
        // Ten rows of twelve cells, each 64 wide with gaps of 4.
        assert_eq!(sheet.dimensions(), (12 * 68 + 4, 10 * 68 + 4));
        let text = report.to_string();
        assert!(text.contains("8x8 grey: 1797") && text.contains("10 classes"), "{text}");
        assert_eq!(report.spec().open().unwrap().len(), 1797);
    }

    #[test]
    fn moments_are_those_of_the_values_in_minus_one_to_one() {
        // Red is 0 in one image and 255 in the other: mean 0, deviation 1. Green is -1, blue is 1 everywhere.
        let dir = folder(&[("a.png", png(4, 4, 0)), ("b.png", png(4, 4, 255))]);
        let report = inspect(dir.path(), &InspectOptions::default()).unwrap().report;
        assert_eq!(report.mean, [0.0, -1.0, 1.0]);
        assert_eq!(report.std, [1.0, 0.0, 0.0]);
        assert_eq!((report.kind, report.sigma_data), (SourceKind::Folder, 1.0));
    }

    #[test]
    fn broken_and_uneven_images_are_problems_not_errors() {
        let mut files: Vec<(String, Vec<u8>)> =
            (0..30).map(|i| (format!("bad{i:02}.png"), b"no png".to_vec())).collect();
        files.push(("good.png".into(), png(4, 4, 1)));
        files.push(("wide.png".into(), png(9, 3, 1)));
        files.push(("notes.txt".into(), vec![]));
        let borrowed: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
        let dir = folder(&borrowed);
        let Inspection { report, sheet } = inspect(dir.path(), &InspectOptions::default()).unwrap();
        assert_eq!((report.count, report.sizes.len(), report.ignored), (32, 2, 1));
        assert_eq!(report.problems.len(), 22);
        assert!(report.problems[0].contains("bad00.png: cannot decode"));
        assert_eq!(report.problems[20], "10 more images do not decode");
        assert!(report.problems[21].starts_with("2 sizes or colours"));
        assert!(sheet.width() > 0);
        let dir = folder(&borrowed[..3]);
        assert!(matches!(inspect(dir.path(), &InspectOptions::default()), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_big_set_is_looked_at_in_part_and_says_so() {
        let files: Vec<(String, Vec<u8>)> = (0..10).map(|i| (format!("{i}.png"), png(2, 2, i))).collect();
        let borrowed: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
        let dir = folder(&borrowed);
        let options = InspectOptions { max_images: 4, ..InspectOptions::default() };
        let report = inspect(dir.path(), &options).unwrap().report;
        assert_eq!((report.count, report.looked_at, report.sizes[0].count), (10, 4, 4));
        assert!(report.to_string().contains("looked at 4 of them"));
    }

    #[test]
    fn forms_are_told_by_their_content() {
        use crate::formats::{cifar::tests as c, idx::tests as i};
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut samples = Cursor::new(Vec::new());
        npz::write(&mut samples, Shape::square(3, 2), &[0; 24], None).unwrap();
        let mut empty_zip = Cursor::new(Vec::new());
        zip::ZipWriter::new(&mut empty_zip).finish().unwrap();
        for (name, bytes, kind) in [
            ("x1", samples.into_inner(), SourceKind::Npz),
            ("x2", empty_zip.into_inner(), SourceKind::Zip),
            ("x3", i::images(2, 2, 2), SourceKind::Idx),
            ("x4", c::archive(&c::files(1)), SourceKind::Cifar10),
        ] {
            assert_eq!(detect(&file(name, &bytes)).unwrap(), kind, "{name}");
        }
        assert!(matches!(detect(&file("x5", &png(2, 2, 0))), Err(Error::Format { .. })));
        assert!(matches!(detect(&dir.path().join("nothing")), Err(Error::Missing { .. })));
        assert_eq!(detect(dir.path()).unwrap(), SourceKind::Folder);
        let report = inspect(&dir.path().join("x4"), &InspectOptions::default()).unwrap().report;
        assert_eq!((report.count, report.classes.len()), (6, 10));
        assert!(
            report.problems.contains(&"4 of 10 classes have no image".to_string()),
            "{:?}",
            report.problems
        );
        // A test part that is missing is a problem of a set whose training part can be used.
        let part = tempfile::tempdir().unwrap();
        for (name, bytes) in &c::files(1)[..5] {
            std::fs::write(part.path().join(name), bytes).unwrap();
        }
        let report = inspect(part.path(), &InspectOptions::default()).unwrap().report;
        assert_eq!(report.count, 5);
        assert!(
            report.problems[0].starts_with("only the training images: no CIFAR-10"),
            "{:?}",
            report.problems
        );
    }
}
