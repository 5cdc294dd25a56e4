//! Which tensor of diffusers is which of ours.

use std::collections::{BTreeMap, HashMap};

use crate::spec::OpenaiUnetSpec;

/// One of our tensors and its parts there.
#[derive(Debug, Clone)]
pub(super) struct Mapped {
    pub(super) ours: String,
    pub(super) our_shape: Vec<i64>,
    /// One name, or those of q, k and v, which are the thirds of our first axis: our channels are ordered
    /// (three, heads, head_dim).
    pub(super) theirs: Vec<String>,
    /// The shape of each of them.
    pub(super) shape: Vec<i64>,
}

/// Parts of a residual block, and of an attention.
const SUFFIXES: [(&str, &str); 8] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
    ("norm", "group_norm"),
    ("proj_out", "to_out.0"),
];

/// All tensors of the network, whose names and shapes are `ours`.
pub(super) fn map(net: &OpenaiUnetSpec, ours: &BTreeMap<String, Vec<i64>>) -> Vec<Mapped> {
    let places = places(net);
    let mapped = |(name, our_shape): (&String, &Vec<i64>)| {
        let (place, rest) = place(&places, name)?;
        let (layer, field) = rest.rsplit_once('.').unwrap_or(("", rest));
        let (mut shape, theirs) = match layer {
            "" => (our_shape.clone(), vec![format!("{place}.{field}")]),
            "qkv" => {
                let part = |part: &str| format!("{place}.to_{part}.{field}");
                let thirds = our_shape.iter().enumerate().map(|(axis, n)| if axis == 0 { n / 3 } else { *n });
                (thirds.collect(), ["q", "k", "v"].map(part).to_vec())
            }
            layer => {
                let (_, theirs) = SUFFIXES.iter().find(|(ours, _)| *ours == layer)?;
                (our_shape.clone(), vec![format!("{place}.{theirs}.{field}")])
            }
        };
        if matches!(layer, "qkv" | "proj_out") {
            // Linear layers there, 1×1 convolutions here.
            shape.truncate(2);
        }
        Some(Mapped { ours: name.clone(), our_shape: our_shape.clone(), theirs, shape })
    };
    ours.iter().filter_map(mapped).collect()
}

/// Their place of a tensor of ours, and what is behind the place in our name.
fn place<'a>(places: &'a HashMap<String, String>, name: &'a str) -> Option<(&'a str, &'a str)> {
    name.rmatch_indices('.').find_map(|(at, _)| Some((places.get(&name[..at])?.as_str(), &name[at + 1..])))
}

/// Our places of blocks and layers, and theirs.
fn places(net: &OpenaiUnetSpec) -> HashMap<String, String> {
    let fixed = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("label_emb", "class_embedding"),
        ("input_blocks.0.0", "conv_in"),
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.1", "mid_block.attentions.0"),
        ("middle_block.2", "mid_block.resnets.1"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ];
    let mut places: HashMap<_, _> = fixed.map(|(ours, theirs)| (ours.to_owned(), theirs.to_owned())).into();
    let (levels, blocks) = (net.channel_mult.len(), net.num_blocks as usize);
    let (down, up, conv) = if net.resblock_updown { ("", "", "") } else { (".op", ".conv", ".conv") };
    for level in 0..levels {
        let first = 1 + level * (blocks + 1);
        for block in 0..blocks {
            let stage = format!("input_blocks.{}", first + block);
            places.insert(format!("{stage}.0"), format!("down_blocks.{level}.resnets.{block}"));
            places.insert(format!("{stage}.1"), format!("down_blocks.{level}.attentions.{block}"));
        }
        let sampler = format!("down_blocks.{level}.downsamplers.0{conv}");
        places.insert(format!("input_blocks.{}.0{down}", first + blocks), sampler);

        let from_bottom = levels - 1 - level;
        for block in 0..=blocks {
            let stage = format!("output_blocks.{}", from_bottom * (blocks + 1) + block);
            places.insert(format!("{stage}.0"), format!("up_blocks.{from_bottom}.resnets.{block}"));
            let attention = format!("up_blocks.{from_bottom}.attentions.{block}");
            let sampler = format!("up_blocks.{from_bottom}.upsamplers.0{conv}");
            if net.attends(level) {
                places.insert(format!("{stage}.1"), attention);
                places.insert(format!("{stage}.2{up}"), sampler);
            } else {
                places.insert(format!("{stage}.1{up}"), sampler);
            }
        }
    }
    places
}
