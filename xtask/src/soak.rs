//! `cargo xtask soak`: a training run of hours, watched from outside: memory, file handles, steps a second.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::cli::SoakArgs;
use crate::runner::build_cm;
use crate::tools;

/// Linux counts processor time for programs in hundredths of a second on every machine.
const TICKS: f64 = 100.0;
/// The share at the beginning that is no part of the verdict: allocators and caches fill.
const WARM_UP: f64 = 0.1;
/// Growth of memory over the rest, as a share of it, that still counts as flat.
const FLAT_MEMORY: f64 = 0.05;
/// How much slower the last third may be than the first, in steps per second of processor time.
const FLAT_RATE: f64 = 0.1;

/// One look at the process.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Look {
    /// Seconds since the start.
    seconds: f64,
    /// Steps that its log has.
    step: f64,
    /// Resident memory in MB.
    rss: f64,
    /// Open file handles.
    files: f64,
    /// Seconds of processor time.
    cpu: f64,
}

/// Trains for `--hours`, and returns 1 if anything was not flat.
pub fn run(args: &SoakArgs) -> Result<u8> {
    ensure!(
        args.hours.is_finite() && args.hours > 0.0 && args.hours < 10_000.0,
        "--hours {}: expected a positive number",
        args.hours
    );
    ensure!(Path::new("/proc/self/status").exists(), "a soak is watched through /proc, which only Linux has");
    let cm = build_cm()?;
    let out = tools::own_folder(&args.out, "soak")?;
    let mut child = Soaked(start(&cm, args, &out)?);
    let looks = watch(&mut child.0, &out, args.hours * 3600.0)?;
    let code = child.stop()?;
    ensure!(
        code == Some(130) || code == Some(143),
        "the run did not save and end when it was asked to, but with {code:?}: see {}",
        out.join("cm.log").display()
    );
    let verdict = Verdict::of(&looks)?;
    fs::write(out.join("soak.json"), format!("{:#}\n", verdict.json(args)))?;
    print!("{}", verdict.table());
    println!("  {}", out.join("soak.csv").display());
    Ok(u8::from(!verdict.flat()))
}

/// Begins the run, with checkpoints and samples every few hundred steps and no end of its own.
fn start(cm: &Path, args: &SoakArgs, out: &Path) -> Result<Child> {
    let mut command = std::process::Command::new(cm);
    command
        .current_dir(tools::workspace_root())
        .args(["train", "--config", &args.config, "--out"])
        .arg(out.join("run"));
    for set in ["train.total_steps=1000000000", "run.checkpoint_every=500", "run.sample_every=500"] {
        command.args(["--set", set]);
    }
    command.args(args.sets.iter().flat_map(|set| ["--set", set]));
    let log = File::create(out.join("cm.log")).context("cm.log")?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().context("cannot start cm")
}

/// The process, which does not outlive an error here.
struct Soaked(Child);

impl Soaked {
    /// Asks it to save and end, and waits for that.
    fn stop(mut self) -> Result<Option<i32>> {
        let status = std::process::Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status();
        ensure!(status.context("cannot start kill")?.success(), "kill -TERM fails");
        Ok(self.0.wait()?.code())
    }
}

impl Drop for Soaked {
    fn drop(&mut self) {
        // It has usually ended by now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Looks every few seconds until the time is up, and keeps what it sees in `soak.csv`.
fn watch(child: &mut Child, out: &Path, seconds: f64) -> Result<Vec<Look>> {
    let (began, process) = (Instant::now(), PathBuf::from(format!("/proc/{}", child.id())));
    let pause = Duration::from_secs_f64((seconds / 100.0).clamp(0.2, 10.0));
    let mut csv = File::create(out.join("soak.csv")).context("soak.csv")?;
    writeln!(csv, "seconds,step,rss_mb,files,cpu_seconds")?;
    let (mut looks, mut shown) = (Vec::new(), Instant::now());
    while began.elapsed().as_secs_f64() < seconds {
        std::thread::sleep(pause);
        if let Some(status) = child.try_wait()? {
            bail!("the run ended by itself ({status}): see {}", out.join("cm.log").display());
        }
        let look = look(&process, &out.join("run/progress.csv"), began.elapsed().as_secs_f64())?;
        let Look { seconds: at, step, rss, files, cpu } = look;
        writeln!(csv, "{at:.1},{step},{rss:.1},{files},{cpu:.2}")?;
        looks.push(look);
        if shown.elapsed() > Duration::from_secs(60) {
            shown = Instant::now();
            let left = (seconds - at).max(0.0) / 60.0;
            eprintln!("soak: step {step}, {rss:.0} MB, {files} file handles, {left:.0} min left");
        }
    }
    Ok(looks)
}

fn look(process: &Path, progress: &Path, seconds: f64) -> Result<Look> {
    let status = fs::read_to_string(process.join("status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"));
    let rss: f64 = rss.context("no VmRSS in /proc")?.trim().parse()?;
    let files = fs::read_dir(process.join("fd"))?.count() as f64;
    Ok(Look {
        seconds,
        step: newest_step(&fs::read_to_string(progress).unwrap_or_default()),
        rss: rss / 1024.0,
        files,
        cpu: cpu_seconds(&fs::read_to_string(process.join("stat"))?)?,
    })
}

/// The first column of the last whole row of the log.
fn newest_step(log: &str) -> f64 {
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    whole.lines().last().and_then(|row| row.split(',').next()?.parse().ok()).unwrap_or(0.0)
}

/// utime and stime of `/proc/PID/stat`, whose second field is a name in parentheses that may hold anything.
fn cpu_seconds(stat: &str) -> Result<f64> {
    let (_, rest) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |place: usize| -> Result<f64> {
        Ok(fields.get(place).context("/proc/PID/stat is short")?.parse::<f64>()?)
    };
    Ok((ticks(11)? + ticks(12)?) / TICKS)
}

/// What was seen behind the warm-up.
#[derive(Debug)]
struct Verdict {
    hours: f64,
    steps: f64,
    /// Median memory in MB, its slope in MB an hour, and its growth over the time as a share.
    rss: f64,
    slope: f64,
    growth: f64,
    /// Median file handles of the first and the last third.
    files: [f64; 2],
    /// Steps a second of the clock, of the first and the last third.
    rate: [f64; 2],
    /// Steps a second of processor time, which other work on the machine disturbs less.
    cpu_rate: [f64; 2],
}

impl Verdict {
    fn of(looks: &[Look]) -> Result<Self> {
        let seconds = looks.last().map_or(0.0, |look| look.seconds);
        let rest: Vec<Look> =
            looks.iter().copied().filter(|look| look.seconds >= WARM_UP * seconds).collect();
        ensure!(rest.len() >= 12, "{} looks are too few for a verdict: more --hours", rest.len());
        let third = rest.len() / 3;
        let ends = [&rest[..third], &rest[rest.len() - third..]];
        let rate = |of: fn(&Look) -> f64| {
            ends.map(|part| (part[third - 1].step - part[0].step) / (of(&part[third - 1]) - of(&part[0])))
        };
        let rss = median(rest.iter().map(|look| look.rss));
        let slope = slope(&rest);
        let span = (seconds - rest[0].seconds) / 3600.0;
        Ok(Self {
            hours: seconds / 3600.0,
            steps: rest[rest.len() - 1].step,
            rss,
            slope,
            growth: slope * span / rss,
            files: ends.map(|part| median(part.iter().map(|look| look.files))),
            rate: rate(|look| look.seconds),
            cpu_rate: rate(|look| look.cpu),
        })
    }

    fn memory_is_flat(&self) -> bool {
        self.growth <= FLAT_MEMORY
    }

    fn files_are_flat(&self) -> bool {
        self.files[1] <= self.files[0]
    }

    fn rate_is_flat(&self) -> bool {
        self.cpu_rate[1] >= (1.0 - FLAT_RATE) * self.cpu_rate[0]
    }

    fn flat(&self) -> bool {
        self.memory_is_flat() && self.files_are_flat() && self.rate_is_flat()
    }

    fn table(&self) -> String {
        let word = |flat: bool| if flat { "flat" } else { "NOT FLAT" };
        let mut text = format!("soak of {:.2} hours, {} steps\n", self.hours, self.steps);
        let _ = writeln!(
            text,
            "  memory         {:.0} MB, {:+.2} MB an hour, {:+.1} % in all  {}",
            self.rss,
            self.slope,
            100.0 * self.growth,
            word(self.memory_is_flat())
        );
        let [first, last] = self.files;
        let _ = writeln!(text, "  file handles   {first} and {last}  {}", word(self.files_are_flat()));
        let [first, last] = self.cpu_rate;
        let flat = word(self.rate_is_flat());
        let _ = writeln!(text, "  steps a second of processor time   {first:.2} and {last:.2}  {flat}");
        let [first, last] = self.rate;
        text + &format!("  steps a second of the clock        {first:.2} and {last:.2}\n")
    }

    fn json(&self, args: &SoakArgs) -> serde_json::Value {
        json!({
            "config": args.config, "hours": self.hours, "steps": self.steps,
            "rss_mb": self.rss, "rss_slope_mb_per_hour": self.slope, "rss_growth": self.growth,
            "file_handles": self.files, "steps_per_second": self.rate,
            "steps_per_cpu_second": self.cpu_rate, "flat": self.flat(),
        })
    }
}

/// Least squares of memory over time, in MB an hour.
fn slope(looks: &[Look]) -> f64 {
    let n = looks.len() as f64;
    let mean = |of: fn(&Look) -> f64| looks.iter().map(of).sum::<f64>() / n;
    let (at, rss) = (mean(|look| look.seconds), mean(|look| look.rss));
    let both: f64 = looks.iter().map(|look| (look.seconds - at) * (look.rss - rss)).sum();
    let square: f64 = looks.iter().map(|look| (look.seconds - at).powi(2)).sum();
    3600.0 * both / square
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(grow: f64, slow: f64, leak: f64) -> Vec<Look> {
        let look = |i: f64| Look {
            seconds: 36.0 * i,
            step: 100.0 * i - slow * i * i,
            rss: 500.0 + grow * i + if i < 10.0 { 300.0 - 30.0 * i } else { 0.0 },
            files: 20.0 + (leak * i).floor(),
            cpu: 30.0 * i,
        };
        (1..=100).map(|i| look(f64::from(i))).collect()
    }

    #[test]
    fn what_grows_or_slows_is_not_flat() {
        let verdict = |grow, slow, leak| Verdict::of(&looks(grow, slow, leak)).unwrap();
        let flat = verdict(0.0, 0.0, 0.0);
        assert!(flat.flat() && flat.slope.abs() < 1e-9 && (flat.hours - 1.0).abs() < 1e-9, "{flat:?}");
        assert!((flat.cpu_rate[0] - 100.0 / 30.0).abs() < 1e-9);
        let grown = verdict(1.0, 0.0, 0.0);
        assert!((grown.slope - 100.0).abs() < 1e-6 && !grown.flat() && grown.table().contains("NOT FLAT"));
        assert!(!verdict(0.0, 0.1, 0.0).flat() && !verdict(0.0, 0.0, 0.02).flat());
        assert!(Verdict::of(&looks(0.0, 0.0, 0.0)[..8]).is_err());
    }

    #[test]
    fn what_proc_and_the_log_say_is_read() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1";
        assert_eq!(cpu_seconds(stat).unwrap(), 2.0);
        assert!(cpu_seconds("7 (a) S 1").is_err());
        assert_eq!(newest_step("step,images\n20,2560\n40,51"), 20.0);
        assert_eq!((newest_step(""), newest_step("step,images\n")), (0.0, 0.0));
    }
}
