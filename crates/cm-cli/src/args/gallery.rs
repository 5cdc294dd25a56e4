//! Options of `cm gallery`.

use std::path::PathBuf;

use clap::Args;
use cm_torch::device::DeviceSpec;

/// How the gallery is called.
pub const GALLERY_EXAMPLES: &str = "\
Examples:
  cm gallery
  cm gallery --out out/gallery --model runs/emoji-gallery

The model that is committed was trained by
  cm train-teacher --config emoji-gallery-edm --out runs/emoji-gallery-edm
  cm train --config emoji-gallery --init-from runs/emoji-gallery-edm --out runs/emoji-gallery
  cm model export runs/emoji-gallery --to own --dtype bf16 -o docs/gallery/emoji.safetensors";

/// Options of `cm gallery`.
#[derive(Debug, Args)]
pub struct GalleryArgs {
    /// A consistency model of the bundled emoji: a model file, a checkpoint or a run folder.
    #[arg(long, value_name = "MODEL", default_value = "docs/gallery/emoji.safetensors")]
    pub model: PathBuf,
    /// Folder for the pictures.
    #[arg(long, value_name = "DIR", default_value = "docs/gallery")]
    pub out: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    pub device: DeviceSpec,
}
