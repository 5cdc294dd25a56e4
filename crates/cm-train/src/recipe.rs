use std::ops::Range;

use cm_schedule::rng::{Purpose, Stream};
use cm_schedule::{Ect, IndexDist, KarrasGrid, LogNormal, NumScales, SigmaRange, TargetEma, Weighting};
use serde::{Deserialize, Serialize};

use crate::{Error, Metric, Result};

/// A way to train a consistency function, as data: which two noise levels are compared, with which network, by
/// which metric, and how much each pair counts.
///
/// Consistency training, iCT and ECT are three values of it and one loss, [`crate::consistency_loss`]:
///
/// | | pairs | target | metric | weighting |
/// | --- | --- | --- | --- | --- |
/// | CT (Song et al. 2023, Algorithm 3) | grid, N(k) progressive, uniform index | EMA, μ(k) adaptive | LPIPS, l2, l1 | uniform |
/// | iCT (arXiv 2310.14189) | grid, N(k) doubling, log-normal index | live weights | pseudo-Huber | 1/(σ − σ′) |
/// | ECT (arXiv 2406.14548) | continuous, t → r by stages | live weights | pseudo-Huber with c = 0 | 1/(σ − σ′) |
///
/// ```
/// # use cm_train::Recipe;
/// let ict: Recipe = serde_json::from_str(r#"{
///     "pairs": {"kind": "grid", "rho": 7,
///               "num_scales": {"kind": "doubling", "s0": 10, "s1": 1280},
///               "index": {"kind": "log_normal", "mean": -1.1, "std": 2.0}},
///     "target": {"kind": "live"}, "metric": "pseudo_huber", "weighting": "inverse_step"}"#)?;
/// assert_eq!(ict.schedule(0, 400_000).num_scales, Some(11));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// How a pair (σ, σ′) is drawn.
    pub pairs: PairRule,
    /// Where the target comes from.
    pub target: TargetRule,
    /// How far apart two images are.
    pub metric: Metric,
    /// How much a pair counts.
    pub weighting: Weighting,
}

/// How the noise levels σ > σ′ of a training image are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PairRule {
    /// Neighbours on the Karras grid of N(k) levels over the model's range.
    Grid {
        /// The grid's exponent ρ.
        rho: f64,
        /// N(k), the number of levels at step k.
        num_scales: NumScales,
        /// Which pair of neighbours.
        index: IndexDist,
    },
    /// σ = t from a continuous distribution and σ′ = r(t).
    ///
    /// t is clamped to the model's range [σ_min, σ_max], outside of which a consistency function is not defined (the
    /// reference leaves the 0.8 % of its draws that lie outside as they are); an r below σ_min becomes 0, which makes
    /// the clean image the target.
    Continuous {
        /// Distribution of ln t.
        sigma: LogNormal,
        /// The mapping t → r and its stages.
        map: Ect,
    },
}

/// Where the target of a consistency loss comes from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TargetRule {
    /// The student's own weights, without a gradient: what an average with μ = 0 would be, without its memory.
    Live {},
    /// A second network whose weights follow the student's, θ⁻ ← μθ⁻ + (1 − μ)θ after each step.
    Ema {
        /// μ(k).
        rule: TargetEma,
    },
}

impl TargetRule {
    /// Whether there is a second network.
    pub fn has_network(&self) -> bool {
        matches!(self, TargetRule::Ema { .. })
    }
}

/// What the schedules of a recipe say at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// N(k), where noise levels come from a grid.
    pub num_scales: Option<usize>,
    /// The stage of the mapping t → r, where they are continuous.
    pub stage: Option<usize>,
    /// μ(k), where there is a target network.
    pub mu: Option<f64>,
}

/// Names the draws of one step of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The run's seed.
    pub seed: u64,
    /// The step k, from 0.
    pub step: u64,
    /// The run's length K.
    pub total_steps: u64,
}

impl Place {
    /// The random numbers of image `sample` of the step's batch.
    pub(crate) fn stream(&self, purpose: Purpose, sample: u64) -> Stream {
        // A run is at most 2^32 steps long: `TrainSpec::check` sees to it.
        Stream { seed: self.seed, purpose, step: self.step as u32, sample }
    }
}

/// What the noise levels of a model are: the part of its description that pairs and weights need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Levels {
    /// σ_min and σ_max.
    pub range: SigmaRange,
    /// Standard deviation of the data, for the weightings that know it.
    pub sigma_data: f64,
}

/// The noise levels of a batch, with the weight of each image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pairs {
    /// σ: the student's level.
    pub sigma: Vec<f64>,
    /// σ′ < σ: the target's level; 0 makes the clean image the target.
    pub next: Vec<f64>,
    /// w(σ, σ′).
    pub weight: Vec<f64>,
}

impl Pairs {
    /// Pairs (σ, σ′) with the weights of `weighting`.
    pub fn new(pairs: impl IntoIterator<Item = (f64, f64)>, weighting: Weighting, sigma_data: f64) -> Self {
        let mut all = Pairs::default();
        for (sigma, next) in pairs {
            all.sigma.push(sigma);
            all.next.push(next);
            all.weight.push(weighting.weight(sigma, next, sigma_data));
        }
        all
    }
}

impl Recipe {
    /// The schedules at step `step` (from 0) of a run of `total_steps`.
    pub fn schedule(&self, step: u64, total_steps: u64) -> Schedule {
        let (num_scales, stage) = match self.pairs {
            PairRule::Grid { num_scales, .. } => (Some(num_scales.num_scales(step, total_steps)), None),
            PairRule::Continuous { map, .. } => (None, Some(map.stage(step, total_steps) as usize)),
        };
        let mu = match (self.target, num_scales) {
            (TargetRule::Live {}, _) => None,
            (TargetRule::Ema { rule }, Some(n)) => Some(rule.mu(n)),
            (TargetRule::Ema { rule: TargetEma::Fixed { mu } }, None) => Some(mu),
            // `check` refuses it: μ(k) is a function of N(k).
            (TargetRule::Ema { rule: TargetEma::Adaptive { mu0, .. } }, None) => Some(mu0),
        };
        Schedule { num_scales, stage, mu }
    }

    /// The pairs of the images at positions `samples` of the step's batch.
    ///
    /// An image's pair is a function of (seed, step, position): it does not depend on how a batch is split, and a
    /// resumed run draws what the uninterrupted one would have drawn.
    ///
    /// # Errors
    /// [`Error::Schedule`] if the index distribution has no mass on the grid.
    pub fn pairs(&self, place: &Place, samples: Range<u64>, levels: &Levels) -> Result<Pairs> {
        let stream = |sample| place.stream(Purpose::Index, sample);
        let (low, high) = (levels.range.min(), levels.range.max());
        let pairs: Vec<(f64, f64)> = match self.pairs {
            PairRule::Grid { rho, num_scales, index } => {
                let n = num_scales.num_scales(place.step, place.total_steps);
                // Algorithm 3: t_1 … t_N, and n from 1 … N − 1.
                let sigmas = KarrasGrid::new(levels.range, rho)?.ascending(n);
                let table = index.table(&sigmas)?;
                let pair = |sample| {
                    let i = table.sample(stream(sample).uniform(0));
                    (sigmas[i + 1], sigmas[i])
                };
                samples.map(pair).collect()
            }
            PairRule::Continuous { sigma, map } => {
                let stage = map.stage(place.step, place.total_steps);
                let pair = |sample| {
                    let t = sigma.sigma(stream(sample).normal(0)).clamp(low, high);
                    let r = map.r(t, stage);
                    (t, if r < low { 0.0 } else { r })
                };
                samples.map(pair).collect()
            }
        };
        Ok(Pairs::new(pairs, self.weighting, levels.sigma_data))
    }

    /// Checks what no part of the recipe can check alone.
    ///
    /// # Errors
    /// [`Error::Setting`] with the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        match (self.pairs, self.target) {
            (PairRule::Grid { num_scales: NumScales::ProgDist { .. }, .. }, _) => Err(Error::setting(
                "train.pairs.num_scales.kind",
                "prog_dist",
                "fixed, progressive or doubling",
                "the halving schedule counts the steps of progressive distillation, not levels to compare",
            )),
            (PairRule::Continuous { .. }, TargetRule::Ema { rule: TargetEma::Adaptive { .. } }) => {
                Err(Error::setting(
                    "train.target.rule.kind",
                    "adaptive",
                    "fixed, or target.kind = \"live\"",
                    "an adaptive rate follows N(k), and continuous noise levels have none",
                ))
            }
            _ => self.check_parts(),
        }
    }

    /// Values from a file have passed these checks; values made in code have not.
    fn check_parts(&self) -> Result<()> {
        match self.pairs {
            PairRule::Grid { rho, num_scales, index } => {
                KarrasGrid::new(SigmaRange::EDM, rho)?;
                num_scales.validate()?;
                index.validate()?;
            }
            PairRule::Continuous { sigma, map } => {
                sigma.validate()?;
                map.validate()?;
            }
        }
        match self.target {
            TargetRule::Live {} => Ok(()),
            TargetRule::Ema { rule } => Ok(rule.validate()?),
        }
    }
}

#[cfg(test)]
mod tests {
    use cm_schedule::{EctAdjust, Reading};

    use super::*;

    const LEVELS: Levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };

    fn ct() -> Recipe {
        Recipe {
            pairs: PairRule::Grid {
                rho: 7.0,
                num_scales: NumScales::Progressive { s0: 2, s1: 150 },
                index: IndexDist::Uniform {},
            },
            target: TargetRule::Ema {
                rule: TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper },
            },
            metric: Metric::L2,
            weighting: Weighting::Uniform,
        }
    }

    fn ict() -> Recipe {
        Recipe {
            pairs: PairRule::Grid {
                rho: 7.0,
                num_scales: NumScales::Doubling { s0: 10, s1: 1280 },
                index: IndexDist::LogNormal { mean: -1.1, std: 2.0 },
            },
            target: TargetRule::Live {},
            metric: Metric::PseudoHuber { c: None },
            weighting: Weighting::InverseStep,
        }
    }

    fn ect() -> Recipe {
        Recipe {
            pairs: PairRule::Continuous {
                sigma: LogNormal { mean: -1.1, std: 2.0 },
                map: Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } },
            },
            target: TargetRule::Live {},
            metric: Metric::PseudoHuber { c: Some(0.0) },
            weighting: Weighting::InverseStep,
        }
    }

    fn draw(recipe: &Recipe, step: u64, samples: Range<u64>) -> Pairs {
        let place = Place { seed: 5, step, total_steps: 800_000 };
        recipe.pairs(&place, samples, &LEVELS).unwrap()
    }

    #[test]
    fn pairs_are_ordered_inside_the_range_and_a_function_of_position() {
        for recipe in [ct(), ict(), ect()] {
            for step in [0, 1, 400_000, 799_999] {
                let all = draw(&recipe, step, 0..64);
                for (sigma, next) in std::iter::zip(&all.sigma, &all.next) {
                    assert!(next < sigma && LEVELS.range.contains(*sigma), "{next} {sigma}");
                    assert!(*next == 0.0 || LEVELS.range.contains(*next), "{next}");
                }
                let part = draw(&recipe, step, 17..40);
                assert_eq!(part.sigma, all.sigma[17..40]);
                assert_eq!(part.weight, all.weight[17..40]);
                assert_ne!(draw(&recipe, step + 2, 0..64).sigma[..32], draw(&recipe, step, 32..64).sigma[..]);
            }
        }
    }

    /// N(k) and μ(k) of the paper's CIFAR-10 run (Song et al. 2023, appendix C), worked out by hand.
    #[test]
    fn ct_follows_the_schedules_of_the_paper() {
        let cases = [(0, 2, 0.9), (8_000, 16, 0.98692), (80_000, 48, 0.99562), (400_000, 107, 0.99803)];
        for (step, n, mu) in cases {
            let schedule = ct().schedule(step, 800_000);
            assert_eq!(schedule.num_scales, Some(n));
            assert!((schedule.mu.unwrap() - mu).abs() < 1e-5, "{:?}", schedule);
        }
        let first = draw(&ct(), 0, 0..8);
        assert!(first.sigma.iter().all(|s| *s == 80.0) && first.next.iter().all(|s| *s == 0.002));
        assert!(first.weight.iter().all(|w| *w == 1.0));
    }

    /// The index is uniform for CT; for iCT's first stage its probabilities were computed apart from this code.
    #[test]
    fn indices_have_their_distribution() {
        let n = 20_000;
        let grid = KarrasGrid::EDM.ascending(11);
        let counts = |pairs: &Pairs| -> Vec<f64> {
            let count = |level: f64| pairs.next.iter().filter(|s| **s == level).count() as f64 / n as f64;
            grid[..10].iter().map(|&level| count(level)).collect()
        };
        let ict_probabilities =
            [0.06263, 0.18174, 0.24550, 0.21349, 0.14245, 0.08060, 0.04108, 0.01958, 0.00894, 0.00398];
        let mut uniform = ict();
        if let PairRule::Grid { index, .. } = &mut uniform.pairs {
            *index = IndexDist::Uniform {};
        }
        for (recipe, want) in [(ict(), ict_probabilities), (uniform, [0.1; 10])] {
            for (got, want) in counts(&draw(&recipe, 0, 0..n)).into_iter().zip(want) {
                // Five standard deviations of a frequency.
                assert!((got - want).abs() < 5.0 * (want * (1.0 - want) / n as f64).sqrt(), "{got} {want}");
            }
        }
    }

    #[test]
    fn ict_weights_pairs_by_their_distance() {
        let pairs = draw(&ict(), 0, 0..16);
        for i in 0..16 {
            assert_eq!(pairs.weight[i], 1.0 / (pairs.sigma[i] - pairs.next[i]));
        }
        assert_eq!(ict().schedule(0, 400_000), Schedule { num_scales: Some(11), stage: None, mu: None });
        assert_eq!(ict().schedule(399_999, 400_000).num_scales, Some(1281));
    }

    #[test]
    fn ect_starts_at_the_clean_image_and_closes_in() {
        let first = draw(&ect(), 0, 0..256);
        let small = std::iter::zip(&first.sigma, &first.next).filter(|(sigma, _)| **sigma < 1.0);
        assert!(small.clone().count() > 100);
        small.for_each(|(_, next)| assert_eq!(*next, 0.0));
        let last = draw(&ect(), 799_999, 0..256);
        assert_eq!(first.sigma.len(), last.sigma.len());
        for (sigma, next) in std::iter::zip(&last.sigma, &last.next).filter(|(sigma, _)| **sigma > 0.1) {
            assert!((0.96..1.0).contains(&(next / sigma)), "{next} {sigma}");
        }
        assert_eq!(ect().schedule(799_999, 800_000).stage, Some(7));
    }

    #[test]
    fn combinations_without_meaning_are_refused() {
        assert!([ct(), ict(), ect()].iter().all(|recipe| recipe.check().is_ok()));
        let adaptive = Recipe { target: ct().target, ..ect() };
        assert!(adaptive.check().unwrap_err().to_string().contains("train.target.rule.kind"));
        let mut halving = ct();
        if let PairRule::Grid { num_scales, .. } = &mut halving.pairs {
            *num_scales = NumScales::ProgDist { start: 64, steps_per_stage: 10 };
        }
        assert!(halving.check().unwrap_err().to_string().contains("prog_dist"));
        let mut flat = ct();
        if let PairRule::Grid { rho, .. } = &mut flat.pairs {
            *rho = 0.0;
        }
        assert!(flat.check().unwrap_err().to_string().contains("rho"));
        let frozen = Recipe { target: TargetRule::Ema { rule: TargetEma::Fixed { mu: 1.0 } }, ..ect() };
        assert!(frozen.check().unwrap_err().to_string().starts_with("mu = 1"));
    }

    #[test]
    fn recipes_survive_a_file_and_unknown_keys_do_not() {
        for recipe in [ct(), ict(), ect()] {
            let text = serde_json::to_string(&recipe).unwrap();
            assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
            let wrong = text.replacen("\"target\":{", "\"target\":{\"speed\":1,", 1);
            assert!(serde_json::from_str::<Recipe>(&wrong).unwrap_err().to_string().contains("speed"));
            let wrong = text.replacen('{', "{\"colour\":1,", 1);
            assert!(serde_json::from_str::<Recipe>(&wrong).unwrap_err().to_string().contains("colour"));
        }
    }
}
