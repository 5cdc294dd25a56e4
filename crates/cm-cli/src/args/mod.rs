//! What can be typed.

mod demo;
mod dtype;
pub mod edit;
mod eval;
mod gallery;
mod launch;
mod model;
mod report;
mod sample;
mod search;
mod side;

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use cm_model::short;
use cm_torch::device::DeviceSpec;

pub use demo::{Bar, DEMO_EXAMPLES, DemoArgs, DemoData, DemoRecipe};
pub use dtype::Dtype;
pub use edit::{EDIT_EXAMPLES, EditCommand};
pub use eval::{EVAL_EXAMPLES, EvalArgs, Metric};
pub use gallery::{GALLERY_EXAMPLES, GalleryArgs};
pub use launch::{LAUNCH_EXAMPLES, LaunchArgs};
pub use model::{ExportForm, LPIPS_KINDS, ModelCommand, StoredDtype};
pub use report::{REPORT_EXAMPLES, ReportArgs, ReportData};
pub use sample::{SAMPLE_EXAMPLES, SampleArgs, SamplerKind};
pub use search::{SEARCH_EXAMPLES, ScoreKind, SearchArgs};
pub use side::{RaceDtype, RaceSize, SideArgs};

/// Consistency models: train them, sample them in one step, look inside.
#[derive(Debug, Parser)]
#[command(name = "cm", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 failed while running; 2 wrong usage, config, data or file; \
3 stopped by the guard on gradients and loss; 130 interrupted (training has saved and can be resumed).";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model from an experiment file or a preset.
    #[command(after_help = TRAIN_EXAMPLES)]
    Train(TrainArgs),
    /// Train consistency training with the paper's CIFAR-10 settings, fetching the data where needed.
    #[command(name = "train-cifar10", after_help = CIFAR_EXAMPLES)]
    TrainCifar10(CifarArgs),
    /// Train an EDM diffusion model, the teacher of a distillation.
    #[command(name = "train-teacher", after_help = TEACHER_EXAMPLES)]
    TrainTeacher(TeacherArgs),
    /// Distil a diffusion model into a consistency model, or progressively into one with fewer steps.
    #[command(after_help = DISTILL_EXAMPLES)]
    Distill(DistillArgs),
    /// Start several processes on this machine that train, sample or evaluate together.
    #[command(after_help = LAUNCH_EXAMPLES)]
    Launch(LaunchArgs),
    /// Make images with a trained model.
    #[command(after_help = SAMPLE_EXAMPLES)]
    Sample(SampleArgs),
    /// Find the time points at which several steps of a consistency model are best.
    #[command(name = "search-ts", after_help = SEARCH_EXAMPLES)]
    SearchTs(SearchArgs),
    /// Edit pictures with a consistency model: fill in, colour, enlarge, draw, denoise, continue, morph.
    #[command(subcommand, after_help = EDIT_EXAMPLES)]
    Edit(EditCommand),
    /// Draw what every edit does, with a model of the bundled emoji: the pictures of docs/gallery/.
    #[command(after_help = GALLERY_EXAMPLES)]
    Gallery(GalleryArgs),
    /// Say how good images or a model's images are: FID, KID, Inception score, precision and recall.
    #[command(after_help = EVAL_EXAMPLES)]
    Eval(Box<EvalArgs>),
    /// Train and sample a small model on bundled data, measure it and draw pictures, in minutes on a CPU.
    #[command(after_help = DEMO_EXAMPLES)]
    Demo(DemoArgs),
    /// Make the paper's comparisons on a data set: train, measure, judge the claims, draw; hours on a CPU.
    #[command(after_help = REPORT_EXAMPLES)]
    Report(Box<ReportArgs>),
    /// Look at data sets.
    #[command(subcommand)]
    Data(DataCommand),
    /// Download published weights.
    #[command(subcommand)]
    Fetch(FetchCommand),
    /// Look at model files, and bring them from and to published forms.
    #[command(subcommand)]
    Model(ModelCommand),
    /// List the built-in experiments, or print one.
    #[command(subcommand)]
    Preset(PresetCommand),
    /// Say what this machine offers: libtorch, devices, memory.
    Doctor,
    /// One side of `cargo xtask race`, which obeys commands on standard input.
    #[command(name = "race-side", hide = true)]
    RaceSide(SideArgs),
}

const TRAIN_EXAMPLES: &str = "\
Examples:
  cm train --config digits-ct --out runs/digits
  cm train --config digits-ct --out runs/digits --resume
  cm train --config configs/cifar10-ct.toml --data ~/cifar --out runs/c10 --set train.metric=l2
  cm train --config imagenet64-ct --dry-run
  cm train --config cifar10-ect --data ~/cifar --init-from edm.safetensors
  cm train --config digits-ect --out runs/lr --sweep train.lr=1e-3,5e-4,1e-4
  cm train --config digits-ict --out runs/grid --sweep train.lr=1e-3,1e-4 --sweep train.metric=l2,pseudo_huber
  cm train --config digits-ct --out runs/nets --sweep 'network.channel_mult=[[1, 2], [2, 2]]'
  cm train --out runs/lr --resume                (what is left of a sweep)
  tensorboard --logdir runs                      (curves and sample grids of all runs)";

const CIFAR_EXAMPLES: &str = "\
Examples:
  cm train-cifar10 --dry-run
  cm train-cifar10 --data ~/cifar-10-binary.tar.gz --set train.metric=l2 --out runs/c10";

const TEACHER_EXAMPLES: &str = "\
Examples:
  cm train-teacher --dry-run
  cm train-teacher --data ~/cifar-10-binary.tar.gz --out runs/edm
  cm train-teacher --config imagenet64-edm --data ~/imagenet64.zip";

const DISTILL_EXAMPLES: &str = "\
Examples:
  cm distill --teacher runs/edm --data ~/cifar-10-binary.tar.gz
  cm distill --teacher edm.safetensors --config cifar10-cd --set train.metric=l2
  cm distill --teacher edm.safetensors --config cifar10-pd
  cm distill --teacher edm_imagenet64_ema.pt --as openai-imagenet64-edm --data ~/imagenet64.zip
  cm distill --teacher edm.safetensors --config cifar10-ect      (starts from the teacher's weights)
  cm distill --config imagenet64-cd --dry-run";

const FETCH_LPIPS_EXAMPLES: &str = "\
Examples:
  cm fetch lpips
  cm fetch lpips --net all";

/// Options of `cm train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Experiment: a TOML file, or the name of a preset (see `cm preset list`).
    #[arg(long, value_name = "FILE|PRESET")]
    pub config: Option<String>,
    /// Folder or file of the training data; overrides what the experiment says.
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Train a run for each of these values, into folders below --out, and compare them in a table; given for several
    /// keys, one for each combination. Values that hold commas: a TOML list, quotes, or the option again.
    #[arg(long = "sweep", value_name = "SECTION.KEY=A,B,C", requires = "out")]
    pub sweeps: Vec<String>,
    /// Options that every training shares.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of `cm train-teacher`.
#[derive(Debug, Args)]
pub struct TeacherArgs {
    /// Experiment: a TOML file, or the name of a preset.
    #[arg(long, value_name = "FILE|PRESET", default_value = "cifar10-edm")]
    pub config: String,
    /// Folder or file of the training data; CIFAR-10 is downloaded where it is not there.
    #[arg(long, value_name = "PATH", value_parser = any_path())]
    pub data: Option<PathBuf>,
    /// Options that every training shares.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of `cm distill`.
#[derive(Debug, Args)]
pub struct DistillArgs {
    /// The diffusion model: a file in any form that `cm model import` reads, or the folder of a run or checkpoint.
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present_any = ["dry_run", "resume"],
        conflicts_with_all = ["init_from", "resume"]
    )]
    pub teacher: Option<PathBuf>,
    /// Experiment: a TOML file, or the name of a preset [default: the preset that distils such a network].
    #[arg(long, value_name = "FILE|PRESET")]
    pub config: Option<String>,
    /// Folder or file of the training data; CIFAR-10 is downloaded where it is not there.
    #[arg(long, value_name = "PATH", value_parser = any_path())]
    pub data: Option<PathBuf>,
    /// Options that every training shares.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Options of `cm train-cifar10`.
#[derive(Debug, Args)]
pub struct CifarArgs {
    /// Experiment: a TOML file, or the name of a preset.
    #[arg(long, value_name = "FILE|PRESET", default_value = "cifar10-ct")]
    pub config: String,
    /// A folder that holds CIFAR-10's binary archive or its files, or the archive itself [default: data/cifar10,
    /// into which the archive is downloaded where it is not there].
    #[arg(long, value_name = "PATH", value_parser = any_path())]
    pub data: Option<PathBuf>,
    /// Options that every training shares.
    #[command(flatten)]
    pub run: RunArgs,
}

/// A path that may be empty: what is wrong with it is said where it is used.
fn any_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// What every training takes.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Folder of the run: config, logs, checkpoints, sample grids [default: out/runs/NAME].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where to compute: auto, cpu, cuda or cuda:N. A device that is not there is an error; only `auto` chooses.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// Go on from the newest whole checkpoint of the run folder, with the run's own config.
    #[arg(long)]
    pub resume: bool,
    /// Build the network, run one step at micro-batch 1 on made-up pixels, print parameters, memory and config.
    #[arg(long)]
    pub dry_run: bool,
    /// Begin with the weights of this model: a file in any form that `cm model import` reads, or the folder of a run
    /// or checkpoint.
    #[arg(long, value_name = "MODEL", conflicts_with = "resume")]
    pub init_from: Option<PathBuf>,
    /// What the weights of --teacher or --init-from do not say of themselves, as for `cm model import`.
    #[arg(long = "as", value_name = "KIND")]
    pub kind: Option<String>,
    /// Change a value of the experiment; may be given several times.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

/// `cm data …`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Say what lies at a path, and write a contact sheet.
    #[command(after_help = "Example:\n  cm data inspect ~/pictures --sheet out/pictures.png")]
    Inspect {
        /// A file or folder of any supported kind.
        path: PathBuf,
        /// Where to write the contact sheet.
        #[arg(long, value_name = "PNG", default_value = "out/contact-sheet.png")]
        sheet: PathBuf,
    },
    /// Decode a set once and write it as NumPy arrays, which training reads in place (kind = "shards").
    #[command(after_help = PACK_EXAMPLES)]
    Pack(PackArgs),
    /// Download CIFAR-10's binary archive; a torn download goes on where it stood.
    Fetch {
        /// Folder for the archive.
        #[arg(long, value_name = "DIR", default_value = "data/cifar10")]
        out: PathBuf,
    },
}

const PACK_EXAMPLES: &str = "\
Examples:
  cm data pack ~/imagenet/train --out data/imagenet64 --resolution 64 --fit center_crop --filter area --labels folder
  cm data pack ~/lsun/bedroom_train_lmdb --out data/bedroom64 --resolution 64 --fit center_crop
  cm train --config imagenet64-ct --data data/imagenet64 --set data.kind=shards";

/// Options of `cm data pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// A file or folder of any supported kind.
    pub path: PathBuf,
    /// The new folder.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Side of the square images in pixels [default: that of the first image].
    #[arg(long, value_name = "PIXELS")]
    pub resolution: Option<usize>,
    /// exact, center_crop or stretch: what is done with images of another size.
    #[arg(long, default_value = "exact")]
    pub fit: String,
    /// area, bicubic or lanczos: the kernel for that [default: lanczos].
    #[arg(long)]
    pub filter: Option<String>,
    /// grey or rgb [default: that of the first image].
    #[arg(long)]
    pub channels: Option<String>,
    /// none, auto, dataset_json, prefix or folder: where labels come from.
    #[arg(long, default_value = "auto")]
    pub labels: String,
    /// train, test or all: the part of a set that is split by its files.
    #[arg(long, default_value = "train")]
    pub split: String,
    /// Images in a file.
    #[arg(long, default_value = "10000", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub per_shard: usize,
    /// Leave out so many images that do not decode, each named in a warning; one more is an error.
    #[arg(long, value_name = "N", default_value = "0")]
    pub max_corrupt: usize,
}

/// `cm fetch …`.
#[derive(Debug, Subcommand)]
pub enum FetchCommand {
    /// Download torchvision's weights and make the files of them that the metric LPIPS reads; a torn download goes on
    /// where it stood.
    #[command(after_help = FETCH_LPIPS_EXAMPLES)]
    Lpips {
        /// The network: vgg16 is 0.53 GB, alex 0.24 GB, squeeze 5 MB.
        #[arg(long, value_enum, default_value_t = LpipsChoice::Vgg16)]
        net: LpipsChoice,
        /// Folder for the files. What lies there already is not fetched again.
        #[arg(long, value_name = "DIR", default_value = "data/lpips")]
        out: PathBuf,
    },
    /// Download the weights of Inception that FID is measured with (96 MB), and make the file of them that `cm eval`
    /// reads; a torn download goes on where it stood.
    #[command(after_help = "Example:\n  cm fetch inception")]
    Inception {
        /// Folder for the file. What lies there already is not fetched again.
        #[arg(long, value_name = "DIR", default_value = "data/inception")]
        out: PathBuf,
    },
}

/// Networks of LPIPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LpipsChoice {
    /// VGG-16, with which the released consistency models were trained.
    Vgg16,
    /// AlexNet.
    Alex,
    /// SqueezeNet 1.1.
    Squeeze,
    /// All three.
    All,
}

/// `cm preset …`.
#[derive(Debug, Subcommand)]
pub enum PresetCommand {
    /// The names of the built-in experiments.
    List,
    /// The text of one, to start your own from.
    Show {
        /// Name of the preset.
        name: String,
    },
}

/// Seeds such as `0-63` or `1,5,9-12`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedRange(pub Vec<u64>);

const MAX_SEEDS: u64 = 10_000_000;
const MAX_SEED: u64 = (1 << 56) - 1;

impl std::str::FromStr for SeedRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            let value: u64 =
                part.trim().parse().map_err(|_| format!("'{}' is no seed (0 to 2^56 − 1)", short(part)))?;
            if value > MAX_SEED { Err(format!("seed {value} is above 2^56 − 1")) } else { Ok(value) }
        };
        let mut seeds = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if last < first {
                return Err(format!("'{}' runs backwards", short(part)));
            }
            if last - first >= MAX_SEEDS || seeds.len() as u64 + (last - first) >= MAX_SEEDS {
                return Err(format!("more than {MAX_SEEDS} seeds at once"));
            }
            seeds.extend(first..=last);
        }
        let mut sorted = seeds.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("seed {} is there twice", pair[0]));
        }
        Ok(Self(seeds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn seeds_are_ranges_and_lists() {
        let seeds = |text: &str| text.parse::<SeedRange>().map(|s| s.0);
        assert_eq!(seeds("0-3").unwrap(), vec![0, 1, 2, 3]);
        assert_eq!(seeds("7,1-2").unwrap(), vec![7, 1, 2]);
        for bad in ["", "3-1", "a", "0-99999999999", "-1", "72057594037927936", "1,,2", "0-3,2"] {
            assert!(seeds(bad).is_err(), "{bad}");
        }
    }
}
