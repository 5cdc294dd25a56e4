//! Options of `cm edit`.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand, ValueEnum};
use cm_torch::device::DeviceSpec;

use super::{Dtype, SeedRange};

/// How edits are called.
pub const EDIT_EXAMPLES: &str = "\
Examples:
  cm edit inpaint runs/emoji --image face.png --mask mask.png
  cm edit colorize runs/emoji --image grey.png --variations 6
  cm edit superres runs/emoji --image small.png --factor 4
  cm edit stroke runs/emoji --image drawing.png --sigma 1
  cm edit denoise runs/emoji --image noisy.png
  cm edit interpolate runs/emoji --seeds 3,8 --frames 16
  cm edit outpaint runs/emoji --image part.png --left 8 --right 8
  cm edit compose runs/emoji --image face.png --mask mask.png --grey

Each writes a PNG per result and sheet.png: input, measurement and results side by side. \
The model has to be a consistency model; `cm edit EDIT --help` says more about one edit.";

/// `cm edit …`.
#[derive(Debug, Subcommand)]
pub enum EditCommand {
    /// Make a part of a picture anew: white in the mask is made anew, black is kept.
    #[command(after_help = INPAINT_EXAMPLES)]
    Inpaint(InpaintArgs),
    /// Give a grey picture colours; its luma stays.
    #[command(after_help = COLORIZE_EXAMPLES)]
    Colorize(ColorizeArgs),
    /// Make a small picture larger by a whole factor; the means of its patches stay.
    #[command(after_help = SUPERRES_EXAMPLES)]
    Superres(SuperresArgs),
    /// Make a picture of a drawing (SDEdit): colours and large shapes stay, details are put in.
    #[command(after_help = STROKE_EXAMPLES)]
    Stroke(StrokeArgs),
    /// Take noise away, in one step.
    #[command(after_help = DENOISE_EXAMPLES)]
    Denoise(DenoiseArgs),
    /// Go from the image of one seed to that of another: a strip, frames and an animated GIF.
    #[command(after_help = INTERPOLATE_EXAMPLES)]
    Interpolate(InterpolateArgs),
    /// Continue a picture beyond its edges.
    #[command(after_help = OUTPAINT_EXAMPLES)]
    Outpaint(OutpaintArgs),
    /// Several edits at once: keep a part as it is, and of the rest the luma, the patch means, or both.
    #[command(after_help = COMPOSE_EXAMPLES)]
    Compose(ComposeArgs),
}

const INPAINT_EXAMPLES: &str = "\
The mask is a picture of the size of the image, or of the model's images: \
white (128 and brighter) marks what is made anew, \
black what is kept; --invert turns that round. Alpha counts as white.

Examples:
  cm edit inpaint runs/emoji --image face.png --mask mask.png
  cm edit inpaint runs/emoji --image face.png --mask hole.png --invert --feather 2 --variations 8";

const COLORIZE_EXAMPLES: &str = "\
A picture in colour is turned grey first.

Example:
  cm edit colorize runs/emoji --image grey.png --variations 6";

const SUPERRES_EXAMPLES: &str = "\
Examples:
  cm edit superres runs/emoji --image 8x8.png --factor 4
  cm edit superres runs/emoji --image face.png --factor 4 --demonstrate";

const STROKE_EXAMPLES: &str = "\
Examples:
  cm edit stroke runs/emoji --image drawing.png
  cm edit stroke runs/emoji --image drawing.png --sigma 1.5 --variations 8";

const DENOISE_EXAMPLES: &str = "\
Examples:
  cm edit denoise runs/emoji --image noisy.png
  cm edit denoise runs/emoji --image face.png --add-noise 0.4";

const INTERPOLATE_EXAMPLES: &str = "\
Example:
  cm edit interpolate runs/emoji --seeds 3,8 --frames 16 --out out/morph";

const OUTPAINT_EXAMPLES: &str = "\
The picture is scaled to what the margins leave of the model's images.

Examples:
  cm edit outpaint runs/emoji --image part.png --left 8 --right 8
  cm edit outpaint runs/emoji --image part.png --bottom 12 --feather 1";

const COMPOSE_EXAMPLES: &str = "\
All parts are measured on one picture, so that they agree.

Examples:
  cm edit compose runs/emoji --image face.png --mask mask.png --grey        (new colours inside the mask)
  cm edit compose runs/emoji --image face.png --mask mask.png --factor 4    (new details inside the mask)
  cm edit compose runs/emoji --image face.png --grey --factor 4 --variations 8";

/// Options of `cm edit inpaint`.
#[derive(Debug, Args)]
pub struct InpaintArgs {
    /// The picture.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// The mask: white is made anew, black is kept.
    #[arg(long, value_name = "FILE")]
    pub mask: PathBuf,
    /// White is kept, black is made anew.
    #[arg(long)]
    pub invert: bool,
    /// Pixels over which the edge of the mask is blended into what is kept.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub feather: usize,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit colorize`.
#[derive(Debug, Args)]
pub struct ColorizeArgs {
    /// The picture.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit superres`.
#[derive(Debug, Args)]
pub struct SuperresArgs {
    /// The small picture, whose size is that of the model's images divided by the factor; or with --demonstrate a full
    /// one.
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// What to do with a picture of another size [default: exact for a small picture, crop for a full one].
    #[arg(long, value_enum)]
    pub fit: Option<FitChoice>,
    /// The factor, in both directions.
    #[arg(long, value_name = "P", default_value_t = 4, value_parser = clap::value_parser!(i64).range(2..=65536))]
    pub factor: i64,
    /// Take a full picture, and degrade it first.
    #[arg(long)]
    pub demonstrate: bool,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit stroke`.
#[derive(Debug, Args)]
pub struct StrokeArgs {
    /// The drawing.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// Noise that is put on the drawing: more of it leaves less of the drawing [default: 5.38·side/256, the paper's at
    /// 256 pixels]. A second step follows at 0.416 of it.
    #[arg(long, value_name = "S", conflicts_with_all = ["ts", "sigmas", "steps"])]
    pub sigma: Option<f64>,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit denoise`.
#[derive(Debug, Args)]
pub struct DenoiseArgs {
    /// The noisy picture.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// Standard deviation of the noise, for values in [-1, 1] [default: estimated from the picture, and printed].
    #[arg(long, value_name = "S")]
    pub sigma: Option<f64>,
    /// A demonstration: add noise of this standard deviation first.
    #[arg(long, value_name = "S")]
    pub add_noise: Option<f64>,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit interpolate`.
#[derive(Debug, Args)]
pub struct InterpolateArgs {
    /// The two seeds.
    #[arg(long, value_name = "A,B")]
    pub seeds: SeedRange,
    /// Number of images, the two ends among them.
    #[arg(long, value_name = "N", default_value = "12", value_parser = RangedU64ValueParser::<usize>::new().range(2..=10_000))]
    pub frames: usize,
    /// Images a second in the GIF, which goes there and back.
    #[arg(long, value_name = "N", default_value = "12", value_parser = clap::value_parser!(u32).range(1..=50))]
    pub fps: u32,
    /// Images computed together.
    #[arg(long, default_value = "16", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: usize,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit outpaint`.
#[derive(Debug, Args)]
pub struct OutpaintArgs {
    /// The picture.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// Pixels to make to its left.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub left: usize,
    /// Pixels to make to its right.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub right: usize,
    /// Pixels to make above it.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub top: usize,
    /// Pixels to make below it.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub bottom: usize,
    /// Pixels over which the edges of the picture are blended.
    #[arg(long, value_name = "PX", default_value_t = 0)]
    pub feather: usize,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// Options of `cm edit compose`.
#[derive(Debug, Args)]
pub struct ComposeArgs {
    /// The picture.
    #[command(flatten)]
    pub picture: PictureArgs,
    /// Keep the picture where this mask is black.
    #[arg(long, value_name = "FILE")]
    pub mask: Option<PathBuf>,
    /// White in the mask is kept, black is made anew.
    #[arg(long, requires = "mask")]
    pub invert: bool,
    /// Keep the luma everywhere.
    #[arg(long)]
    pub grey: bool,
    /// Keep the means of patches of this side everywhere.
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(i64).range(2..=65536))]
    pub factor: Option<i64>,
    /// How the edit goes.
    #[command(flatten)]
    pub walk: WalkArgs,
    /// Model and results.
    #[command(flatten)]
    pub common: CommonArgs,
}

/// A picture to edit.
#[derive(Debug, Args)]
pub struct PictureArgs {
    /// The picture: PNG, JPEG, WebP, BMP or GIF. Grey, 16 bits and EXIF orientation are understood; alpha is put on
    /// white.
    #[arg(long, value_name = "FILE")]
    pub image: PathBuf,
    /// What to do with a picture of another size than the model's images.
    #[arg(long, value_enum, default_value_t = FitChoice::Crop)]
    pub fit: FitChoice,
}

/// What becomes of a picture of another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FitChoice {
    /// The largest middle part of the right proportions, scaled.
    Crop,
    /// Scaled in both directions, each on its own.
    Stretch,
    /// Refused.
    Exact,
}

/// How an edit with several steps goes.
#[derive(Debug, Args)]
pub struct WalkArgs {
    /// Time points as indices into the Karras grid, 0 = σ_max; the last one, σ_min, is not evaluated [default: all
    /// points of a grid of 18 below 64 pixels and of 40 from there on; for stroke, two levels].
    #[arg(long, value_delimiter = ',', conflicts_with = "sigmas")]
    pub ts: Option<Vec<usize>>,
    /// Time points as noise levels, falling; each one is evaluated.
    #[arg(long, value_delimiter = ',', conflicts_with = "steps")]
    pub sigmas: Option<Vec<f64>>,
    /// Number of points of the grid [default: with --ts, one more than its last index]. Without --ts all of them are
    /// used.
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(2..=1_000_000))]
    pub steps: Option<usize>,
    /// Number of results, from seeds 0, 1, 2 …
    #[arg(long, value_name = "N", default_value = "4", conflicts_with = "seeds", value_parser = RangedU64ValueParser::<usize>::new().range(1..=100_000))]
    pub variations: usize,
    /// Seeds, one result each: 0-3, or 1,5,9-12.
    #[arg(long)]
    pub seeds: Option<SeedRange>,
    /// Images computed together.
    #[arg(long, default_value = "16", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: usize,
}

/// What all edits take.
#[derive(Debug, Args)]
pub struct CommonArgs {
    /// A consistency model: a model file, a checkpoint folder, a run folder, or a published form.
    pub model: PathBuf,
    /// Class of the results (class-conditional models) [default: classes in turn, as seeds count].
    #[arg(long)]
    pub class: Option<i64>,
    /// What published weights do not say of themselves, as for `cm model import`.
    #[arg(long = "as", value_name = "KIND")]
    pub kind: Option<String>,
    /// Which average of the weights: an EMA rate such as 0.999, or `raw` [default: the run's first EMA].
    #[arg(long, value_name = "RATE|raw")]
    pub ema: Option<String>,
    /// Folder for the results.
    #[arg(long, value_name = "DIR", default_value = "out/edit")]
    pub out: PathBuf,
    /// Write the results as npz too.
    #[arg(long)]
    pub npz: bool,
    /// What the network computes in.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
}
