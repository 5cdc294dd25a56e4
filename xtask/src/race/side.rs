//! One side of the race as a process that obeys commands.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Race;

/// This project's side.
pub fn ours(race: &Race, dtype: &str) -> Command {
    let mut command = Command::new(&race.cm);
    command.arg("race-side").arg(&race.shared).args(["--size", race.args.size.name()]);
    command.args(["--dtype", dtype, "--device", &race.args.device]);
    command.arg("--threads").arg(race.threads.to_string());
    if let Some(batch) = race.args.batch {
        command.arg("--batch").arg(batch.to_string());
    }
    for set in &race.args.sets {
        command.arg("--set").arg(set);
    }
    with_threads(command, race.threads)
}

/// The peer in mode `letter`.
pub fn peer(race: &Race, letter: &str) -> Command {
    let mut command = Command::new(&race.python);
    command.arg(race.scripts.join("peer.py")).arg(&race.shared);
    command.args([letter, &race.args.dtype, &race.threads.to_string(), &race.args.device]);
    with_threads(command, race.threads)
}

/// Gives every pool of threads of a process the same size.
pub fn with_threads(mut command: Command, threads: usize) -> Command {
    for pool in ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"] {
        command.env(pool, threads.to_string());
    }
    command
}

/// A process with its name (`ours` or a letter) and the dtype in which it computes.
pub struct Side {
    pub name: String,
    pub dtype: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Side {
    /// Starts it; what it says beside its answers goes into a log in the shared folder.
    pub fn start(command: &mut Command, name: &str, shared: &Path) -> Result<Self> {
        let log = shared.join(format!("{name}.log"));
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot write {}", log.display()))?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("a side without pipes");
        };
        Ok(Self { name: name.to_owned(), dtype: String::new(), child, input, output: BufReader::new(output) })
    }

    fn ask(&mut self, line: &str) -> Result<Value> {
        writeln!(self.input, "{line}").and_then(|()| self.input.flush()).context("the side is gone")?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        if answer.is_empty() {
            bail!("{} ended at '{line}'; its last words are in {}.log", self.name, self.name);
        }
        let answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("{}: {answer}", self.name))?;
        match answer.get("error") {
            Some(error) => bail!("{} at '{line}': {error}", self.name),
            None => Ok(answer),
        }
    }

    pub fn prepare(&mut self, row: &str) -> Result<Value> {
        let answer = self.ask(&format!("prepare {row}"))?;
        self.dtype = answer.get("dtype").and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok(answer)
    }

    pub fn check(&mut self) -> Result<Value> {
        self.ask("check")
    }

    /// Seconds and items of `count` runs.
    pub fn run(&mut self, count: u64) -> Result<(f64, f64)> {
        let answer = self.ask(&format!("run {count}"))?;
        Ok((number(&answer, "seconds")?, number(&answer, "items")?))
    }

    /// The most bytes that the process has held, and those of before it had a row.
    pub fn memory(&mut self) -> Result<[f64; 2]> {
        let answer = self.ask("memory")?;
        Ok([number(&answer, "bytes")?, number(&answer, "base")?])
    }
}

fn number(answer: &Value, key: &str) -> Result<f64> {
    answer.get(key).and_then(Value::as_f64).with_context(|| format!("no {key} in {answer}"))
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// A side that is a script of the shell.
    fn side(script: &str, folder: &Path) -> Side {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Side::start(&mut command, "x", folder).unwrap()
    }

    #[test]
    fn a_side_answers_in_numbers_or_says_why_not() {
        let folder = tempfile::tempdir().unwrap();
        let answers = r#"read l; echo '{"dtype": "bf16"}'; read l; echo '{"seconds": 0.5, "items": 4}'; read l;
            echo '{"bytes": 10, "base": 3}'; read l; echo '{"error": "no such row"}'; read l; echo 'what?'"#;
        let mut good = side(answers, folder.path());
        good.prepare("ct").unwrap();
        assert_eq!(good.dtype, "bf16");
        assert_eq!(good.run(2).unwrap(), (0.5, 4.0));
        assert_eq!(good.memory().unwrap(), [10.0, 3.0]);
        assert_eq!(good.check().unwrap_err().to_string(), "x at 'check': \"no such row\"");
        assert!(format!("{:#}", good.check().unwrap_err()).contains("what?"));
    }

    #[test]
    fn a_side_that_dies_is_told_of_with_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let mut dying = side("echo out of memory >&2; read l", folder.path());
        let error = dying.prepare("ct").unwrap_err().to_string();
        assert!(error.contains("ended at 'prepare ct'") && error.contains("x.log"), "{error}");
        assert_eq!(std::fs::read_to_string(folder.path().join("x.log")).unwrap(), "out of memory\n");
    }
}
