//! Options of the report.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use cm_torch::device::DeviceSpec;

use crate::report::trial_names;

/// How the report is called.
pub const REPORT_EXAMPLES: &str = "\
Examples:
  cm report                                      digits, three seeds of each trial: hours on a CPU
  cm report --quick --out out/quick              one seed, short runs: 12 minutes on two cores
  cm report --trials cd,pd,ect --seeds 3 --budget 64000 --out out/three
  cm report --data emoji --device cuda
  cm report --data fashion --images /usr/share/datasets/fashion-mnist --device cuda
  cm report --publish-only                       what out/report holds, into docs/

A report that was interrupted or killed goes on where it stood when it is called again with the same options; trials and
seeds may be added.";

/// Data sets of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportData {
    /// 1,797 hand-written digits, 8×8.
    Digits,
    /// 1,906 colour emoji, 32×32.
    Emoji,
    /// Fashion-MNIST, 28×28: not bundled, --images says where it lies.
    Fashion,
    /// CIFAR-10, 32×32, with the paper's networks: not bundled, --images says where it lies. For GPUs.
    Cifar10,
}

impl ReportData {
    /// Its name on the command line, with which the names of its presets begin.
    pub fn name(self) -> &'static str {
        match self {
            ReportData::Digits => "digits",
            ReportData::Emoji => "emoji",
            ReportData::Fashion => "fashion",
            ReportData::Cifar10 => "cifar10",
        }
    }

    /// Whether its images come with the program.
    pub fn is_bundled(self) -> bool {
        matches!(self, ReportData::Digits | ReportData::Emoji)
    }
}

/// Options of `cm report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The data set.
    #[arg(long, value_enum, default_value_t = ReportData::Digits)]
    pub data: ReportData,
    /// Where the images of --data fashion or cifar10 lie.
    #[arg(long, value_name = "PATH")]
    pub images: Option<PathBuf>,
    /// Training images of each run; the teacher gets twice as many [default: 128000, of cifar10 12800000; with --quick
    /// 38400; with --smoke 9600].
    #[arg(long, value_name = "IMAGES", value_parser = clap::value_parser!(u64).range(1..))]
    pub budget: Option<u64>,
    /// Runs of each trial, with seeds from 0 on. Claims are decided from 3 on [default: 3; with --quick and --smoke 1].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub seeds: Option<u64>,
    /// Train these trials alone [default: all; with --smoke cd and ect].
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(trial_names()))]
    pub trials: Vec<String>,
    /// Short runs, one of each trial.
    #[arg(long, conflicts_with = "smoke")]
    pub quick: bool,
    /// Two minutes that show that everything works, and nothing about models.
    #[arg(long)]
    pub smoke: bool,
    /// Folder for runs, figures and pictures.
    #[arg(long, value_name = "DIR", default_value = "out/report")]
    pub out: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
    /// Put table and pictures into docs/results-DATA.md and docs/pictures/ of the checkout that this is called in.
    #[arg(long)]
    pub publish: bool,
    /// Publish what a finished report left in --out, and compute nothing.
    #[arg(long, conflicts_with_all = ["publish", "budget", "seeds", "trials", "quick", "smoke", "images"])]
    pub publish_only: bool,
}
