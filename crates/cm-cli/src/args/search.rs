//! What `cm search-ts` takes.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use cm_torch::device::DeviceSpec;
use serde::{Deserialize, Serialize};

/// Examples of `cm search-ts`.
pub const SEARCH_EXAMPLES: &str = "\
Examples:
  cm search-ts runs/digits
  cm search-ts runs/digits --points 2 --steps 80 --samples 2000
  cm search-ts model.safetensors --data ~/pictures
  cm search-ts cd_imagenet64_l2.pt --as openai-imagenet64-cd --data imagenet64.zip --score fid --samples 10000

Each evaluation is written to the log as it is made. A search that was stopped goes on when it is started again, and one
for more points takes over what is known.";

/// Options of `cm search-ts`.
#[derive(Debug, Args)]
pub struct SearchArgs {
    /// A consistency model: a model file, a checkpoint folder, a run folder, or a published form with --as.
    pub model: PathBuf,
    /// Number of time points between the two ends of the grid; sampling evaluates the network once more than that.
    #[arg(long, default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub points: usize,
    /// Number of points of the grid that --ts counts in [default: that of the model's training where its file says
    /// it, else 40].
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(3..=1_000_000))]
    pub steps: Option<usize>,
    /// What is to be lowest.
    #[arg(long, value_enum, default_value_t = ScoreKind::Pixels)]
    pub score: ScoreKind,
    /// Inception's weights for --score fid, as `cm fetch inception` or `cm model import --as inception` makes them.
    #[arg(long, value_name = "FILE", default_value = "data/inception/inception.safetensors")]
    pub weights: PathBuf,
    /// Folder that keeps the classifier of --score fcd, as that of `cm eval`.
    #[arg(long, value_name = "DIR", default_value = "out/eval/cache")]
    pub cache: PathBuf,
    /// Images sampled for each score, of the seeds from 0.
    #[arg(long, default_value = "1000", value_parser = RangedU64ValueParser::<usize>::new().range(2..=10_000_000))]
    pub samples: usize,
    /// The images to come near to: digits, emoji, or a folder or file as for `cm data inspect`; brought to the model's
    /// size by a cut out of the middle [default: the run's own data, for a run folder].
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// What published weights do not say of themselves, as for `cm model import`.
    #[arg(long = "as", value_name = "KIND")]
    pub kind: Option<String>,
    /// Which average of the weights, in a run or checkpoint folder: an EMA rate, or `raw` [default: the run's first].
    #[arg(long, value_name = "RATE|raw")]
    pub ema: Option<String>,
    /// The log, as JSON lines [default: beside the model].
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Images computed together.
    #[arg(long, default_value = "64", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: usize,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
}

/// What says how good samples are; lower is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreKind {
    /// Fréchet distance between the Gaussians that have the mean and covariance of the pixels: no network, and no eye
    /// for more than second moments.
    Pixels,
    /// Fréchet Inception distance, with --weights.
    Fid,
    /// Fréchet classifier distance: the same on the features of a small classifier that is trained on the data.
    Fcd,
}

impl ScoreKind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            ScoreKind::Pixels => "pixels",
            ScoreKind::Fid => "fid",
            ScoreKind::Fcd => "fcd",
        }
    }
}
