//! Each edit as a function of pictures: for `cm edit`, and for whatever else shows what a model can do.

use anyhow::Result;
use cm_model::{ConsistencyFn, NoiseSource, Philox, Site};
use cm_sampler::edit::{
    Colorize, Compose, Inpaint, Measurement, Stroke, SuperRes, default_times, denoise, estimate_sigma,
    interpolate, stroke_times, within_range,
};
use cm_sampler::{Hooks, Progress, Request, Times};
use cm_schedule::Purpose;
use tch::{Kind, Tensor};

use crate::pictures::{Cell, Sheet};
use crate::ui::Bar;

/// Sheets of more results than this would be too large to look at.
const SHEET_MOST: usize = 60;

/// A consistency model, and the results that are wanted of it.
pub struct Editor<'a> {
    /// The model.
    pub f: &'a dyn ConsistencyFn,
    /// The exponent of its grid of noise levels.
    pub rho: f64,
    /// A result for each.
    pub seeds: &'a [u64],
    /// A class for each, for a conditional model.
    pub labels: Option<&'a [i64]>,
    /// Number of images that go through the model together.
    pub batch: usize,
    /// Time points; the usual ones of the edit if there are none.
    pub times: Option<Times>,
}

/// What an edit gave: `[N, C, H, W]` in [−1, 1] up to 0.001, and the sheet that shows how.
pub struct Edited {
    /// The results.
    pub results: Tensor,
    /// Input, measurement and results.
    pub sheet: Sheet,
}

/// A picture to enlarge: one of low resolution, or a full one that is degraded first.
pub enum Small<'a> {
    /// `[1, C, H/p, W/p]`.
    Low(&'a Tensor),
    /// `[1, C, H, W]`.
    Full(&'a Tensor),
}

/// What is known when several measurements are composed; all of it is measured on one picture.
#[derive(Default)]
pub struct Known {
    /// The picture itself where this `[1, 1, H, W]` is 0.
    pub outside: Option<Tensor>,
    /// Its luma.
    pub luma: bool,
    /// The means of patches of this side.
    pub factor: Option<i64>,
}

impl Editor<'_> {
    fn request(&self) -> Request<'_> {
        Request { labels: self.labels, batch: self.batch, ..Request::new(self.seeds) }
    }

    /// Time points of an edit that imposes something.
    pub fn times(&self) -> Times {
        self.times.clone().unwrap_or_else(|| default_times(self.f.shape(), self.rho))
    }

    /// The loop with a measurement, its results brought into the range of pictures.
    fn run(&self, measurement: &dyn Measurement, times: &Times) -> Result<Tensor> {
        let mut bar = None::<Bar>;
        let mut show = |seen: &Progress<'_>| {
            let total = (seen.total * seen.evaluations) as u64;
            let done = seen.images.start * seen.evaluations + seen.images.len() * (seen.evaluation + 1);
            let bar = bar.get_or_insert_with(|| Bar::new("edit", "evaluations", 0, total));
            bar.set(done as u64, format!("σ {:.3}", seen.sigma));
        };
        let hooks = Hooks { noise: None, on_evaluation: Some(&mut show) };
        let results = cm_sampler::edit(self.f, measurement, times, &self.request(), hooks)?;
        if let Some(bar) = bar {
            bar.finish();
        }
        Ok(within_range(measurement, &results, 0..self.seeds.len())?)
    }

    /// The results below their seeds.
    fn edited(&self, left: Vec<Cell>, results: Tensor) -> Edited {
        let caption = |seed: &u64| format!("seed {seed}");
        let shown = self.seeds.iter().zip(0..).take(SHEET_MOST);
        let cells = shown.map(|(seed, i)| Cell::new(caption(seed), &results.get(i)));
        let sheet = Sheet { left, cells: cells.collect() };
        Edited { results, sheet }
    }

    /// Makes `picture` `[1, C, H, W]` anew where `anew` `[1, 1, H, W]` is 1, and blends where it is between.
    pub fn inpaint(&self, picture: &Tensor, anew: &Tensor) -> Result<Edited> {
        let measurement = Inpaint::new(picture, anew)?;
        let left = vec![Cell::new("input", picture), Cell::new("measurement", &measurement.measure(0..1)?)];
        Ok(self.edited(left, self.run(&measurement, &self.times())?))
    }

    /// Continues `picture` `[1, C, h, w]`, put on the model's canvas at (left, top) with `soft` pixels of its edges
    /// blended.
    pub fn outpaint(&self, picture: &Tensor, left: usize, top: usize, soft: usize) -> Result<Edited> {
        let measurement = Inpaint::outpaint(picture, self.f.shape(), left, top, soft)?;
        let left = vec![Cell::new("input", picture), Cell::new("measurement", &measurement.measure(0..1)?)];
        Ok(self.edited(left, self.run(&measurement, &self.times())?))
    }

    /// Colours `picture` `[1, 3, H, W]`, of which the luma is kept.
    pub fn colorize(&self, picture: &Tensor) -> Result<Edited> {
        let measurement = Colorize::of(picture)?;
        let left = vec![Cell::new("input", picture), Cell::new("measurement", &measurement.grey())];
        Ok(self.edited(left, self.run(&measurement, &self.times())?))
    }

    /// Enlarges a picture by `factor`.
    pub fn superres(&self, picture: &Small<'_>, factor: i64) -> Result<Edited> {
        let (input, measurement) = match picture {
            Small::Low(low) => (low, SuperRes::from_low(low, factor)?),
            Small::Full(full) => (full, SuperRes::of(full, factor)?),
        };
        let left = vec![Cell::new("input", input), Cell::new("measurement", measurement.low())];
        Ok(self.edited(left, self.run(&measurement, &self.times())?))
    }

    /// Makes a picture of `drawing` `[1, C, H, W]`, which gets noise of standard deviation `sigma`.
    pub fn stroke(&self, drawing: &Tensor, sigma: f64) -> Result<Edited> {
        let times = self.times.clone().unwrap_or_else(|| stroke_times(sigma, self.f.sigma_range()));
        let start = times.plan(self.f.sigma_range())?.evaluation_sigmas().first().copied().unwrap_or(sigma);
        let noisy = with_noise(self.f, drawing, start, self.seeds.first().copied().unwrap_or(0))?;
        let left = vec![Cell::new("drawing", drawing), Cell::new(format!("noise {start:.3}"), &noisy)];
        Ok(self.edited(left, self.run(&Stroke::new(drawing)?, &times)?))
    }

    /// Keeps of `picture` `[1, C, H, W]` all that is in `known`.
    pub fn compose(&self, picture: &Tensor, known: &Known) -> Result<Edited> {
        let mut parts: Vec<Box<dyn Measurement + Send>> = Vec::new();
        if let Some(outside) = &known.outside {
            parts.push(Box::new(Inpaint::new(picture, outside)?));
        }
        if known.luma {
            parts.push(Box::new(Colorize::of(picture)?));
        }
        if let Some(factor) = known.factor {
            parts.push(Box::new(SuperRes::of(picture, factor)?));
        }
        let measurement = Compose::new(parts)?;
        let left = vec![Cell::new("input", picture), Cell::new("measurement", &measurement.measure(0..1)?)];
        Ok(self.edited(left, self.run(&measurement, &self.times())?))
    }

    /// Takes noise of level `sigma` from `picture` `[1, C, H, W]`; `clean` is shown beside it if it is known.
    pub fn denoise(&self, picture: &Tensor, sigma: f64, clean: Option<&Tensor>) -> Result<Edited> {
        let labels = self.labels.map(|labels| &labels[..1]);
        let results = denoise(self.f, picture, sigma, labels)?;
        let mut left: Vec<Cell> = clean.map(|clean| Cell::new("input", clean)).into_iter().collect();
        left.push(Cell::new(if clean.is_some() { "with noise" } else { "input" }, picture));
        let cells = vec![Cell::new(format!("sigma {sigma:.3}"), &results)];
        Ok(Edited { results, sheet: Sheet { left, cells } })
    }

    /// `frames` images from the first seed to the second.
    pub fn interpolate(&self, frames: usize) -> Result<Edited> {
        let results = interpolate(self.f, frames, &self.request())?;
        let caption = |frame: usize| match (self.seeds, frame) {
            ([a, _], 0) => format!("seed {a}"),
            ([_, b], _) if frame + 1 == frames => format!("seed {b}"),
            _ => format!("{:.2}", frame as f64 / (frames - 1) as f64),
        };
        // Of many frames every so many, so that both ends are among them.
        let every = (frames - 1).div_ceil(SHEET_MOST - 1).max(1);
        let shown = (0..frames).filter(|frame| frame % every == 0 || frame + 1 == frames);
        let cells = shown.map(|frame| Cell::new(caption(frame), &results.get(frame as i64))).collect();
        Ok(Edited { results, sheet: Sheet { left: Vec::new(), cells } })
    }
}

/// `picture` with noise of standard deviation `sigma`, as the seed draws it.
pub fn with_noise(f: &dyn ConsistencyFn, picture: &Tensor, sigma: f64, seed: u64) -> Result<Tensor> {
    let site = Site { samples: &[seed], step: 0, purpose: Purpose::Sample };
    let noise = Philox { seed: 0, device: picture.device() }.normal(f.shape(), &site)?;
    Ok(picture + noise * sigma)
}

/// The noise level of one picture, estimated from its finest details.
pub fn noise_of(picture: &Tensor) -> Result<f64> {
    Ok(estimate_sigma(&picture.to_kind(Kind::Double))?.first().copied().unwrap_or(0.0))
}
