//! What changes as training goes: the number of levels N(k), the target's EMA rate μ(k), and ECT's mapping t → r.

use std::ops::Range;

use crate::error::{Result, ensure, ensure_positive, validated_serde};
use serde::{Deserialize, Serialize};

/// The number of noise levels at an optimisation step: N(k), counting both ends of the grid.
///
/// A discrete consistency loss with N levels has N − 1 pairs of neighbours. Progressive distillation
/// ([`ProgDist`](Self::ProgDist)) counts the steps of its student instead, which are the intervals.
///
/// In a file: `{ kind = "progressive", s0 = 2, s1 = 150 }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NumScales {
    /// The same N throughout: consistency distillation.
    Fixed {
        /// N.
        num_scales: usize,
    },
    /// N(k) = ⌈√(k/K · ((s₁ + 1)² − s₀²) + s₀²) − 1⌉ + 1: consistency training.
    ///
    /// # Source
    /// Consistency Models (arXiv 2303.01469) appendix C. Its code agrees, apart from a floor of 1 under the ceiling
    /// that matters for s₀ = 1 alone and is kept here.
    Progressive {
        /// N(0): levels at the start (1 counts as 2).
        s0: usize,
        /// Pairs at the end: N(K) = s₁ + 1.
        s1: usize,
    },
    /// N(k) = min(s₀ 2^⌊k/K'⌋, s₁) + 1 with K' = ⌊K/(log₂⌊s₁/s₀⌋ + 1)⌋: improved consistency training.
    ///
    /// # Source
    /// iCT (arXiv 2310.14189) section 3.4.
    Doubling {
        /// Pairs at the start.
        s0: usize,
        /// Pairs at the end.
        s1: usize,
    },
    /// The steps of a progressively distilled student: halved every `steps_per_stage` optimisation steps down to 2,
    /// and then 2 and 1 for twice as long each.
    ///
    /// # Source
    /// Progressive distillation (arXiv 2202.00512) algorithm 2, with the stage lengths of Consistency Models' code.
    ProgDist {
        /// Student steps of the first stage; a power of two, 2 or more.
        start: usize,
        /// Optimisation steps of each stage but the last two.
        steps_per_stage: u64,
    },
}
validated_serde!(NumScales);

impl NumScales {
    /// N at optimisation step `step` of `total_steps`.
    ///
    /// ```
    /// use cm_schedule::curriculum::NumScales;
    /// // CIFAR-10 consistency training: from 2 levels to 151.
    /// let n = NumScales::Progressive { s0: 2, s1: 150 };
    /// assert_eq!([0, 8_000, 80_000, 800_000].map(|k| n.num_scales(k, 800_000)), [2, 16, 48, 151]);
    /// // iCT on CIFAR-10: doubled every 50 000 steps of 400 000.
    /// let n = NumScales::Doubling { s0: 10, s1: 1280 };
    /// assert_eq!([0, 50_000, 399_999].map(|k| n.num_scales(k, 400_000)), [11, 21, 1281]);
    /// ```
    #[must_use]
    pub fn num_scales(&self, step: u64, total_steps: u64) -> usize {
        match *self {
            NumScales::Fixed { num_scales } => num_scales,
            NumScales::Progressive { s0, s1 } => {
                let (s0, s1) = (s0 as f64, s1 as f64);
                let part = step as f64 / total_steps.max(1) as f64;
                let pairs = ((part * ((s1 + 1.0).powi(2) - s0 * s0) + s0 * s0).sqrt() - 1.0).ceil();
                pairs.max(1.0) as usize + 1
            }
            NumScales::Doubling { s0, s1 } => {
                let doublings = ((s1 / s0.max(1)).max(1) as f64).log2() + 1.0;
                let stage = step / ((total_steps as f64 / doublings) as u64).max(1);
                // 2^63 pairs are more than any s₁.
                s0.saturating_mul(1 << stage.min(63)).min(s1) + 1
            }
            NumScales::ProgDist { start, steps_per_stage } => prog_dist(start, steps_per_stage.max(1), step),
        }
    }

    /// The stage of progressive distillation that `step` lies in, as its steps; `None` for rules without stages.
    ///
    /// Each stage is a training of its own, at whose start the student becomes the teacher. The last one goes on to
    /// the run's end, and none goes beyond it.
    ///
    /// ```
    /// use cm_schedule::curriculum::NumScales;
    /// // 8, 4, 2 and 1 steps of the student.
    /// let n = NumScales::ProgDist { start: 8, steps_per_stage: 10 };
    /// assert_eq!([0, 10, 25, 40].map(|k| n.num_scales(k, 60)), [8, 4, 2, 1]);
    /// assert_eq!([0, 10, 25, 40].map(|k| n.stage(k, 60).unwrap()), [0..10, 10..20, 20..40, 40..60]);
    /// ```
    #[must_use]
    pub fn stage(&self, step: u64, total_steps: u64) -> Option<Range<u64>> {
        let NumScales::ProgDist { start, steps_per_stage } = *self else { return None };
        let length = steps_per_stage.max(1);
        let two = steps_before_two(start, length);
        let one = two.saturating_add(2 * length);
        let (first, end) = if step < two {
            let first = step / length * length;
            (first, first + length)
        } else if step < one {
            (two, one)
        } else {
            (one, u64::MAX)
        };
        Some(first..end.min(total_steps).max(step + 1))
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            NumScales::Fixed { num_scales } => {
                let advice = "a consistency loss compares two neighbouring levels";
                let expected = format!("2 to {MOST_SCALES}");
                ensure(
                    (2..=MOST_SCALES).contains(&num_scales),
                    "num_scales",
                    num_scales as f64,
                    expected,
                    advice,
                )
            }
            NumScales::Progressive { s0, s1 } | NumScales::Doubling { s0, s1 } => {
                ensure(s0 >= 1, "s0", s0 as f64, "1 or more", "the paper starts CT at 2 and iCT at 10")?;
                let advice = "the number of levels grows from s0 to s1";
                let expected = format!("s0 = {s0} to {MOST_SCALES}");
                ensure((s0..=MOST_SCALES).contains(&s1), "s1", s1 as f64, expected, advice)
            }
            NumScales::ProgDist { start, steps_per_stage } => {
                let advice = "each stage halves the number of steps";
                let possible = start >= 2 && start.is_power_of_two();
                ensure(possible, "start", start as f64, "a power of two, 2 or more", advice)?;
                let advice = "it is the length of a stage in optimisation steps";
                // Twice its length, and its sum over the stages, have to be numbers of steps too.
                let possible = (1..=u64::from(u32::MAX)).contains(&steps_per_stage);
                ensure(possible, "steps_per_stage", steps_per_stage as f64, "1 to 4294967295", advice)
            }
        }
    }
}

/// A grid is made anew for each step, so that a slip of the pen must not ask for terabytes of it.
const MOST_SCALES: usize = 1_000_000;

fn prog_dist(start: usize, steps_per_stage: u64, step: u64) -> usize {
    let halved = start.checked_shr((step / steps_per_stage).min(63) as u32).unwrap_or(0);
    if halved > 2 {
        return halved;
    }
    let last_stages = step.saturating_sub(steps_before_two(start, steps_per_stage)) / (2 * steps_per_stage);
    if last_stages == 0 { 2 } else { 1 }
}

/// Optimisation steps until the student of a progressive distillation has two steps.
fn steps_before_two(start: usize, steps_per_stage: u64) -> u64 {
    steps_per_stage.saturating_mul(u64::from(start.max(2).ilog2() - 1))
}

/// Which N stands under the target's EMA rate: see [`TargetEma::Adaptive`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reading {
    /// N(k), as the paper prints it. The default.
    #[default]
    Paper,
    /// N(k) − 1, as the released code computes it.
    Released,
}

/// The rate μ of the target network's moving average: θ⁻ ← μ θ⁻ + (1 − μ) θ.
///
/// In a file: `{ kind = "adaptive", mu0 = 0.9, s0 = 2 }`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TargetEma {
    /// The same μ throughout; 0 makes the target a copy of the network without gradient (iCT, ECT).
    Fixed {
        /// μ in [0, 1).
        mu: f64,
    },
    /// μ(k) = exp(s₀ ln μ₀/N(k)): the more levels, the slower the target.
    ///
    /// The paper prints N(k), its released code divides by N(k) − 1 (it computes μ before it adds the last 1). The
    /// paper's reading is the default, because it starts at μ₀ as the text says: with s₀ = 2, N(0) = 2 and so
    /// μ(0) = μ₀, where the code starts at μ₀² (0.81 for 0.9). The code's reading is for repeating its runs
    /// (configs named `…-released`); at N = 151 the two differ by 10⁻⁵.
    ///
    /// # Source
    /// Consistency Models (arXiv 2303.01469) appendix C; `create_ema_and_scales_fn` in its released code.
    Adaptive {
        /// μ₀ in (0, 1): the rate at the start.
        mu0: f64,
        /// s₀ of the run's [`NumScales`].
        s0: usize,
        /// Which N stands in the denominator.
        #[serde(default)]
        reading: Reading,
    },
}
validated_serde!(TargetEma);

impl TargetEma {
    /// μ while training with `num_scales` levels.
    ///
    /// ```
    /// use cm_schedule::curriculum::{Reading, TargetEma};
    /// let paper = TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper };
    /// assert!((paper.mu(2) - 0.9).abs() < 1e-15);
    /// assert!((paper.mu(151) - 0.99861).abs() < 5e-6);
    /// let released = TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Released };
    /// assert!((released.mu(2) - 0.81).abs() < 1e-15);
    /// ```
    #[must_use]
    pub fn mu(&self, num_scales: usize) -> f64 {
        match *self {
            TargetEma::Fixed { mu } => mu,
            TargetEma::Adaptive { mu0, s0, reading } => {
                let n = match reading {
                    Reading::Paper => num_scales,
                    Reading::Released => num_scales.saturating_sub(1),
                };
                (s0 as f64 * mu0.ln() / n.max(1) as f64).exp()
            }
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            TargetEma::Fixed { mu } => {
                let advice = "1 would never move the target; 0 keeps it equal to the network";
                ensure((0.0..1.0).contains(&mu), "mu", mu, "0 <= mu < 1", advice)
            }
            TargetEma::Adaptive { mu0, s0, .. } => {
                let advice = "for a target without memory use kind = \"fixed\" with mu = 0";
                ensure(mu0 > 0.0 && mu0 < 1.0, "mu0", mu0, "0 < mu0 < 1", advice)?;
                ensure(s0 >= 1, "s0", s0 as f64, "1 or more", "it is the s0 of the number of levels")
            }
        }
    }
}

/// ECT's mapping from a noise level t to the level r < t that it is compared with.
///
/// r = max(0, t (1 − n(t)/q^(stage + 1))), where the stage rises from 0 as training goes, so that r draws near
/// to t. At r = 0 the target is the clean image, and stage 0 is close to diffusion training. The loss weight that
/// belongs to it on CIFAR-10 is [`Weighting::InverseStep`](crate::Weighting::InverseStep) with next σ = r.
///
/// In a file: `{ q = 2.0, stages = 8, adjust = { kind = "sigmoid", k = 8.0, b = 1.0 } }`.
///
/// # Source
/// ECT (arXiv 2406.14548); `ECMLoss` in its released code.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Ect {
    /// The factor by which the step from r to t shrinks at each stage; above 1.
    pub q: f64,
    /// Number of equally long stages in a run; 1 keeps the first mapping throughout.
    pub stages: u32,
    /// n(t).
    pub adjust: EctAdjust,
}
validated_serde!(Ect);

/// n(t) of [`Ect`]: how much longer the step is at small noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum EctAdjust {
    /// n(t) = 1: the same ratio r/t at all levels.
    Const {},
    /// n(t) = 1 + k sigmoid(−b t), which falls from 1 + k/2 at t = 0 to 1.
    Sigmoid {
        /// Twice the height over 1 at t = 0; the paper uses 8.
        k: f64,
        /// How fast it falls; the paper uses 1.
        b: f64,
    },
}

impl EctAdjust {
    /// n(t).
    #[must_use]
    pub fn factor(&self, t: f64) -> f64 {
        match *self {
            EctAdjust::Const {} => 1.0,
            EctAdjust::Sigmoid { k, b } => 1.0 + k / (1.0 + (b * t).exp()),
        }
    }
}

impl Ect {
    /// The stage at optimisation step `step` of `total_steps`: 0 to `stages` − 1.
    ///
    /// ```
    /// # use cm_schedule::curriculum::{Ect, EctAdjust};
    /// // ECT's CIFAR-10 run: 200 000 steps, a new stage every 25 000.
    /// let ect = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } };
    /// assert_eq!([0, 24_999, 25_000, 199_999].map(|k| ect.stage(k, 200_000)), [0, 0, 1, 7]);
    /// // r/t at t = 0.3 in the stages: 0 twice, then 0.449 …
    /// assert_eq!(ect.r(0.3, 1), 0.0);
    /// assert!((ect.r(0.3, 2) / 0.3 - 0.449).abs() < 5e-4);
    /// ```
    #[must_use]
    pub fn stage(&self, step: u64, total_steps: u64) -> u32 {
        let stages = u128::from(self.stages.max(1));
        let stage = u128::from(step) * stages / u128::from(total_steps.max(1));
        stage.min(stages - 1) as u32
    }

    /// 1 − q^−(stage + 1): r/t where n(t) = 1.
    #[must_use]
    pub fn ratio(&self, stage: u32) -> f64 {
        1.0 - self.step_share(stage)
    }

    /// q^−(stage + 1).
    fn step_share(&self, stage: u32) -> f64 {
        self.q.powf(-(f64::from(stage) + 1.0))
    }

    /// r for noise level `t` in a stage.
    #[must_use]
    pub fn r(&self, t: f64, stage: u32) -> f64 {
        (t * (1.0 - self.adjust.factor(t) * self.step_share(stage))).max(0.0)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// When a number is outside its range; the message names it.
    pub fn validate(&self) -> Result<()> {
        let advice = "each stage divides the step from r to t by q";
        ensure(self.q > 1.0 && self.q.is_finite(), "q", self.q, "a finite number above 1", advice)?;
        let advice = "1 keeps the first mapping throughout; beyond 64, r and t are equal in double precision";
        ensure((1..=64).contains(&self.stages), "stages", f64::from(self.stages), "1 to 64", advice)?;
        match self.adjust {
            EctAdjust::Const {} => Ok(()),
            EctAdjust::Sigmoid { k, b } => {
                let advice = "the paper uses 8; for n(t) = 1 use kind = \"const\"";
                ensure_positive("k", k, advice)?;
                ensure_positive("b", b, "the paper uses 1")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIGMOID: EctAdjust = EctAdjust::Sigmoid { k: 8.0, b: 1.0 };

    /// N of CIFAR-10's consistency training, computed apart from this code.
    #[test]
    fn progressive_levels_of_cifar() {
        let n = NumScales::Progressive { s0: 2, s1: 150 };
        for (step, want) in [(0, 2), (8_000, 16), (80_000, 48), (200_000, 76), (400_000, 107), (800_000, 151)]
        {
            assert_eq!(n.num_scales(step, 800_000), want, "step {step}");
        }
        let mu = TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper };
        for (n, want) in [(2, 0.9), (16, 0.98692), (151, 0.99861)] {
            assert!((mu.mu(n) - want).abs() < 5e-6);
        }
    }

    /// The released code at step 0 and at the end, for μ₀ = 0.9 and 0.95.
    #[test]
    fn released_rates() {
        for (mu0, n, want) in
            [(0.9, 2, 0.81), (0.9, 151, 0.998_596_18), (0.95, 2, 0.9025), (0.95, 201, 0.999_487_2)]
        {
            let mu = TargetEma::Adaptive { mu0, s0: 2, reading: Reading::Released }.mu(n);
            assert!((mu - want).abs() < 1e-8, "{mu0} {n}: {mu}");
        }
        assert_eq!(TargetEma::Fixed { mu: 0.95 }.mu(18), 0.95);
    }

    #[test]
    fn doubling_stages_of_ict() {
        let n = NumScales::Doubling { s0: 10, s1: 1280 };
        let stages: Vec<usize> = (0..8).map(|stage| n.num_scales(stage * 50_000, 400_000)).collect();
        assert_eq!(stages, [11, 21, 41, 81, 161, 321, 641, 1281]);
        assert_eq!(n.num_scales(49_999, 400_000), 11);
        assert_eq!(n.num_scales(400_000, 400_000), 1281);
        // A run shorter than the number of stages still ends at s₁ and does not divide by zero.
        assert_eq!(n.num_scales(7, 4), 1281);
    }

    /// 64 steps, 50 000 per stage: 4 until 250 000, 2 for 100 000, then 1.
    #[test]
    fn progressive_distillation_halves() {
        let n = NumScales::ProgDist { start: 64, steps_per_stage: 50_000 };
        let cases =
            [(0, 64), (49_999, 64), (50_000, 32), (249_999, 4), (250_000, 2), (349_999, 2), (350_000, 1)];
        for (step, want) in cases.into_iter().chain([(600_000, 1), (u64::MAX, 1)]) {
            assert_eq!(n.num_scales(step, 600_000), want, "step {step}");
        }
        let one = NumScales::ProgDist { start: 1, steps_per_stage: 10 };
        assert_eq!((one.num_scales(0, 100), one.num_scales(20, 100)), (2, 1));
    }

    /// r/t of the CIFAR-10 setting in stages 0 to 7, computed apart from this code.
    #[test]
    fn ect_ratios() {
        let ect = Ect { q: 2.0, stages: 8, adjust: SIGMOID };
        let low = [0.0, 0.0, 0.449, 0.725, 0.862, 0.931, 0.966, 0.983];
        let high = [0.5, 0.75, 0.875, 0.9375, 0.968_75, 0.984_375, 0.992_187_5, 0.996_093_75];
        for stage in 0..8 {
            assert!((ect.r(0.3, stage) / 0.3 - low[stage as usize]).abs() < 6e-4, "stage {stage}");
            assert!((ect.r(80.0, stage) / 80.0 - high[stage as usize]).abs() < 1e-12);
            assert_eq!(ect.ratio(stage), high[stage as usize]);
        }
        // The setting that never doubles: q = 256, r/t from 0.9805 near 0 to 0.9961.
        let hour = Ect { q: 256.0, stages: 1, adjust: SIGMOID };
        assert!((hour.r(1e-6, 0) / 1e-6 - 0.9805).abs() < 5e-5);
        assert!((hour.r(80.0, 0) / 80.0 - 0.9961).abs() < 5e-5);
        assert_eq!(hour.stage(u64::MAX, 1), 0);
        let constant = Ect { q: 2.0, stages: 8, adjust: EctAdjust::Const {} };
        assert_eq!(constant.r(3.0, 1), 2.25);
    }

    #[test]
    fn files_are_checked() {
        let n: NumScales = serde_json::from_str(r#"{"kind":"progressive","s0":2,"s1":150}"#).unwrap();
        assert_eq!(n, NumScales::Progressive { s0: 2, s1: 150 });
        assert_eq!(serde_json::to_string(&n).unwrap(), r#"{"kind":"progressive","s0":2,"s1":150}"#);
        let mu: TargetEma = serde_json::from_str(r#"{"kind":"adaptive","mu0":0.9,"s0":2}"#).unwrap();
        assert_eq!(mu, TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper });
        let text = r#"{"q":2.0,"stages":8,"adjust":{"kind":"sigmoid","k":8.0,"b":1.0}}"#;
        let ect: Ect = serde_json::from_str(text).unwrap();
        assert_eq!(ect, Ect { q: 2.0, stages: 8, adjust: SIGMOID });
        assert_eq!(serde_json::to_string(&ect).unwrap(), text);
        check_refused::<NumScales>(
            r#"{"kind":"progressive","s0":2,"s1":1}"#,
            "s1 = 1: expected s0 = 2 to 1000000",
        );
        check_refused::<NumScales>(r#"{"kind":"progressive","s0":0,"s1":1}"#, "s0 = 0");
        check_refused::<NumScales>(
            r#"{"kind":"fixed","num_scales":1}"#,
            "num_scales = 1: expected 2 to 1000000",
        );
        check_refused::<NumScales>(r#"{"kind":"fixed","num_scales":18,"s0":2}"#, "unknown field `s0`");
        check_refused::<NumScales>(r#"{"kind":"prog_dist","start":6,"steps_per_stage":9}"#, "a power of two");
        check_refused::<TargetEma>(r#"{"kind":"fixed","mu":1.0}"#, "mu = 1: expected 0 <= mu < 1");
        check_refused::<TargetEma>(r#"{"kind":"adaptive","mu0":0.0,"s0":2}"#, "mu0 = 0");
        check_refused::<Ect>(&text.replace("2.0", "1.0"), "q = 1");
        check_refused::<Ect>(&text.replace('8', "0"), "stages = 0");
        check_refused::<Ect>(r#"{"q":2,"stages":8,"adjust":{"kind":"const","k":8}}"#, "unknown field `k`");
    }

    fn check_refused<T: serde::de::DeserializeOwned + std::fmt::Debug>(text: &str, part: &str) {
        let error = serde_json::from_str::<T>(text).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    proptest! {
        #[test]
        fn levels_never_fall_and_end_at_s1(s0 in 1usize..20, more in 0usize..300, total in 20u64..10_000) {
            for n in [NumScales::Progressive { s0, s1: s0 + more }, NumScales::Doubling { s0, s1: s0 + more }] {
                let mut last = 2;
                for step in 0..=total.min(50) {
                    let now = n.num_scales(step * total / total.min(50), total);
                    prop_assert!(now >= last);
                    last = now;
                }
                prop_assert_eq!(n.num_scales(total, total), s0 + more + 1);
            }
        }

        #[test]
        fn ect_pairs_are_in_order(t in 1e-4..1e3f64, q in 1.01..8.0f64, stage in 0u32..8) {
            for adjust in [SIGMOID, EctAdjust::Const {}] {
                let ect = Ect { q, stages: 8, adjust };
                let r = ect.r(t, stage);
                prop_assert!((0.0..t).contains(&r));
                prop_assert!(ect.r(t, stage + 1) >= r);
            }
        }
    }
}
