//! Checks this project against numbers recorded from the reference implementations.
//!
//! A golden file is a safetensors file that holds inputs, results and, in its metadata, the configuration and the
//! tolerance. What is checked follows from the file's name, its metadata and the names of its tensors alone.
//! Nothing is skipped in silence: a tensor that no check uses, a file that nothing knows and a file that another
//! one needs are failures.
#![deny(missing_docs)]

pub mod analytic;
pub mod close;
pub mod golden;
pub mod group01;
pub mod group02;
pub mod group03;
pub mod group04;
pub mod group05;
pub mod group06;
pub mod group07;
pub mod group08;
pub mod group09;
pub mod hashed;
pub mod nets;
pub mod registry;
pub mod report;

use std::path::{Path, PathBuf};

use golden::{Library, stem};
pub use golden::{Problem, Result};
use report::{Checks, Outcome, Report, Row};

/// Runs every check that the files in `folders` allow; `only` keeps the files whose names begin with it.
///
/// # Errors
/// [`Problem`] if there is nothing to check, or if the registry contradicts itself.
pub fn run(folders: &[PathBuf], only: Option<&str>) -> Result<Report> {
    registry::validate()?;
    let library = Library::new(folders)?;
    let chosen = |path: &&PathBuf| only.is_none_or(|prefix| stem(path).starts_with(prefix));
    let paths: Vec<_> = library.paths().iter().filter(chosen).collect();
    if paths.is_empty() {
        return golden::problem(format!("no file begins with '{}'", only.unwrap_or_default()));
    }
    let mut rows: Vec<_> = paths.iter().map(|path| row(path, &library)).collect();
    for (row, path) in rows.iter_mut().zip(paths) {
        lend(row, path, &library);
    }
    Ok(Report { rows })
}

/// A file that nothing checks by itself counts if the check of another one took all that is in it.
fn lend(row: &mut Row, path: &Path, library: &Library) {
    let users = library.users(path);
    let Ok(golden) = library.open(path) else { return };
    if matches!(row.outcome, Outcome::Unusable(_)) && !users.is_empty() && golden.unused().is_empty() {
        row.outcome = Outcome::Lent { users };
    }
}

fn row(path: &Path, library: &Library) -> Row {
    let unusable = |p: Problem| Row { file: stem(path), outcome: Outcome::Unusable(p.0) };
    let golden = match library.open(path) {
        Ok(golden) => golden,
        Err(problem) => return unusable(problem),
    };
    match registry::find(&golden) {
        Err(problem) => unusable(problem),
        Ok(check) => {
            let mut checks = Checks::new(&golden, library, path);
            let result = check(&mut checks);
            checks.finish(result)
        }
    }
}
