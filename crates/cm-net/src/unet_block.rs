//! The residual block of SongUNet and of ADM in EDM's unified form.

use cm_model::ParamPath;
use cm_model::torch::fused::scaled_sum;
use cm_model::torch::rng;
use tch::Tensor;

use crate::Result;
use crate::layers::{
    Attention, AttentionSpec, Conv2d, Direction, GroupNorm, LayerInit, Linear, QkvOrder, Resample,
    ResampledConv,
};
use crate::part::Block;

/// The start of a block's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockInit {
    /// Uniform Xavier; the last convolution and the attention's output 10⁻⁵ of it, its qkv √0.2 of it.
    Song,
    /// U(±1/√fan_in); the last convolution and the attention's output start at 0.
    Adm,
}

impl BlockInit {
    pub(crate) fn layer(self) -> LayerInit {
        match self {
            BlockInit::Song => LayerInit::Xavier { gain: 1.0 },
            BlockInit::Adm => LayerInit::FanIn,
        }
    }

    /// Layers at the end of a residual branch, and the output of the network.
    pub(crate) fn last(self) -> LayerInit {
        match self {
            BlockInit::Song => LayerInit::Xavier { gain: 1e-5 },
            BlockInit::Adm => LayerInit::Zero,
        }
    }

    fn qkv(self) -> LayerInit {
        match self {
            BlockInit::Song => LayerInit::Xavier { gain: 0.2f64.sqrt() },
            BlockInit::Adm => LayerInit::FanIn,
        }
    }
}

/// What a [`UnetBlock`] is made of.
#[derive(Debug, Clone)]
pub struct BlockSpec {
    /// Channels of the input.
    pub in_channels: i64,
    /// Channels of the output.
    pub out_channels: i64,
    /// Length of the embedding vector.
    pub emb_channels: i64,
    /// A change of resolution in front of the first convolution and in the skip path.
    pub resample: Option<Direction>,
    /// Attention heads; 0 for a block without attention.
    pub heads: i64,
    /// Probability of dropping a unit in front of the second convolution.
    pub dropout: f64,
    /// Factor on the block's output, and once more on the attention's.
    pub skip_scale: f64,
    /// Added to the variance in the normalisations.
    pub eps: f64,
    /// Taps of the resampling filter.
    pub resample_filter: Vec<f64>,
    /// Whether a resampled skip path has a convolution also where the number of channels stays.
    pub resample_proj: bool,
    /// Whether the embedding gives scale and shift behind the second normalisation (ADM) or is added in front
    /// of it (SongUNet).
    pub adaptive_scale: bool,
    /// The start of the weights.
    pub init: BlockInit,
}

/// `x ← (skip(x) + conv1(dropout(silu(norm1(conv0(silu(norm0(x))), emb))))·s`, then, with attention,
/// `x ← (x + attention(x))·s`.
///
/// # Shapes
/// `x` `[B, in, H, W]`, `emb` `[B, emb]`; the result is `[B, out, H′, W′]` with H′ = H, H/2 or 2H.
///
/// # Source
/// Karras et al. 2022, appendix F.1 (the unified form of the blocks of Song et al. 2021 and of Dhariwal and
/// Nichol 2021).
#[derive(Debug)]
pub struct UnetBlock {
    norm0: GroupNorm,
    conv0: ResampledConv,
    affine: Linear,
    norm1: GroupNorm,
    conv1: Conv2d,
    skip: Option<ResampledConv>,
    attention: Option<Attention>,
    dropout: f64,
    skip_scale: f64,
    adaptive_scale: bool,
}

impl UnetBlock {
    /// Registers the block's parameters below `path`.
    ///
    /// # Errors
    /// [`crate::Error::Option`] if channels do not divide into groups or heads.
    pub fn new(path: &ParamPath<'_>, spec: &BlockSpec) -> Result<Self> {
        let &BlockSpec { in_channels, out_channels, emb_channels, heads, eps, init, .. } = spec;
        let resampled = |name: &str, kernel: i64| -> Result<ResampledConv> {
            let path = path.sub(name);
            let resample = spec.resample.map(|way| Resample::new(&path, &spec.resample_filter, way));
            let conv = || Conv2d::new(&path, in_channels, out_channels, kernel, init.layer());
            Ok(ResampledConv { resample: resample.transpose()?, conv: (kernel > 0).then(conv).transpose()? })
        };
        let widens = in_channels != out_channels;
        let skip = match (widens || spec.resample.is_some(), widens || spec.resample_proj) {
            (false, _) => None,
            (true, project) => Some(resampled("skip", i64::from(project))?),
        };
        let attention = AttentionSpec {
            channels: out_channels,
            heads,
            order: QkvOrder::Interleaved,
            qkv: init.qkv(),
            proj: init.last(),
            names: ["norm2", "proj"],
        };
        let norm = |name: &str, channels: i64| GroupNorm::at_least_four_each(&path.sub(name), channels, eps);
        let affine = if spec.adaptive_scale { 2 * out_channels } else { out_channels };
        Ok(Self {
            norm0: norm("norm0", in_channels)?,
            conv0: resampled("conv0", 3)?,
            affine: Linear::new(&path.sub("affine"), emb_channels, affine, init.layer())?,
            norm1: norm("norm1", out_channels)?,
            conv1: Conv2d::new(&path.sub("conv1"), out_channels, out_channels, 3, init.last())?,
            skip,
            attention: (heads > 0)
                .then(|| Attention::new(path, &attention, |_| norm("norm2", out_channels)))
                .transpose()?,
            dropout: spec.dropout,
            skip_scale: spec.skip_scale,
            adaptive_scale: spec.adaptive_scale,
        })
    }

    /// Evaluates the block; `train` turns its dropout on.
    pub fn forward(&self, x: &Tensor, emb: &Tensor, train: bool) -> Tensor {
        let h = self.conv0.forward(&self.norm0.forward_silu(x));
        let h = self.norm1.forward_embedded(&h, &self.affine.forward_f32(emb), self.adaptive_scale);
        let h = self.conv1.forward(&rng::dropout(&h, self.dropout, train));
        let x = match &self.skip {
            Some(skip) => scaled_sum(&h, &skip.forward(x), self.skip_scale),
            None => scaled_sum(&h, x, self.skip_scale),
        };
        match &self.attention {
            Some(attention) => scaled_sum(&attention.forward(&x), &x, self.skip_scale),
            None => x,
        }
    }
}

impl Block for UnetBlock {
    fn forward(&self, x: &Tensor, emb: &Tensor, train: bool) -> Tensor {
        UnetBlock::forward(self, x, emb, train)
    }
}
