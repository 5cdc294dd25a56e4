//! Options of `cm eval`.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use cm_torch::device::DeviceSpec;

use super::SeedRange;

/// How it is called.
pub const EVAL_EXAMPLES: &str = "\
What INPUT and --reference may be:
  runs/digits, model.safetensors    a model: images are drawn as --sample says, for each --seeds
  samples.npz                       images (arr_0, uint8 NHWC), or statistics (mu and sigma), which count more
  pictures/, pictures.zip           images of one size
  ~/cifar, train-images.gz          CIFAR-10 or IDX files; :test behind the path for their other part
  digits-ct, my.toml                the data of an experiment; digits-ct:test for what it holds out
  digits, emoji                     the bundled sets

Examples:
  cm eval runs/digits
  cm eval runs/digits --sample '--sampler multistep --sigmas 80,0.8' --seeds 0-4999 --seeds 5000-9999
  cm eval digits-ct:test --reference digits-ct -o out/eval/floor.json
  cm eval out/samples/samples_50000x32x32x3.npz --reference cifar10-stats.npz --metrics fid,is
  cm eval ~/cifar --save-stats cifar10-stats.npz
  cm eval --compare out/eval/ct.json out/eval/ict.json

fid, sfid, kid, is and pr see images through Inception (`cm fetch inception`). fcd, kcd and cpr are the same as fid, kid \
and pr through a small classifier that is trained on the reference images: they compare models of one data set, and with \
no published figure. See docs/evaluation.md.";

/// Options of `cm eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What is judged: a model, images, or a data set; see below.
    #[arg(required_unless_present = "compare")]
    pub input: Option<String>,
    /// What it is compared with; see below [default: the training data of a run].
    #[arg(long, value_name = "DATA|STATISTICS")]
    pub reference: Option<String>,
    /// What is measured [default: fid,kid,is,pr where Inception's weights are there, else fcd,kcd,cpr].
    #[arg(long, value_enum, value_delimiter = ',')]
    pub metrics: Vec<Metric>,
    /// Seeds of a model's images, one each. Given several times: one evaluation for each, with mean and spread.
    #[arg(long, default_value = "0-9999")]
    pub seeds: Vec<SeedRange>,
    /// How a model is sampled: options of `cm sample`, quoted [default: those of `cm sample`].
    #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
    pub sample: Option<String>,
    /// Inception's weights, as `cm fetch inception` or `cm model import --as inception` makes them.
    #[arg(long, value_name = "FILE", default_value = "data/inception/inception.safetensors")]
    pub weights: PathBuf,
    /// The classifier of fcd, kcd and cpr, from an earlier evaluation's cache [default: one is trained on the reference
    /// images].
    #[arg(long, value_name = "FILE")]
    pub classifier: Option<PathBuf>,
    /// Subsets that kid and kcd average over.
    #[arg(long, default_value = "100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub kid_subsets: u32,
    /// Images in a subset, of each side; all where there are fewer.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(2..))]
    pub kid_size: u32,
    /// Chunks of the Inception score.
    #[arg(long, default_value = "10", value_parser = clap::value_parser!(u64).range(1..))]
    pub is_splits: u64,
    /// The neighbour to which the balls of precision and recall reach.
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(i64).range(1..))]
    pub pr_k: i64,
    /// Measure fid, sfid and fcd also of so few images that the covariance has directions without spread.
    #[arg(long)]
    pub allow_few: bool,
    /// Write the statistics of INPUT (of its first evaluation) as a NumPy archive: mu, sigma, count and, with sfid, mu_s
    /// and sigma_s.
    #[arg(long, value_name = "NPZ")]
    pub save_stats: Option<PathBuf>,
    /// The JSON to write, with a table beside it [default: out/eval/INPUT.json].
    #[arg(short, long, value_name = "JSON")]
    pub out: Option<PathBuf>,
    /// Folder that keeps statistics of data sets, and classifiers.
    #[arg(long, value_name = "DIR", default_value = "out/eval/cache")]
    pub cache: PathBuf,
    /// Measure everything anew and keep nothing.
    #[arg(long, conflicts_with = "cache")]
    pub no_cache: bool,
    /// Images computed together.
    #[arg(long, default_value = "64", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: usize,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// Put two earlier evaluations beside each other, and measure nothing.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"], exclusive = true)]
    pub compare: Vec<PathBuf>,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Metric {
    /// Fréchet Inception distance.
    Fid,
    /// The same on features that keep their place in the image.
    Sfid,
    /// Kernel Inception distance.
    Kid,
    /// Inception score; needs no reference.
    Is,
    /// Precision and recall.
    Pr,
    /// Fréchet classifier distance: FID's maths on the features of a small classifier.
    Fcd,
    /// Kernel classifier distance.
    Kcd,
    /// Precision and recall on the classifier's features.
    Cpr,
}

impl Metric {
    /// Its name on the command line and in figures.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Fid => "fid",
            Metric::Sfid => "sfid",
            Metric::Kid => "kid",
            Metric::Is => "is",
            Metric::Pr => "pr",
            Metric::Fcd => "fcd",
            Metric::Kcd => "kcd",
            Metric::Cpr => "cpr",
        }
    }

    /// Whether it sees images through Inception; else through the classifier.
    pub fn needs_inception(self) -> bool {
        matches!(self, Metric::Fid | Metric::Sfid | Metric::Kid | Metric::Is | Metric::Pr)
    }

    /// Whether it compares with a reference.
    pub fn needs_reference(self) -> bool {
        self != Metric::Is
    }
}
