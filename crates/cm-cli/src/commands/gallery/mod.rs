//! `cm gallery`: what each edit does, in pictures, with a model of the bundled emoji.
//!
//! The pictures that are edited are held-out ones: the model of the gallery has not seen them.

mod drawings;

use anyhow::{Context, Result, ensure};
use cm_data::{Batch, SourceKind, SourceSpec, Split};
use cm_model::{ConsistencyFn, ImageShape};
use image::RgbImage;
use tch::{Kind, Tensor};

use super::edit::edits::{Edited, Editor, Known, Small, with_noise};
use super::session;
use crate::args::GalleryArgs;
use crate::exit::{OrUsage, Outcome};
use crate::pictures;
use crate::sources::ModelSource;

/// Every tenth emoji is held out, as emoji-gallery.toml says.
const HOLDOUT: usize = 10;
/// The side of the emoji.
const SIDE: i64 = 32;

/// Held-out emoji by what they show.
mod emoji {
    pub const SUNRISE: i64 = 30;
    pub const EARTH: i64 = 31;
    pub const BLOSSOM: i64 = 35;
    pub const LIME: i64 = 37;
    pub const BURGER: i64 = 38;
    pub const WHALE: i64 = 57;
    pub const RABBIT: i64 = 61;
    pub const HEART: i64 = 82;
    pub const SURPRISE: i64 = 111;
    pub const SADNESS: i64 = 113;
}

type Draw = fn(&Gallery<'_>) -> Result<Vec<Edited>>;

/// The pictures, by their file names.
const PICTURES: [(&str, Draw); 8] = [
    ("inpaint", inpaint),
    ("colorize", colorize),
    ("superres", superres),
    ("stroke", stroke),
    ("denoise", denoise),
    ("interpolate", interpolate),
    ("outpaint", outpaint),
    ("compose", compose),
];

/// Runs `cm gallery`.
pub fn gallery(args: &GalleryArgs) -> Outcome {
    let source = ModelSource::find(&args.model, None, None).or_usage()?;
    let (path, file) = (&source.path, source.read().or_usage()?);
    let model =
        file.model(session::device(&args.device).or_usage()?, cm_model::Compute::default()).or_usage()?;
    let name = || format!("{}: edits need a consistency model", path.display());
    let f = model.consistency().with_context(name).or_usage()?;
    let gallery =
        Gallery::new(f, file.spec.precond.rho).with_context(|| path.display().to_string()).or_usage()?;
    for (name, draw) in PICTURES {
        eprintln!("{name}");
        let sheets = draw(&gallery).with_context(|| name.to_owned())?;
        let rows = sheets.iter().map(|edited| edited.sheet.draw()).collect::<Result<Vec<_>>>()?;
        let picture = args.out.join(format!("{name}.png"));
        pictures::save_png(&stacked(&rows), &picture)?;
        println!("{}", picture.display());
    }
    Ok(())
}

/// Sheets below one another, on white.
fn stacked(rows: &[RgbImage]) -> RgbImage {
    let width = rows.iter().map(RgbImage::width).max().unwrap_or(1);
    let height = rows.iter().map(RgbImage::height).sum();
    let mut out = RgbImage::from_pixel(width, height, image::Rgb([255; 3]));
    let mut y = 0;
    for row in rows {
        image::imageops::replace(&mut out, row, 0, y);
        y += i64::from(row.height());
    }
    out
}

struct Gallery<'a> {
    f: &'a dyn ConsistencyFn,
    rho: f64,
    /// The held-out emoji, `[N, 3, 32, 32]`.
    pictures: Tensor,
}

/// The variations of an edit.
const SEEDS: [u64; 6] = [0, 1, 2, 3, 4, 5];

impl<'a> Gallery<'a> {
    fn new(f: &'a dyn ConsistencyFn, rho: f64) -> Result<Self> {
        let (shape, wanted) = (f.shape(), ImageShape::square(3, SIDE));
        ensure!(
            shape == wanted && f.num_classes() == 0,
            "it makes images of {shape} with {} classes; the gallery is of the bundled emoji: {wanted}, no classes",
            f.num_classes()
        );
        let spec = SourceSpec {
            split: Split::Test,
            holdout: Some(HOLDOUT),
            ..SourceSpec::new(SourceKind::Emoji, None)
        };
        let set = spec.open()?;
        let pictures = Batch::gather(&*set, 0..set.len() as u32)?.to_images(f.device())?;
        Ok(Self { f, rho, pictures })
    }

    fn editor<'s>(&'s self, seeds: &'s [u64]) -> Editor<'s> {
        Editor { f: self.f, rho: self.rho, seeds, labels: None, batch: 32, times: None }
    }

    /// A held-out emoji, `[1, 3, 32, 32]`.
    fn picture(&self, index: i64) -> Tensor {
        self.pictures.narrow(0, index, 1)
    }

    /// One sheet for each of the pictures.
    fn each(
        &self,
        indices: &[i64],
        edit: impl Fn(&Editor<'_>, &Tensor) -> Result<Edited>,
    ) -> Result<Vec<Edited>> {
        let editor = self.editor(&SEEDS);
        indices.iter().map(|&index| edit(&editor, &self.picture(index))).collect()
    }

    /// A mask `[1, 1, 32, 32]` that is 1 in a rectangle.
    fn mask(&self, (x, y): (i64, i64), (width, height): (i64, i64)) -> Tensor {
        let mask = Tensor::zeros([1, 1, SIDE, SIDE], (Kind::Float, self.f.device()));
        let _ = mask.narrow(2, y, height).narrow(3, x, width).fill_(1.0);
        mask
    }
}

fn inpaint(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    let holes = [
        (emoji::SURPRISE, (19, 0), (13, 32)),
        (emoji::SADNESS, (4, 18), (24, 10)),
        (emoji::WHALE, (0, 22), (32, 10)),
        (emoji::HEART, (8, 8), (12, 12)),
    ];
    let editor = gallery.editor(&SEEDS);
    let fill = |(index, at, size)| editor.inpaint(&gallery.picture(index), &gallery.mask(at, size));
    holes.into_iter().map(fill).collect()
}

fn colorize(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    gallery.each(&[emoji::BLOSSOM, emoji::LIME, emoji::SADNESS, emoji::HEART], |editor, picture| {
        editor.colorize(picture)
    })
}

fn superres(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    gallery.each(&[emoji::SURPRISE, emoji::BURGER, emoji::RABBIT, emoji::EARTH], |editor, picture| {
        editor.superres(&Small::Full(picture), 4)
    })
}

fn stroke(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    let editor = gallery.editor(&SEEDS);
    let sigma = cm_sampler::edit::stroke_sigma(gallery.f.shape());
    let draw = |drawing: Tensor| editor.stroke(&drawing, sigma);
    drawings::all(gallery.f.device()).into_iter().map(draw).collect()
}

fn denoise(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    let levels = [(emoji::BURGER, 0.2), (emoji::SURPRISE, 0.4), (emoji::BLOSSOM, 0.6), (emoji::SUNRISE, 0.8)];
    let editor = gallery.editor(&SEEDS[..1]);
    let denoise = |(index, sigma)| {
        let clean = gallery.picture(index);
        editor.denoise(&with_noise(gallery.f, &clean, sigma, 0)?, sigma, Some(&clean))
    };
    levels.into_iter().map(denoise).collect()
}

fn interpolate(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    let pairs: [[u64; 2]; 3] = [[42, 46], [12, 48], [8, 20]];
    pairs.iter().map(|pair| gallery.editor(pair).interpolate(6)).collect()
}

fn outpaint(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    // The middle of a picture, on the middle of the canvas; then a half at its edge.
    let cuts = [
        (emoji::SADNESS, (5, 5), (22, 22)),
        (emoji::EARTH, (0, 0), (22, 32)),
        (emoji::BURGER, (0, 0), (32, 24)),
    ];
    let editor = gallery.editor(&SEEDS);
    let extend = |(index, (x, y), (width, height)): (i64, (i64, i64), (i64, i64))| {
        let part = gallery.picture(index).narrow(2, y, height).narrow(3, x, width);
        editor.outpaint(&part, x as usize, y as usize, 0)
    };
    cuts.into_iter().map(extend).collect()
}

fn compose(gallery: &Gallery<'_>) -> Result<Vec<Edited>> {
    let half = || Some(gallery.mask((16, 0), (16, 32)));
    let wishes = [
        (emoji::BLOSSOM, Known { outside: half(), luma: true, factor: None }),
        (emoji::BURGER, Known { outside: half(), luma: false, factor: Some(4) }),
        (emoji::SURPRISE, Known { outside: None, luma: true, factor: Some(4) }),
    ];
    let editor = gallery.editor(&SEEDS);
    wishes.iter().map(|(index, known)| editor.compose(&gallery.picture(*index), known)).collect()
}
