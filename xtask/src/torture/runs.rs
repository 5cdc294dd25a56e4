//! The tiny run that everything befalls, and what must hold of its folder afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Steps of the run, and so its checkpoints.
pub const STEPS: u64 = 30;
/// The experiment, in the folder of the runs.
const CONFIG: &str = "tiny.toml";
/// The run that nothing befalls.
pub const WHOLE: &str = "whole";
/// Longest time that one command may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The program, and the folder of all runs.
pub struct Runs {
    program: PathBuf,
    place: PathBuf,
    /// Seconds of the undisturbed run.
    pub whole_seconds: f64,
    /// Whether some of each kind are enough.
    pub quick: bool,
}

impl Runs {
    /// Trains the undisturbed run.
    pub fn begin(program: PathBuf, place: PathBuf, experiment: &Path, quick: bool) -> Result<Self> {
        fs::copy(experiment, place.join(CONFIG))
            .with_context(|| format!("cannot copy {}", experiment.display()))?;
        let mut runs = Self { program, place, whole_seconds: 0.0, quick };
        let began = Instant::now();
        let done = runs.finish(&mut runs.train(WHOLE))?;
        ensure!(done.code == Some(0), "the undisturbed run fails: {}", done.last_line());
        runs.whole_seconds = began.elapsed().as_secs_f64();
        runs.check_whole(WHOLE)?;
        Ok(runs)
    }

    /// The folder of a run.
    pub fn folder(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// The folder of all runs.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// A command of `cm` in the folder of the runs.
    pub fn cm(&self, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(line.split_whitespace()).current_dir(&self.place).stdin(Stdio::null());
        // As in the tests: threads that spin while they wait take the cores from those that work.
        command.env("OMP_NUM_THREADS", "1").env("OMP_WAIT_POLICY", "PASSIVE").env("RAYON_NUM_THREADS", "1");
        command
    }

    /// Begins the run `name`, or goes on with it.
    pub fn train(&self, name: &str) -> Command {
        let sets = format!(
            "--set train.total_steps={STEPS} --set run.checkpoint_every=1 --set run.keep_last=3 --set run.log_every=1"
        );
        self.cm(&format!("train --config {CONFIG} --device cpu --resume --out {name} {sets}"))
    }

    /// Goes on with the run `name` by what its folder says alone.
    pub fn resume(&self, name: &str) -> Command {
        self.cm(&format!("train --device cpu --resume --out {name}"))
    }

    /// A run that was killed behind the middle of its way.
    pub fn interrupted(&self, name: &str) -> Result<()> {
        let mut child = Running::start(&mut self.train(name))?;
        while newest_step(&self.folder(name)).is_none_or(|step| step < STEPS / 2) {
            ensure!(child.ended()?.is_none(), "{name} ended before it could be interrupted");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().map(drop)
    }

    /// Runs a command to its end.
    pub fn finish(&self, command: &mut Command) -> Result<Done> {
        Running::start(command)?.wait()
    }

    /// Goes on with a run to its end and holds it against the undisturbed one.
    pub fn recovers(&self, name: &str) -> Result<Done> {
        let done = self.finish(&mut self.resume(name))?;
        ensure!(done.code == Some(0), "going on fails with {:?}: {}", done.code, done.last_line());
        self.same_as_whole(name)?;
        Ok(done)
    }

    /// Asserts that the last checkpoint of the run is that of the undisturbed one, byte by byte.
    pub fn same_checkpoint(&self, name: &str) -> Result<()> {
        let [whole, other] = [WHOLE, name].map(|name| last(&self.folder(name)));
        let (want, got) = (contents(&whole)?, contents(&other)?);
        ensure!(want.keys().eq(got.keys()), "other files in the last checkpoint: {:?}", got.keys());
        for (file, bytes) in &want {
            ensure!(
                got.get(file) == Some(bytes),
                "{}: other bytes than without a fault",
                other.join(file).display()
            );
        }
        Ok(())
    }

    /// The same, and that every step was logged once.
    pub fn same_as_whole(&self, name: &str) -> Result<()> {
        self.same_checkpoint(name)?;
        let [want, got] = [WHOLE, name].map(|name| log(&self.folder(name)));
        ensure!(want? == got?, "{name}/progress.csv: other rows than without a fault");
        Ok(())
    }

    /// Asserts that every checkpoint with its final name is whole.
    pub fn check_whole(&self, name: &str) -> Result<usize> {
        let mut whole = 0;
        for step in steps(&self.folder(name)) {
            let folder = checkpoints(&self.folder(name)).join(format!("step-{step:08}"));
            check_checkpoint(&folder).with_context(|| folder.display().to_string())?;
            whole += 1;
        }
        Ok(whole)
    }

    /// Asserts that no temporary file is left in the folder of the run.
    pub fn nothing_half_written(&self, name: &str) -> Result<()> {
        for folder in [self.folder(name), checkpoints(&self.folder(name))] {
            // A run that failed early has no checkpoints.
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                let path = entry?.path();
                ensure!(!path.to_string_lossy().ends_with(".partial"), "{} is left", path.display());
            }
        }
        Ok(())
    }

    /// The checksum of the weights at the end of the undisturbed run.
    pub fn weights(&self) -> Result<String> {
        let state = fs::read(last(&self.folder(WHOLE)).join("state.json"))?;
        let state: Value = serde_json::from_slice(&state)?;
        let crc =
            state["files"]["raw.safetensors"]["crc32"].as_u64().context("no checksum of the weights")?;
        Ok(format!("{crc:08x}"))
    }
}

/// A command that runs.
pub struct Running {
    child: Child,
    began: Instant,
}

impl Running {
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.with_context(|| format!("cannot start {}", command.get_program().display()))?;
        Ok(Self { child, began: Instant::now() })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit code if it has ended; an error where it takes too long.
    pub fn ended(&mut self) -> Result<Option<Option<i32>>> {
        if self.began.elapsed() > PATIENCE {
            drop(self.child.kill());
            bail!("a command took more than {} s and was killed", PATIENCE.as_secs());
        }
        Ok(self.child.try_wait()?.map(|status| status.code()))
    }

    /// SIGSTOP: it stays as it is until it is killed.
    pub fn freeze(&self) -> Result<()> {
        let status = Command::new("kill").args(["-STOP", &self.id().to_string()]).status();
        ensure!(status.context("cannot start kill")?.success(), "kill -STOP fails");
        Ok(())
    }

    /// SIGKILL: nothing of it runs on, and nothing is written any more.
    pub fn kill(mut self) -> Result<Done> {
        // It may have ended by itself a moment ago.
        let _ = self.child.kill();
        Ok(Done::of(self.child.wait_with_output()?))
    }

    pub fn wait(mut self) -> Result<Done> {
        // What it prints here is far less than a pipe holds.
        while self.ended()?.is_none() {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Done::of(self.child.wait_with_output()?))
    }
}

/// What a command left behind.
pub struct Done {
    /// The exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Done {
    fn of(output: Output) -> Self {
        Self { code: output.status.code(), stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    pub fn last_line(&self) -> &str {
        self.stderr.lines().last().unwrap_or_default()
    }

    /// Asserts this exit code and one line that holds all of `words`.
    pub fn fails(&self, code: i32, words: &[&str]) -> Result<()> {
        let line = self.last_line();
        ensure!(self.code == Some(code), "exit code {:?}, expected {code}: {line}", self.code);
        let errors = self.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        ensure!(errors == 1 && line.starts_with("error: "), "expected one line of error: {}", self.stderr);
        for word in words {
            ensure!(line.contains(word), "'{word}' is missing in: {line}");
        }
        Ok(())
    }
}

/// `checkpoints` of a run.
pub fn checkpoints(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

fn last(run: &Path) -> PathBuf {
    checkpoints(run).join(format!("step-{STEPS:08}"))
}

/// The steps that have a folder, in ascending order.
pub fn steps(run: &Path) -> Vec<u64> {
    let names = fs::read_dir(checkpoints(run)).into_iter().flatten().flatten();
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    let mut steps: Vec<u64> = names.filter_map(|entry| step(&entry.file_name().to_string_lossy())).collect();
    steps.sort_unstable();
    steps
}

pub fn newest_step(run: &Path) -> Option<u64> {
    steps(run).last().copied()
}

/// Every file of a folder with its bytes.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
    };
    entries.map(file).collect()
}

/// The rows of the log without the columns that tell the time.
fn log(run: &Path) -> Result<Vec<String>> {
    let path = run.join("progress.csv");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.lines().map(|row| row.rsplitn(3, ',').last().unwrap_or_default().to_owned()).collect())
}

/// Reads a checkpoint back by what its `state.json` says of it, independently of the program.
fn check_checkpoint(folder: &Path) -> Result<()> {
    let state: Value = serde_json::from_slice(&fs::read(folder.join("state.json")).context("state.json")?)?;
    let files = state["files"].as_object().context("state.json lists no files")?;
    ensure!(files.len() >= 3, "weights, averages and moments are {} files", files.len());
    for (name, record) in files {
        let mut bytes = Vec::new();
        fs::File::open(folder.join(name)).with_context(|| name.clone())?.read_to_end(&mut bytes)?;
        ensure!(record["bytes"].as_u64() == Some(bytes.len() as u64), "{name} has another length");
        let crc = u64::from(crc32fast::hash(&bytes));
        ensure!(record["crc32"].as_u64() == Some(crc), "{name} has another checksum");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_of(state: &str) -> tempfile::TempDir {
        let run = tempfile::tempdir().unwrap();
        let folder = checkpoints(run.path()).join("step-00000007");
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir(checkpoints(run.path()).join(".step-00000008.partial")).unwrap();
        for name in ["a", "b", "c"] {
            fs::write(folder.join(name), name).unwrap();
        }
        fs::write(folder.join("state.json"), state).unwrap();
        run
    }

    #[test]
    fn checkpoints_are_held_against_their_lists() {
        let record = |name: &str| {
            format!("\"{name}\": {{\"bytes\": 1, \"crc32\": {}}}", crc32fast::hash(name.as_bytes()))
        };
        let state = format!("{{\"files\": {{{}, {}, {}}}}}", record("a"), record("b"), record("c"));
        let run = run_of(&state);
        assert_eq!(steps(run.path()), [7]);
        let folder = checkpoints(run.path()).join("step-00000007");
        check_checkpoint(&folder).unwrap();
        for (content, says) in [("x", "checksum"), ("aa", "length")] {
            fs::write(folder.join("a"), content).unwrap();
            assert!(check_checkpoint(&folder).unwrap_err().to_string().contains(says));
        }
        fs::remove_file(folder.join("a")).unwrap();
        assert!(check_checkpoint(&folder).is_err());
        assert!(check_checkpoint(&checkpoints(run_of("{").path()).join("step-00000007")).is_err());
    }

    #[test]
    fn a_failure_is_one_line_with_words() {
        let done = |stderr: &str| Done { code: Some(1), stderr: stderr.to_owned() };
        done("device\nerror: disk full\n").fails(1, &["disk"]).unwrap();
        assert!(done("error: disk full\n").fails(2, &[]).is_err());
        assert!(done("error: disk full\n").fails(1, &["memory"]).is_err());
        assert!(done("error: a\nerror: b\n").fails(1, &[]).is_err());
    }
}
