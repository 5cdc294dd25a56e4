//! Networks from the configurations that the references were built with.

use cm_model::{Backbone, Cast, Cond, ImageShape, Params, ParamsBuilder, TensorMap};
use cm_net::import::Architecture;
use cm_net::reference::LearnedVariance;
use cm_net::{
    AttnHeads, Decoder, DhariwalUnet, DhariwalUnetSpec, Encoder, NetSpec, NoiseEmbedding, OpenaiUnet,
    OpenaiUnetSpec, Probe, SongUnet, SongUnetSpec,
};
use cm_schedule::reference::{Iddpm, Ve, Vp};
use cm_schedule::{Boundary, Edm, Precond, Scalings};
use serde::Deserialize;
use tch::{Device, Tensor};

use crate::golden::{Golden, Problem, Result, problem};

/// Any of the networks, with a look at its blocks.
#[derive(Debug)]
pub enum Net {
    /// DDPM++ or NCSN++.
    Song(SongUnet),
    /// ADM in EDM's form.
    Adm(DhariwalUnet),
    /// The same with predicted variances.
    LearnedVariance(LearnedVariance),
    /// ADM in OpenAI's form.
    Openai(OpenaiUnet),
}

impl Net {
    /// All outputs of the network, with the blocks shown to `probe`.
    ///
    /// # Errors
    /// [`Problem`] if the inputs do not fit.
    pub fn raw(
        &self,
        x: &Tensor,
        c_noise: &Tensor,
        cond: &Cond,
        train: bool,
        probe: Probe<'_>,
    ) -> Result<Tensor> {
        Ok(match self {
            Net::Song(net) => net.forward_probed(x, c_noise, cond, train, probe)?,
            Net::Adm(net) => net.forward_probed(x, c_noise, cond, train, probe)?,
            Net::LearnedVariance(net) => net.inner().forward_probed(x, c_noise, cond, train, probe)?,
            Net::Openai(net) => net.forward_probed(x, c_noise, cond, train, probe)?,
        })
    }

    /// The embedding that the blocks read.
    ///
    /// # Errors
    /// [`Problem`] if the condition does not fit.
    pub fn embed(&self, c_noise: &Tensor, cond: &Cond, train: bool) -> Result<Tensor> {
        Ok(match self {
            Net::Song(net) => net.embed(c_noise, cond, train)?,
            Net::Adm(net) => net.embed(c_noise, cond, train)?,
            Net::LearnedVariance(net) => net.inner().embed(c_noise, cond, train)?,
            Net::Openai(net) => net.embed(c_noise, cond)?,
        })
    }

    fn backbone(&self) -> &dyn Backbone {
        match self {
            Net::Song(net) => net,
            Net::Adm(net) => net,
            Net::LearnedVariance(net) => net,
            Net::Openai(net) => net,
        }
    }

    /// Loads the weights of a golden file, strictly.
    fn load(self, spec: &NetSpec, state: TensorMap) -> Result<Self> {
        // What an import reads off the weights must be what the file says of them.
        let found = Architecture::of(&state);
        if !matches!(self, Net::LearnedVariance(_)) {
            let differences = found?.differences(spec);
            if !differences.is_empty() {
                return problem(format!("the weights look otherwise: {}", differences.join("; ")));
            }
        } else if found.is_ok() {
            return problem("the weights do not look like those of a network that predicts variances");
        }
        self.params().load(&spec.names_from_published(state), Cast::Never)?;
        Ok(self)
    }
}

impl Backbone for Net {
    fn shape(&self) -> ImageShape {
        self.backbone().shape()
    }
    fn num_classes(&self) -> i64 {
        self.backbone().num_classes()
    }
    fn params(&self) -> &Params {
        self.backbone().params()
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> cm_model::Result<Tensor> {
        self.backbone().forward(x, c_noise, cond, train)
    }
}

/// Any of the preconditionings, known at run time alone.
#[derive(Debug)]
pub enum AnyPrecond {
    /// EDM.
    Edm(Edm),
    /// A consistency function's.
    Boundary(Boundary),
    /// Variance-preserving.
    Vp(Vp),
    /// Variance-exploding.
    Ve(Ve),
    /// Improved DDPM's table of levels.
    Iddpm(Iddpm),
}

impl Precond for AnyPrecond {
    fn scalings(&self, sigma: f64) -> Scalings {
        match self {
            AnyPrecond::Edm(p) => p.scalings(sigma),
            AnyPrecond::Boundary(p) => p.scalings(sigma),
            AnyPrecond::Vp(p) => p.scalings(sigma),
            AnyPrecond::Ve(p) => p.scalings(sigma),
            AnyPrecond::Iddpm(p) => p.scalings(sigma),
        }
    }
}

/// Arguments of EDM's networks; what is left out has the default of the reference's constructors.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EdmConfig {
    img_resolution: i64,
    img_channels: i64,
    #[serde(default)]
    label_dim: i64,
    #[serde(default)]
    augment_dim: i64,
    model_type: String,
    model_channels: Option<i64>,
    channel_mult: Option<Vec<i64>>,
    channel_mult_emb: Option<i64>,
    num_blocks: Option<i64>,
    attn_resolutions: Option<Vec<i64>>,
    /// Probability of dropping a unit.
    #[serde(default = "default_dropout")]
    pub dropout: f64,
    #[serde(default)]
    label_dropout: f64,
    embedding_type: Option<String>,
    encoder_type: Option<String>,
    decoder_type: Option<String>,
    channel_mult_noise: Option<i64>,
    resample_filter: Option<Vec<f64>>,
}

fn default_dropout() -> f64 {
    0.1
}

/// The resolutions among `places` that one of the levels has: the references pass over any other.
fn present(places: &[i64], image_size: i64, levels: usize) -> Vec<i64> {
    let has = |place: &&i64| (0..levels as u32).any(|level| image_size >> level == **place);
    places.iter().filter(has).copied().collect()
}

impl EdmConfig {
    /// Where its blocks have attention; `usual` and so many levels where it does not say.
    fn attention(&self, usual: &[i64], levels: usize) -> Vec<i64> {
        let levels = self.channel_mult.as_ref().map_or(levels, Vec::len);
        present(self.attn_resolutions.as_deref().unwrap_or(usual), self.img_resolution, levels)
    }

    fn song(&self, ect: bool) -> Result<SongUnetSpec> {
        let word = |option: &Option<String>, default: &str| option.clone().unwrap_or_else(|| default.into());
        Ok(SongUnetSpec {
            image_size: self.img_resolution,
            image_channels: self.img_channels,
            num_classes: self.label_dim,
            augment_dim: self.augment_dim,
            model_channels: self.model_channels.unwrap_or(128),
            channel_mult: self.channel_mult.clone().unwrap_or_else(|| vec![1, 2, 2, 2]),
            channel_mult_emb: self.channel_mult_emb.unwrap_or(4),
            num_blocks: self.num_blocks.unwrap_or(4),
            attn_resolutions: self.attention(&[16], 4),
            dropout: self.dropout,
            label_dropout: self.label_dropout,
            embedding: match word(&self.embedding_type, "positional").as_str() {
                "positional" => NoiseEmbedding::Positional {},
                "fourier" => NoiseEmbedding::Fourier { scale: if ect { 0.02 } else { 16.0 } },
                other => return problem(format!("embedding_type '{other}' is not known here")),
            },
            channel_mult_noise: self.channel_mult_noise.unwrap_or(1),
            encoder: match word(&self.encoder_type, "standard").as_str() {
                "standard" => Encoder::Standard,
                "residual" => Encoder::Residual,
                "skip" => Encoder::Skip,
                other => return problem(format!("encoder_type '{other}' is not known here")),
            },
            decoder: match word(&self.decoder_type, "standard").as_str() {
                "standard" => Decoder::Standard,
                "skip" => Decoder::Skip,
                other => return problem(format!("decoder_type '{other}' is not known here")),
            },
            resample_filter: self.resample_filter.clone().unwrap_or_else(|| vec![1.0, 1.0]),
        })
    }

    fn adm(&self) -> DhariwalUnetSpec {
        DhariwalUnetSpec {
            image_size: self.img_resolution,
            image_channels: self.img_channels,
            num_classes: self.label_dim,
            augment_dim: self.augment_dim,
            model_channels: self.model_channels.unwrap_or(192),
            channel_mult: self.channel_mult.clone().unwrap_or_else(|| vec![1, 2, 3, 4]),
            channel_mult_emb: self.channel_mult_emb.unwrap_or(4),
            num_blocks: self.num_blocks.unwrap_or(3),
            attn_resolutions: self.attention(&[32, 16, 8], 4),
            dropout: self.dropout,
            label_dropout: self.label_dropout,
        }
    }
}

/// The network of an EDM or ECT file with the weights `state`, of which the network's begin with `model.`;
/// `variances` for twice the outputs.
///
/// # Errors
/// [`Problem`] for options that are not known here, and for weights that do not fit.
pub fn edm_network(golden: &Golden, config: &EdmConfig, state: TensorMap, variances: bool) -> Result<Net> {
    let builder = ParamsBuilder::unset(Device::Cpu);
    match config.model_type.as_str() {
        "SongUNet" if !variances => {
            let spec = config.song(golden.meta_text("module") == Some("ect"))?;
            Net::Song(SongUnet::new(&spec, builder)?).load(&NetSpec::SongUnet(spec), state)
        }
        "DhariwalUNet" => {
            let spec = config.adm();
            let net = match variances {
                true => Net::LearnedVariance(LearnedVariance::new(&spec, builder)?),
                false => Net::Adm(DhariwalUnet::new(&spec, builder)?),
            };
            net.load(&NetSpec::DhariwalUnet(spec), state)
        }
        other => {
            problem(format!("model_type '{other}' is not known here (with predicted variances: {variances})"))
        }
    }
}

/// Arguments of OpenAI's `create_model`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OpenaiConfig {
    image_size: i64,
    num_channels: i64,
    num_res_blocks: i64,
    channel_mult: String,
    learn_sigma: bool,
    class_cond: bool,
    #[serde(rename = "use_checkpoint")]
    _use_checkpoint: bool,
    attention_resolutions: String,
    num_heads: i64,
    num_head_channels: i64,
    num_heads_upsample: i64,
    use_scale_shift_norm: bool,
    dropout: f64,
    resblock_updown: bool,
    use_fp16: bool,
    #[serde(rename = "use_new_attention_order")]
    _use_new_attention_order: bool,
}

/// The network of an OpenAI file with its weights.
///
/// # Errors
/// [`Problem`] for options that are not known here, and for weights that do not fit.
pub fn openai_network(golden: &Golden) -> Result<Net> {
    let config: OpenaiConfig = golden.meta_json("config")?;
    if config.learn_sigma || config.use_fp16 || config.num_heads_upsample != -1 {
        return problem("learn_sigma, use_fp16 and num_heads_upsample are not known here");
    }
    let channel_mult = integers(&config.channel_mult)?;
    let spec = OpenaiUnetSpec {
        image_size: config.image_size,
        image_channels: 3,
        num_classes: if config.class_cond { golden.meta("num_classes")? } else { 0 },
        model_channels: config.num_channels,
        channel_mult: channel_mult.clone(),
        num_blocks: config.num_res_blocks,
        attn_resolutions: present(
            &integers(&config.attention_resolutions)?,
            config.image_size,
            channel_mult.len(),
        ),
        attn_heads: match config.num_head_channels {
            -1 => AttnHeads::NumHeads(config.num_heads),
            channels => AttnHeads::HeadChannels(channels),
        },
        dropout: config.dropout,
        scale_shift_norm: config.use_scale_shift_norm,
        resblock_updown: config.resblock_updown,
    };
    let net = Net::Openai(OpenaiUnet::new(&spec, ParamsBuilder::unset(Device::Cpu))?);
    net.load(&NetSpec::OpenaiUnet(spec), golden.state())
}

fn integers(text: &str) -> Result<Vec<i64>> {
    let parse = |part: &str| part.parse().map_err(|_| Problem(format!("'{text}': expected integers")));
    text.split(',').map(parse).collect()
}
