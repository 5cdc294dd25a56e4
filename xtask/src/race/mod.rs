//! `cargo xtask race`: this project beside PyTorch on the same work, in turns, on this machine.
//!
//! A side is a process that obeys commands: `cm race-side` here, scripts/peers/peer.py there. All read the same files
//! (networks, weights, batches, noise) and have to agree on what comes of them before any clock starts. Then the sides
//! of a row work in turns, and a ratio is the median over the rounds of one side's speed by the other's in that round.

mod cold_start;
mod entry;
mod peers;
mod record;
mod report;
mod rows;
mod side;
mod watch;

use std::env;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cli::{CudaObjectArgs, RaceArgs};
use crate::cuda_object;
use crate::install::Home;
use crate::runner::{build_cm, status_of};
use crate::tools;
use entry::{Entry, spread};
use record::Standing;
use report::Report;
use rows::{Check, Measure, Row, target};
use side::Side;
use watch::Watch;

pub use rows::Size;

/// What the race is run with.
pub struct Race {
    pub args: RaceArgs,
    pub threads: usize,
    pub cm: PathBuf,
    pub python: PathBuf,
    pub scripts: PathBuf,
    /// The files that all sides share.
    pub shared: PathBuf,
}

/// Sets both sides up, runs the rows, and returns 1 if a target of a row that could be measured was missed.
pub fn run(args: RaceArgs) -> Result<u8> {
    check(&args)?;
    let rows = rows::chosen(args.size, &args.rows)?;
    let out = std::path::absolute(&args.out).context("the folder --out")?;
    let shared = out.join(args.size.name());
    fs::create_dir_all(&shared).with_context(|| format!("cannot make {}", shared.display()))?;
    let _lock = lock(&shared)?;
    let race = Race {
        threads: args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        cm: program(&args)?,
        python: interpreter(&args)?,
        scripts: tools::workspace_root().join("scripts/peers"),
        shared,
        args,
    };
    let rows: Vec<Row> = rows.into_iter().filter(|row| !race.letters(row).is_empty()).collect();
    if rows.is_empty() {
        bail!("no row is left: none of those chosen has one of the peers {}", race.args.against.join(", "));
    }
    let mut report = Report::begin(&race)?;
    race.write_files(&rows)?;
    for (index, row) in rows.iter().enumerate() {
        race.row(row, &mut report, Watch::on(row.name, index + 1, rows.len()));
        // A race that is stopped leaves what it has found.
        report.write(&out)?;
    }
    if race.args.size == Size::Cifar10 && !race.has_gpu() {
        rows::ON_A_GPU.iter().for_each(|(row, _)| report.needs_gpu(row));
    }
    report.end(&out)?;
    Ok(u8::from(!report.holds()))
}

/// Two races in one folder would write over each other's files.
fn lock(shared: &Path) -> Result<File> {
    let path = shared.join("race.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("{}: another race is at work there; choose another --out", shared.display())
        }
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// `cm` as it is built here, on a GPU with the object that records graphs; or that which is named.
fn program(args: &RaceArgs) -> Result<PathBuf> {
    if let Some(cm) = &args.cm {
        return fs::canonicalize(cm).with_context(|| format!("--cm {}", cm.display()));
    }
    let cm = build_cm()?;
    let is_there =
        cm.with_file_name(cuda_object::FILE).exists() || env::var_os(cuda_object::VARIABLE).is_some();
    if args.device.starts_with("cuda") && !is_there {
        cuda_object::run(&CudaObjectArgs { torch: None, out: None })?;
    }
    Ok(cm)
}

/// The peers' interpreter, or that which is named.
fn interpreter(args: &RaceArgs) -> Result<PathBuf> {
    match &args.python {
        Some(python) => Ok(python.clone()),
        None => peers::ensure(&Home::of_workspace()),
    }
}

fn check(args: &RaceArgs) -> Result<()> {
    if args.pairs == 0 || !(args.seconds > 0.0 && args.seconds.is_finite()) {
        bail!(
            "--pairs {} --seconds {}: expected at least one round, and a positive number",
            args.pairs,
            args.seconds
        );
    }
    if args.publish && args.pairs < rows::PAIRS {
        bail!(
            "--publish with --pairs {}: a published ratio is the median of {} or more",
            args.pairs,
            rows::PAIRS
        );
    }
    // Rows of other work would stand among those of the usual.
    if args.publish && (args.batch.is_some() || args.dtype != "bf16" || !args.sets.is_empty()) {
        bail!("--publish with --batch, --dtype or --set: what is published is the usual work");
    }
    if args.batch == Some(0) || args.threads == Some(0) {
        bail!("--batch and --threads: expected 1 or more, got 0");
    }
    let index = args.device.strip_prefix("cuda:");
    if !["cpu", "cuda"].contains(&args.device.as_str()) && index.is_none_or(|n| n.parse::<u32>().is_err()) {
        bail!("--device {}: expected cpu, cuda or cuda:N", args.device);
    }
    if let Some(wrong) = args.against.iter().find(|letter| !["a", "b", "c", "d"].contains(&letter.as_str())) {
        bail!("--against {wrong}: the peers are a, b, c and d");
    }
    Ok(())
}

impl Race {
    fn write_files(&self, rows: &[Row]) -> Result<()> {
        let mut names: Vec<&str> = rows.iter().filter(|row| self.can_run(row)).map(Row::work).collect();
        if names.is_empty() {
            return Ok(());
        }
        names.sort_unstable();
        names.dedup();
        let mut command = side::ours(self, "fp32");
        command.arg("--write").arg(names.join(","));
        let status = status_of(&mut command)?;
        if !status.success() {
            bail!("the files of the race could not be written ({status})");
        }
        Ok(())
    }

    /// Runs a row against each peer that is wanted, and prints its lines.
    fn row(&self, row: &Row, report: &mut Report, watch: Watch) {
        if !self.can_run(row) {
            report.needs_gpu(row.name);
            return;
        }
        let letters = self.letters(row);
        let standings = match self.measure(row, &letters, &watch) {
            Ok(standings) => standings,
            Err(error) => vec![Standing::missing(&error, None)],
        };
        drop(watch);
        report.add(row.name, row.about, standings);
    }

    /// The peers that a row is run against; none if there is no such row in this race.
    fn letters(&self, row: &Row) -> Vec<&'static str> {
        // Weights are packed on CPUs, and float32 is not reduced.
        if row.name == rows::REDUCED && (self.args.dtype != "bf16" || self.has_gpu()) {
            return Vec::new();
        }
        let wanted = |letter: &&'static str| self.args.against.iter().any(|wanted| wanted == letter);
        row.peers.iter().copied().filter(wanted).collect()
    }

    fn can_run(&self, row: &Row) -> bool {
        self.has_gpu() || !rows::needs_gpu(self.args.size, row)
    }

    pub fn has_gpu(&self) -> bool {
        self.args.device.starts_with("cuda")
    }

    fn measure(&self, row: &Row, letters: &[&'static str], watch: &Watch) -> Result<Vec<Standing>> {
        if row.name == rows::COLD_START {
            return cold_start::measure(self, letters, watch);
        }
        watch.stage("both sides compute the same?");
        let (mut sides, exact, note) = self.own(row)?;
        let own = sides.len();
        let mut lost = Vec::new();
        for letter in letters {
            match self.opposite(row, letter, &exact) {
                Ok(peer) => sides.push(peer),
                Err(error) => lost.push(Standing::missing(&error, Some(letter))),
            }
        }
        let rates = self.turns(&mut sides, watch)?;
        let entry = |peer: usize| {
            let target = target(self.args.size, self.has_gpu(), row, Measure::Speed, &sides[peer].name);
            let ours = if row.name == rows::REDUCED { 0 } else { opponent(&sides[peer].name, &rates[..own]) };
            Entry { note: note.clone(), ..Entry::of_speed(row, &sides, ours, peer, &rates, target) }
        };
        let mut standings: Vec<Standing> = (own..sides.len()).map(entry).map(Standing::Measured).collect();
        let present: Vec<String> = sides.drain(..).skip(own).map(|side| side.name.clone()).collect();
        if row.measures_memory {
            watch.stage("peak memory");
            standings.extend(self.memory(row, &present)?.into_iter().map(Standing::Measured));
        }
        standings.extend(lost);
        Ok(standings)
    }

    /// This project's sides, which agree with one another; what they computed in float32; and what is to be said of the
    /// row.
    fn own(&self, row: &Row) -> Result<(Vec<Side>, Value, Option<String>)> {
        let mut sides = Vec::new();
        for (name, dtype) in self.own_sides(row) {
            let mut ours = Side::start(&mut side::ours(self, dtype), name, &self.shared)?;
            ours.prepare(row.work())?;
            sides.push(ours);
        }
        let answers = sides.iter_mut().map(Side::check).collect::<Result<Vec<Value>>>()?;
        let exact = std::iter::zip(&sides, &answers).find(|(side, _)| side.dtype == "fp32");
        let (_, exact) = exact.context("no side computes in float32")?;
        for (side, answer) in std::iter::zip(&sides, &answers) {
            agree(row, side, exact, answer)?;
        }
        let distance = answers.first().and_then(|answer| answer["distance"].as_f64());
        let reduced = distance.filter(|_| row.name == rows::REDUCED);
        let note =
            reduced.map(|distance| format!("samples differ by {:.2} % from float32's", 100.0 * distance));
        Ok((sides, exact.clone(), note))
    }

    /// A peer that computes what this project does.
    fn opposite(&self, row: &Row, letter: &str, exact: &Value) -> Result<Side> {
        let mut peer = Side::start(&mut side::peer(self, letter), letter, &self.shared)?;
        peer.prepare(row.work())?;
        if !row.has_network {
            peer.dtype = "fp32".to_owned();
        }
        let answer = peer.check()?;
        agree(row, &peer, exact, &answer)?;
        Ok(peer)
    }

    /// This project in the dtype that is asked for, and in float32.
    fn own_sides(&self, row: &Row) -> Vec<(&'static str, &str)> {
        match self.args.dtype.as_str() {
            dtype if row.has_network && dtype != "fp32" => vec![("ours", dtype), ("ours-fp32", "fp32")],
            _ => vec![("ours", "fp32")],
        }
    }

    /// Items a second of each side in each round; in every other round the order is turned around.
    fn turns(&self, sides: &mut [Side], watch: &Watch) -> Result<Vec<Vec<f64>>> {
        let mut counts = Vec::new();
        watch.stage("how long does one take?");
        for side in sides.iter_mut() {
            // The first run warms caches up, or compiles; the second says how long one takes.
            side.run(1)?;
            let (seconds, _) = side.run(1)?;
            counts.push((self.args.seconds / seconds.max(1e-6)).ceil().clamp(1.0, 1e6) as u64);
        }
        let mut rates = vec![Vec::new(); sides.len()];
        for round in 0..self.args.pairs {
            watch.round(round, self.args.pairs);
            let mut order: Vec<usize> = (0..sides.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                let (seconds, items) = sides[index].run(counts[index])?;
                rates[index].push(items / seconds);
            }
        }
        Ok(rates)
    }

    /// The peak memory of a process that does nothing but this row.
    fn memory(&self, row: &Row, letters: &[String]) -> Result<Vec<Entry>> {
        let peak = |mut side: Side| -> Result<([f64; 2], String)> {
            side.prepare(row.work())?;
            side.run(2)?;
            Ok((side.memory()?, side.dtype.clone()))
        };
        let (ours, dtype) =
            peak(Side::start(&mut side::ours(self, &self.args.dtype), "ours-memory", &self.shared)?)?;
        let mut entries = Vec::new();
        for letter in letters {
            let side = Side::start(&mut side::peer(self, letter), letter, &self.shared)?;
            let target = target(self.args.size, self.has_gpu(), row, Measure::Memory, letter);
            let (theirs, of_peer) = peak(side)?;
            entries.push(Entry::of_memory(letter, [dtype.clone(), of_peer], [ours, theirs], target));
        }
        Ok(entries)
    }
}

/// Which of this project's sides a peer meets: those that are run as they come the faster one, the tuned that of their
/// dtype.
fn opponent(peer: &str, own: &[Vec<f64>]) -> usize {
    let median = |rates: &[f64]| spread(rates)[0];
    let faster = own.len() > 1 && median(&own[1]) > median(&own[0]);
    usize::from(["a", "d"].contains(&peer) && faster)
}

/// All sides have to compute the same before any clock starts: in float32 closely, in lower precision as closely as that
/// allows.
fn agree(row: &Row, side: &Side, exact: &Value, answer: &Value) -> Result<()> {
    let check = if side.dtype == "fp32" { Check::FLOAT32 } else { Check::BFLOAT16 };
    check
        .compare(exact, answer)
        .with_context(|| format!("{}: {} in {} computes something else", row.name, side.name, side.dtype))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: RaceArgs,
    }

    fn checked(line: &str) -> Result<()> {
        let words = std::iter::once("race").chain(line.split_whitespace());
        check(&Line::try_parse_from(words)?.args)
    }

    #[test]
    fn what_cannot_be_raced_is_said_before_anything_is_built() {
        for good in ["", "--publish", "--device cuda:1", "--pairs 2", "--against a --batch 4 --threads 1"] {
            checked(good).unwrap();
        }
        for (wrong, said) in [
            ("--pairs 0", "at least one round"),
            ("--seconds 0", "a positive number"),
            ("--publish --pairs 3", "the median of 7"),
            ("--publish --batch 4", "the usual work"),
            ("--publish --dtype fp32", "the usual work"),
            ("--publish --set train.lr=1e-3", "the usual work"),
            ("--batch 0", "--batch and --threads"),
            ("--threads 0", "--batch and --threads"),
            ("--device auto", "cpu, cuda or cuda:N"),
            ("--device cuda:x", "cpu, cuda or cuda:N"),
            ("--against a,e", "--against e"),
        ] {
            let error = checked(wrong).unwrap_err().to_string();
            assert!(error.contains(said), "{wrong}: {error}");
        }
    }

    #[test]
    fn two_races_do_not_share_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        assert!(lock(folder.path()).unwrap_err().to_string().contains("choose another --out"));
        drop(first);
        lock(folder.path()).unwrap();
    }

    #[test]
    fn what_runs_as_it_comes_meets_the_faster_of_ours() {
        let own = [vec![2.0, 2.0], vec![1.0, 3.0, 4.0]];
        assert_eq!((opponent("a", &own), opponent("d", &own)), (1, 1));
        assert_eq!((opponent("b", &own), opponent("c", &own)), (0, 0));
        assert_eq!(opponent("a", &own[..1]), 0);
    }
}
