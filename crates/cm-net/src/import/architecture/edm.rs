//! EDM's names, with or without the `model.` of its preconditioning.

use cm_model::TensorMap;

use super::{Architecture, Lookup, Shapes, multipliers};
use crate::NetSpec;
use crate::import::pickle::Result;
use crate::spec::{Decoder, DhariwalUnetSpec, Encoder, NoiseEmbedding, SongUnetSpec};

/// Channels of a head in a [`DhariwalUnetSpec`]'s network.
pub(super) const HEAD: i64 = 64;

/// What both networks have.
struct Common {
    image_size: i64,
    image_channels: i64,
    stem: i64,
    noise: i64,
    emb: i64,
    num_classes: i64,
    augment_dim: i64,
    /// Sides of the levels in pixels, finest first.
    resolutions: Vec<i64>,
    widths: Vec<i64>,
    num_blocks: i64,
    attn_resolutions: Vec<i64>,
}

/// Reads the network off the names, the shapes and the resampling filters.
pub(in crate::import) fn of(tensors: &TensorMap) -> Result<Architecture> {
    let own = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_owned();
    let shapes: Shapes = tensors.iter().map(|(name, tensor)| (own(name), tensor.size())).collect();
    let look = Lookup(&shapes);
    let common = common(&look)?;
    let net = match look.has("out_conv.weight") {
        true => dhariwal(&look, common)?.into(),
        false => song(&look, common, tensors)?.into(),
    };
    Ok(Architecture::Edm(net))
}

/// The same network with frequencies that were drawn from N(0, scale²).
pub(super) fn with_scale(net: &NetSpec, scale: f64) -> NetSpec {
    let mut net = net.clone();
    if let NetSpec::SongUnet(SongUnetSpec { embedding: embedding @ NoiseEmbedding::Fourier { .. }, .. }) =
        &mut net
    {
        *embedding = NoiseEmbedding::Fourier { scale };
    }
    net
}

/// See [`super::comparable`].
pub(super) fn comparable(net: &mut SongUnetSpec, sorted: impl Fn(&mut Vec<i64>)) {
    (net.dropout, net.label_dropout) = (0.0, 0.0);
    sorted(&mut net.attn_resolutions);
    if let NoiseEmbedding::Fourier { scale } = &mut net.embedding {
        *scale = 1.0;
    }
    if net.channel_mult.len() == 1 {
        // Nothing is resampled.
        (net.encoder, net.decoder) = (Encoder::Standard, Decoder::Standard);
        net.resample_filter = vec![1.0, 1.0];
    }
    let sum: f64 = net.resample_filter.iter().sum();
    for tap in &mut net.resample_filter {
        *tap = (*tap / sum * 1e6).round() / 1e6;
    }
}

fn common(look: &Lookup<'_>) -> Result<Common> {
    let stems: Vec<_> = look.0.keys().filter_map(|name| stem_resolution(name)).collect();
    let &[image_size] = stems.as_slice() else {
        return Err(format!("expected one 'enc.RxR_conv.weight', which names the image size, got {stems:?}"));
    };
    let stem = format!("enc.{image_size}x{image_size}_conv.weight");
    let down = |r: i64| look.has(&format!("enc.{r}x{r}_down.conv0.weight"));
    let mut resolutions = vec![image_size];
    while let Some(&last) = resolutions.last()
        && last > 1
        && down(last / 2)
    {
        resolutions.push(last / 2);
    }
    let block = |r: i64, index: i64, part: &str| format!("enc.{r}x{r}_block{index}.{part}.weight");
    let width = |&r: &i64| look.side(&block(r, 0, "conv0"), 4, 0);
    // The inputs of a matrix that only networks have which are told of such a thing.
    let inputs = |name: &str| if look.has(name) { look.side(name, 2, 1) } else { Ok(0) };
    Ok(Common {
        image_size,
        image_channels: look.side(&stem, 4, 1)?,
        stem: look.side(&stem, 4, 0)?,
        noise: look.side("map_layer0.weight", 2, 1)?,
        emb: look.side("map_layer0.weight", 2, 0)?,
        num_classes: inputs("map_label.weight")?,
        augment_dim: inputs("map_augment.weight")?,
        widths: resolutions.iter().map(width).collect::<Result<_>>()?,
        num_blocks: look.count(|index| block(image_size, index, "conv0")),
        attn_resolutions: resolutions.iter().copied().filter(|&r| look.has(&block(r, 0, "qkv"))).collect(),
        resolutions,
    })
}

/// R of `enc.RxR_conv.weight`.
fn stem_resolution(name: &str) -> Option<i64> {
    let (rows, columns) = name.strip_prefix("enc.")?.strip_suffix("_conv.weight")?.split_once('x')?;
    rows.parse().ok().filter(|size| rows == columns && (1..=1 << 16).contains(size))
}

/// `part` as a multiple of `whole`.
fn multiple(what: &str, part: i64, whole: i64) -> Result<i64> {
    match part % whole {
        0 => Ok(part / whole),
        _ => Err(format!("{what} has {part} channels, expected a multiple of {whole}")),
    }
}

fn dhariwal(look: &Lookup<'_>, common: Common) -> Result<DhariwalUnetSpec> {
    let model_channels = common.noise;
    let outputs = look.side("out_conv.weight", 4, 0)?;
    if outputs == 2 * common.image_channels {
        return Err(format!(
            "it predicts variances too ({outputs} outputs for images of {} channels), as iDDPM's networks do; \
             no sampler here takes them",
            common.image_channels
        ));
    }
    Ok(DhariwalUnetSpec {
        image_size: common.image_size,
        image_channels: common.image_channels,
        num_classes: common.num_classes,
        augment_dim: common.augment_dim,
        model_channels,
        channel_mult: multipliers(model_channels, &common.widths)?,
        channel_mult_emb: multiple("map_layer0", common.emb, model_channels)?,
        num_blocks: common.num_blocks,
        attn_resolutions: common.attn_resolutions,
        dropout: 0.0,
        label_dropout: 0.0,
    })
}

fn song(look: &Lookup<'_>, common: Common, tensors: &TensorMap) -> Result<SongUnetSpec> {
    let model_channels = common.stem;
    let below = common.resolutions.get(1).copied();
    let of_level =
        |prefix: &str, part: &str| below.is_some_and(|r| look.has(&format!("{prefix}.{r}x{r}_{part}")));
    Ok(SongUnetSpec {
        image_size: common.image_size,
        image_channels: common.image_channels,
        num_classes: common.num_classes,
        augment_dim: common.augment_dim,
        model_channels,
        channel_mult: multipliers(model_channels, &common.widths)?,
        channel_mult_emb: multiple("map_layer0", common.emb, model_channels)?,
        num_blocks: common.num_blocks,
        attn_resolutions: common.attn_resolutions,
        dropout: 0.0,
        label_dropout: 0.0,
        embedding: match look.has("map_noise.freqs") {
            true => NoiseEmbedding::Fourier { scale: 1.0 },
            false => NoiseEmbedding::Positional {},
        },
        channel_mult_noise: multiple("map_layer0's input", common.noise, model_channels)?,
        encoder: match (of_level("enc", "aux_residual.weight"), of_level("enc", "aux_skip.weight")) {
            (true, _) => Encoder::Residual,
            (_, true) => Encoder::Skip,
            _ => Encoder::Standard,
        },
        decoder: match of_level("dec", "aux_conv.weight") {
            true => Decoder::Skip,
            false => Decoder::Standard,
        },
        resample_filter: match below {
            Some(r) => taps(tensors, &format!("enc.{r}x{r}_down.conv0.resample_filter"))?,
            None => vec![1.0, 1.0],
        },
    })
}

/// The taps f of a filter outer(f, f)/(Σf)², scaled so that the smallest is 1.
fn taps(tensors: &TensorMap, name: &str) -> Result<Vec<f64>> {
    let filter = tensors.get(name).or_else(|| tensors.get(&format!("model.{name}")));
    let filter = filter.ok_or_else(|| format!("'{name}' is missing"))?;
    let size = filter.size();
    match size[..] {
        [1, 1, rows, columns] if rows == columns && (1..=64).contains(&rows) => {}
        _ => return Err(format!("'{name}' has shape {size:?}, expected a square filter")),
    }
    let sums = filter.to_kind(tch::Kind::Double).sum_dim_intlist([0i64, 1, 3].as_slice(), false, None);
    let sums = Vec::<f64>::try_from(&sums.contiguous()).map_err(|e| e.to_string())?;
    let least = sums.iter().copied().filter(|tap| *tap != 0.0).map(f64::abs).fold(f64::INFINITY, f64::min);
    let scaled = sums.iter().map(|tap| tap / least);
    // Float32 filters of small integers come out within rounding.
    let whole = |tap: f64| if (tap - tap.round()).abs() < 1e-4 { tap.round() } else { tap };
    Ok(scaled.map(whole).collect())
}
