//! 05f: sampling and editing as in Kinyugo's consistency models, through the library's loop.

use cm_model::{Cond, ConsistencyFn, ImageShape, Recorded, Sigma};
use cm_sampler::edit::{Inpaint, Stroke, edit_from, slerp};
use cm_sampler::{Hooks, Request, Times, edit};
use cm_schedule::{Boundary, NoiseCond, Precond, SigmaRange};
use tch::{Device, Kind, Tensor};

use super::image_shape;
use crate::close::Tolerance;
use crate::golden::{Golden, Result, problem};
use crate::report::Checks;

/// `f(x, σ) = c_skip·x + c_out·tanh(x/√(1 + σ²) + 0.2)`: the network sees x itself, without c_in.
struct Unscaled {
    shape: ImageShape,
    range: SigmaRange,
    precond: Boundary,
}

impl ConsistencyFn for Unscaled {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn sigma_range(&self) -> SigmaRange {
        self.range
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, _cond: &Cond) -> cm_model::Result<Tensor> {
        sigma.check(self.shape.check("third party's model", x)?)?;
        let of = |g: &dyn Fn(f64) -> f64| sigma.broadcast(x.device(), g);
        let c_skip = of(&|sigma| self.precond.scalings(sigma).c_skip);
        let c_out = of(&|sigma| self.precond.scalings(sigma).c_out);
        let inner = x * of(&|sigma| 1.0 / (1.0 + sigma * sigma).sqrt()) + 0.2;
        Ok(x * c_skip + inner.tanh() * c_out)
    }
}

/// 05f: plain sampling, inpainting and interpolation.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Abs(golden.tolerance("fp32 abs")?);
    let sigmas: Vec<f64> = golden.meta_json("sigmas")?;
    let Some(&first) = sigmas.first() else { return problem("metadata 'sigmas' is empty") };
    let range = SigmaRange::new(golden.meta("sigma_min")?, first)?;
    let precond = Boundary::new(golden.meta("sigma_data")?, range.min(), NoiseCond::QuarterLog)?;
    let (y, mask) = (golden.input("y")?, golden.input("mask")?);
    let model = Unscaled { shape: image_shape(golden, "y")?, range, precond };
    let times = Times::Sigmas(sigmas);
    let seeds: Vec<u64> = (0..y.size().first().copied().unwrap_or(0) as u64).collect();
    let request = Request { batch: seeds.len(), ..Request::new(&seeds) };

    // Sampling is inpainting of all of a black picture; the mask is 1 where the picture is made anew.
    for (name, picture, anew) in
        [("sample", y.zeros_like(), mask.ones_like()), ("inpaint", y.shallow_clone(), mask)]
    {
        let mut noise = Recorded::new(draws(golden, &format!("{name}_noise"))?);
        let hooks = Hooks { noise: Some(&mut noise), on_evaluation: None };
        let images = edit(&model, &Inpaint::new(&picture, &anew)?, &times, &request, hooks)?;
        noise.finish()?;
        checks.tensor(&format!("{name}_out"), &images, tolerance)?;
    }

    // Both ends get noise of the first level, and the whole batch has one angle. The share counts from b to a.
    let mut noise = draws(golden, "interp_noise")?.into_iter();
    let (Some(on_a), Some(on_b)) = (noise.next(), noise.next()) else {
        return problem("tensor 'interp_noise' has fewer than two draws");
    };
    let (a, b) = (golden.input("a")? + on_a * first, golden.input("b")? + on_b * first);
    let start = slerp(&b, &a, golden.meta("ab_ratio")?)?;
    let mut noise = Recorded::new(noise);
    let hooks = Hooks { noise: Some(&mut noise), on_evaluation: None };
    let request = Request { clip: false, ..request };
    let images = edit_from(&model, &Stroke::new(&start)?, &times, &start, &request, hooks)?;
    noise.finish()?;
    checks.tensor("interp_out", &images, tolerance)?;
    Ok(())
}

/// The recorded draws `[K, B, C, H, W]`, one by one.
fn draws(golden: &Golden, name: &str) -> Result<Vec<Tensor>> {
    let noise = golden.input(name)?.to_kind(Kind::Float);
    match noise.dim() {
        5 => Ok(noise.unbind(0)),
        _ => problem(format!("tensor '{name}' has shape {:?}, expected [K, B, C, H, W]", noise.size())),
    }
}
