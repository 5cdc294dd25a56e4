//! Small networks and inputs that all tests here share.
#![allow(dead_code)] // each test binary uses a part of it

use cm_net::{
    AttnHeads, Decoder, DhariwalUnetSpec, Encoder, NetSpec, NoiseEmbedding, OpenaiUnetSpec, SongUnetSpec,
};
use tch::{Device, Kind, Tensor};

/// Values without a pattern that a layer could be blind to, in [-1, 1], and no generator that tests share.
pub fn wave(shape: &[i64]) -> Tensor {
    let numel: i64 = shape.iter().product();
    let index = Tensor::arange(numel, (Kind::Float, Device::Cpu));
    ((&index * &index * 0.013).sin() * (index * 0.71).cos()).view(shape)
}

/// Fills all weights, those that start at 0 too, so that every layer shows in the output.
pub fn fill(params: &cm_model::Params) {
    // On layers this small, threads spend their time waiting for each other.
    tch::set_num_threads(1);
    let _no_grad = tch::no_grad_guard();
    for (_, tensor) in params.trainable() {
        let fan_in = tensor.numel() as i64 / tensor.size()[0];
        let scale = if tensor.dim() > 1 { 1.0 / (fan_in as f64).sqrt() } else { 0.3 };
        let shift = f64::from(u8::from(tensor.dim() == 1));
        tensor.shallow_clone().copy_(&(wave(&tensor.size()) * scale * 2.0 + shift * 0.7));
    }
}

pub fn song() -> SongUnetSpec {
    SongUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes: 0,
        augment_dim: 0,
        model_channels: 16,
        channel_mult: vec![1, 2],
        channel_mult_emb: 4,
        num_blocks: 1,
        attn_resolutions: vec![4],
        dropout: 0.1,
        label_dropout: 0.0,
        embedding: NoiseEmbedding::Positional {},
        channel_mult_noise: 1,
        encoder: Encoder::Standard,
        decoder: Decoder::Standard,
        resample_filter: vec![1.0, 1.0],
    }
}

pub fn ncsnpp() -> SongUnetSpec {
    SongUnetSpec {
        num_classes: 5,
        augment_dim: 9,
        embedding: NoiseEmbedding::Fourier { scale: 0.5 },
        channel_mult_noise: 2,
        encoder: Encoder::Residual,
        resample_filter: vec![1.0, 3.0, 3.0, 1.0],
        ..song()
    }
}

pub fn adm() -> DhariwalUnetSpec {
    DhariwalUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes: 5,
        augment_dim: 0,
        model_channels: 32,
        channel_mult: vec![1, 2],
        channel_mult_emb: 4,
        num_blocks: 1,
        attn_resolutions: vec![4],
        dropout: 0.1,
        label_dropout: 0.0,
    }
}

pub fn openai() -> OpenaiUnetSpec {
    OpenaiUnetSpec {
        image_size: 8,
        image_channels: 3,
        num_classes: 5,
        model_channels: 32,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![4],
        attn_heads: AttnHeads::HeadChannels(32),
        dropout: 0.1,
        scale_shift_norm: true,
        resblock_updown: true,
    }
}

/// One small network of each kind.
pub fn all() -> [NetSpec; 4] {
    [song().into(), ncsnpp().into(), adm().into(), openai().into()]
}

/// The largest difference over the largest value.
pub fn rel(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.size(), want.size());
    let largest = |t: &Tensor| t.to_kind(Kind::Double).abs().max().double_value(&[]);
    largest(&(got - want)) / largest(want)
}
