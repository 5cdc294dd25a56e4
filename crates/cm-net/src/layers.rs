//! The layers that all networks here are made of. Names of parameters are those of the published files.

use cm_model::torch::autocast::Autocast;
use cm_model::torch::fused::{Norm, PackedConv, is_plain, tile_conv};
use cm_model::torch::memory_format;
use cm_model::{Init, ParamPath};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// How the weight and the bias of a layer start.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LayerInit {
    /// Uniform Xavier times `gain`, biases 0: SongUNet.
    Xavier { gain: f64 },
    /// U(±1/√fan_in) for weights and biases: ADM in EDM (uniform Kaiming times √(1/3)), and PyTorch's default.
    FanIn,
    /// All zeros: layers whose residual branch shall start as the identity.
    Zero,
    /// N(0, gain²/fan_in), biases 0.
    Normal { gain: f64 },
}

impl LayerInit {
    fn weight(self, fan_in: i64) -> Init {
        match self {
            LayerInit::Xavier { gain } => Init::XavierUniform { scale: gain },
            LayerInit::FanIn => Init::Uniform { bound: 1.0 / (fan_in as f64).sqrt() },
            LayerInit::Zero => Init::Zeros,
            LayerInit::Normal { gain } => Init::KaimingNormal { scale: gain },
        }
    }

    fn bias(self, fan_in: i64) -> Init {
        match self {
            LayerInit::FanIn => self.weight(fan_in),
            _ => Init::Zeros,
        }
    }
}

/// `y = W·x + b` over the last axis.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(path: &ParamPath<'_>, inputs: i64, outputs: i64, init: LayerInit) -> Result<Self> {
        let bias = path.param("bias", &[outputs], init.bias(inputs))?;
        Ok(Self { bias: Some(bias), ..Self::without_bias(path, inputs, outputs, init)? })
    }

    pub(crate) fn without_bias(
        path: &ParamPath<'_>,
        inputs: i64,
        outputs: i64,
        init: LayerInit,
    ) -> Result<Self> {
        Ok(Self { weight: path.param("weight", &[outputs, inputs], init.weight(inputs))?, bias: None })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }

    /// `W·x` alone.
    pub(crate) fn forward_unbiased(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, None::<&Tensor>)
    }

    /// The layer on a path that stays float32 inside autocast: whatever is computed from the noise level is
    /// small and sets scale and shift of everything else.
    pub(crate) fn forward_f32(&self, x: &Tensor) -> Tensor {
        let _f32 = Autocast::enter(x.device(), None);
        self.forward(x)
    }
}

/// A square convolution with zero padding that keeps the size (at stride 1).
#[derive(Debug)]
pub(crate) struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
    packed: PackedConv,
}

impl Conv2d {
    pub(crate) fn new(
        path: &ParamPath<'_>,
        inputs: i64,
        outputs: i64,
        kernel: i64,
        init: LayerInit,
    ) -> Result<Self> {
        let fan_in = inputs * kernel * kernel;
        Ok(Self {
            weight: path.param("weight", &[outputs, inputs, kernel, kernel], init.weight(fan_in))?,
            bias: path.param("bias", &[outputs], init.bias(fan_in))?,
            stride: 1,
            padding: kernel / 2,
            packed: PackedConv::default(),
        })
    }

    /// The same layer, evaluated at every `stride`-th pixel.
    pub(crate) fn strided(self, stride: i64) -> Self {
        Self { stride, ..self }
    }

    /// The same layer with `padding` zeros around the image.
    pub(crate) fn padded(self, padding: i64) -> Self {
        Self { padding, ..self }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let (parts, how) = ((&self.weight, &self.bias), (self.stride, self.padding));
        let fast = self.packed.forward(x, parts, how).or_else(|| tile_conv(x, parts, how));
        fast.unwrap_or_else(|| x.conv2d(&self.weight, Some(&self.bias), self.stride, self.padding, 1, 1))
    }
}

/// Which way a layer changes the resolution, by a factor of 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Double it.
    Up,
    /// Halve it.
    Down,
}

/// Resampling by 2 with a separable low-pass filter: one depthwise convolution of stride 2 (down), or its
/// transpose with 4 times the filter (up). The filter `[1, 1]` is the mean of 2×2 pixels, or their repetition.
///
/// # Source
/// Karras et al. 2022, appendix G.3, after Karras et al. 2020 (StyleGAN2).
#[derive(Debug)]
pub(crate) struct Resample {
    /// `outer(f, f)/(Σf)²` as `[1, 1, n, n]`: a buffer, since published files carry it.
    filter: Tensor,
    direction: Direction,
    /// The filter `[1, 1]`.
    plain: bool,
}

impl Resample {
    pub(crate) fn new(path: &ParamPath<'_>, taps: &[f64], direction: Direction) -> Result<Self> {
        let (n, sum) = (taps.len() as i64, taps.iter().sum::<f64>());
        let outer: Vec<f32> =
            taps.iter().flat_map(|a| taps.iter().map(move |b| (a * b / (sum * sum)) as f32)).collect();
        let filter = Tensor::from_slice(&outer).view([1, 1, n, n]);
        let plain = taps.len() == 2 && taps[0] == taps[1];
        Ok(Self { filter: path.buffer("resample_filter", &filter)?, direction, plain })
    }

    fn padding(&self) -> i64 {
        (self.filter.size()[3] - 1) / 2
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        if !self.plain {
            return self.filter(x, self.padding());
        }
        // In the dtype that comes in: these kernels are fast in each, and a mean of four is taken in float32.
        let _as_it_is = Autocast::enter(x.device(), None);
        match self.direction {
            Direction::Down => x.avg_pool2d(2, 2, 0, false, true, None),
            Direction::Up => {
                let (_, _, height, width) = x.size4().expect("resampling is on images");
                x.upsample_nearest2d([2 * height, 2 * width], None, None)
            }
        }
    }

    /// Float32 also inside autocast: libtorch's depthwise convolutions in bfloat16 are 15 to 30 times slower on
    /// the CPU (transposed ones forward, strided ones backward), and the filter costs next to nothing in float32.
    fn filter(&self, x: &Tensor, padding: i64) -> Tensor {
        let _f32 = Autocast::enter(x.device(), None);
        let (input, channels) = (x.to_kind(Kind::Float), x.size()[1]);
        let filter = self.filter.repeat([channels, 1, 1, 1]);
        let none = None::<&Tensor>;
        let filtered = match self.direction {
            Direction::Down => input.conv2d(&filter, none, 2, padding, 1, channels),
            Direction::Up => input.conv_transpose2d(&(filter * 4.0), none, 2, padding, 0, channels, 1),
        };
        filtered.to_kind(x.kind())
    }
}

/// A convolution behind a resampling filter, as in every block that changes the resolution.
#[derive(Debug)]
pub(crate) struct ResampledConv {
    pub(crate) resample: Option<Resample>,
    pub(crate) conv: Option<Conv2d>,
}

impl ResampledConv {
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let resampled = self.resample.as_ref().map(|resample| resample.forward(x));
        let x = resampled.as_ref().unwrap_or(x);
        match &self.conv {
            Some(conv) => conv.forward(x),
            None => x.shallow_clone(),
        }
    }
}

/// A convolution followed by the filter, the two padded as one: where the image itself enters a lower level.
#[derive(Debug)]
pub(crate) struct FusedDown {
    conv: Conv2d,
    filter: Resample,
}

impl FusedDown {
    pub(crate) fn new(
        path: &ParamPath<'_>,
        inputs: i64,
        outputs: i64,
        taps: &[f64],
        init: LayerInit,
    ) -> Result<Self> {
        let filter = Resample::new(path, taps, Direction::Down)?;
        Ok(Self { conv: Conv2d::new(path, inputs, outputs, 3, init)?, filter })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let Conv2d { weight, bias, padding, .. } = &self.conv;
        let x = x.conv2d(weight, None::<&Tensor>, 1, padding + self.filter.padding(), 1, 1);
        let bias = bias.view([1, -1, 1, 1]).to_kind(x.kind());
        self.filter.filter(&x, 0) + bias
    }
}

/// Normalisation over groups of channels.
#[derive(Debug)]
pub(crate) struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// EDM's choice of groups, `min(32, channels/4)`.
    pub(crate) fn at_least_four_each(path: &ParamPath<'_>, channels: i64, eps: f64) -> Result<Self> {
        Self::new(path, channels, (channels / 4).min(32), eps)
    }

    pub(crate) fn new(path: &ParamPath<'_>, channels: i64, groups: i64, eps: f64) -> Result<Self> {
        if groups == 0 || channels % groups != 0 {
            return Err(Error::option(
                "model_channels",
                format!("… gives {channels} channels at {}", path.name()),
                match groups {
                    0 => "at least 4 channels at every normalisation".to_owned(),
                    groups => format!("channels that divide into {groups} groups"),
                },
            ));
        }
        Ok(Self {
            weight: path.param("weight", &[channels], Init::Ones)?,
            bias: path.param("bias", &[channels], Init::Zeros)?,
            groups,
            eps,
        })
    }

    fn parts(&self, silu: bool) -> Norm<'_> {
        let Self { weight, bias, groups, eps } = self;
        Norm { weight, bias, groups: *groups, eps: *eps, add: None, modulate: None, silu }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        self.parts(false).forward(x)
    }

    /// `silu(norm(x))`.
    pub(crate) fn forward_silu(&self, x: &Tensor) -> Tensor {
        self.parts(true).forward(x)
    }

    /// `silu` of the normalised image that has been told of the noise level: the embedding, float32, is added to each
    /// channel in front, or where it has two numbers a channel, gives scale and shift behind.
    pub(crate) fn forward_embedded(&self, x: &Tensor, emb: &Tensor, adaptive_scale: bool) -> Tensor {
        if !adaptive_scale {
            return Norm { add: Some(emb), ..self.parts(true) }.forward(x);
        }
        let [scale, shift]: [Tensor; 2] = emb.chunk(2, 1).try_into().expect("two halves");
        Norm { modulate: Some((&scale, &shift)), ..self.parts(true) }.forward(x)
    }
}

/// In which order the output channels of a `qkv` convolution lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum QkvOrder {
    /// (heads, head_dim, 3), interleaved: EDM.
    Interleaved,
    /// (3, heads, head_dim), all q, then all k, then all v: OpenAI's consistency models.
    Stacked,
}

/// What an [`Attention`] is made of.
pub(crate) struct AttentionSpec {
    pub(crate) channels: i64,
    pub(crate) heads: i64,
    pub(crate) order: QkvOrder,
    pub(crate) qkv: LayerInit,
    pub(crate) proj: LayerInit,
    /// Names of the normalisation and of the output convolution.
    pub(crate) names: [&'static str; 2],
}

/// Self-attention between the pixels of an image, `proj(softmax(qᵀk/√head_dim)·v)` with q, k, v from one 1×1
/// convolution of the normalised input.
#[derive(Debug)]
pub(crate) struct Attention {
    norm: GroupNorm,
    qkv: Conv2d,
    proj: Conv2d,
    heads: i64,
    order: QkvOrder,
}

impl Attention {
    pub(crate) fn new(
        path: &ParamPath<'_>,
        spec: &AttentionSpec,
        norm: impl FnOnce(&ParamPath<'_>) -> Result<GroupNorm>,
    ) -> Result<Self> {
        let &AttentionSpec { channels, heads, order, qkv, proj, names } = spec;
        if heads < 1 || channels % heads != 0 {
            let value = format!("{heads} heads over {channels} channels at {}", path.name());
            return Err(Error::option("attn_heads", value, "heads that divide the channels"));
        }
        Ok(Self {
            norm: norm(&path.sub(names[0]))?,
            qkv: Conv2d::new(&path.sub("qkv"), channels, 3 * channels, 1, qkv)?,
            proj: Conv2d::new(&path.sub(names[1]), channels, channels, 1, proj)?,
            heads,
            order,
        })
    }

    /// The residual branch: the caller adds it to `x`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, channels, height, width) = x.size4().expect("attention is on images");
        let (heads, dim, pixels) = (self.heads, channels / self.heads, height * width);
        let qkv = self.qkv.forward(&self.norm.forward(x));
        // [3, batch, heads, pixels, dim], the layout that the fast attention kernels read.
        let qkv = match self.order {
            QkvOrder::Interleaved => {
                qkv.reshape([batch, heads, dim, 3, pixels]).permute([3, 0, 1, 4, 2]).contiguous()
            }
            QkvOrder::Stacked => {
                qkv.reshape([batch, 3, heads, dim, pixels]).permute([1, 0, 2, 4, 3]).contiguous()
            }
        };
        let [q, k, v] = [qkv.get(0), qkv.get(1), qkv.get(2)];
        let mixed = match composes(&q) && !is_plain() {
            true => composed_attention(&q, &k, &v),
            false => {
                Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)
            }
        };
        // The fused kernel leaves the result pixel by pixel, which is the channels-last order.
        let image = mixed.permute([0, 2, 1, 3]).reshape([batch, height, width, channels]);
        let image = image.permute([0, 3, 1, 2]);
        let image = if memory_format::is_channels_last(x) { image } else { image.contiguous() };
        self.proj.forward(&image)
    }
}

/// Whether attention is computed step by step: on CPUs the gradient of libtorch's fused kernel multiplies head by head,
/// in bfloat16 at ten times the cost of whole products at 4×4 pixels and four times at 8×8; from 16×16 on, and in float32,
/// it is as fast. It does not depend on whether there will be a gradient, so that a block that is computed again computes
/// the same.
fn composes(q: &Tensor) -> bool {
    q.kind() == Kind::BFloat16 && !q.device().is_cuda() && q.size()[2] <= 64
}

/// `softmax(q·kᵀ/√dim)·v` of `[batch, heads, pixels, dim]`: up to the softmax in float32, as the fused kernel does, and
/// the rest in the dtype of v.
fn composed_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let _as_it_is = Autocast::enter(q.device(), None);
    let scale = (q.size()[3] as f64).powf(-0.5);
    let logits = (q.to_kind(Kind::Float) * scale).matmul(&k.to_kind(Kind::Float).transpose(-1, -2));
    logits.softmax(-1, None).to_kind(v.kind()).matmul(v)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// The result and the gradients of q, k and v for a given gradient of the result, in double.
    fn attended(
        parts: &[Tensor; 3],
        slope: &Tensor,
        attention: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor,
    ) -> Vec<Tensor> {
        let [q, k, v] = parts.each_ref().map(|t| t.copy().set_requires_grad(true));
        let y = attention(&q, &k, &v);
        (&y * slope.to_kind(y.kind())).sum(y.kind()).backward();
        [y.detach(), q.grad(), k.grad(), v.grad()].map(|t| t.to_kind(Kind::Double)).into()
    }

    #[test]
    fn attention_step_by_step_is_as_exact_as_the_fused_kernel() {
        tch::manual_seed(4);
        let fused = |q: &Tensor, k: &Tensor, v: &Tensor| {
            Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, false, None, false)
        };
        let randn = || Tensor::randn([3, 2, 16, 8], (Kind::Double, Device::Cpu)).to_kind(Kind::BFloat16);
        let slope = randn();
        // Logits of some units, and of some tens, which bfloat16 would round by a sixteenth.
        for large in [1.0, 4.0] {
            let parts: [Tensor; 3] = [randn() * large, randn() * large, randn()];
            assert!(composes(&parts[0]));
            let double = parts.each_ref().map(|t| t.to_kind(Kind::Double));
            let exact = attended(&double, &slope, fused);
            let apart = |got: &[Tensor]| -> Vec<f64> {
                let relative = |(got, want): (&Tensor, &Tensor)| {
                    (got - want).norm().double_value(&[]) / want.norm().double_value(&[])
                };
                std::iter::zip(got, &exact).map(relative).collect()
            };
            let own = apart(&attended(&parts, &slope, composed_attention));
            let theirs = apart(&attended(&parts, &slope, fused));
            for (i, (own, theirs)) in std::iter::zip(own, theirs).enumerate() {
                assert!(own < 1.5 * theirs && own < 0.02, "×{large}, output {i}: {own:e} beside {theirs:e}");
            }
        }
    }

    #[test]
    fn attention_step_by_step_is_for_small_images_in_bfloat16() {
        let of = |pixels: i64, kind| composes(&Tensor::zeros([1, 1, pixels, 4], (kind, Device::Cpu)));
        assert!(of(64, Kind::BFloat16) && !of(65, Kind::BFloat16) && !of(16, Kind::Float));
    }
}
