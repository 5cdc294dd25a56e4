//! What a network is told beside the image: the noise level, the class, the augmentation.

use std::f64::consts::TAU;

use cm_model::torch::rng;
use cm_model::{Cond, Error, Result};
use tch::{Device, Kind, Tensor};

use crate::layers::Linear;

/// Which frequencies a positional embedding has; both start at 1 and have `half` members.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Frequencies {
    /// 10000^(−j/(half − 1)), the last one is 1/10000: SongUNet.
    Closed,
    /// 10000^(−j/half): ADM in EDM.
    Open,
    /// exp(−ln 10000·j/half): the same numbers with the rounding of OpenAI's code.
    OpenExp,
}

impl Frequencies {
    /// `[half]` float32. The rounding of the published code is kept: times a noise label of 1000 it shows.
    pub(crate) fn tensor(self, half: i64, device: Device) -> Tensor {
        let index = Tensor::arange(half, (Kind::Float, Device::Cpu));
        let frequencies = match self {
            Frequencies::Closed => Tensor::pow_scalar(1e-4, &(index / (half - 1) as f64)),
            Frequencies::Open => Tensor::pow_scalar(1e-4, &(index / half as f64)),
            Frequencies::OpenExp => (index * -10_000f64.ln() / half as f64).exp(),
        };
        frequencies.to_device(device)
    }
}

/// `[B, half]` angles from noise labels `[B]`.
pub(crate) fn angles(c_noise: &Tensor, frequencies: &Tensor) -> Tensor {
    c_noise.to_kind(Kind::Float).view([-1, 1]) * frequencies.view([1, -1])
}

/// Angles of random Fourier features, `2π·c_noise·frequency` (Tancik et al. 2020).
pub(crate) fn fourier_angles(c_noise: &Tensor, frequencies: &Tensor) -> Tensor {
    angles(c_noise, &(frequencies * TAU))
}

/// `[sin, cos]` as SongUNet has them.
pub(crate) fn sines_first(angles: &Tensor) -> Tensor {
    Tensor::cat(&[angles.sin(), angles.cos()], 1)
}

/// `[cos, sin]` as the ADM networks have them.
pub(crate) fn cosines_first(angles: &Tensor) -> Tensor {
    Tensor::cat(&[angles.cos(), angles.sin()], 1)
}

/// Checks that there is one noise label for each image.
pub(crate) fn check_noise_labels(c_noise: &Tensor, batch: i64) -> Result<()> {
    if c_noise.size() == [batch] {
        return Ok(());
    }
    Err(Error::Shape { what: "noise labels".into(), expected: format!("[{batch}]"), got: c_noise.size() })
}

/// Labels that were handed to a network that has no use for them are a mistake of the caller.
pub(crate) fn refuse_labels(cond: &Cond) -> Result<()> {
    match &cond.labels {
        None => Ok(()),
        Some(labels) => Err(Error::Value {
            what: "class labels".into(),
            expected: "none, the network is unconditional".into(),
            got: format!("labels of shape {:?}", labels.size()),
        }),
    }
}

/// Class labels as rows `[B, classes]`, in training with whole rows set to 0 with probability `dropout`, so that
/// the network learns the unconditional answer beside the others.
pub(crate) fn class_rows(
    cond: &Cond,
    batch: i64,
    classes: i64,
    dropout: f64,
    device: Device,
) -> Result<Tensor> {
    let rows = cond.one_hot(batch, classes, device)?;
    if dropout == 0.0 {
        return Ok(rows);
    }
    let keep = rng::uniform_rows(batch, device).ge(dropout);
    Ok(rows * keep.to_kind(Kind::Float))
}

/// Adds the embedded augmentation parameters; none given means zeros, as when sampling.
pub(crate) fn add_augment(
    emb: Tensor,
    cond: &Cond,
    batch: i64,
    dim: i64,
    map: Option<&Linear>,
) -> Result<Tensor> {
    let Some(augment) = &cond.augment else { return Ok(emb) };
    match map {
        Some(map) if augment.size() == [batch, dim] => {
            let augment = augment.to_device(emb.device()).to_kind(Kind::Float);
            Ok(emb + map.forward_f32(&augment))
        }
        _ => Err(Error::Shape {
            what: "augmentation parameters".into(),
            expected: match map {
                Some(_) => format!("[{batch}, {dim}]"),
                None => "none, the network does not take any".into(),
            },
            got: augment.size(),
        }),
    }
}

/// As [`refuse_labels`], for augmentation parameters.
pub(crate) fn refuse_augment(cond: &Cond) -> Result<()> {
    match &cond.augment {
        None => Ok(()),
        Some(augment) => Err(Error::Shape {
            what: "augmentation parameters".into(),
            expected: "none, the network does not take any".into(),
            got: augment.size(),
        }),
    }
}
