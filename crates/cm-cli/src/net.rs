//! The models that `cm` trains: a network as a denoiser or as a consistency function, whichever the recipe is for.

use anyhow::Result;
use cm_model::{Backbone, Cond, ImageShape, Mode, Params, Preconditioned, Sigma};
use cm_sampler::{Hooks, Method, ModelRef, Request, Solver, Steps, sample};
use cm_schedule::solver::Churn;
use cm_schedule::{Boundary, Edm, KarrasGrid};
use cm_train::Trainable;
use tch::{Device, Tensor};

use crate::experiment::Experiment;

/// A model in training.
pub enum Net {
    /// `f(x, σ)`.
    Consistency(Preconditioned<Box<dyn Backbone + Send>, Boundary>),
    /// `D(x; σ)`.
    Denoiser(Preconditioned<Box<dyn Backbone + Send>, Edm>),
}

/// Levels of Heun's method for a denoiser where none are named: EDM's choice for CIFAR-10.
pub const HEUN_LEVELS: usize = 18;
/// A progressively distilled student with more steps than this is drawn by Heun's method: it is quicker, and a
/// denoiser all the same.
const MOST_STUDENT_STEPS: usize = 16;

impl Net {
    /// Builds the experiment's network with fresh weights.
    pub fn build(experiment: &Experiment, device: Device) -> Result<Self> {
        let net = cm_net::build(&experiment.network, experiment.train.seed, device)?;
        let compute = experiment.compute(device)?;
        if compute.channels_last {
            net.params().to_channels_last();
        }
        let (precond, sigma_range) = (&experiment.precond, experiment.precond.sigma_range()?);
        Ok(match experiment.train.recipe().method().trains_denoiser() {
            true => Self::Denoiser(Preconditioned { net, precond: precond.edm()?, sigma_range, compute }),
            false => {
                Self::Consistency(Preconditioned { net, precond: precond.boundary()?, sigma_range, compute })
            }
        })
    }

    /// How the network computes.
    pub fn compute(&self) -> cm_model::Compute {
        match self {
            Self::Consistency(model) => model.compute,
            Self::Denoiser(model) => model.compute,
        }
    }

    /// Quick samples: one step of a consistency function, a solver for a denoiser, of which `student_steps` says how
    /// many steps it was distilled to.
    pub fn draw(&self, request: &Request<'_>, rho: f64, student_steps: Option<usize>) -> Result<Tensor> {
        let method = match self {
            Self::Consistency(f) => Method::one_step(f)?,
            Self::Denoiser(d) => {
                let grid = KarrasGrid::new(d.sigma_range, rho)?;
                match student_steps {
                    Some(steps) if steps <= MOST_STUDENT_STEPS => {
                        Method::new(ModelRef::Denoiser(d), &steps_of_student(&grid, steps))?
                    }
                    _ => {
                        let heun = Solver::Heun { churn: Churn::NONE };
                        Method::solver(d, heun, &grid.with_zero(HEUN_LEVELS))?
                    }
                }
            }
        };
        Ok(sample(&method, request, Hooks::default())?)
    }
}

/// The sampler of a student that was progressively distilled to so many steps: Euler steps along its own grid.
pub fn steps_of_student(grid: &KarrasGrid, steps: usize) -> Steps {
    Steps::Solver { solver: Solver::Euler, levels: grid.descending(steps + 1) }
}

impl Trainable for Net {
    fn shape(&self) -> ImageShape {
        match self {
            Self::Consistency(model) => model.net.shape(),
            Self::Denoiser(model) => model.net.shape(),
        }
    }

    fn num_classes(&self) -> i64 {
        match self {
            Self::Consistency(model) => model.net.num_classes(),
            Self::Denoiser(model) => model.net.num_classes(),
        }
    }

    fn params(&self) -> &Params {
        match self {
            Self::Consistency(model) => model.net.params(),
            Self::Denoiser(model) => model.net.params(),
        }
    }

    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> cm_model::Result<Tensor> {
        match self {
            Self::Consistency(model) => model.evaluate(x, sigma, cond, mode),
            Self::Denoiser(model) => model.evaluate(x, sigma, cond, mode),
        }
    }
}
