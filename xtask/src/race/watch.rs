//! How far a race has come: one line that is written anew in a terminal, and a line for each row in a log.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::time::Instant;

/// The watch on one row.
pub struct Watch {
    row: &'static str,
    place: usize,
    rows: usize,
    terminal: bool,
    /// When the first round began.
    rounds: Cell<Option<Instant>>,
}

impl Watch {
    /// Row number `place` (from 1) of `rows`.
    pub fn on(row: &'static str, place: usize, rows: usize) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let watch = Self { row, place, rows, terminal, rounds: Cell::new(None) };
        if !terminal {
            watch.say("begins");
        }
        watch
    }

    /// What is done now.
    pub fn stage(&self, what: &str) {
        if self.terminal {
            self.say(what);
        }
    }

    /// Round `round` (from 0) of `rounds` begins.
    pub fn round(&self, round: usize, rounds: usize) {
        if round == 0 {
            self.rounds.set(Some(Instant::now()));
        }
        let spent = self.rounds.get().map_or(0.0, |begin| begin.elapsed().as_secs_f64());
        self.stage(&line(round, rounds, spent));
    }

    fn say(&self, what: &str) {
        let Self { row, place, rows, .. } = self;
        let text = format!("row {place} of {rows}, {row}: {what}");
        let mut err = std::io::stderr().lock();
        // A line that cannot be shown must not end the race.
        let _ = if self.terminal { write!(err, "\r\x1b[2K{text}") } else { writeln!(err, "{text}") };
        let _ = err.flush();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[2K");
        }
    }
}

fn line(round: usize, rounds: usize, spent: f64) -> String {
    let begins = format!("round {} of {rounds}", round + 1);
    if round == 0 {
        return begins;
    }
    let left = spent / round as f64 * (rounds - round) as f64;
    format!("{begins}, {left:.0} s left")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_follows_from_the_rounds_before() {
        assert_eq!(line(0, 7, 0.0), "round 1 of 7");
        assert_eq!(line(2, 7, 4.0), "round 3 of 7, 10 s left");
    }
}
