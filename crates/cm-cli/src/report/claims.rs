//! The paper's claims, and those of its successors, held against what was measured.
//!
//! Each is "this is better than that", in Fréchet distance. It *holds* or *fails* only if the means are further apart than
//! two standard deviations of their difference, √(s₁² + s₂²), over three seeds or more of each; else it is *unresolved*.

use serde::{Deserialize, Serialize};

use super::plan::{TEACHER, TEACHER_LEVELS, sampled_in};
use super::results::{Results, Spread};

/// What became of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The difference is as claimed, and larger than chance.
    Holds,
    /// The difference is the other way round, and larger than chance.
    Fails,
    /// Chance may have made it.
    Unresolved,
}

impl Verdict {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Holds => "holds",
            Verdict::Fails => "fails",
            Verdict::Unresolved => "unresolved",
        }
    }
}

/// One side of a claim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// The trial, or what was made of its figure.
    pub name: String,
    /// Its Fréchet distance.
    pub fcd: Spread,
    /// How many of its runs did not come to their end. The others are no fair choice.
    pub stopped: usize,
}

/// A claim and its verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Claim {
    /// The claim.
    pub text: String,
    /// What is said to be better.
    pub better: Side,
    /// What it is said to be better than.
    pub worse: Side,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it is unresolved, if it is.
    pub why: Option<String>,
}

/// Standard deviations that a difference must exceed.
const SIGMAS: f64 = 2.0;
/// Seeds from which on a claim is decided.
const LEAST_SEEDS: usize = 3;
/// One step of a distilled model is close to its teacher if its distance is at most so many times the teacher's.
const CLOSE: f64 = 2.0;

impl Claim {
    fn new(text: &str, better: Side, worse: Side) -> Self {
        let gap = worse.fcd.mean - better.fcd.mean;
        let noise = match (better.fcd.sd, worse.fcd.sd) {
            (Some(a), Some(b)) => Some(a.hypot(b)),
            _ => None,
        };
        let few = better.fcd.count.min(worse.fcd.count) < LEAST_SEEDS;
        let stopped = better.stopped + worse.stopped;
        let (verdict, why) = match noise {
            _ if stopped > 0 => {
                (Verdict::Unresolved, Some(format!("{stopped} of its runs did not come to their end")))
            }
            Some(noise) if !few && gap > SIGMAS * noise => (Verdict::Holds, None),
            Some(noise) if !few && gap < -SIGMAS * noise => (Verdict::Fails, None),
            Some(noise) if !few => {
                let why = format!("the difference {gap:+.3} is within {SIGMAS} × {noise:.3}");
                (Verdict::Unresolved, Some(why))
            }
            _ => (Verdict::Unresolved, Some(format!("fewer than {LEAST_SEEDS} seeds"))),
        };
        Self { text: text.to_owned(), better, worse, verdict, why }
    }
}

/// Every claim of which both sides were tried.
pub fn claims(results: &Results) -> Vec<Claim> {
    let of = |trial: &str, steps: u64| {
        let fcd = results.spread(trial, steps, |score| score.fcd)?;
        let evaluations = if steps == 1 { String::new() } else { format!(", {steps} evaluations") };
        Some(Side { name: format!("{trial}{evaluations}"), fcd, stopped: results.stopped(trial) })
    };
    let twice_the_teacher = || {
        let of_teacher = of(TEACHER, 2 * TEACHER_LEVELS as u64 - 1)?;
        let name = format!("{CLOSE} × {}", of_teacher.name);
        Some(Side { name, fcd: of_teacher.fcd.times(CLOSE), stopped: 0 })
    };
    let pairs = [
        ("CD is better than PD in one step", of("cd", 1), of("pd", 1)),
        ("CD is better than PD in two steps", of("cd", 2), of(sampled_in("pd", 2), 2)),
        ("CD: pseudo-Huber is better than l2", of("cd", 1), of("cd-l2", 1)),
        ("CD: LPIPS is better than l2", of("cd-lpips", 1), of("cd-l2", 1)),
        ("CD: l2 is better than l1", of("cd-l2", 1), of("cd-l1", 1)),
        ("CD: Heun is better than Euler at N = 8", of("cd-n8", 1), of("cd-n8-euler", 1)),
        ("CD: Heun is better than Euler at N = 18", of("cd", 1), of("cd-euler", 1)),
        ("CT: adaptive N(k) and μ(k) are better than N = 18", of("ct", 1), of("ct-n18", 1)),
        ("iCT is better than CT", of("ict", 1), of("ct", 1)),
        ("iCT is better than CT with a live target", of("ict", 1), of("ct-live", 1)),
        ("ECT is better than CT", of("ect", 1), of("ct", 1)),
        ("ECT is better than CT with a live target", of("ect", 1), of("ct-live", 1)),
        ("one step of CD is close to its teacher", of("cd", 1), twice_the_teacher()),
        ("one step of CD at N = 8 is close to its teacher", of("cd-n8", 1), twice_the_teacher()),
    ];
    pairs.into_iter().filter_map(|(text, better, worse)| Some(Claim::new(text, better?, worse?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(values: &[f64]) -> Side {
        Side { name: "x".into(), fcd: Spread::of(values).unwrap(), stopped: 0 }
    }

    fn verdict(better: &[f64], worse: &[f64]) -> Verdict {
        Claim::new("c", side(better), side(worse)).verdict
    }

    #[test]
    fn a_difference_counts_beyond_two_deviations_of_it() {
        // Deviations 1 and 1: two of their difference are 2.83.
        let around = |mean: f64| [mean - 1.0, mean, mean + 1.0];
        assert_eq!(verdict(&around(5.0), &around(7.9)), Verdict::Holds);
        assert_eq!(verdict(&around(7.9), &around(5.0)), Verdict::Fails);
        assert_eq!(verdict(&around(5.0), &around(7.8)), Verdict::Unresolved);
        assert_eq!(verdict(&around(7.8), &around(5.0)), Verdict::Unresolved);
    }

    #[test]
    fn runs_that_stopped_leave_a_claim_open() {
        let stopped = Side { stopped: 1, ..side(&[1.0, 1.0, 1.0]) };
        let claim = Claim::new("c", stopped, side(&[9.0, 9.0, 9.0]));
        assert_eq!(claim.verdict, Verdict::Unresolved);
        assert!(claim.why.unwrap().contains("1 of its runs"));
    }

    #[test]
    fn few_seeds_decide_nothing() {
        for (better, worse) in
            [(vec![1.0, 1.0], vec![9.0; 3]), (vec![1.0], vec![9.0]), (vec![1.0; 3], vec![9.0])]
        {
            let claim = Claim::new("c", side(&better), side(&worse));
            assert_eq!(claim.verdict, Verdict::Unresolved);
            assert!(claim.why.unwrap().contains("3 seeds"));
        }
    }
}
