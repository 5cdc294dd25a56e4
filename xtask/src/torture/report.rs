//! What held and what did not, for people and for programs; and how far the suite is.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

/// How a fault ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// As promised, with what was seen.
    Held(String),
    /// Otherwise.
    Failed(String),
    /// This machine does not let it be tried, and why.
    LeftOut(String),
}

/// One kind of fault and its outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    pub name: &'static str,
    pub outcome: Outcome,
    pub seconds: f64,
}

impl Case {
    /// Does it. An error is a failure.
    pub fn of(name: &'static str, work: impl FnOnce() -> Result<Outcome>) -> Self {
        let began = Instant::now();
        let outcome = work().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        Self { name, outcome, seconds: began.elapsed().as_secs_f64() }
    }

    /// A row of the table.
    pub fn line(&self) -> String {
        let (word, text) = self.outcome.words();
        format!("  {:<16} {:>6.1} s  {word:<8}  {text}", self.name, self.seconds)
    }
}

impl Outcome {
    fn words(&self) -> (&'static str, &str) {
        match self {
            Outcome::Held(text) => ("held", text),
            Outcome::Failed(text) => ("FAILED", text),
            Outcome::LeftOut(text) => ("left out", text),
        }
    }
}

/// The table at the end.
pub fn table(cases: &[Case], seconds: f64) -> String {
    let count = |wanted: &str| cases.iter().filter(|case| case.outcome.words().0 == wanted).count();
    let mut text = "\ntorture\n".to_owned();
    cases.iter().for_each(|case| text += &format!("{}\n", case.line()));
    let (held, failed, left_out) = (count("held"), count("FAILED"), count("left out"));
    text + &format!("  {:<16} {seconds:>6.1} s  {held} held, {failed} failed, {left_out} left out\n", "all")
}

/// The same for programs.
pub fn json(cases: &[Case], kills: usize, seed: u64, seconds: f64) -> String {
    let rows: Vec<_> = cases
        .iter()
        .map(|case| {
            let (outcome, text) = case.outcome.words();
            json!({"name": case.name, "outcome": outcome.to_lowercase(), "text": text, "seconds": case.seconds})
        })
        .collect();
    let whole = json!({"kills": kills, "seed": seed, "seconds": seconds, "cases": rows});
    format!("{whole:#}\n")
}

/// A bar in a terminal, and a line every ten seconds elsewhere.
pub struct Bar {
    what: &'static str,
    total: usize,
    terminal: bool,
    shown: Instant,
}

impl Bar {
    pub fn new(what: &'static str, total: usize) -> Self {
        Self { what, total, terminal: std::io::stderr().is_terminal(), shown: Instant::now() }
    }

    pub fn set(&mut self, done: usize, more: &str) {
        let often = Duration::from_millis(if self.terminal { 100 } else { 10_000 });
        if self.shown.elapsed() < often {
            return;
        }
        self.shown = Instant::now();
        let mut err = std::io::stderr().lock();
        // A line that cannot be shown must not end the suite.
        let _ = match self.terminal {
            true => write!(err, "\r\x1b[2K{}", bar(self.what, done, self.total, more)),
            false => writeln!(err, "{}", bar(self.what, done, self.total, more)),
        };
        let _ = err.flush();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[2K");
        }
    }
}

fn bar(what: &str, done: usize, total: usize, more: &str) -> String {
    const WIDTH: usize = 30;
    let full = (WIDTH * done.min(total)) / total.max(1);
    format!("{what} [{}{}] {done} of {total}  {more}", "#".repeat(full), "-".repeat(WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_and_json_say_the_same() {
        let case = |name, outcome| Case { name, outcome, seconds: 1.25 };
        let cases = [
            case("kills", Outcome::Held("3 kills".to_owned())),
            case("full disk", Outcome::Failed("a \"half\" is left".to_owned())),
            case("read-only", Outcome::LeftOut("no namespaces".to_owned())),
        ];
        let text = table(&cases, 4.0);
        for line in [
            "  kills               1.2 s  held      3 kills\n",
            "  full disk           1.2 s  FAILED    a \"half\" is left\n",
            "  all                 4.0 s  1 held, 1 failed, 1 left out\n",
        ] {
            assert!(text.contains(line), "{line:?} in {text}");
        }
        let value: serde_json::Value = serde_json::from_str(&json(&cases, 3, 7, 4.0)).unwrap();
        assert_eq!(value["cases"][1]["outcome"], "failed");
        assert_eq!(value["cases"][2]["text"], "no namespaces");
        assert_eq!((value["kills"].as_u64(), value["seed"].as_u64()), (Some(3), Some(7)));
    }

    #[test]
    fn the_bar_fills() {
        assert_eq!(bar("kills", 5, 10, "x"), "kills [###############---------------] 5 of 10  x");
        assert!(bar("kills", 0, 0, "").contains("0 of 0"));
    }

    #[test]
    fn an_error_is_a_failure() {
        let case = Case::of("x", || anyhow::bail!("gone"));
        assert_eq!(case.outcome, Outcome::Failed("gone".to_owned()));
    }
}
