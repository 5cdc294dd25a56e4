//! Networks as plain data: what stands in a config file and in the head of a model file.

use cm_model::{Backbone, ParamsBuilder, TensorMap};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{DhariwalUnet, Error, OpenaiUnet, Result, SongUnet, openai_unet};

mod bounds;

use bounds::{Common, MAX_TAPS, even_channels, label_dropout, product, within};
pub(crate) use bounds::{MAX_BLOCKS, MAX_SIDE};

/// A network of one of the published architectures.
///
/// ```
/// use cm_net::NetSpec;
/// let text = r#"{"kind": "openai_unet", "image_size": 8, "image_channels": 3, "num_classes": 0,
///     "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
///     "attn_heads": {"head_channels": 32}, "dropout": 0.0, "scale_shift_norm": true,
///     "resblock_updown": true}"#;
/// let spec: NetSpec = serde_json::from_str(text).unwrap();
/// assert_eq!(spec.image_shape().height, 8);
/// assert!(serde_json::from_str::<NetSpec>(&text.replace("dropout", "drop_out")).is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NetSpec {
    /// DDPM++ or NCSN++.
    SongUnet(SongUnetSpec),
    /// ADM, in EDM's form.
    DhariwalUnet(DhariwalUnetSpec),
    /// ADM, in OpenAI's form.
    OpenaiUnet(OpenaiUnetSpec),
}

/// Options of [`SongUnet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SongUnetSpec {
    /// Rows and columns of the images.
    pub image_size: i64,
    /// Channels of the images.
    pub image_channels: i64,
    /// Classes that it is conditioned on; 0 for none.
    pub num_classes: i64,
    /// Parameters of the geometric augmentation that it is told; 0 for none.
    pub augment_dim: i64,
    /// Channels at the finest level, before `channel_mult`.
    pub model_channels: i64,
    /// Factor on the channels of each level, finest first; its length is the number of levels.
    pub channel_mult: Vec<i64>,
    /// Length of the embedding vector, as a multiple of `model_channels`.
    pub channel_mult_emb: i64,
    /// Residual blocks in each level of the encoder (the decoder has one more).
    pub num_blocks: i64,
    /// Resolutions whose blocks have attention.
    pub attn_resolutions: Vec<i64>,
    /// Probability of dropping a unit in each block, in training.
    pub dropout: f64,
    /// Probability of dropping the class of an image, in training.
    pub label_dropout: f64,
    /// How the noise level is embedded.
    pub embedding: NoiseEmbedding,
    /// Length of the noise embedding, as a multiple of `model_channels`: 1 in DDPM++, 2 in NCSN++.
    pub channel_mult_noise: i64,
    /// How the image enters the lower levels.
    pub encoder: Encoder,
    /// How the levels of the decoder contribute to the output.
    pub decoder: Decoder,
    /// Taps of the resampling filter: `[1, 1]` in DDPM++, `[1, 3, 3, 1]` in NCSN++.
    pub resample_filter: Vec<f64>,
}

/// How a [`SongUnet`] embeds the noise level.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NoiseEmbedding {
    /// Sines and cosines of fixed frequencies: DDPM++.
    Positional {},
    /// Random frequencies drawn once, N(0, scale²): NCSN++.
    Fourier {
        /// Standard deviation of the frequencies: 16 in EDM and the CIFAR-10 models of Consistency Models, 0.02
        /// in ECT.
        scale: f64,
    },
}

/// How the image enters the lower levels of a [`SongUnet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoder {
    /// Through the level above alone: DDPM++.
    Standard,
    /// Downsampled by a learned filter and averaged in, `(x + aux)/√2`: NCSN++.
    Residual,
    /// Downsampled and added; no published configuration has it, see [`crate::reference`].
    Skip,
}

/// How the levels of a [`SongUnet`]'s decoder contribute to the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decoder {
    /// The finest one makes the image.
    Standard,
    /// Each makes one and they are added; no published configuration has it, see [`crate::reference`].
    Skip,
}

/// Options of [`DhariwalUnet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DhariwalUnetSpec {
    /// Rows and columns of the images.
    pub image_size: i64,
    /// Channels of the images.
    pub image_channels: i64,
    /// Classes that it is conditioned on; 0 for none.
    pub num_classes: i64,
    /// Parameters of the geometric augmentation that it is told; 0 for none.
    pub augment_dim: i64,
    /// Channels at the finest level, before `channel_mult`.
    pub model_channels: i64,
    /// Factor on the channels of each level, finest first; its length is the number of levels.
    pub channel_mult: Vec<i64>,
    /// Length of the embedding vector, as a multiple of `model_channels`.
    pub channel_mult_emb: i64,
    /// Residual blocks in each level of the encoder (the decoder has one more).
    pub num_blocks: i64,
    /// Resolutions whose blocks have attention, one head for each 64 channels; as in the published network, a
    /// block with fewer than 64 channels has none.
    pub attn_resolutions: Vec<i64>,
    /// Probability of dropping a unit in each block, in training.
    pub dropout: f64,
    /// Probability of dropping the class of an image, in training.
    pub label_dropout: f64,
}

/// Options of [`OpenaiUnet`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenaiUnetSpec {
    /// Rows and columns of the images.
    pub image_size: i64,
    /// Channels of the images.
    pub image_channels: i64,
    /// Classes that it is conditioned on; 0 for none.
    pub num_classes: i64,
    /// Channels at the finest level, before `channel_mult`.
    pub model_channels: i64,
    /// Factor on the channels of each level, finest first; its length is the number of levels.
    pub channel_mult: Vec<i64>,
    /// Residual blocks in each level of the encoder (the decoder has one more).
    pub num_blocks: i64,
    /// Resolutions, in pixels, whose blocks have attention.
    pub attn_resolutions: Vec<i64>,
    /// How the channels are split into attention heads.
    pub attn_heads: AttnHeads,
    /// Probability of dropping a unit in each block, in training.
    pub dropout: f64,
    /// Whether the embedding gives scale and shift behind a normalisation, or is added in front of it.
    pub scale_shift_norm: bool,
    /// Whether residual blocks change the resolution, or convolutions do.
    pub resblock_updown: bool,
}

/// How an [`OpenaiUnet`] splits channels into attention heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttnHeads {
    /// This many channels in each head.
    HeadChannels(i64),
    /// This many heads.
    NumHeads(i64),
}

impl From<SongUnetSpec> for NetSpec {
    fn from(spec: SongUnetSpec) -> Self {
        NetSpec::SongUnet(spec)
    }
}

impl From<DhariwalUnetSpec> for NetSpec {
    fn from(spec: DhariwalUnetSpec) -> Self {
        NetSpec::DhariwalUnet(spec)
    }
}

impl From<OpenaiUnetSpec> for NetSpec {
    fn from(spec: OpenaiUnetSpec) -> Self {
        NetSpec::OpenaiUnet(spec)
    }
}

/// Builds a network whose weights start from `seed`.
///
/// # Errors
/// [`Error::Option`] for options that do not go together.
pub fn build(spec: &NetSpec, seed: u64, device: Device) -> Result<Box<dyn Backbone + Send>> {
    spec.build_with(ParamsBuilder::new(seed, device))
}

impl NetSpec {
    /// Builds the network with the start of its weights that `builder` stands for.
    ///
    /// # Errors
    /// [`Error::Option`] for options that do not go together.
    pub fn build_with(&self, builder: ParamsBuilder) -> Result<Box<dyn Backbone + Send>> {
        Ok(match self {
            NetSpec::SongUnet(spec) => Box::new(SongUnet::new(spec, builder)?),
            NetSpec::DhariwalUnet(spec) => Box::new(DhariwalUnet::new(spec, builder)?),
            NetSpec::OpenaiUnet(spec) => Box::new(OpenaiUnet::new(spec, builder)?),
        })
    }

    /// Checks that the options go together, at the cost of building the network without its weights.
    ///
    /// # Errors
    /// [`Error::Option`] with the first that does not.
    pub fn validate(&self) -> Result<()> {
        self.num_parameters().map(drop)
    }

    /// Number of trained scalars, counted without making them.
    ///
    /// # Errors
    /// [`Error::Option`] for options that do not go together.
    pub fn num_parameters(&self) -> Result<i64> {
        Ok(self.build_with(ParamsBuilder::shapes())?.params().num_parameters())
    }

    /// Shape of the images.
    #[must_use]
    pub fn image_shape(&self) -> cm_model::ImageShape {
        let (channels, size) = match self {
            NetSpec::SongUnet(spec) => (spec.image_channels, spec.image_size),
            NetSpec::DhariwalUnet(spec) => (spec.image_channels, spec.image_size),
            NetSpec::OpenaiUnet(spec) => (spec.image_channels, spec.image_size),
        };
        cm_model::ImageShape::square(channels, size)
    }

    /// Number of classes; 0 for an unconditional network.
    #[must_use]
    pub fn num_classes(&self) -> i64 {
        match self {
            NetSpec::SongUnet(spec) => spec.num_classes,
            NetSpec::DhariwalUnet(spec) => spec.num_classes,
            NetSpec::OpenaiUnet(spec) => spec.num_classes,
        }
    }

    /// Probability with which training hides the class, so that the network learns the answer without one; 0 for a
    /// network that always sees it.
    #[must_use]
    pub fn label_dropout(&self) -> f64 {
        match self {
            NetSpec::SongUnet(spec) => spec.label_dropout,
            NetSpec::DhariwalUnet(spec) => spec.label_dropout,
            NetSpec::OpenaiUnet(_) => 0.0,
        }
    }

    /// Number of augmentation parameters that the network is told; 0 for a network that takes none.
    #[must_use]
    pub fn augment_dim(&self) -> i64 {
        match self {
            NetSpec::SongUnet(spec) => spec.augment_dim,
            NetSpec::DhariwalUnet(spec) => spec.augment_dim,
            NetSpec::OpenaiUnet(_) => 0,
        }
    }

    /// Probability of dropping a unit, in training.
    #[must_use]
    pub fn dropout(&self) -> f64 {
        match self {
            NetSpec::SongUnet(spec) => spec.dropout,
            NetSpec::DhariwalUnet(spec) => spec.dropout,
            NetSpec::OpenaiUnet(spec) => spec.dropout,
        }
    }

    /// The names that this crate's parameters have, from those of the published files: EDM's files put `model.`
    /// in front (their network sits inside its preconditioning), OpenAI's files have the same names. Attention
    /// weights that a release stores for one-dimensional convolutions get their last axis.
    #[must_use]
    pub fn names_from_published(&self, tensors: TensorMap) -> TensorMap {
        let own = |(name, tensor): (String, tch::Tensor)| match self {
            NetSpec::SongUnet(_) | NetSpec::DhariwalUnet(_) => {
                (name.strip_prefix("model.").map(str::to_owned).unwrap_or(name), tensor)
            }
            NetSpec::OpenaiUnet(_) => {
                let tensor = openai_unet::widen_attention(&name, tensor);
                (name, tensor)
            }
        };
        tensors.into_iter().map(own).collect()
    }
}

impl SongUnetSpec {
    pub(crate) fn widths(&self) -> Vec<i64> {
        self.channel_mult.iter().map(|mult| mult * self.model_channels).collect()
    }

    pub(crate) fn noise_channels(&self) -> i64 {
        self.model_channels * self.channel_mult_noise
    }

    pub(crate) fn emb_channels(&self) -> i64 {
        self.model_channels * self.channel_mult_emb
    }

    pub(crate) fn validate(&self) -> Result<()> {
        Common {
            image_size: self.image_size,
            image_channels: self.image_channels,
            num_classes: self.num_classes,
            model_channels: self.model_channels,
            channel_mult: &self.channel_mult,
            num_blocks: self.num_blocks,
            attn_resolutions: &self.attn_resolutions,
            dropout: self.dropout,
        }
        .validate()?;
        within("augment_dim", self.augment_dim, 0, MAX_SIDE)?;
        product("channel_mult_emb", self.channel_mult_emb, self.model_channels)?;
        product("channel_mult_noise", self.channel_mult_noise, self.model_channels)?;
        label_dropout(self.label_dropout, self.num_classes)?;
        if self.noise_channels() < 4 || self.noise_channels() % 2 != 0 {
            let value = format!("… gives a noise embedding of {}", self.noise_channels());
            return Err(Error::option("model_channels", value, "an even length of at least 4"));
        }
        if let NoiseEmbedding::Fourier { scale } = self.embedding
            && !(scale.is_finite() && scale > 0.0)
        {
            return Err(Error::option("embedding.scale", scale, "a finite number above 0"));
        }
        let taps = &self.resample_filter;
        if taps.len() > MAX_TAPS {
            let value = format!("[…] of {} taps", taps.len());
            return Err(Error::option("resample_filter", value, format!("at most {MAX_TAPS} taps")));
        }
        let sum: f64 = taps.iter().sum();
        if taps.is_empty() || !taps.len().is_multiple_of(2) || !sum.is_finite() || sum == 0.0 {
            let expected = "an even number of taps whose sum is not 0, such as [1, 1] or [1, 3, 3, 1]";
            return Err(Error::option("resample_filter", format!("{taps:?}"), expected));
        }
        Ok(())
    }
}

impl DhariwalUnetSpec {
    pub(crate) fn widths(&self) -> Vec<i64> {
        self.channel_mult.iter().map(|mult| mult * self.model_channels).collect()
    }

    pub(crate) fn emb_channels(&self) -> i64 {
        self.model_channels * self.channel_mult_emb
    }

    pub(crate) fn validate(&self) -> Result<()> {
        Common {
            image_size: self.image_size,
            image_channels: self.image_channels,
            num_classes: self.num_classes,
            model_channels: self.model_channels,
            channel_mult: &self.channel_mult,
            num_blocks: self.num_blocks,
            attn_resolutions: &self.attn_resolutions,
            dropout: self.dropout,
        }
        .validate()?;
        within("augment_dim", self.augment_dim, 0, MAX_SIDE)?;
        product("channel_mult_emb", self.channel_mult_emb, self.model_channels)?;
        label_dropout(self.label_dropout, self.num_classes)?;
        even_channels(self.model_channels)
    }
}

impl OpenaiUnetSpec {
    pub(crate) fn widths(&self) -> Vec<i64> {
        self.channel_mult.iter().map(|mult| mult * self.model_channels).collect()
    }

    pub(crate) fn emb_channels(&self) -> i64 {
        4 * self.model_channels
    }

    pub(crate) fn attends(&self, level: usize) -> bool {
        let side = self.image_size.checked_shr(level as u32);
        side.is_some_and(|side| self.attn_resolutions.contains(&side))
    }

    pub(crate) fn heads(&self, channels: i64) -> i64 {
        match self.attn_heads {
            // Channels that a head does not divide give 0, which the attention layer refuses.
            AttnHeads::HeadChannels(each) if channels % each == 0 => channels / each,
            AttnHeads::HeadChannels(_) => 0,
            AttnHeads::NumHeads(heads) => heads,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        Common {
            image_size: self.image_size,
            image_channels: self.image_channels,
            num_classes: self.num_classes,
            model_channels: self.model_channels,
            channel_mult: &self.channel_mult,
            num_blocks: self.num_blocks,
            attn_resolutions: &self.attn_resolutions,
            dropout: self.dropout,
        }
        .validate()?;
        match self.attn_heads {
            AttnHeads::HeadChannels(each) => within("attn_heads.head_channels", each, 1, MAX_SIDE)?,
            AttnHeads::NumHeads(heads) => within("attn_heads.num_heads", heads, 1, MAX_SIDE)?,
        }
        even_channels(self.model_channels)
    }
}
