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
//! | `memory` | the most memory that this process has held so far, in bytes, and that before it had a row |
//! | `quit` | |

mod files;
mod parts;
mod sample;
mod train;
mod work;

use std::io::BufRead;

use anyhow::{Context, Result, bail};
use cm_torch::device;
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
    device::set_threads(args.threads).or_usage()?;
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
        ["memory"] => {
            let bytes = device::memory(work.device)?.peak_reserved;
            Ok(json!({ "bytes": bytes, "base": work.base }))
        }
        _ => bail!("{}: no such command", words.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use device::DeviceSpec;

    use super::*;
    use crate::args::{RaceDtype, RaceSize};

    fn work(folder: &std::path::Path, dtype: RaceDtype) -> Work {
        let args = SideArgs {
            folder: folder.to_owned(),
            size: RaceSize::Tiny,
            dtype,
            threads: 1,
            batch: Some(4),
            device: DeviceSpec::Cpu,
            write: Vec::new(),
            sets: Vec::new(),
        };
        Work::new(&args).unwrap()
    }

    /// Asks for a row's check.
    fn check(work: &Work, name: &str) -> Value {
        let mut row = None;
        obey(work, &["prepare", name], &mut row).unwrap();
        let answer = obey(work, &["check"], &mut row).unwrap();
        let ran = obey(work, &["run", "2"], &mut row).unwrap();
        assert!(
            ran["seconds"].as_f64().unwrap() > 0.0 && ran["items"].as_u64().unwrap() >= 2,
            "{name}: {ran}"
        );
        answer
    }

    #[test]
    fn rows_do_the_work_that_their_files_describe() {
        let folder = tempfile::tempdir().unwrap();
        let plain = work(folder.path(), RaceDtype::Fp32);
        let rows = ["cd-heun", "edm", "sample-2", "adm-2", "update", "checkpoint-load"].map(str::to_owned);
        files::write(&plain, &rows).unwrap();
        for name in ["sample-2", "adm-2"] {
            // The shared samples are computed plane by plane, the row's in the memory order of the preset.
            let rounding = check(&plain, name)["distance"].as_f64().unwrap();
            assert!(rounding < 5e-6, "{name}: {rounding:e}");
            // Lower precision is there, and not far.
            let low = check(&work(folder.path(), RaceDtype::Bf16), name)["distance"].as_f64().unwrap();
            assert!(low > 1e-4 && low < 0.05, "{name}: {low}");
        }
        for name in ["cd-heun", "edm"] {
            let answer = check(&plain, name);
            assert_eq!(answer, check(&plain, name), "the first step is always the same");
            assert!(["loss", "grad_norm", "moved"].iter().all(|key| answer[key].as_f64().unwrap() > 0.0));
        }
        let answer = check(&plain, "update");
        // Adam's steps by a gradient that stays are even, and θ⁻ goes Σ (1 − β^k)/n of the way that θ goes in n of them.
        let share = answer["average"].as_f64().unwrap() / answer["moved"].as_f64().unwrap();
        let n = parts::CHECKED_UPDATES as i32;
        let even = (1..=n).map(|k| (1.0 - 0.98f64.powi(k)) / f64::from(n)).sum::<f64>();
        assert!((share / even - 1.0).abs() < 1e-3, "{share} instead of {even}");
        check(&plain, "checkpoint-load");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let work = work(folder.path(), RaceDtype::Fp32);
        let answer = |words: &[&str]| obey(&work, words, &mut None);
        assert!(answer(&["check"]).unwrap_err().to_string().contains("prepare"));
        assert!(answer(&["prepare", "sample-x"]).is_err() && answer(&["jump"]).is_err());
        let memory = answer(&["memory"]).unwrap();
        let [bytes, base] = ["bytes", "base"].map(|key| memory[key].as_u64().unwrap());
        assert!(bytes >= base && base > 1_000_000, "{memory}");
    }
}
