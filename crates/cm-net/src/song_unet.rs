use cm_model::{Backbone, Cond, ImageShape, ParamPath, Params, ParamsBuilder};
use tch::{Device, Tensor};

use crate::body::{Aux, Body, Output, Place, Plan, resolution_name};
use crate::embedding::{self, Frequencies};
use crate::layers::{Conv2d, FusedDown, GroupNorm, LayerInit, Linear};
use crate::reference::{SkipDecoder, SkipEncoder};
use crate::spec::{Decoder, Encoder, NoiseEmbedding, SongUnetSpec};
use crate::unet_block::{BlockInit, BlockSpec};
use crate::{Probe, Result};

const EPS: f64 = 1e-6;

/// DDPM++ and NCSN++ (Song et al. 2021) in the form of EDM's `SongUNet`.
///
/// Parameters have the names of the published files, without the leading `model.` that the preconditioning
/// wrapper gives them there.
///
/// # Source
/// Karras et al. 2022, appendix F.1 and table 7.
#[derive(Debug)]
pub struct SongUnet {
    spec: SongUnetSpec,
    params: Params,
    mapping: Mapping,
    body: Body,
}

/// From noise level, class and augmentation to the vector that every block reads.
#[derive(Debug)]
struct Mapping {
    frequencies: Tensor,
    label: Option<Linear>,
    augment: Option<Linear>,
    layer0: Linear,
    layer1: Linear,
}

impl SongUnet {
    /// Builds the network with the start of its weights that `builder` stands for.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for options that do not go together.
    pub fn new(spec: &SongUnetSpec, builder: ParamsBuilder) -> Result<Self> {
        spec.validate()?;
        let (mapping, body) = {
            let root = builder.root();
            let mut body = Body::new(&root, &plan(spec))?;
            add_encoder_inputs(&mut body, &root.sub("enc"), spec)?;
            add_outputs(&mut body, &root.sub("dec"), spec)?;
            (Mapping::new(&root, spec)?, body)
        };
        Ok(Self { spec: spec.clone(), params: builder.finish(), mapping, body })
    }

    /// The embedding that the blocks read, `[B, model_channels·channel_mult_emb]` float32. `train` turns label
    /// dropout on.
    ///
    /// # Errors
    /// [`cm_model::Error`] for a condition that does not fit the network.
    pub fn embed(&self, c_noise: &Tensor, cond: &Cond, train: bool) -> cm_model::Result<Tensor> {
        self.mapping.forward(&self.spec, c_noise, cond, train)
    }

    /// [`Backbone::forward`] that also shows the output of every block to `probe`, under the block's name
    /// (`enc.16x16_block0`).
    ///
    /// # Errors
    /// As [`Backbone::forward`].
    pub fn forward_probed(
        &self,
        x: &Tensor,
        c_noise: &Tensor,
        cond: &Cond,
        train: bool,
        probe: Probe<'_>,
    ) -> cm_model::Result<Tensor> {
        let batch = self.shape().check("network input", x)?;
        embedding::check_noise_labels(c_noise, batch)?;
        let emb = self.embed(c_noise, cond, train)?;
        let (bottom, skips) = self.body.encode(x, &emb, train, probe);
        let (_, image) = self.body.decode(bottom, skips, &emb, train, probe);
        Ok(image.expect("the finest level has an output"))
    }
}

impl Backbone for SongUnet {
    fn shape(&self) -> ImageShape {
        ImageShape::square(self.spec.image_channels, self.spec.image_size)
    }
    fn num_classes(&self) -> i64 {
        self.spec.num_classes
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> cm_model::Result<Tensor> {
        self.forward_probed(x, c_noise, cond, train, &mut |_, _| {})
    }
}

fn plan(spec: &SongUnetSpec) -> Plan<'_> {
    let heads = |place: Place, resolution: i64| {
        let listed = spec.attn_resolutions.contains(&resolution);
        let attends = match place {
            Place::Encoder => listed,
            Place::Bottom => true,
            Place::Decoder { last } => last && listed,
        };
        i64::from(attends)
    };
    Plan {
        image_size: spec.image_size,
        image_channels: spec.image_channels,
        stem: spec.model_channels,
        widths: spec.widths(),
        num_blocks: spec.num_blocks,
        heads: Box::new(move |place, resolution, _| heads(place, resolution)),
        block: BlockSpec {
            in_channels: 0,
            out_channels: 0,
            emb_channels: spec.emb_channels(),
            resample: None,
            heads: 0,
            dropout: spec.dropout,
            skip_scale: 0.5f64.sqrt(),
            eps: EPS,
            resample_filter: spec.resample_filter.clone(),
            resample_proj: true,
            adaptive_scale: false,
            init: BlockInit::Song,
        },
    }
}

fn add_encoder_inputs(body: &mut Body, path: &ParamPath<'_>, spec: &SongUnetSpec) -> Result<()> {
    let (taps, init) = (&spec.resample_filter, BlockInit::Song.layer());
    // What comes from above: the image, in the residual form merged with the features of the level above.
    let mut above = spec.image_channels;
    let widths = spec.widths();
    for (level, into) in body.encoder.iter_mut().enumerate().skip(1) {
        let (resolution, here) = (resolution_name(spec.image_size, level), widths[level - 1]);
        into.aux = match spec.encoder {
            Encoder::Standard => Aux::None,
            Encoder::Residual => {
                let path = path.sub(format!("{resolution}_aux_residual"));
                Aux::Residual(FusedDown::new(&path, above, here, taps, init)?)
            }
            Encoder::Skip => {
                Aux::Skip(SkipEncoder::new(path, &resolution, spec.image_channels, here, taps, init)?)
            }
        };
        above = here;
    }
    Ok(())
}

fn add_outputs(body: &mut Body, path: &ParamPath<'_>, spec: &SongUnetSpec) -> Result<()> {
    let levels = body.decoder.len();
    for (from_bottom, decoder) in body.decoder.iter_mut().enumerate() {
        let level = levels - 1 - from_bottom;
        let skip_form = spec.decoder == Decoder::Skip;
        if level > 0 && !skip_form {
            continue;
        }
        let resolution = resolution_name(spec.image_size, level);
        let up = || SkipDecoder::new(path, &resolution, &spec.resample_filter);
        let named = |suffix: &str| path.sub(format!("{resolution}_{suffix}"));
        let channels = spec.widths()[level];
        let last = BlockInit::Song.last();
        decoder.output = Some(Output {
            up: (skip_form && from_bottom > 0).then(up).transpose()?,
            norm: GroupNorm::at_least_four_each(&named("aux_norm"), channels, EPS)?,
            conv: Conv2d::new(&named("aux_conv"), channels, spec.image_channels, 3, last)?,
        });
    }
    Ok(())
}

impl Mapping {
    fn new(root: &ParamPath<'_>, spec: &SongUnetSpec) -> Result<Self> {
        let (noise, emb) = (spec.noise_channels(), spec.emb_channels());
        let init = LayerInit::Xavier { gain: 1.0 };
        let frequencies = match spec.embedding {
            NoiseEmbedding::Positional {} => Frequencies::Closed.tensor(noise / 2, root.device()),
            NoiseEmbedding::Fourier { scale } => {
                root.sub("map_noise").normal_buffer("freqs", &[noise / 2], scale)?
            }
        };
        let label = || Linear::new(&root.sub("map_label"), spec.num_classes, noise, init);
        let augment = || Linear::without_bias(&root.sub("map_augment"), spec.augment_dim, noise, init);
        Ok(Self {
            frequencies,
            label: (spec.num_classes > 0).then(label).transpose()?,
            augment: (spec.augment_dim > 0).then(augment).transpose()?,
            layer0: Linear::new(&root.sub("map_layer0"), noise, emb, init)?,
            layer1: Linear::new(&root.sub("map_layer1"), emb, emb, init)?,
        })
    }

    fn forward(
        &self,
        spec: &SongUnetSpec,
        c_noise: &Tensor,
        cond: &Cond,
        train: bool,
    ) -> cm_model::Result<Tensor> {
        let (batch, device): (i64, Device) = (c_noise.size()[0], c_noise.device());
        let angles = match spec.embedding {
            NoiseEmbedding::Positional {} => embedding::angles(c_noise, &self.frequencies),
            NoiseEmbedding::Fourier { .. } => embedding::fourier_angles(c_noise, &self.frequencies),
        };
        let mut emb = embedding::sines_first(&angles);
        match &self.label {
            Some(map) => {
                let dropout = if train { spec.label_dropout } else { 0.0 };
                let rows = embedding::class_rows(cond, batch, spec.num_classes, dropout, device)?;
                emb += map.forward_f32(&(rows * (spec.num_classes as f64).sqrt()));
            }
            None => embedding::refuse_labels(cond)?,
        }
        let emb = embedding::add_augment(emb, cond, batch, spec.augment_dim, self.augment.as_ref())?;
        let emb = self.layer0.forward_f32(&emb).silu();
        Ok(self.layer1.forward_f32(&emb).silu())
    }
}
