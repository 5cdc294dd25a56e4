//! How fast a moving average of the weights forgets.

use crate::error::{Result, ensure, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// The rate β of a moving average of the weights, θ_ema ← β θ_ema + (1 − β) θ, after one optimisation step.
///
/// In a file: `{ kind = "beta", beta = 0.9999 }`, or
/// `{ kind = "half_life", halflife_images = 500000, rampup_ratio = 0.05 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EmaRule {
    /// The same β at every step: Consistency Models, iCT and ECT.
    Beta {
        /// β in [0, 1).
        beta: f64,
    },
    /// β = ½^(batch/h): a weight counts half after h images, whatever the batch size. With a ramp-up,
    /// h = min(`halflife_images`, `rampup_ratio` · images seen before the step), so that a young average forgets
    /// its random start, and the first step copies the weights (β = 0).
    ///
    /// # Source
    /// EDM (arXiv 2206.00364), in its released training loop.
    HalfLife {
        /// h, in images.
        halflife_images: f64,
        /// Share of the images seen so far that bounds h; none for no ramp-up.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rampup_ratio: Option<f64>,
    },
}
validated_serde!(EmaRule);

impl EmaRule {
    /// β of the step that takes the image count from `images_before` to `images_before` + `batch`.
    ///
    /// ```
    /// use cm_schedule::ema::EmaRule;
    /// let edm = EmaRule::HalfLife { halflife_images: 500_000.0, rampup_ratio: Some(0.05) };
    /// assert_eq!(edm.beta(0, 512), 0.0);
    /// // Half-life 0.05 · 10 240 = 512 images: one batch.
    /// assert_eq!(edm.beta(10_240, 512), 0.5);
    /// ```
    #[must_use]
    pub fn beta(&self, images_before: u64, batch: u64) -> f64 {
        match *self {
            EmaRule::Beta { beta } => beta,
            EmaRule::HalfLife { halflife_images, rampup_ratio } => {
                let bound = rampup_ratio.map_or(f64::INFINITY, |ratio| images_before as f64 * ratio);
                // The floor makes the exponent of the first step huge instead of infinite.
                0.5f64.powf(batch as f64 / halflife_images.min(bound).max(1e-8))
            }
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            EmaRule::Beta { beta } => {
                let advice = "1 would keep the first weights for ever; the papers use 0.999 to 0.99995";
                ensure((0.0..1.0).contains(&beta), "beta", beta, "0 <= beta < 1", advice)
            }
            EmaRule::HalfLife { halflife_images, rampup_ratio } => {
                ensure_positive("halflife_images", halflife_images, "EDM uses 500000")?;
                match rampup_ratio {
                    Some(ratio) => {
                        ensure_positive("rampup_ratio", ratio, "EDM uses 0.05; leave it out for none")
                    }
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_life_does_not_depend_on_the_batch() {
        let rule = EmaRule::HalfLife { halflife_images: 4096.0, rampup_ratio: None };
        let small: f64 = (0..32).map(|i| rule.beta(i * 128, 128)).product();
        let large: f64 = (0..8).map(|i| rule.beta(i * 512, 512)).product();
        assert!((small - 0.5).abs() < 1e-12 && (large - 0.5).abs() < 1e-12);
    }

    #[test]
    fn the_ramp_ends_where_it_meets_the_half_life() {
        let ramp = EmaRule::HalfLife { halflife_images: 500_000.0, rampup_ratio: Some(0.05) };
        let flat = EmaRule::HalfLife { halflife_images: 500_000.0, rampup_ratio: None };
        assert!(ramp.beta(9_999_872, 512) < flat.beta(9_999_872, 512));
        assert_eq!(ramp.beta(10_000_000, 512), flat.beta(10_000_000, 512));
        // ½^(512/500000)
        assert!((flat.beta(0, 512) - 0.999_290_47).abs() < 1e-8);
        assert_eq!(EmaRule::Beta { beta: 0.9999 }.beta(0, 512), 0.9999);
    }

    #[test]
    fn files_are_checked() {
        for text in [
            r#"{"kind":"beta","beta":0.9999}"#,
            r#"{"kind":"half_life","halflife_images":500000.0,"rampup_ratio":0.05}"#,
            r#"{"kind":"half_life","halflife_images":500000.0}"#,
        ] {
            let rule: EmaRule = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&rule).unwrap(), text);
        }
        for (text, part) in [
            (r#"{"kind":"beta","beta":1.0}"#, "beta = 1: expected 0 <= beta < 1"),
            (r#"{"kind":"half_life","halflife_images":0}"#, "halflife_images = 0"),
            (r#"{"kind":"half_life","halflife_images":9,"rampup_ratio":-1}"#, "rampup_ratio = -1"),
            (r#"{"kind":"half_life","halflife_images":9,"rampup":1}"#, "unknown field `rampup`"),
        ] {
            let error = serde_json::from_str::<EmaRule>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
