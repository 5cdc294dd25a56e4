//! kill -9 at random moments.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::report::{Bar, Case, Outcome};
use super::runs::{Running, Runs, checkpoints, newest_step};

/// Its name in the table.
pub const NAME: &str = "kill -9";

/// Kills the run again and again, each time at another moment, until there were `count` kills; every time it reaches
/// its end, it is held against the undisturbed run, and another begins.
pub fn kills(runs: &Runs, count: usize, seed: u64) -> Result<Case> {
    let mut killer =
        Killer { runs, random: Random(seed), name: "killed-0".to_owned(), rounds: 0, kills: 0, torn: 0 };
    let mut bar = Bar::new("kills", count);
    let case = Case::of(NAME, || {
        while killer.kills < count {
            killer.session()?;
            bar.set(killer.kills, &format!("{} runs ended in the same bytes", killer.rounds));
        }
        killer.go_on_to_the_end()?;
        Ok(Outcome::Held(format!(
            "{} kills ({} while a checkpoint was written) in {} runs; all end in weights {}",
            killer.kills,
            killer.torn,
            killer.rounds,
            runs.weights()?
        )))
    });
    drop(bar);
    println!("{}", case.line());
    Ok(case)
}

struct Killer<'a> {
    runs: &'a Runs,
    random: Random,
    name: String,
    rounds: usize,
    kills: usize,
    torn: usize,
}

impl Killer<'_> {
    /// One session of the run, which is killed unless it ends before.
    fn session(&mut self) -> Result<()> {
        let folder = self.runs.folder(&self.name);
        let before = newest_step(&folder);
        let mut session = Running::start(&mut self.runs.train(&self.name))?;
        self.wait(&mut session, &folder)?;
        if let Some(code) = session.ended()? {
            ensure!(code == Some(0), "going on fails with {code:?}: {}", session.wait()?.last_line());
            return self.reached_its_end();
        }
        let done = session.kill()?;
        ensure!(
            !done.stderr.contains("WARNING"),
            "a checkpoint was not whole after kill {}: {}",
            self.kills,
            done.stderr
        );
        self.kills += 1;
        self.torn += usize::from(is_torn(&folder));
        self.runs.check_whole(&self.name)?;
        let after = newest_step(&folder);
        ensure!(after >= before, "kill {} took {before:?} back to {after:?}", self.kills);
        Ok(())
    }

    /// Half of the moments are anywhere in a session, from its first instant on; the others lie within the writing of a
    /// checkpoint or shortly behind it.
    fn wait(&mut self, session: &mut Running, folder: &Path) -> Result<()> {
        let anywhere = self.random.below(2) == 0;
        let most = if anywhere { self.runs.whole_seconds * 0.6 } else { 0.02 };
        let moment = Duration::from_secs_f64(most * self.random.share());
        // How many checkpoints are let pass first.
        let mut passes = self.random.below(6);
        let mut in_writing = false;
        let began = Instant::now();
        loop {
            let due = match anywhere {
                true => began.elapsed() >= moment,
                false => {
                    let torn = is_torn(folder);
                    passes -= u64::from(torn && !in_writing && passes > 0);
                    in_writing = torn;
                    passes == 0 && torn
                }
            };
            if due || session.ended()?.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        if !anywhere {
            std::thread::sleep(moment);
        }
        Ok(())
    }

    fn go_on_to_the_end(&mut self) -> Result<()> {
        if !self.runs.folder(&self.name).is_dir() {
            return Ok(());
        }
        let done = self.runs.finish(&mut self.runs.train(&self.name))?;
        ensure!(done.code == Some(0), "going on fails with {:?}: {}", done.code, done.last_line());
        self.reached_its_end()
    }

    fn reached_its_end(&mut self) -> Result<()> {
        self.runs.same_as_whole(&self.name)?;
        self.runs.check_whole(&self.name)?;
        self.runs.nothing_half_written(&self.name)?;
        fs::remove_dir_all(self.runs.folder(&self.name))?;
        self.rounds += 1;
        self.name = format!("killed-{}", self.rounds);
        Ok(())
    }
}

/// Whether a checkpoint is being written, or was when the run was killed.
fn is_torn(run: &Path) -> bool {
    let mut names = fs::read_dir(checkpoints(run)).into_iter().flatten().flatten();
    names.any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

/// Numbers for moments (Steele, Lea and Flood 2014, SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// From 0 to 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_spread() {
        let mut random = Random(1);
        let shares: Vec<f64> = (0..1000).map(|_| random.share()).collect();
        let mean = shares.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05 && shares.iter().all(|s| (0.0..1.0).contains(s)), "{mean}");
        assert!((0..100).map(|_| random.below(6)).max() == Some(5));
        // The first output for the seed 0 in the authors' code.
        assert_eq!(Random(0).next(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn a_half_written_checkpoint_shows() {
        let run = tempfile::tempdir().unwrap();
        assert!(!is_torn(run.path()));
        fs::create_dir_all(checkpoints(run.path()).join("step-00000001")).unwrap();
        assert!(!is_torn(run.path()));
        fs::create_dir(checkpoints(run.path()).join(".step-00000002.partial")).unwrap();
        assert!(is_torn(run.path()));
    }
}
