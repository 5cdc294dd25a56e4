use cm_model::torch::autocast::Autocast;
use cm_model::torch::rng;
use cm_model::{Backbone, Cond, Error, ImageShape, Init, ParamPath, Params, ParamsBuilder};
use tch::Tensor;

use crate::embedding::{self, Frequencies};
use crate::layers::{Attention, AttentionSpec, Conv2d, Direction, GroupNorm, LayerInit, Linear, QkvOrder};
use crate::part::{Block, Part};
use crate::spec::OpenaiUnetSpec;
use crate::{Probe, Result};

const EPS: f64 = 1e-5;
const GROUPS: i64 = 32;

/// OpenAI's `UNetModel` (Dhariwal and Nichol 2021) as the consistency models for ImageNet-64 and LSUN have it.
///
/// Parameters have the names of the published files. The attention's qkv channels are ordered (3, heads,
/// head_dim), unlike in guided-diffusion's older checkpoints, and softmax runs in the dtype of the network
/// (the released code casts q, k and v to half precision also in a float32 model).
#[derive(Debug)]
pub struct OpenaiUnet {
    spec: OpenaiUnetSpec,
    params: Params,
    layers: Layers,
}

#[derive(Debug)]
struct Layers {
    frequencies: Tensor,
    time_embed: [Linear; 2],
    label_emb: Option<Tensor>,
    input_blocks: Vec<Stage>,
    middle_block: Stage,
    output_blocks: Vec<Stage>,
    out_norm: GroupNorm,
    out_conv: Conv2d,
}

/// The layers that the published files number as one block.
#[derive(Debug)]
struct Stage {
    name: String,
    layers: Part<Chain>,
}

/// Layers one behind the other.
#[derive(Debug)]
struct Chain(Vec<Layer>);

#[derive(Debug)]
enum Layer {
    Conv(Conv2d),
    Res(ResBlock),
    Attention(Attention),
    Upsample(Conv2d),
}

#[derive(Debug)]
struct ResBlock {
    in_norm: GroupNorm,
    in_conv: Conv2d,
    emb: Linear,
    out_norm: GroupNorm,
    out_conv: Conv2d,
    skip: Option<Conv2d>,
    resample: Option<Direction>,
    scale_shift: bool,
    dropout: f64,
}

impl OpenaiUnet {
    /// Builds the network with the start of its weights that `builder` stands for.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for options that do not go together.
    pub fn new(spec: &OpenaiUnetSpec, builder: ParamsBuilder) -> Result<Self> {
        spec.validate()?;
        let layers = Layers::new(&builder.root(), spec)?;
        Ok(Self { spec: spec.clone(), params: builder.finish(), layers })
    }

    /// The embedding that the blocks read, `[B, 4·model_channels]` float32.
    ///
    /// # Errors
    /// [`cm_model::Error`] for a condition that does not fit the network; a conditional network cannot do
    /// without labels.
    pub fn embed(&self, c_noise: &Tensor, cond: &Cond) -> cm_model::Result<Tensor> {
        embedding::refuse_augment(cond)?;
        let Layers { frequencies, time_embed: [first, second], label_emb, .. } = &self.layers;
        let emb = embedding::cosines_first(&embedding::angles(c_noise, frequencies));
        let emb = second.forward_f32(&first.forward_f32(&emb).silu());
        let Some(table) = label_emb else {
            embedding::refuse_labels(cond)?;
            return Ok(emb);
        };
        if cond.labels.is_none() {
            return Err(Error::Value {
                what: "class labels".into(),
                expected: format!("one of {} classes for each image", self.spec.num_classes),
                got: "none, and this network has no unconditional answer".into(),
            });
        }
        let rows = cond.one_hot(c_noise.size()[0], self.spec.num_classes, emb.device())?;
        let _f32 = Autocast::enter(emb.device(), None);
        Ok(emb + rows.matmul(table))
    }

    /// [`Backbone::forward`] that also shows the output of every block to `probe`, under the block's name
    /// (`input_blocks.1`).
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
        let emb = self.embed(c_noise, cond)?.silu();
        let mut skips = Vec::new();
        let mut x = x.shallow_clone();
        for stage in &self.layers.input_blocks {
            x = stage.forward(x, None, &emb, train, probe);
            skips.push(x.shallow_clone());
        }
        x = self.layers.middle_block.forward(x, None, &emb, train, probe);
        for stage in &self.layers.output_blocks {
            let skip = skips.pop().expect("as many skips as output blocks");
            x = stage.forward(x, Some(skip), &emb, train, probe);
        }
        let Layers { out_norm, out_conv, .. } = &self.layers;
        Ok(out_conv.forward(&out_norm.forward_silu(&x)))
    }
}

impl Backbone for OpenaiUnet {
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

impl Layers {
    fn new(root: &ParamPath<'_>, spec: &OpenaiUnetSpec) -> Result<Self> {
        let (emb, width) = (spec.emb_channels(), spec.widths()[0]);
        let (time, label, out) = (root.sub("time_embed"), root.sub("label_emb"), root.sub("out"));
        let label = || label.param("weight", &[spec.num_classes, emb], Init::Normal { std: 1.0 });
        let mut skips = Vec::new();
        Ok(Self {
            frequencies: Frequencies::OpenExp.tensor(spec.model_channels / 2, root.device()),
            time_embed: [
                Linear::new(&time.sub(0), spec.model_channels, emb, LayerInit::FanIn)?,
                Linear::new(&time.sub(2), emb, emb, LayerInit::FanIn)?,
            ],
            label_emb: (spec.num_classes > 0).then(label).transpose()?,
            input_blocks: input_blocks(&root.sub("input_blocks"), spec, &mut skips)?,
            middle_block: middle_block(&root.sub("middle_block"), spec)?,
            output_blocks: output_blocks(&root.sub("output_blocks"), spec, &mut skips)?,
            out_norm: norm(&out.sub(0), width)?,
            out_conv: Conv2d::new(&out.sub(2), width, spec.image_channels, 3, LayerInit::Zero)?,
        })
    }
}

fn norm(path: &ParamPath<'_>, channels: i64) -> Result<GroupNorm> {
    GroupNorm::new(path, channels, GROUPS, EPS)
}

fn attention(path: &ParamPath<'_>, channels: i64, spec: &OpenaiUnetSpec) -> Result<Layer> {
    let parts = AttentionSpec {
        channels,
        heads: spec.heads(channels),
        order: QkvOrder::Stacked,
        qkv: LayerInit::FanIn,
        proj: LayerInit::Zero,
        names: ["norm", "proj_out"],
    };
    Ok(Layer::Attention(Attention::new(path, &parts, |path| norm(path, channels))?))
}

fn input_blocks(path: &ParamPath<'_>, spec: &OpenaiUnetSpec, skips: &mut Vec<i64>) -> Result<Vec<Stage>> {
    let (widths, mut channels) = (spec.widths(), spec.widths()[0]);
    let stem = Conv2d::new(&path.sub(0).sub(0), spec.image_channels, channels, 3, LayerInit::FanIn)?;
    let mut stages = vec![Stage::new("input_blocks.0".into(), vec![Layer::Conv(stem)])];
    skips.push(channels);
    for (level, &width) in widths.iter().enumerate() {
        for _ in 0..spec.num_blocks {
            let path = path.sub(stages.len());
            let mut layers = vec![Layer::Res(ResBlock::new(&path.sub(0), spec, channels, width, None)?)];
            channels = width;
            if spec.attends(level) {
                layers.push(attention(&path.sub(1), channels, spec)?);
            }
            stages.push(Stage::new(format!("input_blocks.{}", stages.len()), layers));
            skips.push(channels);
        }
        if level + 1 < widths.len() {
            let path = path.sub(stages.len()).sub(0);
            let layer = if spec.resblock_updown {
                Layer::Res(ResBlock::new(&path, spec, channels, channels, Some(Direction::Down))?)
            } else {
                Layer::Conv(Conv2d::new(&path.sub("op"), channels, channels, 3, LayerInit::FanIn)?.strided(2))
            };
            stages.push(Stage::new(format!("input_blocks.{}", stages.len()), vec![layer]));
            skips.push(channels);
        }
    }
    Ok(stages)
}

fn middle_block(path: &ParamPath<'_>, spec: &OpenaiUnetSpec) -> Result<Stage> {
    let channels = spec.widths()[spec.channel_mult.len() - 1];
    let layers = vec![
        Layer::Res(ResBlock::new(&path.sub(0), spec, channels, channels, None)?),
        attention(&path.sub(1), channels, spec)?,
        Layer::Res(ResBlock::new(&path.sub(2), spec, channels, channels, None)?),
    ];
    Ok(Stage::new("middle_block".into(), layers))
}

fn output_blocks(path: &ParamPath<'_>, spec: &OpenaiUnetSpec, skips: &mut Vec<i64>) -> Result<Vec<Stage>> {
    let widths = spec.widths();
    let mut channels = widths[widths.len() - 1];
    let mut stages = Vec::new();
    for (level, &width) in widths.iter().enumerate().rev() {
        for index in 0..=spec.num_blocks {
            let path = path.sub(stages.len());
            let skip = skips.pop().expect("as many skips as output blocks");
            let mut layers =
                vec![Layer::Res(ResBlock::new(&path.sub(0), spec, channels + skip, width, None)?)];
            channels = width;
            if spec.attends(level) {
                layers.push(attention(&path.sub(1), channels, spec)?);
            }
            if level > 0 && index == spec.num_blocks {
                let path = path.sub(layers.len());
                layers.push(if spec.resblock_updown {
                    Layer::Res(ResBlock::new(&path, spec, channels, channels, Some(Direction::Up))?)
                } else {
                    Layer::Upsample(Conv2d::new(&path.sub("conv"), channels, channels, 3, LayerInit::FanIn)?)
                });
            }
            stages.push(Stage::new(format!("output_blocks.{}", stages.len()), layers));
        }
    }
    Ok(stages)
}

impl Stage {
    fn new(name: String, layers: Vec<Layer>) -> Self {
        Self { name, layers: Part::new(Chain(layers)) }
    }

    fn forward(
        &self,
        x: Tensor,
        skip: Option<Tensor>,
        emb: &Tensor,
        train: bool,
        probe: Probe<'_>,
    ) -> Tensor {
        let x = self.layers.forward(x, skip, emb, train);
        probe(&self.name, &x);
        x
    }
}

impl Block for Chain {
    fn forward(&self, x: &Tensor, emb: &Tensor, train: bool) -> Tensor {
        let mut x = x.shallow_clone();
        for layer in &self.0 {
            x = match layer {
                Layer::Conv(conv) => conv.forward(&x),
                Layer::Res(block) => block.forward(&x, emb, train),
                Layer::Attention(attention) => attention.forward(&x) + x,
                Layer::Upsample(conv) => conv.forward(&resample(&x, Direction::Up)),
            };
        }
        x
    }
}

impl ResBlock {
    fn new(
        path: &ParamPath<'_>,
        spec: &OpenaiUnetSpec,
        inputs: i64,
        outputs: i64,
        resample: Option<Direction>,
    ) -> Result<Self> {
        let emb = if spec.scale_shift_norm { 2 * outputs } else { outputs };
        let (in_layers, out_layers) = (path.sub("in_layers"), path.sub("out_layers"));
        let skip = || Conv2d::new(&path.sub("skip_connection"), inputs, outputs, 1, LayerInit::FanIn);
        Ok(Self {
            in_norm: norm(&in_layers.sub(0), inputs)?,
            in_conv: Conv2d::new(&in_layers.sub(2), inputs, outputs, 3, LayerInit::FanIn)?,
            emb: Linear::new(&path.sub("emb_layers").sub(1), spec.emb_channels(), emb, LayerInit::FanIn)?,
            out_norm: norm(&out_layers.sub(0), outputs)?,
            out_conv: Conv2d::new(&out_layers.sub(3), outputs, outputs, 3, LayerInit::Zero)?,
            skip: (inputs != outputs).then(skip).transpose()?,
            resample,
            scale_shift: spec.scale_shift_norm,
            dropout: spec.dropout,
        })
    }

    /// `emb` has gone through SiLU already, which all blocks share.
    fn forward(&self, x: &Tensor, emb: &Tensor, train: bool) -> Tensor {
        let h = self.in_norm.forward_silu(x);
        let (h, x) = match self.resample {
            Some(way) => (resample(&h, way), resample(x, way)),
            None => (h, x.shallow_clone()),
        };
        let h = self.in_conv.forward(&h);
        let h = self.out_norm.forward_embedded(&h, &self.emb.forward_f32(emb), self.scale_shift);
        let h = self.out_conv.forward(&rng::dropout(&h, self.dropout, train));
        match &self.skip {
            Some(skip) => h + skip.forward(&x),
            None => h + x,
        }
    }
}

/// The mean of 2×2 pixels, or each pixel four times.
fn resample(x: &Tensor, way: Direction) -> Tensor {
    match way {
        Direction::Down => x.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None),
        Direction::Up => {
            let size = x.size();
            x.upsample_nearest2d([2 * size[2], 2 * size[3]], None, None)
        }
    }
}

/// Weights of 1×1 convolutions that other releases of this network store as one-dimensional ones.
pub(crate) fn widen_attention(name: &str, tensor: Tensor) -> Tensor {
    let attention = name.ends_with(".qkv.weight") || name.ends_with(".proj_out.weight");
    if attention && tensor.dim() == 3 { tensor.unsqueeze(-1) } else { tensor }
}
