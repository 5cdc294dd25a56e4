//! What an edit starts from: pictures, masks, time points.

use std::path::Path;

use anyhow::{Result, bail, ensure};
use cm_data::resize::fit;
use cm_data::transform::{self, Plain};
use cm_data::{Channels, Filter, Fit, Shape, batch};
use cm_model::ImageShape;
use cm_sampler::Times;
use tch::{Device, Tensor};

use crate::args::edit::{FitChoice, WalkArgs};

/// A file, read and not yet of any other size.
pub struct Picture {
    name: String,
    plain: Plain,
}

impl Picture {
    /// Reads a picture of any kind.
    pub fn read(path: &Path) -> Result<Self> {
        Ok(Self { name: path.display().to_string(), plain: transform::read(path)? })
    }

    /// The picture `[1, C, H, W]` of `shape`; what is done to its size is said.
    pub fn to_tensor(&self, shape: ImageShape, choice: FitChoice, needs: &str) -> Result<Tensor> {
        let channels = match shape.channels {
            1 => Channels::Grey,
            3 => Channels::Rgb,
            n => bail!("the model's images have {n} channels; pictures have 1 or 3"),
        };
        let (height, width) = (shape.height as usize, shape.width as usize);
        let (have_height, have_width) = self.plain.size();
        let fits = (have_height, have_width) == (height, width);
        let sizes = format!("{}: {have_width}x{have_height} pixels", self.name);
        ensure!(fits || choice != FitChoice::Exact, "{sizes}, expected {width}x{height}: {needs}");
        if !fits {
            let how = if choice == FitChoice::Crop { "middle, scaled" } else { "stretched" };
            eprintln!("{sizes}, {how} to {width}x{height}");
        }
        let plain = self.plain.clone().into_channels(channels);
        let plain = fit(plain, height, width, fit_of(choice), Filter::Lanczos, &self.name)?;
        let shape = Shape { channels: channels.count(), height, width };
        Ok(batch::to_tensor(&plain.to_chw(), shape, Device::Cpu)?)
    }

    /// Ω `[1, 1, H, W]` of the mask `self` for `picture`, which is fitted to `shape` as `choice` says: 1 where it is to be
    /// made anew.
    pub fn to_mask(
        &self,
        picture: &Picture,
        shape: ImageShape,
        choice: FitChoice,
        invert: bool,
    ) -> Result<Tensor> {
        let (height, width) = (shape.height as usize, shape.width as usize);
        let (size, of_picture) = (self.plain.size(), picture.plain.size());
        ensure!(
            size == of_picture || size == (height, width),
            "{}: {}x{} pixels; expected {}x{}, the size of {}, or {width}x{height}, that of the model's images",
            self.name,
            size.1,
            size.0,
            of_picture.1,
            of_picture.0,
            picture.name
        );
        let grey = self.plain.clone().into_channels(Channels::Grey);
        let marks = fit(grey, height, width, fit_of(choice), Filter::Area, &self.name)?.to_chw();
        let anew: Vec<f32> = marks.iter().map(|&v| f32::from((v >= 128) != invert)).collect();
        let marked = anew.iter().filter(|v| **v > 0.0).count();
        let word = if invert { "black" } else { "white" };
        ensure!(
            marked > 0,
            "{}: nothing is {word}, so that nothing would be made anew; --invert turns black and white round",
            self.name
        );
        ensure!(
            marked < anew.len(),
            "{}: all of it is {word} (alpha counts as white), so that nothing would be kept; --invert turns black and \
             white round",
            self.name
        );
        Ok(Tensor::from_slice(&anew).view([1, 1, shape.height, shape.width]))
    }
}

fn fit_of(choice: FitChoice) -> Fit {
    match choice {
        FitChoice::Crop => Fit::CenterCrop,
        FitChoice::Stretch => Fit::Stretch,
        FitChoice::Exact => Fit::Exact,
    }
}

/// The time points that were asked for, if any were.
pub fn times(walk: &WalkArgs, rho: f64) -> Result<Option<Times>> {
    match (&walk.sigmas, &walk.ts, walk.steps) {
        (Some(sigmas), _, _) => Ok(Some(Times::Sigmas(sigmas.clone()))),
        (None, Some(ts), steps) => {
            let last = ts.last().copied().unwrap_or(0);
            let steps = steps.unwrap_or_else(|| last.saturating_add(1));
            ensure!(
                last.saturating_add(1) >= steps,
                "--ts ends with {last}, and the last of {steps} points is {}: what is known would end up with noise on it",
                steps - 1
            );
            Ok(Some(Times::Indices { ts: ts.clone(), steps, rho }))
        }
        (None, None, Some(steps)) => Ok(Some(Times::Indices { ts: (0..steps).collect(), steps, rho })),
        (None, None, None) => Ok(None),
    }
}

/// A class for each of `seeds`: the one asked for, or all classes in turn. Where all results share what they show
/// (`single`), a conditional model has to be told.
pub fn labels(class: Option<i64>, seeds: &[u64], classes: i64, single: bool) -> Result<Option<Vec<i64>>> {
    match (class, classes) {
        (None, 0) => Ok(None),
        (Some(class), 0) => bail!("--class {class}: this model is unconditional; leave --class out"),
        (Some(class), n) if (0..n).contains(&class) => Ok(Some(vec![class; seeds.len()])),
        (Some(class), n) => bail!("--class {class}: expected 0 to {}", n - 1),
        (None, n) if single => bail!("--class is missing: this model has classes 0 to {}", n - 1),
        (None, n) => Ok(Some(seeds.iter().map(|seed| (seed % n as u64) as i64).collect())),
    }
}
