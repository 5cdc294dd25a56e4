//! The U that SongUNet and ADM share in EDM's unified form: an encoder whose outputs all become skips, and a
//! decoder that takes them back in reverse order.

use std::f64::consts::FRAC_1_SQRT_2;

use cm_model::ParamPath;
use tch::Tensor;

use crate::layers::{Conv2d, Direction, FusedDown, GroupNorm};
use crate::part::Part;
use crate::reference::{SkipDecoder, SkipEncoder};
use crate::unet_block::{BlockSpec, UnetBlock};
use crate::{Probe, Result};

/// Where a block stands, for the rule that says which blocks have attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the encoder.
    Encoder,
    /// The first block of the decoder.
    Bottom,
    /// In the decoder.
    Decoder {
        /// The last block of its resolution.
        last: bool,
    },
}

/// What a [`Body`] is made of.
pub(crate) struct Plan<'a> {
    pub(crate) image_size: i64,
    pub(crate) image_channels: i64,
    /// Channels behind the first convolution.
    pub(crate) stem: i64,
    /// Channels of each level, finest first.
    pub(crate) widths: Vec<i64>,
    pub(crate) num_blocks: i64,
    /// Attention heads of a block at (place, resolution, channels).
    pub(crate) heads: Box<dyn Fn(Place, i64, i64) -> i64 + 'a>,
    /// What all blocks have in common.
    pub(crate) block: BlockSpec,
}

/// What enters a level of the encoder beside the level above.
#[derive(Debug)]
pub(crate) enum Aux {
    /// Nothing.
    None,
    /// The input image, downsampled and averaged in: NCSN++'s residual encoder.
    Residual(FusedDown),
    /// The input image, downsampled and added.
    Skip(SkipEncoder),
}

#[derive(Debug)]
enum Entry {
    Conv(Conv2d),
    Down(Part<UnetBlock>),
}

#[derive(Debug)]
pub(crate) struct EncoderLevel {
    resolution: String,
    entry: Entry,
    pub(crate) aux: Aux,
    blocks: Vec<Part<UnetBlock>>,
}

#[derive(Debug)]
struct DecoderBlock {
    name: String,
    block: Part<UnetBlock>,
    takes_skip: bool,
}

/// `conv(silu(norm(x)))`: features to image.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) norm: GroupNorm,
    pub(crate) conv: Conv2d,
    pub(crate) up: Option<SkipDecoder>,
}

#[derive(Debug)]
pub(crate) struct DecoderLevel {
    resolution: String,
    blocks: Vec<DecoderBlock>,
    pub(crate) output: Option<Output>,
}

/// Encoder and decoder; finest level first in the one, last in the other.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) encoder: Vec<EncoderLevel>,
    pub(crate) decoder: Vec<DecoderLevel>,
}

/// `32x32`, as published files write it.
pub(crate) fn resolution_name(image_size: i64, level: usize) -> String {
    let side = image_size >> level;
    format!("{side}x{side}")
}

impl Body {
    pub(crate) fn new(root: &ParamPath<'_>, plan: &Plan<'_>) -> Result<Self> {
        let mut skips = Vec::new();
        let encoder = Self::encoder(&root.sub("enc"), plan, &mut skips)?;
        let decoder = Self::decoder(&root.sub("dec"), plan, &mut skips)?;
        Ok(Self { encoder, decoder })
    }

    fn encoder(path: &ParamPath<'_>, plan: &Plan<'_>, skips: &mut Vec<i64>) -> Result<Vec<EncoderLevel>> {
        let mut channels = plan.stem;
        let mut levels = Vec::new();
        for (level, &width) in plan.widths.iter().enumerate() {
            let resolution = resolution_name(plan.image_size, level);
            let named = |suffix: &str| path.sub(format!("{resolution}_{suffix}"));
            let entry = if level == 0 {
                let init = plan.block.init.layer();
                Entry::Conv(Conv2d::new(&named("conv"), plan.image_channels, channels, 3, init)?)
            } else {
                let spec = plan.resampling(channels, Direction::Down);
                Entry::Down(Part::new(UnetBlock::new(&named("down"), &spec)?))
            };
            skips.push(channels);
            let mut blocks = Vec::new();
            for index in 0..plan.num_blocks {
                let spec = plan.block_at(Place::Encoder, level, channels, width);
                blocks.push(Part::new(UnetBlock::new(&named(&format!("block{index}")), &spec)?));
                channels = width;
                skips.push(channels);
            }
            levels.push(EncoderLevel { resolution, entry, aux: Aux::None, blocks });
        }
        Ok(levels)
    }

    fn decoder(path: &ParamPath<'_>, plan: &Plan<'_>, skips: &mut Vec<i64>) -> Result<Vec<DecoderLevel>> {
        let bottom = plan.widths.len() - 1;
        let mut channels = plan.widths[bottom];
        let mut levels = Vec::new();
        for (level, &width) in plan.widths.iter().enumerate().rev() {
            let resolution = resolution_name(plan.image_size, level);
            let mut blocks = Vec::new();
            let mut add = |name: String, spec: &BlockSpec, takes_skip: bool| -> Result<()> {
                let name = format!("{resolution}_{name}");
                let block = Part::new(UnetBlock::new(&path.sub(&name), spec)?);
                blocks.push(DecoderBlock { name: format!("dec.{name}"), block, takes_skip });
                Ok(())
            };
            if level == bottom {
                add("in0".into(), &plan.block_at(Place::Bottom, level, channels, channels), false)?;
                add("in1".into(), &plan.without_attention(channels, channels), false)?;
            } else {
                add("up".into(), &plan.resampling(channels, Direction::Up), false)?;
            }
            for index in 0..=plan.num_blocks {
                let skip = skips.pop().expect("as many skips as decoder blocks");
                let place = Place::Decoder { last: index == plan.num_blocks };
                add(format!("block{index}"), &plan.block_at(place, level, channels + skip, width), true)?;
                channels = width;
            }
            levels.push(DecoderLevel { resolution, blocks, output: None });
        }
        Ok(levels)
    }

    /// The features at the bottom, and the skips.
    pub(crate) fn encode(
        &self,
        image: &Tensor,
        emb: &Tensor,
        train: bool,
        probe: Probe<'_>,
    ) -> (Tensor, Vec<Tensor>) {
        let mut skips = Vec::new();
        let (mut x, mut aux) = (image.shallow_clone(), image.shallow_clone());
        for EncoderLevel { resolution, entry, aux: into, blocks } in &self.encoder {
            let suffix;
            (x, suffix) = match entry {
                Entry::Conv(conv) => (conv.forward(&x), "conv"),
                Entry::Down(block) => (block.forward(x, None, emb, train), "down"),
            };
            probe(&format!("enc.{resolution}_{suffix}"), &x);
            match into {
                Aux::None => {}
                Aux::Residual(conv) => {
                    let below = conv.forward(&aux);
                    probe(&format!("enc.{resolution}_aux_residual"), &below);
                    x = (x + below) * FRAC_1_SQRT_2;
                    aux = x.shallow_clone();
                }
                Aux::Skip(skip) => (x, aux) = skip.forward(&x, &aux, resolution, probe),
            }
            skips.push(x.shallow_clone());
            for (index, block) in blocks.iter().enumerate() {
                x = block.forward(x, None, emb, train);
                probe(&format!("enc.{resolution}_block{index}"), &x);
                skips.push(x.shallow_clone());
            }
        }
        (x, skips)
    }

    /// The features at the top, and the sum of the outputs of all levels that have one.
    pub(crate) fn decode(
        &self,
        bottom: Tensor,
        mut skips: Vec<Tensor>,
        emb: &Tensor,
        train: bool,
        probe: Probe<'_>,
    ) -> (Tensor, Option<Tensor>) {
        let (mut x, mut image) = (bottom, None::<Tensor>);
        for DecoderLevel { resolution, blocks, output } in &self.decoder {
            for DecoderBlock { name, block, takes_skip } in blocks {
                let skip = takes_skip.then(|| skips.pop().expect("as many skips as decoder blocks"));
                x = block.forward(x, skip, emb, train);
                probe(name, &x);
            }
            let Some(output) = output else { continue };
            if let (Some(up), Some(above)) = (&output.up, &image) {
                image = Some(up.forward(above, resolution, probe));
            }
            let normed = output.norm.forward(&x);
            probe(&format!("dec.{resolution}_aux_norm"), &normed);
            let here = output.conv.forward(&normed.silu());
            probe(&format!("dec.{resolution}_aux_conv"), &here);
            image = Some(match image {
                Some(coarser) => here + coarser,
                None => here,
            });
        }
        (x, image)
    }
}

impl Plan<'_> {
    fn without_attention(&self, in_channels: i64, out_channels: i64) -> BlockSpec {
        BlockSpec { in_channels, out_channels, heads: 0, resample: None, ..self.block.clone() }
    }

    fn resampling(&self, channels: i64, way: Direction) -> BlockSpec {
        BlockSpec { resample: Some(way), ..self.without_attention(channels, channels) }
    }

    fn block_at(&self, place: Place, level: usize, in_channels: i64, out_channels: i64) -> BlockSpec {
        let heads = (self.heads)(place, self.image_size >> level, out_channels);
        BlockSpec { heads, ..self.without_attention(in_channels, out_channels) }
    }
}
