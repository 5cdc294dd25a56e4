//! What names and shapes of a state dict say about its network.

use std::collections::BTreeMap;
use std::fmt;

use cm_model::TensorMap;
use serde_json::Value;

use super::kind::{Kind, Unknowns};
use super::pickle::Result;
use crate::spec::{MAX_SIDE, OpenaiUnetSpec};
use crate::{AttnHeads, NetSpec, NoiseEmbedding, SongUnetSpec};

mod edm;
mod openai;

/// Names and shapes.
pub(super) type Shapes = BTreeMap<String, Vec<i64>>;

/// A network as far as its weights describe it.
///
/// Dropout is not in the weights, and is 0 here; nor are the size of attention heads and the image size of OpenAI's
/// network, nor the scale that random frequencies were drawn with.
#[derive(Debug, Clone, PartialEq)]
pub enum Architecture {
    /// OpenAI's U-Net.
    Openai(OpenaiParts),
    /// One of EDM's, whose names hold the resolutions.
    Edm(NetSpec),
}

/// What the weights of OpenAI's U-Net say; the fields are those of [`OpenaiUnetSpec`].
#[derive(Debug, Clone, PartialEq)]
pub struct OpenaiParts {
    /// Channels of the images.
    pub image_channels: i64,
    /// Classes; 0 for none.
    pub num_classes: i64,
    /// Channels at the finest level, before `channel_mult`.
    pub model_channels: i64,
    /// Factor on the channels of each level, finest first.
    pub channel_mult: Vec<i64>,
    /// Residual blocks in each level of the encoder.
    pub num_blocks: i64,
    /// Levels whose blocks have attention: level l has 1/2^l of the image's size.
    pub attn_levels: Vec<usize>,
    /// Whether the embedding gives scale and shift.
    pub scale_shift_norm: bool,
    /// Whether residual blocks change the resolution; false also where nothing does.
    pub resblock_updown: bool,
}

impl Architecture {
    /// The architecture of a state dict, in the published names or ours.
    ///
    /// # Errors
    /// [`crate::Error::Import`] without a file's name, if the names are not those of a network of this crate or do
    /// not go together.
    pub fn of(tensors: &TensorMap) -> crate::Result<Self> {
        let found = match family(tensors.keys().map(String::as_str)) {
            Some(Family::Openai) => openai_of(&shapes(tensors)),
            Some(Family::Edm) => edm_of(tensors),
            Some(Family::Diffusers) | None => {
                Err("the names are not those of OpenAI's or EDM's networks".into())
            }
        };
        found.map_err(|problem| super::problem(std::path::Path::new("state dict"), problem))
    }

    /// As much of a known network as its weights would say.
    #[must_use]
    pub fn of_net(net: &NetSpec) -> Self {
        match net {
            NetSpec::OpenaiUnet(net) => Self::Openai(OpenaiParts {
                image_channels: net.image_channels,
                num_classes: net.num_classes,
                model_channels: net.model_channels,
                channel_mult: net.channel_mult.clone(),
                num_blocks: net.num_blocks,
                attn_levels: (0..net.channel_mult.len()).filter(|level| net.attends(*level)).collect(),
                scale_shift_norm: net.scale_shift_norm,
                resblock_updown: net.resblock_updown,
            }),
            NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_) => Self::Edm(net.clone()),
        }
    }

    /// What differs between these weights and `net`, apart from what the weights do not say; empty if they fit.
    #[must_use]
    pub fn differences(&self, net: &NetSpec) -> Vec<String> {
        let ours = match (self, net) {
            (Self::Openai(parts), NetSpec::OpenaiUnet(net)) => {
                parts.spec(net.image_size, net.attn_heads).into()
            }
            (Self::Edm(ours), _) if family_of(net) == Family::Edm => ours.clone(),
            _ => return vec![format!("the weights are of {self}, expected {}", kind_of(net))],
        };
        let (Ok(Value::Object(ours)), Ok(Value::Object(theirs))) =
            (serde_json::to_value(comparable(&ours)), serde_json::to_value(comparable(net)))
        else {
            return vec!["the descriptions cannot be compared".into()];
        };
        if ours.get("kind") != theirs.get("kind") {
            return vec![format!("the weights are of {self}, expected {}", kind_of(net))];
        }
        let differing = theirs.iter().filter(|(key, theirs)| ours.get(*key) != Some(theirs));
        differing
            .map(|(key, theirs)| {
                format!("{key} {}, expected {theirs}", ours.get(key).unwrap_or(&Value::Null))
            })
            .collect()
    }

    /// Whether weights like these can be of that kind.
    #[must_use]
    pub fn fits(&self, kind: &Kind) -> bool {
        match (&kind.net, self, &kind.unknowns) {
            (Some(net), ..) => self.differences(net).is_empty(),
            (None, Self::Openai(_), Unknowns::Openai { .. }) => true,
            (None, Self::Edm(_), Unknowns::Edm { .. }) => true,
            (None, ..) => false,
        }
    }

    /// The whole network, with what `kind` adds.
    pub(super) fn spec(&self, kind: &Kind) -> Result<NetSpec> {
        if let Some(net) = &kind.net {
            let differences = self.differences(net);
            return match differences.is_empty() {
                true => Ok(net.clone()),
                false => Err(format!("it is not {kind}: {}", differences.join("; "))),
            };
        }
        match (self, kind.unknowns) {
            (Self::Openai(parts), Unknowns::Openai { image_size, heads }) => {
                Ok(parts.spec(image_size, heads).into())
            }
            (Self::Edm(net), Unknowns::Edm { fourier_scale }) => match net {
                NetSpec::SongUnet(SongUnetSpec { embedding: NoiseEmbedding::Fourier { .. }, .. }) => {
                    Ok(edm::with_scale(net, fourier_scale))
                }
                _ if kind.scale_given => Err(format!(
                    "{self} has no random frequencies, so no fourier_scale; leave it out of {kind}"
                )),
                _ => Ok(net.clone()),
            },
            _ => Err(format!("it is {self}, which {kind} is not")),
        }
    }
}

impl OpenaiParts {
    /// The network for images of `image_size` pixels with such heads.
    #[must_use]
    pub fn spec(&self, image_size: i64, attn_heads: AttnHeads) -> OpenaiUnetSpec {
        OpenaiUnetSpec {
            image_size,
            image_channels: self.image_channels,
            num_classes: self.num_classes,
            model_channels: self.model_channels,
            channel_mult: self.channel_mult.clone(),
            num_blocks: self.num_blocks,
            attn_resolutions: self.attn_levels.iter().map(|level| image_size >> level).collect(),
            attn_heads,
            dropout: 0.0,
            scale_shift_norm: self.scale_shift_norm,
            resblock_updown: self.resblock_updown,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = match self {
            Self::Openai(parts) => parts,
            Self::Edm(net) => {
                let (shape, classes) = (net.image_shape(), net.num_classes());
                return write!(f, "{} for {shape} with {classes} classes", kind_of(net));
            }
        };
        let fractions = parts.attn_levels.iter().map(|level| format!("1/{}", 1u64 << level));
        let attention = fractions.collect::<Vec<_>>().join(", ");
        write!(
            f,
            "OpenAI's U-Net ({} channels × {:?}, {} {} a level, attention at {} of the image, {} classes, {}, {})",
            parts.model_channels,
            parts.channel_mult,
            parts.num_blocks,
            if parts.num_blocks == 1 { "block" } else { "blocks" },
            if attention.is_empty() { "no level" } else { &attention },
            parts.num_classes,
            if parts.scale_shift_norm { "scale-shift norm" } else { "no scale-shift norm" },
            if parts.resblock_updown { "resampling blocks" } else { "resampling convolutions" },
        )
    }
}

/// Whose names a state dict has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    Openai,
    Edm,
    Diffusers,
}

pub(super) fn family<'a>(names: impl Iterator<Item = &'a str>) -> Option<Family> {
    for name in names {
        let family = match name {
            _ if name.starts_with("input_blocks.") || name.starts_with("time_embed.") => Family::Openai,
            _ if name.starts_with("down_blocks.") || name.starts_with("time_embedding.") => Family::Diffusers,
            "map_layer0.weight" | "model.map_layer0.weight" => Family::Edm,
            _ if name.starts_with("enc.") || name.starts_with("model.enc.") => Family::Edm,
            _ => continue,
        };
        return Some(family);
    }
    None
}

pub(super) use edm::of as edm_of;
pub(super) use openai::of as openai_of;

fn family_of(net: &NetSpec) -> Family {
    match net {
        NetSpec::OpenaiUnet(_) => Family::Openai,
        NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_) => Family::Edm,
    }
}

fn kind_of(net: &NetSpec) -> &'static str {
    match net {
        NetSpec::OpenaiUnet(_) => "OpenAI's U-Net",
        NetSpec::SongUnet(_) => "EDM's SongUNet",
        NetSpec::DhariwalUnet(_) => "EDM's DhariwalUNet",
    }
}

pub(super) fn shapes(tensors: &TensorMap) -> Shapes {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect()
}

/// The network without what weights do not say, and in one spelling where there are several.
fn comparable(net: &NetSpec) -> NetSpec {
    let sorted = |resolutions: &mut Vec<i64>| {
        resolutions.sort_unstable_by(|a, b| b.cmp(a));
        resolutions.dedup();
    };
    let mut net = net.clone();
    match &mut net {
        NetSpec::OpenaiUnet(net) => {
            net.dropout = 0.0;
            net.resblock_updown &= net.channel_mult.len() > 1;
            sorted(&mut net.attn_resolutions);
        }
        NetSpec::DhariwalUnet(net) => {
            (net.dropout, net.label_dropout) = (0.0, 0.0);
            // Blocks with fewer channels than one head has have no attention, listed or not.
            let (size, widths) = (net.image_size, net.widths());
            let attends = |r: &i64| {
                widths.iter().enumerate().any(|(level, width)| size >> level == *r && *width >= edm::HEAD)
            };
            net.attn_resolutions.retain(attends);
            sorted(&mut net.attn_resolutions);
        }
        NetSpec::SongUnet(net) => edm::comparable(net, sorted),
    }
    net
}

/// Shapes with errors that name the tensor.
struct Lookup<'a>(&'a Shapes);

impl Lookup<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The length of an axis of a tensor of that many axes.
    fn side(&self, name: &str, axes: usize, axis: usize) -> Result<i64> {
        let shape = self.0.get(name).ok_or_else(|| format!("'{name}' is missing"))?;
        match shape.get(axis) {
            Some(&side) if shape.len() == axes && (1..=MAX_SIDE).contains(&side) => Ok(side),
            _ => Err(format!("'{name}' has shape {shape:?}, expected {axes} axes of 1 to {MAX_SIDE}")),
        }
    }

    /// How many of the names that `name` gives for 0, 1, … are there.
    fn count(&self, name: impl Fn(i64) -> String) -> i64 {
        (0..).take_while(|&index| self.has(&name(index))).count() as i64
    }
}

/// The factors of `widths` over `model_channels`.
fn multipliers(model_channels: i64, widths: &[i64]) -> Result<Vec<i64>> {
    let factor = |width: &i64| match width % model_channels {
        0 => Ok(width / model_channels),
        _ => Err(format!("a level has {width} channels, expected a multiple of {model_channels}")),
    };
    widths.iter().map(factor).collect()
}
