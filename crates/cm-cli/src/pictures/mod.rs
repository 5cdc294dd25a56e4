//! Pictures that people look at: charts of a run, strips of sample grids.

mod chart;

pub use chart::{Chart, Series};
