//! Which noise levels are stepped through, and in which coordinates: the columns of EDM's Table 1.

use serde::Deserialize;

/// Which noise levels a sampler steps through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Discretization {
    /// Even steps of t from 1 down to ε_s in the VP schedule.
    Vp,
    /// Even steps of ln σ² (VE of Song et al.).
    Ve,
    /// Evenly spaced levels of iDDPM's table.
    Iddpm,
    /// Even steps of σ^(1/ρ).
    Edm,
}

/// σ(t): how the noise level grows with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// σ(t) = √(exp(β_d t²/2 + β_min t) − 1).
    Vp,
    /// σ(t) = √t.
    Ve,
    /// σ(t) = t.
    Linear,
}

/// s(t): the factor on the state, x = s·(image + σ·noise).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scaling {
    /// s(t) = 1/√(1 + σ(t)²): the variance of the state stays about 1.
    Vp,
    /// s(t) = 1.
    None,
}

/// How the ODE is followed through a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Solver {
    /// One evaluation.
    Euler,
    /// Two evaluations, the second at t̂ + α h; one in the last step, which goes to 0.
    Heun,
}

/// β_d and β_min of the VP schedule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Betas {
    d: f64,
    min: f64,
}

impl Betas {
    /// Those of the released VP models, from which the default range of VP levels comes.
    pub(super) const RELEASED: Self = Self { d: 19.9, min: 0.1 };

    /// The schedule that has σ(ε_s) = σ_min and σ(1) = σ_max.
    pub(super) fn fit(sigma_min: f64, sigma_max: f64, epsilon_s: f64) -> Self {
        let [low, high] = [sigma_min, sigma_max].map(|sigma| (sigma * sigma + 1.0).ln());
        let d = 2.0 * (low / epsilon_s - high) / (epsilon_s - 1.0);
        Self { d, min: high - 0.5 * d }
    }

    /// σ(t), with the cancellation of the released code: `exp_m1` would differ by 1e-12 at the lowest levels.
    pub(super) fn sigma(self, t: f64) -> f64 {
        (std::f64::consts::E.powf(0.5 * self.d * (t * t) + self.min * t) - 1.0).sqrt()
    }

    fn derivative(self, t: f64) -> f64 {
        0.5 * (self.min + self.d * t) * (self.sigma(t) + 1.0 / self.sigma(t))
    }

    fn inverse(self, sigma: f64) -> f64 {
        ((self.min * self.min + 2.0 * self.d * (sigma * sigma + 1.0).ln()).sqrt() - self.min) / self.d
    }
}

/// σ(t) and s(t) together: the coordinates in which the ODE is solved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Coordinates {
    pub(super) schedule: Schedule,
    pub(super) scaling: Scaling,
    pub(super) betas: Betas,
}

impl Coordinates {
    pub(super) fn sigma(&self, t: f64) -> f64 {
        match self.schedule {
            Schedule::Vp => self.betas.sigma(t),
            Schedule::Ve => t.sqrt(),
            Schedule::Linear => t,
        }
    }

    /// σ'(t).
    pub(super) fn sigma_derivative(&self, t: f64) -> f64 {
        match self.schedule {
            Schedule::Vp => self.betas.derivative(t),
            Schedule::Ve => 0.5 / t.sqrt(),
            Schedule::Linear => 1.0,
        }
    }

    /// The time of a level.
    pub(super) fn time(&self, sigma: f64) -> f64 {
        match self.schedule {
            Schedule::Vp => self.betas.inverse(sigma),
            Schedule::Ve => sigma * sigma,
            Schedule::Linear => sigma,
        }
    }

    pub(super) fn scale(&self, t: f64) -> f64 {
        match self.scaling {
            Scaling::Vp => 1.0 / (1.0 + self.sigma(t).powi(2)).sqrt(),
            Scaling::None => 1.0,
        }
    }

    /// s'(t).
    pub(super) fn scale_derivative(&self, t: f64) -> f64 {
        match self.scaling {
            Scaling::Vp => -self.sigma(t) * self.sigma_derivative(t) * self.scale(t).powi(3),
            Scaling::None => 0.0,
        }
    }
}

/// The levels of iDDPM's cosine schedule, as the ablation sampler makes them.
///
/// u_M = 0, u_{j−1} = √((u_j² + 1)/max(ā(j−1)/ā(j), C₁) − 1), ā(j) = sin²(πj/(2M(C₂ + 1))), where ā is computed in f32
/// and the rest in f64. It is not the table of the networks ([`crate::reference::Iddpm`]), which is f32 throughout.
#[derive(Debug, Clone, PartialEq)]
pub struct IddpmTable {
    levels: Vec<f64>,
}

impl Default for IddpmTable {
    /// M = 1000, C₁ = 0.001, C₂ = 0.008.
    fn default() -> Self {
        Self::new(1000, 0.001, 0.008, libm::sinf)
    }
}

impl IddpmTable {
    /// The table of `m` steps with sines by `sin`: these differ by an ulp of f32 between libraries, which moves levels by up to
    /// 10⁻⁵, and whoever compares more closely brings the sine of the other side.
    #[must_use]
    pub fn new(m: usize, c_1: f64, c_2: f64, sin: impl Fn(f32) -> f32) -> Self {
        let alpha_bar = |j: usize| {
            let angle = std::f32::consts::FRAC_PI_2 * j as f32 / m as f32 / (c_2 + 1.0) as f32;
            let sin = sin(angle);
            sin * sin
        };
        let mut levels = vec![0.0f64; m + 1];
        for j in (1..=m).rev() {
            let ratio = (alpha_bar(j - 1) / alpha_bar(j)).max(c_1 as f32);
            levels[j - 1] = ((levels[j] * levels[j] + 1.0) / f64::from(ratio) - 1.0).sqrt();
        }
        Self { levels }
    }

    /// `n` levels of the table that lie in the range, evenly spaced by index, the first and the last among them.
    pub(super) fn pick(&self, sigma_min: f64, sigma_max: f64, n: usize) -> Vec<f64> {
        let inside = |level: &&f64| (sigma_min..=sigma_max).contains(*level);
        let inside: Vec<f64> = self.levels.iter().filter(inside).copied().collect();
        let stride = inside.len().saturating_sub(1) as f64 / (n.max(2) - 1) as f64;
        let index = |i: usize| (stride * i as f64).round_ties_even() as usize;
        (0..n).filter_map(|i| inside.get(index(i)).copied()).collect()
    }
}
