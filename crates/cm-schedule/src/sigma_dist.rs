//! Which noise level a training image gets.

use crate::error::{Error, Result, ensure, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// How a discrete loss draws one of the N − 1 pairs of neighbouring levels.
///
/// In a file: `{ kind = "uniform" }` or `{ kind = "log_normal", mean = -1.1, std = 2.0 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum IndexDist {
    /// Every pair alike: Consistency Models, algorithms 2 and 3.
    Uniform {},
    /// p(i) ∝ erf((ln σ_{i+1} − m)/(√2 s)) − erf((ln σ_i − m)/(√2 s)): the mass that a log-normal σ has between the
    /// two levels.
    ///
    /// # Source
    /// iCT (arXiv 2310.14189) section 3.5, with m = −1.1 and s = 2.0.
    LogNormal {
        /// m: mean of ln σ.
        mean: f64,
        /// s: standard deviation of ln σ.
        std: f64,
    },
}
validated_serde!(IndexDist);

impl IndexDist {
    /// The table of this distribution over the pairs of `levels`, which rise (σ_1 < … < σ_N).
    ///
    /// # Errors
    /// When there are fewer than two levels, when they do not rise, or when the log-normal has no mass between them.
    ///
    /// ```
    /// use cm_schedule::{KarrasGrid, sigma_dist::IndexDist};
    /// // Ten pairs of iCT's first stage: the third is the likeliest.
    /// let table = IndexDist::LogNormal { mean: -1.1, std: 2.0 }.table(&KarrasGrid::EDM.ascending(11)).unwrap();
    /// assert!((table.probabilities()[2] - 0.24550).abs() < 5e-6);
    /// assert_eq!(table.sample(0.4), 2);
    /// ```
    pub fn table(&self, levels: &[f64]) -> Result<IndexTable> {
        check_rising(levels)?;
        let masses = match *self {
            IndexDist::Uniform {} => vec![1.0; levels.len() - 1],
            IndexDist::LogNormal { mean, std } => {
                let score = |sigma: f64| (sigma.ln() - mean) / std;
                levels.windows(2).map(|pair| normal_mass(score(pair[0]), score(pair[1]))).collect()
            }
        };
        IndexTable::new(&masses)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            IndexDist::Uniform {} => Ok(()),
            IndexDist::LogNormal { mean, std } => LogNormal { mean, std }.validate(),
        }
    }
}

fn check_rising(levels: &[f64]) -> Result<()> {
    if levels.len() < 2 {
        let advice = "a pair of neighbours needs two noise levels";
        return Err(Error::TooFew { key: "sigmas", got: levels.len(), least: 2, advice });
    }
    let fault = |index: usize| Error::Levels {
        index,
        value: levels[index],
        expected: "expected finite levels above 0, each larger than the one before",
    };
    for (index, &sigma) in levels.iter().enumerate() {
        let rises = index == 0 || sigma > levels[index - 1];
        if !(sigma > 0.0 && sigma.is_finite() && rises) {
            return Err(fault(index));
        }
    }
    Ok(())
}

/// Twice the standard normal mass between `a` < `b`, by whichever of erf and erfc loses no digits.
fn normal_mass(a: f64, b: f64) -> f64 {
    let (a, b) = (a / std::f64::consts::SQRT_2, b / std::f64::consts::SQRT_2);
    if a > 0.0 {
        libm::erfc(a) - libm::erfc(b)
    } else if b < 0.0 {
        libm::erfc(-b) - libm::erfc(-a)
    } else {
        libm::erf(b) - libm::erf(a)
    }
}

/// The probabilities of the pairs of neighbouring levels, ready to be drawn from.
///
/// Index i is the pair (σ_i, σ_{i+1}) of the rising levels, counted from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexTable {
    probabilities: Vec<f64>,
    /// cumulative[i] = p(0) + … + p(i); the last entry is 1 or a rounding away from it.
    cumulative: Vec<f64>,
}

impl IndexTable {
    fn new(masses: &[f64]) -> Result<Self> {
        let total: f64 = masses.iter().sum();
        let advice = "the distribution has no mass between these levels: bring its mean nearer to ln sigma";
        ensure(total > 0.0 && total.is_finite(), "total mass", total, "a number above 0", advice)?;
        let probabilities: Vec<f64> = masses.iter().map(|mass| mass / total).collect();
        let cumulative = probabilities
            .iter()
            .scan(0.0, |sum, p| {
                *sum += p;
                Some(*sum)
            })
            .collect();
        Ok(IndexTable { probabilities, cumulative })
    }

    /// p(i) of each pair; they sum to 1.
    #[must_use]
    pub fn probabilities(&self) -> &[f64] {
        &self.probabilities
    }

    /// The pair that a uniform number `u` in [0, 1) selects: the first whose cumulated probability exceeds it.
    #[must_use]
    pub fn sample(&self, u: f64) -> usize {
        let index = self.cumulative.partition_point(|&c| c <= u);
        // The sum may fall short of 1 by a rounding; what lies beyond it belongs to the last pair with any mass.
        if index < self.cumulative.len() {
            return index;
        }
        self.probabilities.iter().rposition(|&p| p > 0.0).unwrap_or(0)
    }
}

/// A continuous distribution of noise levels: ln σ ~ N(mean, std²).
///
/// In a file: `{ mean = -1.2, std = 1.2 }`, which is EDM's (arXiv 2206.00364, Table 1); ECT has −1.1 and 2.0 on
/// CIFAR-10.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct LogNormal {
    /// Mean of ln σ.
    pub mean: f64,
    /// Standard deviation of ln σ.
    pub std: f64,
}
validated_serde!(LogNormal);

impl LogNormal {
    /// σ = exp(mean + std · z) for a standard normal z.
    ///
    /// ```
    /// use cm_schedule::sigma_dist::LogNormal;
    /// // The median is e^mean.
    /// assert_eq!(LogNormal { mean: -1.2, std: 1.2 }.sigma(0.0), (-1.2f64).exp());
    /// ```
    #[must_use]
    pub fn sigma(&self, z: f64) -> f64 {
        (self.mean + self.std * z).exp()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When `mean` is not finite or `std` is not a finite number above 0.
    pub fn validate(&self) -> Result<()> {
        let advice = "it is the mean of ln sigma: EDM uses -1.2, iCT and ECT -1.1";
        ensure(self.mean.is_finite(), "mean", self.mean, "a finite number", advice)?;
        ensure_positive(
            "std",
            self.std,
            "it is the standard deviation of ln sigma: EDM uses 1.2, iCT and ECT 2.0",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KarrasGrid;
    use proptest::prelude::*;

    const ICT: IndexDist = IndexDist::LogNormal { mean: -1.1, std: 2.0 };

    /// iCT's probabilities at N = 11, computed apart from this code.
    #[test]
    fn probabilities_of_ict() {
        let want = [0.06263, 0.18174, 0.24550, 0.21349, 0.14245, 0.08060, 0.04108, 0.01958, 0.00894, 0.00398];
        let table = ICT.table(&KarrasGrid::EDM.ascending(11)).unwrap();
        for (got, want) in table.probabilities().iter().zip(want) {
            assert!((got - want).abs() < 5.1e-6, "{got} {want}");
        }
    }

    /// The share of draws on an even grid of u equals the probability to the width of that grid.
    #[test]
    fn sampling_inverts_the_distribution() {
        for dist in [ICT, IndexDist::Uniform {}] {
            let table = dist.table(&KarrasGrid::EDM.ascending(41)).unwrap();
            let n = 100_000;
            let mut counts = [0u32; 40];
            for i in 0..n {
                counts[table.sample((f64::from(i) + 0.5) / f64::from(n))] += 1;
            }
            for (count, p) in counts.iter().zip(table.probabilities()) {
                assert!((f64::from(*count) / f64::from(n) - p).abs() <= 1.0 / f64::from(n) + 1e-12);
            }
            assert_eq!(table.sample(0.0), 0);
            assert_eq!(table.sample(1.0f64.next_down()), 39);
        }
    }

    /// Levels far above the mean: erf is 1 to all digits at both ends of each pair, erfc is not.
    #[test]
    fn tails_keep_their_digits() {
        let table = IndexDist::LogNormal { mean: -30.0, std: 3.0 }.table(&[1.0, 2.0, 4.0]).unwrap();
        // (Q(30/3) − Q((30 + ln 2)/3)) / (Q(30/3) − Q((30 + ln 4)/3)) in 40 digits of mpmath.
        assert!((table.probabilities()[0] - 0.913_270_494_273_446_5).abs() < 1e-12);
        // And where even erfc is 0 the table is refused.
        let error = IndexDist::LogNormal { mean: -300.0, std: 1.0 }.table(&[1.0, 2.0]).unwrap_err();
        assert!(error.to_string().contains("no mass"), "{error}");
    }

    #[test]
    fn faulty_levels_are_refused() {
        for levels in [&[][..], &[1.0]] {
            assert!(matches!(ICT.table(levels), Err(Error::TooFew { .. })));
        }
        for (levels, at) in [([2.0, 1.0], 1), ([0.0, 1.0], 0), ([1.0, f64::NAN], 1), ([1.0, 1.0], 1)] {
            let error = ICT.table(&levels).unwrap_err();
            assert!(matches!(error, Error::Levels { index, .. } if index == at), "{error}");
        }
    }

    #[test]
    fn files_are_checked() {
        assert_eq!(
            serde_json::from_str::<IndexDist>(r#"{"kind":"uniform"}"#).unwrap(),
            IndexDist::Uniform {}
        );
        let text = r#"{"kind":"log_normal","mean":-1.1,"std":2.0}"#;
        assert_eq!(serde_json::from_str::<IndexDist>(text).unwrap(), ICT);
        assert_eq!(serde_json::to_string(&ICT).unwrap(), text);
        let edm: LogNormal = serde_json::from_str(r#"{"mean":-1.2,"std":1.2}"#).unwrap();
        assert_eq!(edm, LogNormal { mean: -1.2, std: 1.2 });
        assert!(serde_json::from_str::<IndexDist>(&text.replace("2.0", "0")).is_err());
        assert!(serde_json::from_str::<IndexDist>(r#"{"kind":"uniform","mean":1}"#).is_err());
        assert!(serde_json::from_str::<LogNormal>(r#"{"mean":-1.2,"std":-1}"#).is_err());
    }

    proptest! {
        #[test]
        fn probabilities_sum_to_one(mean in -5.0..5.0f64, std in 0.3..4.0f64, n in 2usize..1300) {
            let table = IndexDist::LogNormal { mean, std }.table(&KarrasGrid::EDM.ascending(n)).unwrap();
            prop_assert_eq!(table.probabilities().len(), n - 1);
            prop_assert!(table.probabilities().iter().all(|p| (0.0..=1.0).contains(p)));
            prop_assert!((table.probabilities().iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }

        #[test]
        fn a_draw_is_a_pair_with_mass(u in 0.0..1.0f64, n in 2usize..50) {
            let table = ICT.table(&KarrasGrid::EDM.ascending(n)).unwrap();
            prop_assert!(table.probabilities()[table.sample(u)] > 0.0);
        }
    }
}
