use cm_model::{Cond, ConsistencyFn, Denoiser, ImageShape, Sigma};
use cm_schedule::solver::{Churn, Plan, Renoise, Rule};
use cm_schedule::{KarrasGrid, SigmaRange};
use tch::{Device, Tensor};

use crate::{Error, ModelRef, Result};

/// The noise levels at which multistep sampling evaluates the consistency function.
///
/// The first level is where sampling starts, from noise of that standard deviation; it should be σ_max, since
/// noisy data at a lower level is not plain noise.
#[derive(Debug, Clone, PartialEq)]
pub enum Times {
    /// Positions on the Karras grid of `steps` levels, counted downwards from 0 = σ_max, as the released
    /// consistency models are run (`0,22,39` of 40). The **last** position is not evaluated: it names the level
    /// that the result is brought back to, and at `steps − 1`, which is σ_min, no noise is added.
    Indices {
        /// The positions, rising: levels fall.
        ts: Vec<usize>,
        /// Number of levels of the grid.
        steps: usize,
        /// The grid's exponent ρ; 7 for the released models.
        rho: f64,
    },
    /// Noise levels, falling; every one of them is evaluated (Song et al. 2023, Algorithm 1).
    Sigmas(Vec<f64>),
}

impl Times {
    /// The steps of these times for a model that is defined on `range`.
    ///
    /// # Errors
    /// [`Error::Schedule`] for an empty list, for levels that do not fall and for positions off the grid, and unless ρ is positive.
    ///
    /// ```
    /// use cm_sampler::{Times, schedule::SigmaRange};
    /// let plan = Times::Indices { ts: vec![0, 22, 39], steps: 40, rho: 7.0 }.plan(SigmaRange::EDM)?;
    /// let sigmas = plan.evaluation_sigmas();
    /// assert_eq!((sigmas.len(), sigmas[0]), (2, 80.0));
    /// assert!((sigmas[1] - 1.382).abs() < 1e-3, "position 22 of 40");
    /// assert_eq!(plan.draws(), 1, "position 39 is σ_min, where nothing is added");
    /// # Ok::<(), cm_sampler::Error>(())
    /// ```
    pub fn plan(&self, range: SigmaRange) -> Result<Plan> {
        Ok(match self {
            Times::Indices { ts, steps, rho } => {
                Plan::multistep_indices(&KarrasGrid::new(range, *rho)?, *steps, ts)?
            }
            Times::Sigmas(sigmas) => Plan::multistep(sigmas, range.min(), Renoise::ToLevel)?,
        })
    }
}

/// A solver of the probability-flow ODE.
///
/// ```
/// use cm_sampler::{Solver, schedule::solver::Churn};
/// let levels = [80.0, 8.0, 0.8, 0.0];
/// // Heun's method corrects each step but the one to 0.
/// assert_eq!(Solver::Heun { churn: Churn::NONE }.plan(&levels)?.evaluations(), 5);
/// assert_eq!(Solver::DpmPp2m.plan(&levels)?.evaluations(), 3);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Solver {
    /// Euler's method. Along `KarrasGrid::descending(n + 1)` it is the sampler of a model that was progressively
    /// distilled to n steps.
    Euler,
    /// Heun's method (Karras et al. 2022, Algorithm 1; with churn Algorithm 2).
    Heun {
        /// Noise before each step; [`Churn::NONE`] for the deterministic solver.
        churn: Churn,
    },
    /// DPM-2, the midpoint rule as Karras et al. restate it.
    Dpm2 {
        /// Noise before each step.
        churn: Churn,
    },
    /// Euler's method to below each level, and noise back up to it.
    Ancestral,
    /// DPM-Solver++(2M) (Lu et al., arXiv 2211.01095).
    DpmPp2m,
}

impl Solver {
    /// The steps along falling levels.
    ///
    /// # Errors
    /// [`Error::Schedule`] for levels that do not fall and for churn out of range.
    pub fn plan(&self, levels: &[f64]) -> Result<Plan> {
        Ok(match self {
            Solver::Euler => Plan::euler(levels)?,
            Solver::Heun { churn } => Plan::heun(levels, churn)?,
            Solver::Dpm2 { churn } => Plan::dpm2(levels, churn)?,
            Solver::Ancestral => Plan::ancestral(levels)?,
            Solver::DpmPp2m => Plan::dpmpp_2m(levels)?,
        })
    }
}

/// A way through the noise levels, for a model that is named elsewhere: what a request to a service says.
///
/// ```
/// use cm_sampler::{Method, ModelRef, Solver, Steps, model::{GaussianOracle, ImageShape}};
/// use cm_sampler::schedule::{KarrasGrid, SigmaRange, solver::Churn};
/// let d = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// let heun = Steps::Solver { solver: Solver::Heun { churn: Churn::NONE }, levels: KarrasGrid::EDM.with_zero(18) };
/// assert_eq!(Method::new(ModelRef::Denoiser(&d), &heun)?.num_evaluations(), 35);
/// # Ok::<(), cm_sampler::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Steps {
    /// One jump of a consistency function from σ_max.
    One,
    /// Several jumps (Song et al. 2023, Algorithm 1).
    Multistep(Times),
    /// Any plan of jumps.
    Jumps(Plan),
    /// A solver of the probability-flow ODE for a denoiser.
    Solver {
        /// Which one.
        solver: Solver,
        /// Falling levels, the last of which may be 0.
        levels: Vec<f64>,
    },
}

/// A way to make images: a model, and the steps in which it is used.
///
/// Which models go with which steps is a matter of types: a consistency function cannot be put into an ODE solver, nor a
/// denoiser into multistep sampling. Where the kind of model is not known before a file is open, [`Method::new`] finds
/// out.
///
/// ```
/// use cm_sampler::{Error, Method, Times, model::{GaussianOracle, ImageShape}, schedule::SigmaRange};
/// use cm_sampler::schedule::solver::{Plan, Renoise};
/// let f = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
/// assert_eq!(Method::one_step(&f)?.plan().evaluation_sigmas(), [80.0]);
/// assert_eq!(Method::multistep(&f, &Times::Sigmas(vec![80.0, 0.8]))?.num_evaluations(), 2);
/// // ECT's way to add noise again.
/// let ect = Plan::multistep(&[80.0, 0.821], 0.002, Renoise::Full)?;
/// assert_eq!(Method::jumps(&f, ect)?.start(), 80.0);
/// assert!(matches!(Method::multistep(&f, &Times::Sigmas(vec![100.0])), Err(Error::Level { .. })));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Method<'a> {
    model: ModelRef<'a>,
    start: f64,
    plan: Plan,
}

impl<'a> Method<'a> {
    /// The steps `steps` with a model of either kind.
    ///
    /// # Errors
    /// [`Error::NeedsConsistency`] and [`Error::NeedsDenoiser`] for a model of the other kind; else those of
    /// [`Method::multistep`], [`Method::jumps`] and [`Method::solver`].
    pub fn new(model: ModelRef<'a>, steps: &Steps) -> Result<Self> {
        match steps {
            Steps::One => Self::one_step(model.consistency()?),
            Steps::Multistep(times) => Self::multistep(model.consistency()?, times),
            Steps::Jumps(plan) => Self::jumps(model.consistency()?, plan.clone()),
            Steps::Solver { solver, levels } => Self::solver(model.denoiser()?, *solver, levels),
        }
    }

    /// One jump from σ_max.
    ///
    /// # Errors
    /// [`Error::Schedule`] for a model whose range is no range.
    pub fn one_step(f: &'a dyn ConsistencyFn) -> Result<Self> {
        let sigma_max = f.sigma_range().max();
        Self::multistep(f, &Times::Sigmas(vec![sigma_max]))
    }

    /// Several jumps (Song et al. 2023, Algorithm 1).
    ///
    /// # Errors
    /// [`Error::Schedule`] or [`Error::Level`] for times that the model cannot follow.
    pub fn multistep(f: &'a dyn ConsistencyFn, times: &Times) -> Result<Self> {
        let plan = times.plan(f.sigma_range())?;
        Self::jumps(f, plan)
    }

    /// Any plan of jumps: one on another grid, or with ECT's way to add noise.
    ///
    /// # Errors
    /// [`Error::Plan`] for a plan with other steps than jumps; [`Error::Level`] for a level outside the model's
    /// range.
    pub fn jumps(f: &'a dyn ConsistencyFn, plan: Plan) -> Result<Self> {
        let levels = plan.evaluation_sigmas();
        let only_jumps = plan.steps().iter().all(|step| step.rule == Rule::Jump);
        let (true, Some(&start)) = (only_jumps, levels.first()) else {
            return Err(Error::Plan);
        };
        check_levels(&levels, f.sigma_range())?;
        Ok(Self { model: ModelRef::Consistency(f), start, plan })
    }

    /// A solver of the probability-flow ODE along falling levels, the last of which may be 0.
    ///
    /// # Errors
    /// [`Error::Schedule`] for levels that do not fall or churn out of range; [`Error::Level`] for a level outside
    /// the model's range.
    ///
    /// ```
    /// use cm_sampler::{Hooks, Method, Request, Solver, model::{GaussianOracle, ImageShape}, sample};
    /// use cm_sampler::schedule::{KarrasGrid, SigmaRange, solver::Churn};
    /// let d = GaussianOracle { data_std: 0.5, shape: ImageShape::square(3, 8), sigma_range: SigmaRange::EDM };
    /// // EDM's deterministic sampler: 18 levels and 0, 35 evaluations.
    /// let heun = Method::solver(&d, Solver::Heun { churn: Churn::NONE }, &KarrasGrid::EDM.with_zero(18))?;
    /// assert_eq!(heun.num_evaluations(), 35);
    /// let images = sample(&heun, &Request::new(&[1, 2, 3]), Hooks::default())?;
    /// assert_eq!(images.size(), [3, 3, 8, 8]);
    /// # Ok::<(), cm_sampler::Error>(())
    /// ```
    pub fn solver(d: &'a dyn Denoiser, solver: Solver, levels: &[f64]) -> Result<Self> {
        let plan = solver.plan(levels)?;
        // A solver may leave the range by itself, by churn or below the last level; what it is given may not.
        let inner = levels.strip_suffix(&[0.0]).unwrap_or(levels);
        check_levels(inner, d.sigma_range())?;
        Ok(Self { model: ModelRef::Denoiser(d), start: levels[0], plan })
    }

    /// The level at which sampling starts, from noise of that standard deviation.
    pub fn start(&self) -> f64 {
        self.start
    }

    /// The steps.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Number of evaluations of the model that an image takes.
    pub fn num_evaluations(&self) -> usize {
        self.plan.evaluations()
    }

    /// The model.
    pub fn model(&self) -> ModelRef<'a> {
        self.model
    }

    /// Shape of the images.
    pub fn shape(&self) -> ImageShape {
        self.model.shape()
    }

    /// Number of classes of the model; 0 for an unconditional one.
    pub fn num_classes(&self) -> i64 {
        self.model.num_classes()
    }

    /// The device that the model is on.
    pub fn device(&self) -> Device {
        self.model.device()
    }

    /// One evaluation of the model.
    pub(crate) fn evaluate(&self, x: &Tensor, sigma: f64, cond: &Cond) -> Result<Tensor> {
        self.model.estimate(x, Sigma::One(sigma), cond)
    }
}

impl std::fmt::Debug for Method<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Method").field("plan", &self.plan).finish_non_exhaustive()
    }
}

fn check_levels(levels: &[f64], range: SigmaRange) -> Result<()> {
    match levels.iter().find(|&&sigma| !range.contains(sigma)) {
        None => Ok(()),
        Some(&sigma) => Err(Error::Level { sigma, min: range.min(), max: range.max() }),
    }
}
