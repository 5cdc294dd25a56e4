//! OpenAI's names.

use super::{Architecture, Lookup, OpenaiParts, Shapes, multipliers};
use crate::import::pickle::Result;

/// More levels than any image can be halved for.
const MAX_LEVELS: i64 = 16;

/// Reads the network off the names and shapes.
///
/// A residual block that halves the resolution has the names of any other, so the levels are counted in the
/// decoder, where each level but the last ends with a layer more.
pub(in crate::import) fn of(shapes: &Shapes) -> Result<Architecture> {
    let look = Lookup(shapes);
    let model_channels = look.side("time_embed.0.weight", 2, 1)?;
    let image_channels = look.side("input_blocks.0.0.weight", 4, 1)?;
    let num_classes = match look.has("label_emb.weight") {
        true => look.side("label_emb.weight", 2, 0)?,
        false => 0,
    };
    let stages = look.count(|stage| format!("output_blocks.{stage}.0.in_layers.0.weight"));
    let up = |stage: i64, layer: &str| {
        (1..=2).any(|child| look.has(&format!("output_blocks.{stage}.{child}.{layer}.weight")))
    };
    let by_blocks = (0..stages).filter(|&stage| up(stage, "in_layers.0")).count() as i64;
    let by_convolutions = (0..stages).filter(|&stage| up(stage, "conv")).count() as i64;
    let levels = by_blocks + by_convolutions + 1;
    if by_blocks > 0 && by_convolutions > 0 {
        return Err(format!(
            "the decoder doubles its resolution {by_blocks} times by blocks and {by_convolutions} times by \
             convolutions; the network does it in one way"
        ));
    }
    if levels > MAX_LEVELS {
        return Err(format!("the decoder has {levels} levels, at most {MAX_LEVELS} are known"));
    }
    let num_blocks = stages / levels - 1;
    if num_blocks < 1 || stages % levels != 0 {
        return Err(format!(
            "the decoder has {stages} output_blocks for {levels} levels, expected two or more for each"
        ));
    }
    let first = |level: i64| format!("input_blocks.{}", 1 + level * (num_blocks + 1));
    let widths = (0..levels)
        .map(|level| look.side(&format!("{}.0.in_layers.2.weight", first(level)), 4, 0))
        .collect::<Result<Vec<_>>>()?;
    let emb_rows = look.side(&format!("{}.0.emb_layers.1.weight", first(0)), 2, 0)?;
    let attends = |level: &usize| look.has(&format!("{}.1.qkv.weight", first(*level as i64)));
    Ok(Architecture::Openai(OpenaiParts {
        image_channels,
        num_classes,
        model_channels,
        channel_mult: multipliers(model_channels, &widths)?,
        num_blocks,
        attn_levels: (0..levels as usize).filter(attends).collect(),
        scale_shift_norm: emb_rows == 2 * widths[0],
        resblock_updown: by_blocks > 0,
    }))
}
