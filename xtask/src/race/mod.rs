//! `cargo xtask race`: this project beside PyTorch on the same work, in turns, on this machine.
//!
//! A side is a process that obeys commands: `cm race-side` here, scripts/peers/peer.py there. All read the same files
//! (networks, weights, batches, noise) and have to agree on what comes of them before any clock starts. Then the sides
//! of a row work in turns, and a ratio is the median over the rounds of one side's speed by the other's in that round.

mod cold_start;
mod peers;
mod report;
mod rows;
mod side;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cli::RaceArgs;
use crate::install::Home;
use crate::runner::{build_cm, status_of};
use crate::tools;
use report::{Entry, Report, Reported, Standing};
use rows::{Check, Measure, Row, target};
use side::Side;

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
    let cm = build_cm()?;
    let out = std::path::absolute(&args.out).context("the folder --out")?;
    let shared = out.join(args.size.name());
    fs::create_dir_all(&shared).with_context(|| format!("cannot make {}", shared.display()))?;
    let race = Race {
        threads: args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        cm,
        python: peers::ensure(&Home::of_workspace())?,
        scripts: tools::workspace_root().join("scripts/peers"),
        shared,
        args,
    };
    let rows = rows::chosen(race.args.size, &race.args.rows)?;
    let mut report = Report::begin(&race);
    if race.can_run() {
        race.write_files(&rows)?;
    }
    for row in &rows {
        race.row(row, &mut report);
    }
    if race.args.size == Size::Cifar10 && !race.has_gpu() {
        for (row, about) in rows::ON_A_GPU {
            report.add(Reported { row, about, standing: Standing::NeedsGpu });
        }
    }
    report.end();
    report.write(&out)?;
    if race.args.publish {
        report.publish(&tools::workspace_root().join("docs/performance.md"))?;
    }
    Ok(u8::from(!report.holds()))
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
    if let Some(wrong) = args.against.iter().find(|letter| !["a", "b", "c", "d"].contains(&letter.as_str())) {
        bail!("--against {wrong}: the peers are a, b, c and d");
    }
    Ok(())
}

impl Race {
    fn write_files(&self, rows: &[Row]) -> Result<()> {
        let mut names: Vec<&str> = rows.iter().map(Row::work).collect();
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
    fn row(&self, row: &Row, report: &mut Report) {
        let wanted = |letter: &&'static str| self.args.against.iter().any(|wanted| wanted == letter);
        let letters: Vec<&'static str> = row.peers.iter().copied().filter(wanted).collect();
        // Weights are packed on CPUs, and float32 is not reduced.
        let is_absent = row.name == rows::REDUCED && (self.args.dtype != "bf16" || self.has_gpu());
        if letters.is_empty() || is_absent {
            return;
        }
        if !self.can_run() {
            report.add(Reported { row: row.name, about: row.about, standing: Standing::NeedsGpu });
            return;
        }
        let standing = match self.measure(row, &letters) {
            Ok(entries) => Standing::Measured(entries),
            Err(error) => Standing::Missing(format!("{error:#}")),
        };
        report.add(Reported { row: row.name, about: row.about, standing });
    }

    /// The largest network is for a GPU.
    fn can_run(&self) -> bool {
        self.args.size != Size::Imagenet64 || self.has_gpu()
    }

    pub fn has_gpu(&self) -> bool {
        self.args.device.starts_with("cuda")
    }

    fn measure(&self, row: &Row, letters: &[&'static str]) -> Result<Vec<Entry>> {
        if row.name == rows::COLD_START {
            return cold_start::measure(self, letters);
        }
        let mut sides = Vec::new();
        for (name, dtype) in self.own_sides(row) {
            let mut ours = Side::start(&mut side::ours(self, dtype), name, &self.shared)?;
            ours.prepare(row.work())?;
            sides.push(ours);
        }
        let own = sides.len();
        for letter in letters {
            let mut peer = Side::start(&mut side::peer(self, letter), letter, &self.shared)?;
            peer.prepare(row.work()).with_context(|| format!("peer {letter}"))?;
            if !row.has_network {
                peer.dtype = "fp32".to_owned();
            }
            sides.push(peer);
        }
        let answers = agree(row, &mut sides)?;
        let rates = self.turns(&mut sides)?;
        let mut entries: Vec<Entry> = (own..sides.len())
            .map(|peer| {
                let target = target(self.args.size, self.has_gpu(), row, Measure::Speed, &sides[peer].name);
                let ours = if row.name == rows::REDUCED { 0 } else { opponent(&sides[peer], &rates[..own]) };
                Entry::of_speed(row, &sides, ours, peer, &rates, target)
            })
            .collect();
        if let (rows::REDUCED, Some(distance)) = (row.name, answers[0]["distance"].as_f64()) {
            let loss = format!("samples differ by {:.2} % from float32's", 100.0 * distance);
            entries.iter_mut().for_each(|entry| entry.note = Some(loss.clone()));
        }
        drop(sides);
        if row.measures_memory {
            entries.extend(self.memory(row, letters)?);
        }
        Ok(entries)
    }

    /// This project in the dtype that is asked for, and in float32.
    fn own_sides(&self, row: &Row) -> Vec<(&'static str, &str)> {
        match self.args.dtype.as_str() {
            dtype if row.has_network && dtype != "fp32" => vec![("ours", dtype), ("ours-fp32", "fp32")],
            _ => vec![("ours", "fp32")],
        }
    }

    /// Items a second of each side in each round; in every other round the order is turned around.
    fn turns(&self, sides: &mut [Side]) -> Result<Vec<Vec<f64>>> {
        let mut counts = Vec::new();
        for side in sides.iter_mut() {
            // The first run warms caches up, or compiles; the second says how long one takes.
            side.run(1)?;
            let (seconds, _) = side.run(1)?;
            counts.push((self.args.seconds / seconds.max(1e-6)).ceil().clamp(1.0, 1e6) as u64);
        }
        let mut rates = vec![Vec::new(); sides.len()];
        for round in 0..self.args.pairs {
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
    fn memory(&self, row: &Row, letters: &[&'static str]) -> Result<Vec<Entry>> {
        let peak = |mut side: Side| -> Result<f64> {
            side.prepare(row.work())?;
            side.run(2)?;
            side.memory()
        };
        let dtype = &self.args.dtype;
        let ours = peak(Side::start(&mut side::ours(self, dtype), "ours-memory", &self.shared)?)?;
        let mut entries = Vec::new();
        for letter in letters {
            let side = Side::start(&mut side::peer(self, letter), letter, &self.shared)?;
            let target = target(self.args.size, self.has_gpu(), row, Measure::Memory, letter);
            entries.push(Entry::of_memory(letter, dtype, (ours, peak(side)?), target));
        }
        Ok(entries)
    }
}

/// Which of this project's sides a peer meets: those that are run as they come the faster one, the tuned that of their
/// dtype.
fn opponent(peer: &Side, own: &[Vec<f64>]) -> usize {
    let median = |rates: &[f64]| report::spread(rates)[0];
    let faster = own.len() > 1 && median(&own[1]) > median(&own[0]);
    usize::from(["a", "d"].contains(&peer.name.as_str()) && faster)
}

/// All sides have computed the same before any clock starts: in float32 closely, in lower precision as closely as that
/// allows. Returns what each has computed.
fn agree(row: &Row, sides: &mut [Side]) -> Result<Vec<Value>> {
    let answers = sides.iter_mut().map(Side::check).collect::<Result<Vec<Value>>>()?;
    let exact = std::iter::zip(sides.iter(), &answers).find(|(side, _)| side.dtype == "fp32");
    let (_, exact) = exact.context("no side computes in float32")?;
    for (side, answer) in std::iter::zip(sides.iter(), &answers) {
        let check = if side.dtype == "fp32" { Check::FLOAT32 } else { Check::BFLOAT16 };
        check.compare(exact, answer).with_context(|| {
            format!("{}: {} in {} computes something else", row.name, side.name, side.dtype)
        })?;
    }
    Ok(answers)
}
