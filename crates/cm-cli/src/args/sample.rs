//! Options of `cm sample`.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use cm_model::Compute;
use cm_torch::device::DeviceSpec;

use super::{Dtype, SeedRange};

/// How it is called.
pub const SAMPLE_EXAMPLES: &str = "\
Examples:
  cm sample runs/digits --seeds 0-63
  cm sample runs/digits --sampler multistep --sigmas 80,0.8 --seeds 0-15 --out out/two-step
  cm sample model.safetensors --sampler multistep --ts 0,22,39 --class 3
  cm sample cd_imagenet64_l2.pt --as openai-imagenet64-cd --class 207
  cm sample runs/cifar10 --dtype bf16 --seeds 0-49999 --batch 64
  cm sample runs/edm --sampler heun --steps 18 --ema 0.9999
  cm sample runs/edm --sampler dpmpp2m --steps 10
  cm sample runs/edm --sampler heun --steps 256 --s-churn 40 --s-min 0.05 --s-max 50 --s-noise 1.003
  cm sample runs/edm-dropout --class 3 --cfg 2.5";

/// Options of `cm sample`.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// A model file, a checkpoint folder or a run folder; or weights in any form that `cm model import` reads.
    pub model: PathBuf,
    /// What the weights do not say of themselves, as for `cm model import`.
    #[arg(long = "as", value_name = "KIND")]
    pub kind: Option<String>,
    /// How to sample [default: onestep for a consistency model; for a denoiser heun, or progdist if it was
    /// progressively distilled].
    #[arg(long, value_enum)]
    pub sampler: Option<SamplerKind>,
    /// Time points of multistep sampling as indices into the Karras grid, 0 = σ_max; the last one only sets the
    /// final noise and is not evaluated.
    #[arg(long, value_delimiter = ',', conflicts_with = "sigmas")]
    pub ts: Option<Vec<usize>>,
    /// For the solvers of a denoiser: number of noise levels [default: 18]. For progdist: number of steps [default: what
    /// the model was distilled to]. For multistep: number of points of the grid that --ts counts in [default: one more
    /// than its last index, which then is σ_min, as in all published time points].
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pub steps: Option<usize>,
    /// Time points of multistep sampling as noise levels, falling; each one is evaluated.
    #[arg(long, value_delimiter = ',')]
    pub sigmas: Option<Vec<f64>>,
    /// The churn of heun and dpm2.
    #[command(flatten)]
    pub churn: ChurnArgs,
    /// Seeds, one image each: 0-63, or 1,5,9-12.
    #[arg(long, default_value = "0-63")]
    pub seeds: SeedRange,
    /// Class of all images (class-conditional models).
    #[arg(long)]
    pub class: Option<i64>,
    /// Classifier-free guidance towards --class, for denoisers that were trained with label dropout: 1 is the model as it
    /// is, more follows the class more closely. Doubles the cost.
    #[arg(long, value_name = "W", allow_negative_numbers = true)]
    pub cfg: Option<f64>,
    /// Which average of the weights: an EMA rate such as 0.999, or `raw` [default: the run's first EMA].
    #[arg(long, value_name = "RATE|raw")]
    pub ema: Option<String>,
    /// Images computed together.
    #[arg(long, default_value = "64", value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch: usize,
    /// Do not clip the model's estimates and the images to [-1, 1].
    #[arg(long)]
    pub no_clip: bool,
    /// Folder for PNGs, grid and npz.
    #[arg(long, value_name = "DIR", default_value = "out/samples")]
    pub out: PathBuf,
    /// Put the PNGs into sub-folders of 1,000.
    #[arg(long)]
    pub subdirs: bool,
    /// What the network computes in.
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,
    /// On a GPU, record the network's pass for each batch size and do it again as one CUDA graph.
    #[arg(long)]
    pub cuda_graph: bool,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
}

impl SampleArgs {
    /// How the network computes.
    pub fn compute(&self) -> Compute {
        Compute { graph: self.cuda_graph, ..self.dtype.compute() }
    }
}

/// Noise that a stochastic sampler adds before each step (Karras et al. 2022, Algorithm 2).
#[derive(Debug, Args)]
pub struct ChurnArgs {
    /// How much noise heun and dpm2 add in all, to forget the errors of earlier steps; EDM uses 40 for ImageNet-64
    /// [default: 0, none].
    #[arg(long, value_name = "S")]
    pub s_churn: Option<f64>,
    /// Lowest noise level that gets some [default: 0].
    #[arg(long, value_name = "SIGMA")]
    pub s_min: Option<f64>,
    /// Highest noise level that gets some [default: no limit].
    #[arg(long, value_name = "SIGMA")]
    pub s_max: Option<f64>,
    /// Factor on the noise, slightly above 1 for a denoiser that removes too much [default: 1].
    #[arg(long, value_name = "FACTOR")]
    pub s_noise: Option<f64>,
}

/// Samplers of `cm sample`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SamplerKind {
    /// One jump from pure noise, with a consistency function.
    Onestep,
    /// Algorithm 1 of Song et al. 2023: jump, add noise, jump.
    Multistep,
    /// Heun's method for a denoiser: Algorithms 1 and 2 of Karras et al. 2022.
    Heun,
    /// Euler's method for a denoiser.
    Euler,
    /// DPM-2 for a denoiser: the midpoint rule.
    Dpm2,
    /// Euler's method to below each level, and noise back up to it.
    Ancestral,
    /// DPM-Solver++(2M) for a denoiser: second order at one evaluation a step.
    Dpmpp2m,
    /// The steps of a progressively distilled denoiser.
    Progdist,
}

impl SamplerKind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            SamplerKind::Onestep => "onestep",
            SamplerKind::Multistep => "multistep",
            SamplerKind::Heun => "heun",
            SamplerKind::Euler => "euler",
            SamplerKind::Dpm2 => "dpm2",
            SamplerKind::Ancestral => "ancestral",
            SamplerKind::Dpmpp2m => "dpmpp2m",
            SamplerKind::Progdist => "progdist",
        }
    }
}
