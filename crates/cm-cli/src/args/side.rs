//! Options of `cm race-side`, which `cargo xtask race` calls.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cm_torch::device::DeviceSpec;

/// Options of `cm race-side`.
#[derive(Debug, Args)]
pub struct SideArgs {
    /// Folder of the files that all sides share.
    pub folder: PathBuf,
    /// Which networks.
    #[arg(long, value_enum)]
    pub size: RaceSize,
    /// What the network computes in.
    #[arg(long, value_enum, default_value_t = RaceDtype::Fp32)]
    pub dtype: RaceDtype,
    /// Threads of one operation.
    #[arg(long)]
    pub threads: usize,
    /// Images in a training step [default: 128 for tiny, 8 for others].
    #[arg(long)]
    pub batch: Option<usize>,
    /// Where to compute.
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// Write the files of these rows instead of obeying commands.
    #[arg(long, value_delimiter = ',')]
    pub write: Vec<String>,
    /// Change a value of the experiments.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
}

/// Sizes of the race.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RaceSize {
    /// The network of the demo on digits.
    Tiny,
    /// DDPM++ and NCSN++ for CIFAR-10.
    Cifar10,
    /// OpenAI's U-Net for ImageNet-64.
    Imagenet64,
}

/// What a network computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RaceDtype {
    /// float32.
    Fp32,
    /// bfloat16 inside the network.
    Bf16,
}
