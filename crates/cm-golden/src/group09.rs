//! Group 09: EDM's augmentation, from recorded draws.

use cm_data::augment::{Augment, AugmentSpec, Draws, Gated};
use serde::Deserialize;

use crate::close::{Tolerance, values};
use crate::golden::{Golden, Problem, Result, problem};
use crate::report::Checks;

/// Arguments of the reference's pipe; what is not given is off.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Arguments {
    #[serde(default = "certain")]
    p: f64,
    #[serde(default)]
    xflip: f64,
    #[serde(default)]
    yflip: f64,
    #[serde(default)]
    scale: f64,
    #[serde(default)]
    rotate_frac: f64,
    #[serde(default)]
    aniso: f64,
    #[serde(default)]
    translate_frac: f64,
}

fn certain() -> f64 {
    1.0
}

impl Arguments {
    fn spec(&self) -> AugmentSpec {
        let &Self { p, xflip, yflip, scale, rotate_frac: rotate, aniso, translate_frac: translate } = self;
        AugmentSpec { p, xflip, yflip, scale, rotate, aniso, translate }
    }
}

/// Hands out the recorded draws `draw.NN.<kind>` in their order.
struct Recorded<'a> {
    golden: &'a Golden,
    batch: usize,
    next: usize,
}

impl Recorded<'_> {
    /// The next draw, which has to be of this kind: `each` numbers for every image, `each` rows of them.
    fn take(&mut self, kind: &str, each: usize) -> Result<Vec<f64>> {
        let position = format!("draw.{:02}.", self.next);
        let found = self.golden.names_after(&position).next();
        if found != Some(kind) {
            let found = found.map_or("nothing".to_owned(), |kind| format!("'{position}{kind}'"));
            return problem(format!("expected '{position}{kind}', recorded is {found}"));
        }
        self.next += 1;
        let draw = values(&self.golden.input(&format!("{position}{kind}"))?);
        if draw.len() != each * self.batch {
            let (got, batch) = (draw.len(), self.batch);
            return problem(format!(
                "'{position}{kind}': {got} numbers, expected {each} for each of {batch} images"
            ));
        }
        Ok(draw)
    }

    fn uniform(&mut self) -> Result<Vec<f64>> {
        self.take("rand", 1)
    }

    fn coins(&mut self) -> Result<Vec<bool>> {
        let bit = |value: &f64| match *value {
            0.0 => Ok(false),
            1.0 => Ok(true),
            other => problem(format!("a coin shows 0 or 1, and {other} was recorded")),
        };
        self.take("randint", 1)?.iter().map(bit).collect()
    }

    /// The draws of every image, in the reference's order: those of the transforms that are on alone.
    fn draws(&mut self, spec: &AugmentSpec) -> Result<Vec<Draws>> {
        let mut all = vec![CLOSED; self.batch];
        if spec.xflip > 0.0 {
            let (coins, gates) = (self.coins()?, self.uniform()?);
            set(&mut all, |draws, i| draws.xflip = Gated { value: coins[i], gate: gates[i] });
        }
        if spec.yflip > 0.0 {
            let (coins, gates) = (self.coins()?, self.uniform()?);
            set(&mut all, |draws, i| draws.yflip = Gated { value: coins[i], gate: gates[i] });
        }
        if spec.scale > 0.0 {
            let (normals, gates) = (self.take("randn", 1)?, self.uniform()?);
            set(&mut all, |draws, i| draws.scale = Gated { value: normals[i], gate: gates[i] });
        }
        if spec.rotate > 0.0 {
            let (angles, gates) = (self.uniform()?, self.uniform()?);
            set(&mut all, |draws, i| draws.rotate = Gated { value: angles[i], gate: gates[i] });
        }
        if spec.aniso > 0.0 {
            let (normals, angles) = (self.take("randn", 1)?, self.uniform()?);
            let (gates, turned) = (self.uniform()?, self.uniform()?);
            set(&mut all, |draws, i| {
                draws.aniso = Gated { value: normals[i], gate: gates[i] };
                (draws.aniso_angle, draws.aniso_turned) = (angles[i], turned[i]);
            });
        }
        if spec.translate > 0.0 {
            let (normals, gates) = (self.take("randn", 2)?, self.uniform()?);
            let (x, y) = normals.split_at(self.batch);
            set(&mut all, |draws, i| draws.translate = Gated { value: [x[i], y[i]], gate: gates[i] });
        }
        Ok(all)
    }
}

/// What no transform makes use of.
const CLOSED: Draws = Draws {
    xflip: Gated { value: false, gate: 1.0 },
    yflip: Gated { value: false, gate: 1.0 },
    scale: Gated { value: 0.0, gate: 1.0 },
    rotate: Gated { value: 0.0, gate: 1.0 },
    aniso: Gated { value: 0.0, gate: 1.0 },
    aniso_angle: 0.0,
    aniso_turned: 1.0,
    translate: Gated { value: [0.0; 2], gate: 1.0 },
};

fn set(all: &mut [Draws], set_one: impl Fn(&mut Draws, usize)) {
    all.iter_mut().enumerate().for_each(|(i, draws)| set_one(draws, i));
}

/// 09: images and labels. Draws that are left over are reported as tensors that nothing uses.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let spec = golden.meta_json::<Arguments>("args")?.spec();
    let images = golden.input("images")?;
    let batch = *images.size().first().ok_or_else(|| Problem("tensor 'images' is a scalar".into()))? as usize;
    let draws = Recorded { golden, batch, next: 0 }.draws(&spec)?;
    let (out, labels) = Augment::new(spec)?.apply(&images, &draws)?;
    checks.tensor("out", &out, Tolerance::Abs(golden.tolerance("abs")?))?;
    // "fp32 abs 2e-5 on out, 1e-6 on labels".
    checks.tensor("labels", &labels, Tolerance::Abs(golden.tolerance("on out,")?))?;
    Ok(())
}
