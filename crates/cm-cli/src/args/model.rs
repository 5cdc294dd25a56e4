//! What `cm model` does.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

/// `cm model …`.
#[derive(Debug, Subcommand)]
pub enum ModelCommand {
    /// Say what a file of weights holds: a model file, a checkpoint or run folder, or a published form.
    Info {
        /// A model file, a checkpoint folder or a run folder; or a `.pt` of OpenAI, safetensors in EDM's names, or a
        /// folder of diffusers.
        file: PathBuf,
    },
    /// Make a model file of published weights.
    #[command(after_help = IMPORT_EXAMPLES)]
    Import {
        /// OpenAI's `.pt`, safetensors (or `.pt`) in EDM's or OpenAI's names, or a folder of diffusers. EDM's and
        /// ECT's `.pkl` go through scripts/convert_edm.py first. No pickle is executed.
        file: PathBuf,
        /// What the weights do not say of themselves; see below. Without it the kinds that fit are listed.
        #[arg(long = "as", value_name = "KIND", long_help = kinds())]
        kind: Option<String>,
        /// The model file to write.
        #[arg(short, long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Write a model in the form that another program reads, or smaller.
    #[command(after_help = EXPORT_EXAMPLES)]
    Export {
        /// A model file, a checkpoint folder or a run folder; for `openai` and `diffusers` with a network of OpenAI's
        /// form.
        file: PathBuf,
        /// Whose names the weights get. `openai`: a `.pt` that OpenAI's code loads, or `.safetensors`. `diffusers`: a
        /// folder with a UNet2DModel and, for a consistency model, its pipeline. `own`: a model file of this project,
        /// alone and in another dtype.
        #[arg(long, value_enum)]
        to: ExportForm,
        /// Dtype of the weights in the file, for `--to own`; they are float32 again when they are loaded.
        #[arg(long, value_enum)]
        dtype: Option<StoredDtype>,
        /// The file or, for diffusers, the new folder to write.
        #[arg(short, long, value_name = "PATH")]
        out: PathBuf,
    },
}

/// Forms of `cm model export`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportForm {
    /// OpenAI's names, as `.pt` or `.safetensors`.
    Openai,
    /// A folder of diffusers.
    Diffusers,
    /// A model file of this project.
    Own,
}

/// Dtypes of weights in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoredDtype {
    /// As they are trained.
    F32,
    /// Half the size, three digits.
    Bf16,
}

/// Kinds of weights that are no model: what a metric measures with.
pub const LPIPS_KINDS: &str = "lpips-vgg16, lpips-alex, lpips-squeeze";

/// The help of `--as`.
fn kinds() -> String {
    format!(
        "What the weights do not say of themselves: whether the model is a denoiser or a consistency function and, \
         for OpenAI's network, the size of images and attention heads. One of {}; or, for a network of your own, \
         {}; or, for torchvision's weights of the networks of LPIPS, {}; or, for those of FID's network, {}. Without it the \
         kinds that fit are listed.",
        cm_net::import::Kind::names(),
        cm_net::import::OWN_KINDS,
        LPIPS_KINDS,
        cm_net::inception::KIND
    )
}

const IMPORT_EXAMPLES: &str = "\
Examples:
  cm model import cd_imagenet64_l2.pt --as openai-imagenet64-cd -o cd.safetensors
  cm model import diffusers-ct_bedroom256 -o ct.safetensors
  cm model import vgg16-397923af.pth --as lpips-vgg16 -o data/lpips/lpips-vgg16.safetensors
  cm model import pt_inception-2015-12-05-6726825d.pth --as inception -o data/inception/inception.safetensors
  cm model import own.pt --as openai:image_size=32,head_channels=64,role=denoiser -o own.safetensors";

const EXPORT_EXAMPLES: &str = "\
Examples:
  cm model export runs/i64 --to openai -o model.pt
  cm model export cd.safetensors --to diffusers -o out/cd-diffusers
  cm model export runs/emoji --to own --dtype bf16 -o emoji.safetensors";
