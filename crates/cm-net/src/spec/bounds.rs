//! What the options of all networks must keep to.
//!
//! The bounds are far above any network's. They are there so that a file of a few bytes cannot claim a network that
//! takes hours or all memory to describe, and so that no product of sides overflows.

use crate::{Error, Result};

/// Longest side of an image or a weight.
pub(crate) const MAX_SIDE: i64 = 1 << 20;
/// Most residual blocks in a level.
pub(crate) const MAX_BLOCKS: i64 = 256;
/// Most levels.
const MAX_LEVELS: usize = 16;
/// Most taps of a resampling filter.
pub(super) const MAX_TAPS: usize = 64;

/// What all networks have.
pub(super) struct Common<'a> {
    pub(super) image_size: i64,
    pub(super) image_channels: i64,
    pub(super) num_classes: i64,
    pub(super) model_channels: i64,
    pub(super) channel_mult: &'a [i64],
    pub(super) num_blocks: i64,
    pub(super) attn_resolutions: &'a [i64],
    pub(super) dropout: f64,
}

impl Common<'_> {
    pub(super) fn validate(&self) -> Result<()> {
        within("image_size", self.image_size, 1, MAX_SIDE)?;
        within("image_channels", self.image_channels, 1, MAX_SIDE)?;
        within("num_classes", self.num_classes, 0, MAX_SIDE)?;
        within("model_channels", self.model_channels, 1, MAX_SIDE)?;
        within("num_blocks", self.num_blocks, 1, MAX_BLOCKS)?;
        let levels = self.channel_mult.len();
        if levels > MAX_LEVELS {
            let value = format!("[…] of {levels} levels");
            return Err(Error::option("channel_mult", value, format!("at most {MAX_LEVELS} levels")));
        }
        if self.channel_mult.is_empty() || self.channel_mult.iter().any(|mult| *mult < 1) {
            let value = format!("{:?}", self.channel_mult);
            return Err(Error::option("channel_mult", value, "a factor of at least 1 for each level"));
        }
        for mult in self.channel_mult {
            product("channel_mult", *mult, self.model_channels)?;
        }
        self.resolutions()?;
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::option("dropout", self.dropout, "a probability, 0 or more and below 1"));
        }
        Ok(())
    }

    /// Every level but the last is halved, and attention is at resolutions that there are.
    fn resolutions(&self) -> Result<()> {
        let halvings = self.channel_mult.len() as u32 - 1;
        let divisor = 1i64.checked_shl(halvings).filter(|d| *d > 0 && self.image_size % d == 0);
        if divisor.is_none() {
            let expected = format!("a multiple of 2^{halvings}, for {} levels", self.channel_mult.len());
            return Err(Error::option("image_size", self.image_size, expected));
        }
        let levels: Vec<i64> = (0..=halvings).map(|level| self.image_size >> level).collect();
        match self.attn_resolutions.iter().find(|resolution| !levels.contains(resolution)) {
            None => Ok(()),
            Some(resolution) => {
                let expected = format!("resolutions of this network's levels, out of {levels:?}");
                Err(Error::option("attn_resolutions", format!("[… {resolution} …]"), expected))
            }
        }
    }
}

pub(super) fn within(key: &'static str, value: i64, least: i64, most: i64) -> Result<()> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(Error::option(key, value, format!("at least {least} and at most {most}"))),
    }
}

/// A factor on `model_channels`, whose product is a side of a weight.
pub(super) fn product(key: &'static str, factor: i64, model_channels: i64) -> Result<()> {
    match factor.checked_mul(model_channels) {
        Some(1..=MAX_SIDE) => Ok(()),
        _ => {
            let expected = format!("a factor of at least 1 that gives at most {MAX_SIDE} channels");
            Err(Error::option(key, format!("{factor} (with model_channels = {model_channels})"), expected))
        }
    }
}

pub(super) fn even_channels(model_channels: i64) -> Result<()> {
    if model_channels % 2 == 0 {
        return Ok(());
    }
    Err(Error::option(
        "model_channels",
        model_channels,
        "an even number: half of it are sines of the noise level",
    ))
}

pub(super) fn label_dropout(probability: f64, num_classes: i64) -> Result<()> {
    if !(0.0..1.0).contains(&probability) {
        return Err(Error::option("label_dropout", probability, "a probability, 0 or more and below 1"));
    }
    if probability > 0.0 && num_classes == 0 {
        return Err(Error::option("label_dropout", probability, "0 for a network without classes"));
    }
    Ok(())
}
