use std::ops::Range;

use cm_schedule::rng::{Purpose, Stream};
use cm_schedule::{Ect, IndexDist, KarrasGrid, LogNormal, NumScales, SigmaRange, TargetEma, Weighting};
use serde::{Deserialize, Serialize};

use crate::{Error, Metric, Result};

/// A way to train a consistency function, as data: which two noise levels are compared, with which network, by
/// which metric, and how much each pair counts.
///
/// Every method of this crate is a value of it, and the loss that its [`Recipe::method`] names:
///
/// | | pairs | target | teacher | metric | weighting |
/// | --- | --- | --- | --- | --- | --- |
/// | EDM (arXiv 2206.00364) | σ log-normal, σ′ = 0 | the image | – | squared norm | Karras |
/// | CD (Song et al. 2023, Algorithm 2) | grid, N fixed, uniform index | EMA, μ fixed | Heun | LPIPS, l2, l1 | uniform |
/// | CT (Song et al. 2023, Algorithm 3) | grid, N(k) progressive, uniform index | EMA, μ(k) adaptive | – | LPIPS, l2, l1 | uniform |
/// | iCT (arXiv 2310.14189) | grid, N(k) doubling, log-normal index | live weights | – | pseudo-Huber | 1/(σ − σ′) |
/// | ECT (arXiv 2406.14548) | continuous, t → r by stages | live weights | – | pseudo-Huber with c = 0 | 1/(σ − σ′) |
/// | PD (arXiv 2202.00512) | steps of a student with N(k) of them | two steps of the stage before | – | l2 | truncated SNR |
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
    /// The teacher's part, in distillation.
    pub teacher: Option<TeacherRule>,
    /// How far apart two images are.
    pub metric: Metric,
    /// How much a pair counts.
    pub weighting: Weighting,
}

/// The loss that a recipe is trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// [`crate::denoising_loss`]: diffusion.
    Denoising,
    /// [`crate::consistency_loss`]: CT, iCT and ECT.
    Consistency,
    /// [`crate::distillation_loss`]: CD.
    Distillation(TeacherRule),
    /// [`crate::progressive_loss`]: progressive distillation, on a grid of exponent ρ.
    Progressive {
        /// ρ.
        rho: f64,
    },
}

impl Method {
    /// Whether it trains a denoiser; a consistency function else.
    pub fn trains_denoiser(&self) -> bool {
        matches!(self, Method::Denoising | Method::Progressive { .. })
    }

    /// Whether it begins with a diffusion model that teaches.
    pub fn is_distilled(&self) -> bool {
        matches!(self, Method::Distillation(_) | Method::Progressive { .. })
    }
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
    /// σ from a continuous distribution, and the image itself at σ′ = 0: diffusion.
    ///
    /// σ is not clamped to the model's range, which for a denoiser only says where sampling goes (as in EDM).
    Denoise {
        /// Distribution of ln σ.
        sigma: LogNormal,
    },
    /// Start and end of one of the N(k) steps of a progressively distilled student, along the Karras grid of
    /// N(k) + 1 levels.
    Steps {
        /// The grid's exponent ρ.
        rho: f64,
        /// N(k), the number of steps of the student.
        num_scales: NumScales,
    },
}

/// How a teacher, a denoiser, moves a noisy image from σ to σ′ along its probability-flow ODE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherRule {
    /// The solver of that one step.
    pub solver: TeacherSolver,
}

/// One-step solvers of the teacher's ODE dx/dσ = (x − D(x; σ))/σ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherSolver {
    /// Order 1, one evaluation of the teacher.
    Euler,
    /// Order 2, two evaluations; the paper's choice.
    Heun,
}

/// Where the image that the student is compared with comes from.
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
    /// The clean image: diffusion.
    Image {},
    /// Where two Euler steps of a second network lead: the student of the stage before, whose weights it takes over
    /// when a stage of progressive distillation begins.
    TwoSteps {},
}

impl TargetRule {
    /// Whether there is a second network.
    pub fn has_network(&self) -> bool {
        matches!(self, TargetRule::Ema { .. } | TargetRule::TwoSteps {})
    }

    /// Whether it is an estimate of the clean image, as a denoiser gives it.
    fn is_denoised(&self) -> bool {
        matches!(self, TargetRule::Image {} | TargetRule::TwoSteps {})
    }

    /// Its name in config files.
    pub fn name(&self) -> &'static str {
        match self {
            TargetRule::Live {} => "live",
            TargetRule::Ema { .. } => "ema",
            TargetRule::Image {} => "image",
            TargetRule::TwoSteps {} => "two_steps",
        }
    }
}

/// What the schedules of a recipe say at one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// N(k), where noise levels come from a grid.
    pub num_scales: Option<usize>,
    /// The stage of the mapping t → r, where there is one.
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

    /// σ′, and σ where that is 0: levels that a network knows.
    pub(crate) fn known_next(&self) -> Vec<f64> {
        let known = |(&next, &sigma): (&f64, &f64)| if next == 0.0 { sigma } else { next };
        std::iter::zip(&self.next, &self.sigma).map(known).collect()
    }
}

impl Recipe {
    /// The schedules at step `step` (from 0) of a run of `total_steps`.
    pub fn schedule(&self, step: u64, total_steps: u64) -> Schedule {
        let (num_scales, stage) = match self.pairs {
            PairRule::Grid { num_scales, .. } => (Some(num_scales.num_scales(step, total_steps)), None),
            PairRule::Steps { num_scales, .. } => (Some(num_scales.num_scales(step, total_steps)), None),
            PairRule::Continuous { map, .. } => (None, Some(map.stage(step, total_steps) as usize)),
            PairRule::Denoise { .. } => (None, None),
        };
        let mu = match (self.target, num_scales) {
            (TargetRule::Live {} | TargetRule::Image {} | TargetRule::TwoSteps {}, _) => None,
            (TargetRule::Ema { rule }, Some(n)) => Some(rule.mu(n)),
            (TargetRule::Ema { rule: TargetEma::Fixed { mu } }, None) => Some(mu),
            // `check` refuses it: μ(k) is a function of N(k).
            (TargetRule::Ema { rule: TargetEma::Adaptive { mu0, .. } }, None) => Some(mu0),
        };
        Schedule { num_scales, stage, mu }
    }

    /// The loss that belongs to the recipe.
    pub fn method(&self) -> Method {
        match (self.pairs, self.teacher) {
            (PairRule::Denoise { .. }, _) => Method::Denoising,
            (PairRule::Steps { rho, .. }, _) => Method::Progressive { rho },
            (_, Some(teacher)) => Method::Distillation(teacher),
            (_, None) => Method::Consistency,
        }
    }

    /// The stage that `step` lies in, as its steps, where each stage is a training of its own with the student of the
    /// one before as its teacher (progressive distillation).
    pub fn stage(&self, step: u64, total_steps: u64) -> Option<Range<u64>> {
        match self.pairs {
            PairRule::Steps { num_scales, .. } => num_scales.stage(step, total_steps),
            _ => None,
        }
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
            PairRule::Denoise { sigma } => {
                samples.map(|sample| (sigma.sigma(stream(sample).normal(0)), 0.0)).collect()
            }
            PairRule::Steps { rho, num_scales } => {
                let n = num_scales.num_scales(place.step, place.total_steps);
                let grid = KarrasGrid::new(levels.range, rho)?;
                let step = |sample| {
                    let i = ((stream(sample).uniform(0) * n as f64) as usize).min(n - 1);
                    let [start, _, end] = grid.halved_step(i, n);
                    (start, end)
                };
                samples.map(step).collect()
            }
        };
        Ok(Pairs::new(pairs, self.weighting, levels.sigma_data))
    }

    /// Checks what no part of the recipe can check alone.
    ///
    /// # Errors
    /// [`Error::Setting`] with the key, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        self.check_target()?;
        match (self.pairs, self.target) {
            (PairRule::Grid { num_scales: NumScales::ProgDist { .. }, .. }, _) => Err(Error::setting(
                "train.pairs.num_scales.kind",
                "prog_dist",
                "fixed, progressive or doubling",
                "the halving schedule counts the steps of progressive distillation, not levels to compare",
            )),
            (
                PairRule::Steps {
                    num_scales: NumScales::Progressive { .. } | NumScales::Doubling { .. },
                    ..
                },
                _,
            ) => Err(Error::setting(
                "train.pairs.num_scales.kind",
                "growing",
                "prog_dist, or fixed for a single stage",
                "a progressively distilled student has fewer and fewer steps",
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

    /// Each way to draw noise levels goes with its own targets, and a teacher with those of consistency models.
    fn check_target(&self) -> Result<()> {
        let (pairs, fits, expected) = match (self.pairs, self.target) {
            (PairRule::Denoise { .. }, target) => ("denoise", target == TargetRule::Image {}, "image"),
            (PairRule::Steps { .. }, target) => ("steps", target == TargetRule::TwoSteps {}, "two_steps"),
            (PairRule::Grid { .. }, target) => ("grid", !target.is_denoised(), "live or ema"),
            (PairRule::Continuous { .. }, target) => ("continuous", !target.is_denoised(), "live or ema"),
        };
        if !fits {
            let advice = format!("that is what train.pairs.kind = \"{pairs}\" goes with");
            return Err(Error::setting("train.target.kind", self.target.name(), expected, advice));
        }
        match (self.teacher, self.target.is_denoised()) {
            (Some(_), true) => Err(Error::setting(
                "train.teacher",
                "{ solver = … }",
                "none",
                "diffusion has no teacher, and progressive distillation's is the student of the stage before",
            )),
            _ => Ok(()),
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
            PairRule::Denoise { sigma } => sigma.validate()?,
            PairRule::Steps { rho, num_scales } => {
                KarrasGrid::new(SigmaRange::EDM, rho)?;
                num_scales.validate()?;
            }
        }
        match self.target {
            TargetRule::Ema { rule } => Ok(rule.validate()?),
            _ => Ok(()),
        }
    }
}
