//! `cm race-side`: this project's side of `cargo xtask race`, hidden from the help.
//!
//! It reads one command a line and answers one line of JSON each, as the peers in scripts/peers do, so that the two can
//! work in turns without being started anew:
//!
//! | command | what it does |
//! | --- | --- |
//! | `prepare ROW` | builds what the row needs, in place of the row before |
//! | `check` | does the row's work once on the files that all sides share, and says what came of it |
//! | `run N` | does it N times: `{"seconds": …, "items": …}` |
//! | `memory` | the peak resident memory of this process so far, in bytes |
//! | `quit` | |

mod files;
mod parts;
mod sample;
mod train;
mod work;

use std::io::BufRead;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::args::SideArgs;
use crate::exit::{OrUsage, Outcome};
use work::{Kind, Work};

/// A row of the race, ready to run.
trait Row {
    /// What the row's work gives on the shared files.
    fn check(&mut self) -> Result<Value>;

    /// Does the work `count` times and returns its seconds.
    fn run(&mut self, count: u64) -> Result<f64>;

    /// Images, or whatever is counted, in one piece of work.
    fn items(&self) -> u64;
}

/// Runs `cm race-side`.
pub fn side(args: &SideArgs) -> Outcome {
    cm_torch::device::set_threads(args.threads).or_usage()?;
    let work = Work::new(args)?;
    if !args.write.is_empty() {
        return Ok(files::write(&work, &args.write)?);
    }
    let mut row: Option<Box<dyn Row>> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading a command")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["quit"] {
            break;
        }
        let answer = obey(&work, &words, &mut row).unwrap_or_else(|error| {
            let text = format!("{error:#}").replace('\n', " ");
            json!({ "error": text })
        });
        println!("{answer}");
    }
    Ok(())
}

fn obey(work: &Work, words: &[&str], row: &mut Option<Box<dyn Row>>) -> Result<Value> {
    let ready = |row: &mut Option<Box<dyn Row>>| row.take().context("prepare a row first");
    match words {
        ["prepare", name] => {
            *row = None;
            *row = Some(match work::kind(name)? {
                Kind::Train => Box::new(train::TrainRow::new(work, name)?),
                Kind::Sample => Box::new(sample::SampleRow::new(work, name)?),
                Kind::Update => Box::new(parts::UpdateRow::new(work)?),
                Kind::Checkpoint => Box::new(parts::CheckpointRow::new(work, name)?),
                Kind::Data => Box::new(parts::DataRow::new(work, name)?),
                Kind::Fid => Box::new(parts::FidRow::new(work, name)?),
                Kind::Reduced => return Ok(json!({ "missing": "not built" })),
            });
            Ok(json!({ "dtype": work.dtype_name() }))
        }
        ["check"] => {
            let mut ready = ready(row)?;
            let answer = ready.check();
            *row = Some(ready);
            answer
        }
        ["run", count] => {
            let count: u64 = count.parse().context("run N")?;
            let mut ready = ready(row)?;
            let (seconds, items) = (ready.run(count), ready.items() * count);
            *row = Some(ready);
            Ok(json!({ "seconds": seconds?, "items": items }))
        }
        ["memory"] => Ok(json!({ "bytes": peak_memory()? })),
        _ => bail!("{}: no such command", words.join(" ")),
    }
}

/// The most memory that this process has had resident.
fn peak_memory() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM there")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().context("VmHWM")?;
    Ok(kilobytes * 1024)
}
