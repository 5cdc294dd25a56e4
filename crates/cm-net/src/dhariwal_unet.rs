use cm_model::{Backbone, Cond, ImageShape, ParamPath, Params, ParamsBuilder};
use tch::Tensor;

use crate::body::{Body, Place, Plan};
use crate::embedding::{self, Frequencies};
use crate::layers::{Conv2d, GroupNorm, LayerInit, Linear};
use crate::spec::DhariwalUnetSpec;
use crate::unet_block::{BlockInit, BlockSpec};
use crate::{Probe, Result};

const EPS: f64 = 1e-5;
/// Attention has one head for each 64 channels, and a block with fewer channels has no attention.
const HEAD_CHANNELS: i64 = 64;

/// The ADM U-Net (Dhariwal and Nichol 2021) in the form of EDM's `DhariwalUNet`.
///
/// Parameters have the names of the published files, without the leading `model.` that the preconditioning
/// wrapper gives them there. It computes the same function as [`crate::OpenaiUnet`] with scale-shift norm and
/// resampling blocks, under other names and with another order of qkv channels.
///
/// # Source
/// Karras et al. 2022, appendix F.2 and table 7.
#[derive(Debug)]
pub struct DhariwalUnet {
    spec: DhariwalUnetSpec,
    params: Params,
    mapping: Mapping,
    body: Body,
    out_norm: GroupNorm,
    out_conv: Conv2d,
}

#[derive(Debug)]
struct Mapping {
    frequencies: Tensor,
    augment: Option<Linear>,
    layer0: Linear,
    layer1: Linear,
    label: Option<Linear>,
}

impl DhariwalUnet {
    /// Builds the network with the start of its weights that `builder` stands for.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for options that do not go together.
    pub fn new(spec: &DhariwalUnetSpec, builder: ParamsBuilder) -> Result<Self> {
        Self::with_outputs(spec, spec.image_channels, builder)
    }

    /// The same network with `outputs` channels at its end.
    pub(crate) fn with_outputs(
        spec: &DhariwalUnetSpec,
        outputs: i64,
        builder: ParamsBuilder,
    ) -> Result<Self> {
        spec.validate()?;
        let (mapping, body, out_norm, out_conv) = {
            let (root, width) = (builder.root(), spec.widths()[0]);
            (
                Mapping::new(&root, spec)?,
                Body::new(&root, &plan(spec))?,
                GroupNorm::at_least_four_each(&root.sub("out_norm"), width, EPS)?,
                Conv2d::new(&root.sub("out_conv"), width, outputs, 3, LayerInit::Zero)?,
            )
        };
        Ok(Self { spec: spec.clone(), params: builder.finish(), mapping, body, out_norm, out_conv })
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
        let (top, _) = self.body.decode(bottom, skips, &emb, train, probe);
        Ok(self.out_conv.forward(&self.out_norm.forward_silu(&top)))
    }
}

impl Backbone for DhariwalUnet {
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

fn plan(spec: &DhariwalUnetSpec) -> Plan<'_> {
    let widths = spec.widths();
    Plan {
        image_size: spec.image_size,
        image_channels: spec.image_channels,
        stem: widths[0],
        widths,
        num_blocks: spec.num_blocks,
        heads: Box::new(|place, resolution, channels| {
            let attends = place == Place::Bottom || spec.attn_resolutions.contains(&resolution);
            if attends { channels / HEAD_CHANNELS } else { 0 }
        }),
        block: BlockSpec {
            in_channels: 0,
            out_channels: 0,
            emb_channels: spec.emb_channels(),
            resample: None,
            heads: 0,
            dropout: spec.dropout,
            skip_scale: 1.0,
            eps: EPS,
            resample_filter: vec![1.0, 1.0],
            resample_proj: false,
            adaptive_scale: true,
            init: BlockInit::Adm,
        },
    }
}

impl Mapping {
    fn new(root: &ParamPath<'_>, spec: &DhariwalUnetSpec) -> Result<Self> {
        let (noise, emb) = (spec.model_channels, spec.emb_channels());
        let augment =
            || Linear::without_bias(&root.sub("map_augment"), spec.augment_dim, noise, LayerInit::Zero);
        let label = || {
            let init = LayerInit::Normal { gain: (spec.num_classes as f64).sqrt() };
            Linear::without_bias(&root.sub("map_label"), spec.num_classes, emb, init)
        };
        Ok(Self {
            frequencies: Frequencies::Open.tensor(noise / 2, root.device()),
            augment: (spec.augment_dim > 0).then(augment).transpose()?,
            layer0: Linear::new(&root.sub("map_layer0"), noise, emb, LayerInit::FanIn)?,
            layer1: Linear::new(&root.sub("map_layer1"), emb, emb, LayerInit::FanIn)?,
            label: (spec.num_classes > 0).then(label).transpose()?,
        })
    }

    fn forward(
        &self,
        spec: &DhariwalUnetSpec,
        c_noise: &Tensor,
        cond: &Cond,
        train: bool,
    ) -> cm_model::Result<Tensor> {
        let batch = c_noise.size()[0];
        let emb = embedding::cosines_first(&embedding::angles(c_noise, &self.frequencies));
        let emb = embedding::add_augment(emb, cond, batch, spec.augment_dim, self.augment.as_ref())?;
        let emb = self.layer1.forward_f32(&self.layer0.forward_f32(&emb).silu());
        let emb = match &self.label {
            Some(map) => {
                let dropout = if train { spec.label_dropout } else { 0.0 };
                let rows = embedding::class_rows(cond, batch, spec.num_classes, dropout, emb.device())?;
                emb + map.forward_f32(&rows)
            }
            None => {
                embedding::refuse_labels(cond)?;
                emb
            }
        };
        Ok(emb.silu())
    }
}
