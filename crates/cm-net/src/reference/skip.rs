//! The skip forms of encoder and decoder (Karras et al. 2020, figure 7; option `skip` of Song et al. 2021): an
//! image travels beside the features and meets them at every level.

use cm_model::ParamPath;
use tch::Tensor;

use crate::layers::{Conv2d, Direction, LayerInit, Resample};
use crate::{Probe, Result};

/// Halves the image and adds a 1×1 convolution of it to the features.
#[derive(Debug)]
pub(crate) struct SkipEncoder {
    down: Resample,
    proj: Conv2d,
}

impl SkipEncoder {
    pub(crate) fn new(
        path: &ParamPath<'_>,
        resolution: &str,
        image_channels: i64,
        channels: i64,
        taps: &[f64],
        init: LayerInit,
    ) -> Result<Self> {
        let proj = path.sub(format!("{resolution}_aux_skip"));
        Ok(Self {
            down: Resample::new(&path.sub(format!("{resolution}_aux_down")), taps, Direction::Down)?,
            proj: Conv2d::new(&proj, image_channels, channels, 1, init)?,
        })
    }

    /// The new features and the halved image.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        image: &Tensor,
        resolution: &str,
        probe: Probe<'_>,
    ) -> (Tensor, Tensor) {
        let image = self.down.forward(image);
        probe(&format!("enc.{resolution}_aux_down"), &image);
        let added = self.proj.forward(&image);
        probe(&format!("enc.{resolution}_aux_skip"), &added);
        (x + added, image)
    }
}

/// Doubles the image that a coarser level of the decoder made.
#[derive(Debug)]
pub(crate) struct SkipDecoder {
    up: Resample,
}

impl SkipDecoder {
    pub(crate) fn new(path: &ParamPath<'_>, resolution: &str, taps: &[f64]) -> Result<Self> {
        let path = path.sub(format!("{resolution}_aux_up"));
        Ok(Self { up: Resample::new(&path, taps, Direction::Up)? })
    }

    pub(crate) fn forward(&self, image: &Tensor, resolution: &str, probe: Probe<'_>) -> Tensor {
        let image = self.up.forward(image);
        probe(&format!("dec.{resolution}_aux_up"), &image);
        image
    }
}
