//! Preconditioning of older models, for their published files alone; no preset uses it.
//!
//! [`Vp`] and [`Iddpm`] were trained and released with fp32 tables, and in fp32 some of their formulas cancel so
//! strongly that the rounding is part of the model: VP's σ_min is 2⁻¹⁰ where exact arithmetic gives 0.0010005, its
//! noise label at σ = 0.003 is 0.0885 where exact arithmetic gives 0.0891, and iDDPM's table is off by up to
//! 4.8·10⁻⁴. What is computed in f32 below is so for this reason.
//!
//! # Source
//! EDM (arXiv 2206.00364) Table 1 and its released networks.

use super::{Precond, Scalings};
use crate::error::{Result, ensure};
use crate::sigma::SigmaRange;

/// Variance-preserving models (DDPM++ of Song et al.): D = x − σ F(x/√(σ² + 1), 999 τ(σ)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Vp;

impl Vp {
    const BETA_D: f32 = 19.9;
    const BETA_MIN: f32 = 0.1;
    /// The time at which the released models end: their σ_min is σ(10⁻⁵).
    const T_MIN: f32 = 1e-5;

    /// σ(τ) = √(exp(β_d τ²/2 + β_min τ) − 1) with β_d = 19.9 and β_min = 0.1, in f32.
    #[must_use]
    pub fn sigma(tau: f32) -> f32 {
        Self::sigma_with(tau, Self::BETA_D, Self::BETA_MIN)
    }

    /// [`sigma`](Self::sigma) with other β_d and β_min, as a training may have them.
    #[must_use]
    pub fn sigma_with(tau: f32, beta_d: f32, beta_min: f32) -> f32 {
        (libm::expf(0.5 * beta_d * (tau * tau) + beta_min * tau) - 1.0).sqrt()
    }

    /// τ(σ) = (√(β_min² + 2 β_d ln(1 + σ²)) − β_min)/β_d, the inverse of [`sigma`](Self::sigma), in f32.
    #[must_use]
    pub fn tau(sigma: f32) -> f32 {
        // β_min² and 2 β_d are rounded once, from their exact values, as constants of the released code are.
        const BETA_MIN_SQUARED: f32 = 0.01;
        const TWO_BETA_D: f32 = 39.8;
        let root = (BETA_MIN_SQUARED + TWO_BETA_D * libm::logf(1.0 + sigma * sigma)).sqrt();
        (root - Self::BETA_MIN) / Self::BETA_D
    }

    /// σ(10⁻⁵) to σ(1): 2⁻¹⁰ to 152.17, as the released models state it.
    #[must_use]
    pub fn sigma_range(self) -> SigmaRange {
        SigmaRange::trusted(f64::from(Self::sigma(Self::T_MIN)), f64::from(Self::sigma(1.0)))
    }
}

impl Precond for Vp {
    fn scalings(&self, sigma: f64) -> Scalings {
        Scalings {
            c_skip: 1.0,
            c_out: -sigma,
            c_in: 1.0 / (sigma * sigma + 1.0).sqrt(),
            c_noise: f64::from(999.0 * Self::tau(sigma as f32)),
        }
    }
}

/// Variance-exploding models (NCSN++ of Song et al.): D = x + σ F(x, ln(σ/2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ve;

impl Precond for Ve {
    fn scalings(&self, sigma: f64) -> Scalings {
        Scalings { c_skip: 1.0, c_out: sigma, c_in: 1.0, c_noise: (0.5 * sigma).ln() }
    }
}

/// Improved DDPM (Nichol and Dhariwal) with 1000 levels: D = x − σ F(x/√(σ² + 1), 999 − index of the nearest level).
#[derive(Debug, Clone, PartialEq)]
pub struct Iddpm {
    levels: Vec<f32>,
}

/// Number of training levels of [`Iddpm`].
const IDDPM_LEVELS: usize = 1000;

impl Default for Iddpm {
    fn default() -> Self {
        Self::new()
    }
}

impl Iddpm {
    /// The cosine schedule: u_1000 = 0, u_{j−1} = √((u_j² + 1)/max(ā(j−1)/ā(j), 0.001) − 1) with
    /// ā(j) = sin²(πj/(2·1000·1.008)), all in f32.
    ///
    /// Sine differs by an ulp between libraries, which leaves the table within 2·10⁻⁵ of the published one; a file
    /// that carries its own goes through [`from_levels`](Self::from_levels).
    #[must_use]
    pub fn new() -> Self {
        let mut levels = vec![0.0f32; IDDPM_LEVELS + 1];
        for j in (1..=IDDPM_LEVELS).rev() {
            let ratio = (alpha_bar(j - 1) / alpha_bar(j)).max(0.001);
            levels[j - 1] = ((levels[j] * levels[j] + 1.0) / ratio - 1.0).sqrt();
        }
        Iddpm { levels }
    }

    /// The same rule on the table that a published file carries (its buffer `u`).
    ///
    /// # Errors
    /// When the table does not have 1001 entries.
    pub fn from_levels(levels: &[f32]) -> Result<Self> {
        ensure(
            levels.len() == IDDPM_LEVELS + 1,
            "u",
            levels.len() as f64,
            "a table of 1001 levels",
            "only iDDPM models with 1000 training steps are published",
        )?;
        Ok(Iddpm { levels: levels.to_vec() })
    }

    /// The 1001 levels, falling from 20291 to 0.
    #[must_use]
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }

    /// The index of the level nearest to `sigma`, the first of two that are equally near.
    #[must_use]
    pub fn nearest(&self, sigma: f64) -> usize {
        let sigma = sigma as f32;
        let mut best = 0;
        for (index, level) in self.levels.iter().enumerate() {
            if (sigma - level).abs() < (sigma - self.levels[best]).abs() {
                best = index;
            }
        }
        best
    }
}

fn alpha_bar(j: usize) -> f32 {
    let angle = std::f32::consts::FRAC_PI_2 * j as f32 / IDDPM_LEVELS as f32 / 1.008;
    let sin = libm::sinf(angle);
    sin * sin
}

impl Precond for Iddpm {
    fn scalings(&self, sigma: f64) -> Scalings {
        Scalings {
            c_skip: 1.0,
            c_out: -sigma,
            c_in: 1.0 / (sigma * sigma + 1.0).sqrt(),
            c_noise: IDDPM_LEVELS as f64 - 1.0 - self.nearest(sigma) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vp_ends_where_fp32_puts_them() {
        let range = Vp.sigma_range();
        assert_eq!(range.min(), 2f64.powi(-10));
        assert!((range.max() - 152.166_976_9).abs() < 2e-5, "{}", range.max());
        // Exact arithmetic would give another σ_min.
        let exact = (0.5 * 19.9 * 1e-10 + 0.1 * 1e-5f64).exp_m1().sqrt();
        assert!((exact - 0.001_000_5).abs() < 1e-7);
    }

    /// (σ, noise label) that EDM's released class computes in fp32.
    #[test]
    fn vp_noise_labels_carry_the_rounding_of_fp32() {
        let golden = [(0.003, 0.088_536_218), (0.05, 11.582_556), (0.5, 144.669_11), (3.0, 475.581_76)];
        for (sigma, label) in golden {
            let got = Vp.scalings(sigma).c_noise;
            assert!((got / label - 1.0).abs() < 1e-5, "{sigma}: {got} {label}");
        }
    }

    #[test]
    fn vp_levels_and_times_are_inverse() {
        for tau in [0.01f32, 0.1, 0.5, 1.0] {
            assert!((Vp::tau(Vp::sigma(tau)) / tau - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn ve_tells_the_network_half_the_level() {
        let s = Ve.scalings(2.0);
        assert_eq!(s, Scalings { c_skip: 1.0, c_out: 2.0, c_in: 1.0, c_noise: 0.0 });
    }

    #[test]
    fn iddpm_table_and_labels() {
        let iddpm = Iddpm::new();
        let levels = iddpm.levels();
        assert!(levels.windows(2).all(|w| w[0] > w[1]));
        assert_eq!(levels[1000], 0.0);
        for (index, golden) in
            [(0, 20_291.172), (1, 641.662_4), (3, 213.886_11), (998, 0.009_347_75), (999, 0.006_422_34)]
        {
            assert!((levels[index] / golden - 1.0).abs() < 1e-4, "{index}: {}", levels[index]);
        }
        for (sigma, label) in [(0.01, 1.0), (0.05, 24.0), (0.5, 289.0), (3.0, 793.0), (70.0, 990.0)] {
            assert_eq!(iddpm.scalings(sigma).c_noise, label);
        }
        assert_eq!(Iddpm::from_levels(levels).unwrap(), iddpm);
        assert!(Iddpm::from_levels(&levels[1..]).is_err());
    }
}
