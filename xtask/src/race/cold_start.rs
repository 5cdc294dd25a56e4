//! The time from the start of a process to its first picture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Race;
use super::entry::{Entry, spread};
use super::record::Standing;
use super::rows::{self, Measure, Row, target};
use super::side::with_threads;
use super::watch::Watch;

/// Longer than any start.
const PATIENCE: Duration = Duration::from_secs(120);

/// `cm sample` beside cold_start.py, in turns; in every other round the order is turned around.
pub fn measure(race: &Race, letters: &[&'static str], watch: &Watch) -> Result<Vec<Standing>> {
    let row = row()?;
    let folder = race.shared.join("first");
    let mut own = vec!["fp32"];
    if race.args.dtype == "bf16" {
        own.push("bf16");
    }
    let mut rates = vec![Vec::new(); own.len() + letters.len()];
    // The first round of each fills the page cache and does not count.
    for round in 0..=race.args.pairs {
        watch.round(round, race.args.pairs + 1);
        let mut order: Vec<usize> = (0..rates.len()).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let (mut command, png) = match own.get(index) {
                Some(dtype) => ours(race, dtype, &folder),
                None => theirs(race, letters[index - own.len()], &folder),
            };
            let seconds = until(&mut command, &png)?;
            if round > 0 {
                rates[index].push(1.0 / seconds);
            }
        }
    }
    let entry = |(index, letter): (usize, &&'static str)| {
        let target = target(race.args.size, race.has_gpu(), &row, Measure::Speed, letter);
        let theirs = if *letter == "a" { "fp32" } else { &race.args.dtype };
        // That which is run as it comes meets the faster of ours, the tuned that of its dtype.
        let ours = match *letter {
            "a" => opponent_of_a(&rates[..own.len()]),
            _ => own.len() - 1,
        };
        let dtypes = [own[ours].to_owned(), theirs.to_owned()];
        Entry::of_rates(row.unit, letter, dtypes, [&rates[ours], &rates[own.len() + index]], target)
    };
    Ok(letters.iter().enumerate().map(entry).map(Standing::Measured).collect())
}

fn opponent_of_a(own: &[Vec<f64>]) -> usize {
    let median = |rates: &[f64]| spread(rates)[0];
    usize::from(own.len() > 1 && median(&own[1]) > median(&own[0]))
}

fn row() -> Result<Row> {
    rows::chosen(rows::Size::Tiny, &[rows::COLD_START.to_owned()])?.pop().context("the row of cold starts")
}

fn ours(race: &Race, dtype: &str, folder: &Path) -> (Command, PathBuf) {
    let mut command = Command::new(&race.cm);
    command.arg("sample").arg(race.shared.join("ct-weights.safetensors"));
    command.args(["--seeds", "0", "--batch", "1", "--device", &race.args.device]);
    command.args(["--dtype", if dtype == "fp32" { "f32" } else { dtype }]).arg("--out").arg(folder);
    (with_threads(command, race.threads), folder.join("000000.png"))
}

fn theirs(race: &Race, letter: &str, folder: &Path) -> (Command, PathBuf) {
    let png = folder.join(format!("{letter}.png"));
    let mut command = Command::new(&race.python);
    command.arg(race.scripts.join("cold_start.py")).arg(&race.shared).arg("sample-1");
    command.args([letter, &race.args.dtype, &race.threads.to_string(), &race.args.device]).arg(&png);
    (with_threads(command, race.threads), png)
}

/// Seconds until a whole picture lies at `png`.
fn until(command: &mut Command, png: &Path) -> Result<f64> {
    if let Some(folder) = png.parent() {
        drop(fs::remove_dir_all(folder));
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    loop {
        if is_whole(png) {
            let seconds = begin.elapsed().as_secs_f64();
            child.wait()?;
            return Ok(seconds);
        }
        let ended = child.try_wait()?.is_some() && !is_whole(png);
        if ended || begin.elapsed() > PATIENCE {
            let _ = child.kill();
            child.wait()?;
            bail!("{}: no picture came of {:?}", png.display(), command);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A PNG ends in the chunk IEND.
fn is_whole(png: &Path) -> bool {
    fs::read(png).is_ok_and(|bytes| bytes.len() > 8 && bytes[bytes.len() - 8..].starts_with(b"IEND"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn started(script: &str) -> Result<f64> {
        let folder = tempfile::tempdir().unwrap();
        let png = folder.path().join("first/a.png");
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(&png);
        until(&mut command, &png)
    }

    #[test]
    fn the_clock_stops_when_the_whole_picture_is_there() {
        let seconds = started("printf 'head' > $1; sleep 0.2; printf 'IENDcrc4' >> $1; sleep 0.2").unwrap();
        assert!(seconds >= 0.2, "{seconds}");
        for script in ["true", "printf head > $1", "exit 3"] {
            let error = started(script).unwrap_err().to_string();
            assert!(error.contains("no picture came of"), "{script}: {error}");
        }
    }
}
