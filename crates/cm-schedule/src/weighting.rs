//! Loss weights λ as functions of the noise level.

use serde::{Deserialize, Serialize};

/// The weight of one sample's loss.
///
/// In a file it is a word: `weighting = "inverse_step"`.
///
/// OpenAI's released losses evaluate the weight at the larger level of a pair; the paper's λ is 1, where the choice
/// makes no difference. [`weight`](Self::weight) takes both levels, and every rule but
/// [`InverseStep`](Self::InverseStep) reads the larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// λ = 1: discrete CD and CT (Consistency Models, section 4).
    Uniform,
    /// λ = σ⁻², the signal-to-noise ratio; also the weight of the VE and VP losses.
    Snr,
    /// λ = σ⁻² + 1.
    #[serde(rename = "snr_plus_1")]
    SnrPlus1,
    /// λ = σ⁻² + σ_d⁻² = (σ² + σ_d²)/(σ σ_d)² = 1/c_out²: EDM's loss weight (Table 1), which makes the first
    /// loss of a network equal at all levels; also ECT's for ImageNet-64.
    Karras,
    /// λ = max(σ⁻², 1): progressive distillation (arXiv 2202.00512, section 4).
    TruncatedSnr,
    /// λ = 1/(σ − next σ): iCT (arXiv 2310.14189, section 3.1), and ECT with 1/(t − r) for CIFAR-10.
    InverseStep,
}

impl Weighting {
    /// λ for a sample at `sigma` whose target lies at `next_sigma` < `sigma`.
    ///
    /// ```
    /// use cm_schedule::weighting::Weighting;
    /// // 1/0.25 + 1/0.25 at σ = σ_d = 0.5, and 1/(0.5 − 0.4).
    /// assert_eq!(Weighting::Karras.weight(0.5, 0.4, 0.5), 8.0);
    /// assert!((Weighting::InverseStep.weight(0.5, 0.4, 0.5) - 10.0).abs() < 1e-12);
    /// ```
    #[must_use]
    pub fn weight(self, sigma: f64, next_sigma: f64, sigma_data: f64) -> f64 {
        let snr = 1.0 / (sigma * sigma);
        match self {
            Weighting::Uniform => 1.0,
            Weighting::Snr => snr,
            Weighting::SnrPlus1 => snr + 1.0,
            Weighting::Karras => snr + 1.0 / (sigma_data * sigma_data),
            Weighting::TruncatedSnr => snr.max(1.0),
            Weighting::InverseStep => 1.0 / (sigma - next_sigma),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Edm, KarrasGrid, NoiseCond, Precond};

    #[test]
    fn karras_is_one_over_c_out_squared() {
        let edm = Edm::new(0.5, NoiseCond::QuarterLog).unwrap();
        for sigma in KarrasGrid::EDM.descending(20) {
            let c_out = edm.scalings(sigma).c_out;
            assert!((Weighting::Karras.weight(sigma, 0.0, 0.5) * c_out * c_out - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn values_by_hand() {
        let cases = [
            (Weighting::Uniform, 1.0),
            (Weighting::Snr, 0.0625),
            (Weighting::SnrPlus1, 1.0625),
            (Weighting::Karras, 4.0625),
            (Weighting::TruncatedSnr, 1.0),
            (Weighting::InverseStep, 1.0 / 3.0),
        ];
        for (weighting, want) in cases {
            assert_eq!(weighting.weight(4.0, 1.0, 0.5), want, "{weighting:?}");
        }
        assert_eq!(Weighting::TruncatedSnr.weight(0.5, 0.1, 0.5), 4.0);
    }

    /// The first two of iCT's weights at N = 11 in its golden file, which start at the smallest level.
    #[test]
    fn inverse_steps_of_ict() {
        let levels = KarrasGrid::EDM.ascending(11);
        for (i, want) in [67.931_313, 14.627_057].into_iter().enumerate() {
            let got = Weighting::InverseStep.weight(levels[i + 1], levels[i], 0.5);
            assert!((got / want - 1.0).abs() < 2e-6, "{i}: {got}");
        }
    }

    #[test]
    fn names_in_files() {
        for (weighting, name) in [
            (Weighting::SnrPlus1, "\"snr_plus_1\""),
            (Weighting::TruncatedSnr, "\"truncated_snr\""),
            (Weighting::InverseStep, "\"inverse_step\""),
        ] {
            assert_eq!(serde_json::to_string(&weighting).unwrap(), name);
            assert_eq!(serde_json::from_str::<Weighting>(name).unwrap(), weighting);
        }
    }
}
