//! How the learning rate changes as training goes.

use crate::error::{Result, ensure, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// The factor on the base learning rate at an optimisation step.
///
/// In a file: `{ kind = "constant" }` or `{ kind = "warmup", warmup_images = 10000000 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LrRule {
    /// 1 throughout: Consistency Models, iCT, and ECT on CIFAR-10.
    Constant {},
    /// min(images seen before the step/`warmup_images`, 1): EDM. The first step of a run has factor 0, as there.
    Warmup {
        /// Length of the ramp in images; above 0.
        warmup_images: f64,
    },
    /// 1/√max(step/`reference_steps`, 1): constant at first, then falling; ECT on ImageNet-64, after EDM2
    /// (arXiv 2312.02696).
    InverseSqrt {
        /// The step at which the fall begins; above 0.
        reference_steps: f64,
    },
    /// 1 − step/total: falling to 0 over the run, or over each stage of a progressive distillation
    /// (arXiv 2202.00512, appendix C), whose steps and length then stand for the run's.
    Linear {},
    /// A linear ramp over `warmup_steps`, times ½(1 + cos(π·step/total)), which falls to 0 over the run: what short
    /// runs do well with, since their averages of the weights have no time to settle.
    Cosine {
        /// Length of the ramp in steps; 0 for none.
        warmup_steps: f64,
    },
}
validated_serde!(LrRule);

impl LrRule {
    /// The factor at optimisation step `step` (from 0) of a run of `total_steps`, before which the run has seen
    /// `images_before` images.
    ///
    /// ```
    /// use cm_schedule::lr::LrRule;
    /// let edm = LrRule::Warmup { warmup_images: 10e6 };
    /// assert_eq!([0, 5_000_000, 20_000_000].map(|images| edm.factor(0, images, 100)), [0.0, 0.5, 1.0]);
    /// let ect = LrRule::InverseSqrt { reference_steps: 2000.0 };
    /// assert_eq!([0, 2000, 8000].map(|step| ect.factor(step, 0, 10_000)), [1.0, 1.0, 0.5]);
    /// let cosine = LrRule::Cosine { warmup_steps: 10.0 };
    /// assert_eq!([0, 50, 100].map(|step| cosine.factor(step, 0, 100)), [0.1, 0.5, 0.0]);
    /// assert_eq!([0, 50, 100].map(|step| LrRule::Linear {}.factor(step, 0, 100)), [1.0, 0.5, 0.0]);
    /// ```
    #[must_use]
    pub fn factor(&self, step: u64, images_before: u64, total_steps: u64) -> f64 {
        match *self {
            LrRule::Constant {} => 1.0,
            // The floor is EDM's, whose own switch for "no warm-up" is a length of 0: the first step then has
            // factor 0 and the others 1.
            LrRule::Warmup { warmup_images } => (images_before as f64 / warmup_images.max(1e-8)).min(1.0),
            LrRule::InverseSqrt { reference_steps } => 1.0 / (step as f64 / reference_steps).max(1.0).sqrt(),
            LrRule::Linear {} => 1.0 - (step as f64 / total_steps.max(1) as f64).min(1.0),
            LrRule::Cosine { warmup_steps } => {
                let ramp = ((step as f64 + 1.0) / warmup_steps.max(1.0)).min(1.0);
                let share = (step as f64 / total_steps as f64).min(1.0);
                ramp * 0.5 * (1.0 + (std::f64::consts::PI * share).cos())
            }
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            LrRule::Constant {} | LrRule::Linear {} => Ok(()),
            LrRule::Warmup { warmup_images } => {
                ensure_positive("warmup_images", warmup_images, "for no warm-up use kind = \"constant\"")
            }
            LrRule::InverseSqrt { reference_steps } => {
                ensure_positive("reference_steps", reference_steps, "for no decay use kind = \"constant\"")
            }
            LrRule::Cosine { warmup_steps } => ensure(
                warmup_steps >= 0.0 && warmup_steps.is_finite(),
                "warmup_steps",
                warmup_steps,
                "0 or more",
                "use 0 for no ramp",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_stay_in_the_unit_interval_and_change_one_way() {
        let rules = [LrRule::Warmup { warmup_images: 1e4 }, LrRule::InverseSqrt { reference_steps: 10.0 }];
        for (rule, rises) in rules.into_iter().zip([true, false]) {
            let factors: Vec<f64> = (0..1000).map(|step| rule.factor(step, step * 128, 1000)).collect();
            assert!(factors.iter().all(|f| (0.0..=1.0).contains(f)));
            assert!(factors.windows(2).all(|w| if rises { w[0] <= w[1] } else { w[0] >= w[1] }));
        }
        assert_eq!(LrRule::Constant {}.factor(7, 99, 1000), 1.0);
    }

    #[test]
    fn a_cosine_rises_through_its_ramp_and_ends_at_zero() {
        let rule = LrRule::Cosine { warmup_steps: 20.0 };
        let factors: Vec<f64> = (0..=1000).map(|step| rule.factor(step, 0, 1000)).collect();
        assert!(
            factors[..19].windows(2).all(|w| w[0] < w[1]) && factors[20..].windows(2).all(|w| w[0] > w[1])
        );
        assert!(factors[1000].abs() < 1e-12 && (factors[500] - 0.5).abs() < 1e-12);
    }

    /// EDM's loop with a ramp of no length, as its golden file has it.
    #[test]
    fn a_ramp_of_no_length_costs_one_step() {
        let rule = LrRule::Warmup { warmup_images: 0.0 };
        assert_eq!([0, 1, 128].map(|images| rule.factor(0, images, 1000)), [0.0, 1.0, 1.0]);
    }

    #[test]
    fn files_are_checked() {
        for text in [
            r#"{"kind":"constant"}"#,
            r#"{"kind":"warmup","warmup_images":1e7}"#,
            r#"{"kind":"inverse_sqrt","reference_steps":2000}"#,
            r#"{"kind":"cosine","warmup_steps":50}"#,
        ] {
            let rule: LrRule = serde_json::from_str(text).unwrap();
            let again: LrRule = serde_json::from_str(&serde_json::to_string(&rule).unwrap()).unwrap();
            assert_eq!(rule, again);
        }
        for (text, part) in [
            (r#"{"kind":"warmup","warmup_images":0}"#, "use kind = \"constant\""),
            (r#"{"kind":"inverse_sqrt","reference_steps":-1}"#, "reference_steps = -1"),
            (r#"{"kind":"cosine","warmup_steps":-1}"#, "warmup_steps = -1"),
            (r#"{"kind":"constant","lr":1}"#, "unknown field `lr`"),
        ] {
            let error = serde_json::from_str::<LrRule>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
