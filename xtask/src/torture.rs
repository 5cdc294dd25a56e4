//! `cargo xtask torture`: what may befall a training run, done to one, and what must be left of it.
//!
//! Everything goes through the built program `cm` on a tiny run of digits with a checkpoint after every step, and every
//! run that goes on must end in the bytes of one that nothing befell.

mod faults;
mod hosts;
mod injected;
mod kills;
mod report;
mod runs;

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cli::TortureArgs;
use crate::runner::build_cm;
use crate::tools;

use report::{Case, Outcome};
use runs::Runs;

/// Kills of the whole suite and of the quick one.
const KILLS: [usize; 2] = [200, 24];

/// The names of all kinds.
pub fn names() -> Vec<&'static str> {
    std::iter::once(kills::NAME).chain(faults::FAULTS.iter().map(|(name, _)| *name)).collect()
}

/// Builds `cm`, does all of it, and returns 1 if anything did not hold.
pub fn run(args: &TortureArgs) -> Result<u8> {
    let cm = build_cm()?;
    let out = tools::own_folder(&args.out, "torture")?;
    let place = out.join("runs");
    fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
    let kills = args.kills.unwrap_or(KILLS[usize::from(args.quick)]);

    let began = Instant::now();
    let experiment = tools::workspace_root().join("tests/tiny.toml");
    let runs = Runs::begin(cm, place.clone(), &experiment, args.quick)?;
    println!("torture: a run of {} steps takes {:.1} s here", runs::STEPS, runs.whole_seconds);
    let wanted = |name: &str| args.only.as_deref().is_none_or(|only| only == name);
    let mut cases = Vec::new();
    if wanted(kills::NAME) {
        cases.push(kills::kills(&runs, kills, args.seed)?);
    }
    for (name, fault) in faults::FAULTS.into_iter().filter(|(name, _)| wanted(name)) {
        cases.push(Case::of(name, || fault(&runs)));
        println!("{}", cases[cases.len() - 1].line());
    }
    let seconds = began.elapsed().as_secs_f64();
    let json = out.join("torture.json");
    fs::write(&json, report::json(&cases, kills, args.seed, seconds))
        .with_context(|| format!("cannot write {}", json.display()))?;
    print!("{}", report::table(&cases, seconds));
    println!("  {}", json.display());
    let failed = cases.iter().any(|case| matches!(case.outcome, Outcome::Failed(_)));
    if !failed {
        fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    }
    Ok(u8::from(failed))
}
