//! Samplers for comparison with other implementations alone: no preset uses them and no command offers them.

mod ablation;
mod levels;

pub use ablation::{Ablation, AblationPlan, AblationStep, Stage};
pub use levels::{Discretization, IddpmTable, Scaling, Schedule, Solver};
