//! What the end-to-end tests are written with: a folder of its own for every test, the command `cm` run there, and
//! checkpoints compared bit by bit.

mod command;
mod weights;

pub use command::{Cm, Done, Running, Sandbox, root};
pub use weights::{assert_same_checkpoint, largest_difference, relative_difference};
