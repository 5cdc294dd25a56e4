//! What was checked, and the table of it.

use std::fmt::Write as _;
use std::path::Path;

use tch::Tensor;

use crate::close::{Tolerance, compare};
use crate::golden::{Golden, Library, Result};

/// One comparison with a recorded value.
#[derive(Debug, Clone)]
pub struct Check {
    /// Name of the tensor, or of the fact.
    pub name: String,
    /// The error found.
    pub error: f64,
    /// What is allowed.
    pub tolerance: Tolerance,
    /// Where the worst error is.
    pub detail: String,
}

impl Check {
    /// Whether the value is as near as it must be.
    pub fn passed(&self) -> bool {
        self.error <= self.tolerance.limit()
    }

    /// Error in units of what is allowed, to find the worst check of a file.
    fn severity(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance.limit() }
    }
}

/// The checks of one file while they run.
pub struct Checks<'a> {
    /// The file.
    pub golden: &'a Golden,
    /// The other files.
    pub library: &'a Library,
    /// Where the file lies.
    pub path: &'a Path,
    done: Vec<Check>,
    hint: Option<String>,
}

impl<'a> Checks<'a> {
    /// No check done yet.
    pub fn new(golden: &'a Golden, library: &'a Library, path: &'a Path) -> Self {
        Self { golden, library, path, done: Vec::new(), hint: None }
    }

    /// Compares `got` with the file's tensor `name`.
    ///
    /// # Errors
    /// [`crate::Problem`] if the file has no such tensor.
    pub fn tensor(&mut self, name: &str, got: &Tensor, tolerance: Tolerance) -> Result<bool> {
        let want = self.golden.want(name)?;
        Ok(self.between(name, got, &want, tolerance))
    }

    /// Compares f64 values with the file's tensor `name`.
    ///
    /// # Errors
    /// [`crate::Problem`] if the file has no such tensor.
    pub fn values(&mut self, name: &str, got: &[f64], tolerance: Tolerance) -> Result<bool> {
        let want = self.golden.want(name)?;
        let size = want.size();
        // A scalar and a list of one are the same fact; any other difference in length is an error.
        let got = Tensor::from_slice(got);
        let got = if got.numel() == want.numel() { got.view(size.as_slice()) } else { got };
        Ok(self.between(name, &got, &want, tolerance))
    }

    /// Compares integers with the file's tensor `name`, which must equal them.
    ///
    /// # Errors
    /// [`crate::Problem`] if the file has no such tensor.
    pub fn integers(&mut self, name: &str, got: &[i64]) -> Result<bool> {
        let got: Vec<f64> = got.iter().map(|&n| n as f64).collect();
        self.values(name, &got, Tolerance::Exact)
    }

    /// Compares two tensors, where the recorded one is a part of or a function of the file's.
    pub fn between(&mut self, name: &str, got: &Tensor, want: &Tensor, tolerance: Tolerance) -> bool {
        let difference = compare(got, want, tolerance);
        let check =
            Check { name: name.into(), error: difference.error, tolerance, detail: difference.detail };
        let passed = check.passed();
        self.done.push(check);
        passed
    }

    /// Records a fact that either holds or does not.
    pub fn fact(&mut self, name: &str, holds: bool, detail: impl Into<String>) {
        let error = if holds { 0.0 } else { f64::INFINITY };
        self.done.push(Check {
            name: name.into(),
            error,
            tolerance: Tolerance::Exact,
            detail: detail.into(),
        });
    }

    /// Where to look first if the file fails.
    pub fn hint(&mut self, hint: impl Into<String>) {
        self.hint = Some(hint.into());
    }

    /// The finished row.
    pub fn finish(self, result: Result<()>) -> Row {
        let mut problems: Vec<String> = result.err().map(|p| p.0).into_iter().collect();
        if problems.is_empty() {
            let unused = self.golden.unused();
            if !unused.is_empty() {
                problems.push(format!("nothing uses {}", list(&unused)));
            }
            if self.done.is_empty() {
                problems.push("no check was made".into());
            }
        }
        let outcome = Outcome::Checked { checks: self.done, problems, hint: self.hint };
        Row { file: self.golden.stem.clone(), outcome }
    }
}

fn list(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(|n| format!("'{n}'")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

/// What became of a file.
#[derive(Debug)]
pub enum Outcome {
    /// Its checks ran.
    Checked {
        /// Each comparison.
        checks: Vec<Check>,
        /// What kept it from being checked whole.
        problems: Vec<String>,
        /// Where to look first.
        hint: Option<String>,
    },
    /// Nothing checks it by itself, and the checks of other files used all that is in it.
    Lent {
        /// Those files.
        users: Vec<String>,
    },
    /// It could not be read, or nothing knows it.
    Unusable(String),
}

/// A line of the table.
#[derive(Debug)]
pub struct Row {
    /// The file's name without its ending.
    pub file: String,
    /// What became of it.
    pub outcome: Outcome,
}

impl Row {
    /// Whether the file makes the run fail.
    pub fn failed(&self) -> bool {
        match &self.outcome {
            Outcome::Checked { checks, problems, .. } => {
                !problems.is_empty() || checks.iter().any(|c| !c.passed())
            }
            Outcome::Lent { .. } => false,
            Outcome::Unusable(_) => true,
        }
    }

    /// Whether the file was checked, with whatever result.
    pub fn checked(&self) -> bool {
        matches!(self.outcome, Outcome::Checked { .. } | Outcome::Lent { .. })
    }

    fn line(&self) -> [String; 5] {
        let blank = || "-".to_string();
        match &self.outcome {
            Outcome::Checked { checks, problems, .. } => {
                let worst = checks.iter().max_by(|a, b| a.severity().total_cmp(&b.severity()));
                let error = worst.map_or_else(blank, |w| format!("{:.1e}", w.error));
                let tolerance = worst
                    .map_or_else(blank, |w| format!("{:.0e} {}", w.tolerance.limit(), w.tolerance.word()));
                let failed = checks.iter().filter(|c| !c.passed()).count() + problems.len();
                let verdict = if failed == 0 { "pass".into() } else { format!("FAIL ({failed})") };
                [self.file.clone(), checks.len().to_string(), error, tolerance, verdict]
            }
            Outcome::Lent { users } => {
                let used = format!("used by {}", users.first().map_or("none", String::as_str));
                [self.file.clone(), blank(), blank(), blank(), used]
            }
            Outcome::Unusable(_) => [self.file.clone(), blank(), blank(), blank(), "FAIL".into()],
        }
    }

    fn explain(&self, out: &mut String) {
        match &self.outcome {
            Outcome::Checked { checks, problems, hint } => {
                for check in checks.iter().filter(|c| !c.passed()) {
                    let Check { name, error, tolerance, detail } = check;
                    let (limit, word) = (tolerance.limit(), tolerance.word());
                    let _ = writeln!(
                        out,
                        "{}: '{name}' is off by {error:.2e}, {limit:.0e} ({word}) is allowed; {detail}",
                        self.file
                    );
                }
                for problem in problems {
                    let _ = writeln!(out, "{}: {problem}", self.file);
                }
                if let Some(hint) = hint.as_ref().filter(|_| self.failed()) {
                    let _ = writeln!(out, "{}: {hint}", self.file);
                }
            }
            Outcome::Unusable(reason) => {
                let _ = writeln!(out, "{}: {reason}", self.file);
            }
            Outcome::Lent { .. } => {}
        }
    }
}

/// The result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// One row for each file.
    pub rows: Vec<Row>,
}

impl Report {
    /// Number of files that fail.
    pub fn num_failed(&self) -> usize {
        self.rows.iter().filter(|row| row.failed()).count()
    }

    /// Number of files that were checked.
    pub fn num_checked(&self) -> usize {
        self.rows.iter().filter(|row| row.checked()).count()
    }
}

impl Report {
    /// Every comparison, a line for each.
    pub fn comparisons(&self) -> String {
        let mut lines = String::new();
        for row in &self.rows {
            let Outcome::Checked { checks, .. } = &row.outcome else { continue };
            for Check { name, error, tolerance, .. } in checks {
                let (limit, word) = (tolerance.limit(), tolerance.word());
                let _ = writeln!(lines, "{}: '{name}' {error:.1e} of {limit:.0e} ({word})", row.file);
            }
        }
        lines
    }
}

impl std::fmt::Display for Report {
    /// The table, then a line for each miss, then the count.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = ["file", "checks", "worst error", "tolerance", "result"].map(String::from);
        let lines: Vec<[String; 5]> = std::iter::once(head).chain(self.rows.iter().map(Row::line)).collect();
        let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0);
        let widths: [usize; 5] = std::array::from_fn(width);
        for [file, checks, error, tolerance, result] in &lines {
            let [w0, w1, w2, w3, _] = widths;
            writeln!(f, "{file:w0$}  {checks:>w1$}  {error:>w2$}  {tolerance:w3$}  {result}")?;
        }
        let mut misses = String::new();
        self.rows.iter().for_each(|row| row.explain(&mut misses));
        if !misses.is_empty() {
            write!(f, "\n{misses}")?;
        }
        let (checked, failed) = (self.num_checked(), self.num_failed());
        write!(f, "{checked} of {} files checked, {failed} failed", self.rows.len())
    }
}
