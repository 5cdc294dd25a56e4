//! Options of the demo.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cm_torch::device::DeviceSpec;

/// How the demo is called.
pub const DEMO_EXAMPLES: &str = "\
Examples:
  cm demo
  cm demo --seconds 60 --out out/quick
  cm demo --recipe cd
  cm demo --recipe all --out out/recipes
  cm demo --data emoji
  cm demo --data emoji --recipe cd --device cuda --seconds 120
  cm demo --data fashion --images /usr/share/datasets/fashion-mnist --recipe ict --device cuda";

/// Data sets of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoData {
    /// 1,797 hand-written digits, 8×8.
    Digits,
    /// 1,906 colour emoji, 32×32.
    Emoji,
    /// Fashion-MNIST, 70,000 grey pictures of clothes, 28×28: not bundled, --images says where it lies.
    Fashion,
}

impl DemoData {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DemoData::Digits => "digits",
            DemoData::Emoji => "emoji",
            DemoData::Fashion => "fashion",
        }
    }
}

/// Recipes of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoRecipe {
    /// Consistency training with easy consistency tuning's noise levels (Geng et al. 2024).
    Ect,
    /// Improved consistency training (Song and Dhariwal 2023).
    Ict,
    /// Consistency training (Song et al. 2023, Algorithm 3).
    Ct,
    /// Consistency distillation (Song et al. 2023, Algorithm 2) of a small diffusion model that is trained first.
    Cd,
    /// Progressive distillation (Salimans and Ho 2022) of a small diffusion model that is trained first.
    Pd,
    /// All of these, one after the other, and their samples side by side.
    All,
}

impl DemoRecipe {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DemoRecipe::Ect => "ect",
            DemoRecipe::Ict => "ict",
            DemoRecipe::Ct => "ct",
            DemoRecipe::Cd => "cd",
            DemoRecipe::Pd => "pd",
            DemoRecipe::All => "all",
        }
    }
}

/// Options of `cm demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// The data set.
    #[arg(long, value_enum, default_value_t = DemoData::Digits)]
    pub data: DemoData,
    /// Folder of the four IDX files of --data fashion, as Debian's package dataset-fashion-mnist installs them into
    /// /usr/share/datasets/fashion-mnist.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// How the model is trained.
    #[arg(long, value_enum, default_value_t = DemoRecipe::Ect)]
    pub recipe: DemoRecipe,
    /// Folder for pictures, checkpoint and summary.
    #[arg(long, value_name = "DIR", default_value = "out/demo")]
    pub out: PathBuf,
    /// Time for each recipe in seconds, without its teacher; the training schedule is fitted to it [default: 220
    /// for digits, 1500 for others]. A teacher gets as much again.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Seed of the run.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Fail unless the samples reach a bar.
    #[arg(long, value_enum)]
    pub check: Option<Bar>,
    /// Put figures and pictures into docs/ of the checkout that this is called in: the marked block of this data
    /// set in docs/results.md, and docs/pictures/. Nothing else ever writes there.
    #[arg(long)]
    pub publish: bool,
    /// Publish what a finished demo left in --out, without another demo.
    #[arg(long, conflicts_with_all = ["publish", "seconds", "check"])]
    pub publish_only: bool,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
}

/// Bars that the demo on digits can be held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Bar {
    /// Both shares ≥ 0.60, class entropy ≥ 2.1, no image nearer than 0.3 to a training image.
    Full,
    /// Both shares 0.1 above those of a Gaussian fit.
    Ci,
}
