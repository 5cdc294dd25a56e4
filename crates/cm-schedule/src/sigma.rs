//! Noise levels: the range a model is defined on, and the grid of Karras et al. over it.

use crate::error::{Result, ensure, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// Why a smallest noise level of 0 is no harmless choice.
pub(crate) const SIGMA_MIN_ADVICE: &str =
    "c_noise takes its logarithm, and log(0) is no input for a network: use 0.002 as in EDM";

/// The noise levels a model knows: 0 < σ_min < σ_max, in data units (images in [−1, 1]).
///
/// In a file: `{ sigma_min = 0.002, sigma_max = 80.0 }`, the values of every published model of this family.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct SigmaRange {
    #[serde(rename = "sigma_min")]
    min: f64,
    #[serde(rename = "sigma_max")]
    max: f64,
}
validated_serde!(SigmaRange);

impl SigmaRange {
    /// 0.002 to 80, as in EDM and in every consistency-model paper.
    pub const EDM: SigmaRange = SigmaRange { min: 0.002, max: 80.0 };

    /// A range.
    ///
    /// # Errors
    /// When not 0 < `min` < `max` < ∞.
    ///
    /// ```
    /// use cm_schedule::sigma::SigmaRange;
    /// let error = SigmaRange::new(0.0, 80.0).unwrap_err().to_string();
    /// assert!(error.contains("log(0)"), "{error}");
    /// ```
    pub fn new(min: f64, max: f64) -> Result<Self> {
        let range = SigmaRange { min, max };
        range.validate()?;
        Ok(range)
    }

    /// The same checks as [`new`](Self::new).
    fn validate(&self) -> Result<()> {
        ensure_positive("sigma_min", self.min, SIGMA_MIN_ADVICE)?;
        ensure(
            self.max > self.min && self.max.is_finite(),
            "sigma_max",
            self.max,
            format!("a finite number above sigma_min = {}", self.min),
            "the published models use 80",
        )
    }

    /// A range whose two constants are known to be in order.
    pub(crate) const fn trusted(min: f64, max: f64) -> Self {
        SigmaRange { min, max }
    }

    /// σ_min: the level at which a consistency function is the identity (ε in the papers).
    #[must_use]
    pub fn min(&self) -> f64 {
        self.min
    }

    /// σ_max: the level at which sampling starts (T in the papers).
    #[must_use]
    pub fn max(&self) -> f64 {
        self.max
    }

    /// Whether `sigma` lies in the range, ends included.
    #[must_use]
    pub fn contains(&self, sigma: f64) -> bool {
        (self.min..=self.max).contains(&sigma)
    }
}

/// The grid of Karras et al.: equal steps in σ^(1/ρ).
///
/// σ(u) = (σ_max^(1/ρ) + u (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ for u ∈ [0, 1], from σ_max down to σ_min. With ρ = 7
/// the steps near σ_min are short, where the flow bends most.
///
/// In a file: `{ sigma_min = 0.002, sigma_max = 80.0, rho = 7.0 }`.
///
/// # Source
/// EDM (arXiv 2206.00364) eq. 5; Consistency Models (arXiv 2303.01469) section 2, which numbers the same levels
/// upwards from 1, while its released code numbers them downwards from 0. Methods here name the direction.
///
/// ```
/// use cm_schedule::sigma::KarrasGrid;
/// // ρ = 7 and three levels: the middle one is ((80^(1/7) + 0.002^(1/7)) / 2)^7.
/// let grid = KarrasGrid::EDM.descending(3);
/// assert_eq!(grid[0], 80.0);
/// assert!((grid[1] - 2.515_2).abs() < 5e-5);
/// assert_eq!(grid[2], 0.002);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KarrasGrid {
    range: SigmaRange,
    rho: f64,
}

/// The flat form of the grid in a file.
#[derive(Serialize, Deserialize)]
#[serde(rename = "KarrasGrid", deny_unknown_fields)]
struct GridFields {
    sigma_min: f64,
    sigma_max: f64,
    rho: f64,
}

impl Serialize for KarrasGrid {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        GridFields { sigma_min: self.range.min, sigma_max: self.range.max, rho: self.rho }
            .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for KarrasGrid {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let GridFields { sigma_min, sigma_max, rho } = GridFields::deserialize(deserializer)?;
        SigmaRange::new(sigma_min, sigma_max)
            .and_then(|range| KarrasGrid::new(range, rho))
            .map_err(serde::de::Error::custom)
    }
}

impl KarrasGrid {
    /// σ from 80 to 0.002 with ρ = 7: the grid of every published model of this family.
    pub const EDM: KarrasGrid = KarrasGrid { range: SigmaRange::EDM, rho: 7.0 };

    /// A grid over `range`.
    ///
    /// # Errors
    /// When `rho` is not a finite number above 0.
    pub fn new(range: SigmaRange, rho: f64) -> Result<Self> {
        ensure_positive("rho", rho, "1 gives equal steps in sigma, EDM uses 7")?;
        Ok(KarrasGrid { range, rho })
    }

    /// The range that the grid covers.
    #[must_use]
    pub fn range(&self) -> SigmaRange {
        self.range
    }

    /// The exponent ρ.
    #[must_use]
    pub fn rho(&self) -> f64 {
        self.rho
    }

    /// σ at position `u`: σ_max at 0, σ_min at 1, both exactly; positions outside [0, 1] count as the nearest end.
    #[must_use]
    pub fn sigma(&self, u: f64) -> f64 {
        // The ends are exact because a consistency function is the identity at σ_min itself, not at the power of a
        // root of it.
        if u <= 0.0 {
            return self.range.max;
        }
        if u >= 1.0 {
            return self.range.min;
        }
        let (low, high) = self.roots();
        (high + u * (low - high)).powf(self.rho)
    }

    /// The position of `sigma`: the inverse of [`sigma`](Self::sigma).
    ///
    /// ```
    /// # use cm_schedule::sigma::KarrasGrid;
    /// assert!((KarrasGrid::EDM.position(KarrasGrid::EDM.sigma(0.25)) - 0.25).abs() < 1e-12);
    /// ```
    #[must_use]
    pub fn position(&self, sigma: f64) -> f64 {
        let (low, high) = self.roots();
        (sigma.powf(1.0 / self.rho) - high) / (low - high)
    }

    fn roots(&self) -> (f64, f64) {
        (self.range.min.powf(1.0 / self.rho), self.range.max.powf(1.0 / self.rho))
    }

    /// Level `index` of `n`, counted downwards from 0 = σ_max to n − 1 = σ_min: what `--ts` of a sampler means.
    ///
    /// ```
    /// # use cm_schedule::sigma::KarrasGrid;
    /// // The released two-step setting of ImageNet-64 distillation: index 22 of 40.
    /// assert!((KarrasGrid::EDM.at(22, 40) - 1.382).abs() < 5e-4);
    /// ```
    #[must_use]
    pub fn at(&self, index: usize, n: usize) -> f64 {
        self.sigma(index as f64 / (n.max(2) - 1) as f64)
    }

    /// The two neighbouring levels (σ, next σ) = (t_{n+1}, t_n) that a discrete consistency loss compares, the
    /// larger first; `index` counts downwards from 0 and there are `n` − 1 pairs.
    #[must_use]
    pub fn pair(&self, index: usize, n: usize) -> (f64, f64) {
        (self.at(index, n), self.at(index + 1, n))
    }

    /// Start, middle and end of step `index` of `n`, counted downwards from 0: what progressive distillation trains
    /// on. Here the `n` steps are the intervals, so the positions are index/n, (index + ½)/n and (index + 1)/n.
    #[must_use]
    pub fn halved_step(&self, index: usize, n: usize) -> [f64; 3] {
        let n = n.max(1) as f64;
        [0.0, 0.5, 1.0].map(|part| self.sigma((index as f64 + part) / n))
    }

    /// `n` levels from σ_max down to σ_min (σ_max alone for `n` = 1).
    #[must_use]
    pub fn descending(&self, n: usize) -> Vec<f64> {
        (0..n).map(|index| self.at(index, n)).collect()
    }

    /// `n` levels from σ_min up to σ_max: t_1 … t_N of the Consistency Models paper.
    #[must_use]
    pub fn ascending(&self, n: usize) -> Vec<f64> {
        let mut levels = self.descending(n);
        levels.reverse();
        levels
    }

    /// `n` levels from σ_max down to σ_min, and then 0: what an ODE sampler walks along.
    #[must_use]
    pub fn with_zero(&self, n: usize) -> Vec<f64> {
        let mut levels = self.descending(n);
        levels.push(0.0);
        levels
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The 18 levels of EDM's CIFAR-10 sampler, computed apart from this code.
    const EDM_18: [f64; 18] = [
        80.0, 57.586, 40.786, 28.375, 19.352, 12.91, 8.4009, 5.3152, 3.2568, 1.9233, 1.0882, 0.58535,
        0.29644, 0.13952, 0.059947, 0.022935, 0.007528, 0.002,
    ];

    #[test]
    fn edm_grid_of_18() {
        let grid = KarrasGrid::EDM.descending(18);
        for (got, want) in grid.iter().zip(EDM_18) {
            assert!((got / want - 1.0).abs() < 5e-5, "{got} {want}");
        }
        assert_eq!(grid.len(), 18);
    }

    #[test]
    fn two_step_indices_of_the_released_models() {
        // (index, N, σ): methods table of the published two-step samplers.
        let cases = [(22, 40, 1.382), (106, 201, 1.913), (17, 40, 4.366), (18, 40, 3.520), (67, 151, 3.991)];
        for (index, n, sigma) in cases.into_iter().chain([(62, 151, 5.249), (11, 18, 0.585)]) {
            assert!((KarrasGrid::EDM.at(index, n) - sigma).abs() < 1e-3, "{index} of {n}");
        }
    }

    #[test]
    fn short_grids_are_defined() {
        assert!(KarrasGrid::EDM.descending(0).is_empty());
        assert_eq!(KarrasGrid::EDM.descending(1), [80.0]);
        assert_eq!(KarrasGrid::EDM.ascending(2), [0.002, 80.0]);
        assert_eq!(KarrasGrid::EDM.with_zero(2), [80.0, 0.002, 0.0]);
        assert_eq!(KarrasGrid::EDM.pair(0, 2), (80.0, 0.002));
        let [start, middle, end] = KarrasGrid::EDM.halved_step(0, 1);
        assert_eq!((start, end), (80.0, 0.002));
        assert_eq!(middle, KarrasGrid::EDM.at(1, 3));
    }

    #[test]
    fn a_wrong_range_is_refused_with_its_key_and_value() {
        for (min, max, key) in [
            (0.0, 80.0, "sigma_min = 0:"),
            (-1.0, 80.0, "sigma_min = -1:"),
            (f64::NAN, 80.0, "sigma_min = NaN:"),
        ] {
            assert!(SigmaRange::new(min, max).unwrap_err().to_string().starts_with(key));
        }
        for max in [0.002, 0.001, f64::INFINITY, f64::NAN] {
            assert!(SigmaRange::new(0.002, max).unwrap_err().to_string().contains("above sigma_min = 0.002"));
        }
        assert!(KarrasGrid::new(SigmaRange::EDM, 0.0).is_err());
    }

    #[test]
    fn files_are_checked_like_calls() {
        let read = |text: &str| serde_json::from_str::<KarrasGrid>(text);
        let grid = read(r#"{"sigma_min":0.002,"sigma_max":80.0,"rho":7}"#).unwrap();
        assert_eq!(grid, KarrasGrid::EDM);
        assert_eq!(read(&serde_json::to_string(&grid).unwrap()).unwrap(), grid);
        let zero = read(r#"{"sigma_min":0,"sigma_max":80.0,"rho":7}"#).unwrap_err().to_string();
        assert!(zero.contains("sigma_min = 0") && zero.contains("log(0)"), "{zero}");
        assert!(
            read(r#"{"sigma_min":0.002,"sigma_max":80,"rho":7,"roh":7}"#)
                .unwrap_err()
                .to_string()
                .contains("roh")
        );
        let range: SigmaRange = serde_json::from_str(r#"{"sigma_min":0.002,"sigma_max":80.0}"#).unwrap();
        assert_eq!(range, SigmaRange::EDM);
        assert!(serde_json::from_str::<SigmaRange>(r#"{"sigma_min":3,"sigma_max":2}"#).is_err());
    }

    proptest! {
        #[test]
        fn grids_fall_and_keep_their_ends(
            min in 1e-4..1.0f64, ratio in 1.5..1e5f64, rho in 0.5..10.0f64, n in 2usize..400,
        ) {
            let range = SigmaRange::new(min, min * ratio).unwrap();
            let grid = KarrasGrid::new(range, rho).unwrap();
            let levels = grid.descending(n);
            prop_assert_eq!((levels[0], levels[n - 1]), (range.max(), range.min()));
            prop_assert!(levels.windows(2).all(|w| w[0] > w[1]));
            prop_assert!(levels.iter().all(|&s| range.contains(s)));
            let middle = levels[n / 2];
            prop_assert!((grid.sigma(grid.position(middle)) / middle - 1.0).abs() < 1e-9);
        }
    }
}
