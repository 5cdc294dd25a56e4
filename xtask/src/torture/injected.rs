//! Errors that disks give and that no test can order from one: `EIO` and `EDQUOT`, out of calls of the C library that an
//! object fails which is loaded ahead of it (`xtask/torture/faults.c`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::faults::{copy, resumed_at};
use super::report::Outcome;
use super::runs::{Done, Runs, WHOLE, newest_step};
use crate::tools;

/// An error of the system: its number on Linux, its text, and whether it stays for later calls.
#[derive(Clone, Copy)]
struct Error {
    number: i32,
    text: &'static str,
    stays: bool,
}

/// A block that cannot be written or read; the next one can.
const EIO: Error = Error { number: 5, text: "Input/output error", stays: false };
/// A quota that is used up.
const EDQUOT: Error = Error { number: 122, text: "Disk quota exceeded", stays: true };
/// A disk that is full.
const ENOSPC: Error = Error { number: 28, text: "No space left on device", stays: true };

/// What fails in writing.
const WRITING: [(&str, Error); 9] = [
    ("write", EIO),
    ("fsync", EIO),
    ("rename", EIO),
    ("write", EDQUOT),
    ("create", EIO),
    ("mkdir", EIO),
    ("create", EDQUOT),
    ("mkdir", EDQUOT),
    ("unlink", EIO),
];
/// How many of them the quick suite tries.
const QUICK: usize = 4;

/// The object that is loaded ahead of the C library.
struct Object(PathBuf);

/// A command's calls for one folder.
struct Watched {
    done: Done,
    /// The file whose call failed first, if one did.
    failed: Option<String>,
    /// How many calls of each kind there were.
    calls: BTreeMap<String, u64>,
}

impl Object {
    /// Compiles it; or why it cannot be had.
    fn make(runs: &Runs) -> Result<std::result::Result<Self, Outcome>> {
        let left_out = |why: String| Ok(Err(Outcome::LeftOut(why)));
        if !cfg!(all(target_os = "linux", target_env = "gnu")) {
            return left_out("calls are made to fail on Linux with glibc alone".to_owned());
        }
        let object = runs.place().join("faults.so");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let mut command = Command::new(&compiler);
        command.args(["-x", "c", "-O1", "-shared", "-fPIC", "-o"]).arg(&object);
        command.arg(tools::workspace_root().join("xtask/torture/faults.c")).arg("-ldl");
        match command.output() {
            Ok(output) if output.status.success() => Ok(Ok(Self(object))),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                left_out(format!("{compiler}: {}", text.lines().next().unwrap_or("it fails")))
            }
            Err(error) => left_out(format!("no {compiler}: {error}")),
        }
    }

    /// Runs a command whose call number `at` fails, if there are so many of them for what lies below `folder`.
    fn run(&self, runs: &Runs, mut command: Command, folder: &str, fault: Fault) -> Result<Watched> {
        let note = runs.place().join("note");
        drop(fs::remove_file(&note));
        command.env("LD_PRELOAD", &self.0).env("CM_FAULT_NOTE", &note);
        command.env("CM_FAULT_BELOW", runs.folder(folder)).env("CM_FAULT_CALL", fault.call);
        command.env("CM_FAULT_AT", fault.at.to_string());
        command.env("CM_FAULT_ERRNO", fault.error.number.to_string());
        if fault.error.stays {
            command.env("CM_FAULT_STAYS", "1");
        }
        let done = runs.finish(&mut command)?;
        let text = fs::read_to_string(&note).context("the object was not loaded")?;
        let failed = text.lines().find_map(|line| line.strip_prefix("failed "));
        let count = |line: &str| {
            let (name, number) = line.strip_prefix("calls ")?.split_once(' ')?;
            Some((name.to_owned(), number.parse().ok()?))
        };
        let calls = text.lines().filter_map(count).collect();
        Ok(Watched { done, failed: failed.map(str::to_owned), calls })
    }
}

/// A call that fails.
#[derive(Clone, Copy)]
struct Fault {
    call: &'static str,
    at: u64,
    error: Error,
}

impl Fault {
    const NONE: Self = Self { call: "none", at: 0, error: EIO };
}

/// Which of `count` calls fail in turn.
fn places(count: u64, quick: bool) -> Vec<u64> {
    let mut places = if quick { vec![count * 2 / 5] } else { vec![1, count / 2, count] };
    places.retain(|place| (1..=count).contains(place));
    places.dedup();
    places
}

/// Errors while a run writes.
pub fn write_errors(runs: &Runs) -> Result<Outcome> {
    let object = match Object::make(runs)? {
        Ok(object) => object,
        Err(left_out) => return Ok(left_out),
    };
    let calm = object.run(runs, runs.train("calm"), "calm", Fault::NONE)?;
    ensure!(calm.done.code == Some(0), "with the object loaded: {}", calm.done.last_line());
    runs.same_as_whole("calm")?;
    let mut tried = 0;
    for (call, error) in WRITING.into_iter().take(if runs.quick { QUICK } else { WRITING.len() }) {
        let count = calm.calls.get(call).copied().unwrap_or(0);
        ensure!(count > 0, "a run makes no call of {call}");
        for at in places(count, runs.quick) {
            let fault = Fault { call, at, error };
            fails_and_goes_on(runs, &object, fault)
                .with_context(|| format!("{}: {call} {at} of {count}", error.text))?;
            tried += 1;
        }
    }
    let samples = unwritten_samples(runs, &object)?;
    Ok(Outcome::Held(format!(
        "{tried} calls of {} kinds fail in turn: one line, nothing half-written, and going on ends in the same bytes; the \
         disk is full at {samples} writes of samples: one line with the file",
        if runs.quick { QUICK } else { WRITING.len() }
    )))
}

/// One run with one fault, and on from it.
fn fails_and_goes_on(runs: &Runs, object: &Object, fault: Fault) -> Result<()> {
    const NAME: &str = "faulty";
    drop(fs::remove_dir_all(runs.folder(NAME)));
    let Watched { done, failed, .. } = object.run(runs, runs.train(NAME), NAME, fault)?;
    let failed = failed.context("the call was not made")?;
    let saved = newest_step(&runs.folder(NAME));
    // What is found before the training begins is for the user to mend.
    let code = if saved.is_none() && done.code == Some(2) { 2 } else { 1 };
    done.fails(code, &[NAME, fault.error.text]).with_context(|| failed.clone())?;
    runs.check_whole(NAME)?;
    runs.nothing_half_written(NAME)?;
    // The newest one may be whole and just not known to be on the disk.
    let again = runs.finish(&mut runs.train(NAME))?;
    ensure!(again.code == Some(0), "going on fails: {}", again.last_line());
    ensure!(resumed_at(&again.stderr) == saved, "saved was {saved:?}: {}", again.stderr);
    ensure!(!again.stderr.contains("WARNING"), "{}", again.stderr);
    runs.same_as_whole(NAME)
}

/// Draws pictures, a grid and an npz into the folder `drawn`, which is a new one.
fn draw(runs: &Runs) -> Command {
    drop(fs::remove_dir_all(runs.folder(DRAWN)));
    runs.cm(&format!("sample {WHOLE} --device cpu --seeds 0-3 --out {DRAWN}"))
}

const DRAWN: &str = "drawn";

/// A disk that is full while samples are written, an npz among them.
fn unwritten_samples(runs: &Runs, object: &Object) -> Result<usize> {
    let calm = object.run(runs, draw(runs), DRAWN, Fault::NONE)?;
    ensure!(calm.done.code == Some(0), "{}", calm.done.last_line());
    let count = calm.calls.get("write").copied().unwrap_or(0);
    // An npz goes to the disk in several: they are few, and all of them are tried.
    let places = if runs.quick { vec![count] } else { (1..=count).collect() };
    for &at in &places {
        let fault = Fault { call: "write", at, error: ENOSPC };
        let Watched { done, failed, .. } = object.run(runs, draw(runs), DRAWN, fault)?;
        let check = || -> Result<()> {
            ensure!(failed.is_some(), "the call was not made");
            done.fails(1, &[DRAWN, ENOSPC.text])?;
            ensure!(!done.stderr.contains("ZipWriter"), "{}", done.stderr);
            runs.nothing_half_written(DRAWN)
        };
        check().with_context(|| format!("samples: write {at} of {count}"))?;
    }
    Ok(places.len())
}

/// The time of day is turned while a run looks at it: nothing is decided by it.
pub fn turned_clock(runs: &Runs) -> Result<Outcome> {
    const NAME: &str = "turned";
    const DAY: i64 = 24 * 3600;
    let object = match Object::make(runs)? {
        Ok(object) => object,
        Err(left_out) => return Ok(left_out),
    };
    let turned = |mut command: Command, by: i64, behind: u64| {
        command.env("CM_FAULT_CLOCK", by.to_string()).env("CM_FAULT_CLOCK_AT", behind.to_string());
        object.run(runs, command, NAME, Fault::NONE)
    };
    let looks = |watched: &Watched| watched.calls.get("clock").copied().unwrap_or(0);
    let calm = looks(&turned(runs.train(NAME), 0, 0)?);
    ensure!(calm > 10, "a run looks at the clock {calm} times");
    for by in [-DAY, 365 * DAY] {
        let check = || -> Result<()> {
            drop(fs::remove_dir_all(runs.folder(NAME)));
            let begun = turned(runs.train(NAME), by, calm / 2)?;
            ensure!(begun.done.code == Some(0), "{}", begun.done.last_line());
            ensure!(looks(&begun) > calm / 2, "it was not turned");
            runs.same_as_whole(NAME)?;
            times_grow(&runs.folder(NAME).join("progress.csv"))?;
            // And one that goes on with files of another time than its own.
            drop(fs::remove_dir_all(runs.folder(NAME)));
            runs.interrupted(NAME)?;
            let resumed = turned(runs.resume(NAME), by, 0)?;
            ensure!(resumed.done.code == Some(0), "{}", resumed.done.last_line());
            ensure!(resumed_at(&resumed.done.stderr).is_some(), "{}", resumed.done.stderr);
            ensure!(!resumed.done.stderr.contains("WARNING"), "{}", resumed.done.stderr);
            runs.same_as_whole(NAME)
        };
        check().with_context(|| format!("turned by {by} s"))?;
    }
    Ok(Outcome::Held(
        "turned a day back and a year ahead, in a run and before it goes on: the same bytes, times that grow"
            .to_owned(),
    ))
}

/// Asserts that the seconds in a log, its last column, go up and stay far below what a clock was turned by.
fn times_grow(log: &Path) -> Result<()> {
    let text = fs::read_to_string(log).with_context(|| log.display().to_string())?;
    let seconds = |row: &str| row.rsplit(',').next().unwrap_or_default().parse::<f64>();
    let times: Vec<f64> = text.lines().skip(1).map(seconds).collect::<std::result::Result<_, _>>()?;
    ensure!(!times.is_empty() && times.is_sorted(), "times in the log: {times:?}");
    ensure!(times.iter().all(|time| (0.0..3600.0).contains(time)), "times in the log: {times:?}");
    Ok(())
}

/// Errors while a run reads: its checkpoints, and its data.
pub fn read_errors(runs: &Runs) -> Result<Outcome> {
    let object = match Object::make(runs)? {
        Ok(object) => object,
        Err(left_out) => return Ok(left_out),
    };
    let checkpoints = unread_checkpoints(runs, &object)?;
    let data = unread_data(runs, &object)?;
    Ok(Outcome::Held(format!(
        "the newest checkpoint unreadable from {checkpoints} calls on: passed over by name, to the same bytes; {data} reads of \
         data fail in turn: one line with the file"
    )))
}

/// A disk on which the newest checkpoint can no longer be read, from one call on: the one before is taken.
fn unread_checkpoints(runs: &Runs, object: &Object) -> Result<usize> {
    const BAD_SECTOR: Error = Error { stays: true, ..EIO };
    runs.interrupted("whole-unread")?;
    let saved = newest_step(&runs.folder("whole-unread")).context("no checkpoint")?;
    let newest = format!("unread/checkpoints/step-{saved:08}");
    let mut tried = 0;
    for (call, at) in
        [("read", 1), ("open", 1), ("read", 3), ("open", 3)].into_iter().take(if runs.quick { 1 } else { 4 })
    {
        drop(fs::remove_dir_all(runs.folder("unread")));
        copy(&runs.folder("whole-unread"), &runs.folder("unread"))?;
        let fault = Fault { call, at, error: BAD_SECTOR };
        let Watched { done, failed, .. } = object.run(runs, runs.resume("unread"), &newest, fault)?;
        let check = || -> Result<()> {
            ensure!(failed.is_some(), "the call was not made");
            ensure!(done.code == Some(0), "{}", done.last_line());
            let told = done.stderr.lines().find(|line| line.contains("passed over")).unwrap_or_default();
            ensure!(told.contains(&newest) && told.contains(EIO.text), "{}", done.stderr);
            ensure!(resumed_at(&done.stderr).is_some_and(|from| from < saved), "{}", done.stderr);
            runs.same_as_whole("unread")
        };
        check().with_context(|| format!("{call} {at} of {newest}"))?;
        tried += 1;
    }
    Ok(tried)
}

/// Data that cannot be read: shards, read while the run goes on, and an npz, read before it begins.
fn unread_data(runs: &Runs, object: &Object) -> Result<usize> {
    fs::create_dir_all(runs.folder("shards"))?;
    write_npy(&runs.folder("shards").join("images.npy"), 64)?;
    let shards = unread(runs, object, "shards", "images.npy", ["data.kind=shards", "data.path=shards"])?;
    let drawn = runs.finish(&mut draw(runs))?;
    ensure!(drawn.code == Some(0), "{}", drawn.last_line());
    let names = fs::read_dir(runs.folder(DRAWN))?.flatten().map(|entry| entry.file_name());
    let npz = names.map(|name| name.to_string_lossy().into_owned()).find(|name| name.ends_with(".npz"));
    let npz = npz.context("no npz was written")?;
    let path = format!("data.path={DRAWN}/{npz}");
    Ok(shards + unread(runs, object, DRAWN, &npz, ["data.kind=npz", &path])?)
}

/// Trains on the `file` in `folder`, each of some of whose reads fails once.
fn unread(runs: &Runs, object: &Object, folder: &str, file: &str, sets: [&str; 2]) -> Result<usize> {
    let train = || {
        let mut command = runs.train("starved");
        command.args(sets.iter().flat_map(|set| ["--set", set]));
        command
    };
    let fresh = || drop(fs::remove_dir_all(runs.folder("starved")));
    fresh();
    let calm = object.run(runs, train(), folder, Fault::NONE)?;
    ensure!(calm.done.code == Some(0), "{}", calm.done.last_line());
    let count = calm.calls.get("read").copied().unwrap_or(0);
    ensure!(count > 0, "no read of {folder}/{file}");
    let mut tried = 0;
    for at in places(count, runs.quick) {
        fresh();
        let fault = Fault { call: "read", at, error: EIO };
        let Watched { done, failed, .. } = object.run(runs, train(), folder, fault)?;
        ensure!(failed.is_some(), "read {at} of {count} was not made");
        let code = if newest_step(&runs.folder("starved")).is_none() && done.code == Some(2) { 2 } else { 1 };
        done.fails(code, &[&format!("cannot read {folder}/{file}"), EIO.text])
            .with_context(|| format!("read {at} of {count}"))?;
        runs.check_whole("starved")?;
        let again = runs.finish(&mut train())?;
        ensure!(again.code == Some(0), "going on fails: {}", again.last_line());
        tried += 1;
    }
    Ok(tried)
}

/// Images of 8×8 grey pixels as NumPy writes them.
fn write_npy(path: &Path, count: usize) -> Result<()> {
    let mut head = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, 8, 8), }}");
    // Magic, version and length take 10 bytes, and a line ends what is a multiple of 64.
    while (10 + head.len() + 1) % 64 != 0 {
        head.push(' ');
    }
    head.push('\n');
    let Ok(length) = u16::try_from(head.len()) else { bail!("a header of {} bytes", head.len()) };
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(head.into_bytes());
    bytes.extend((0..count * 64).map(|i| (i * i % 251) as u8));
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_the_last_and_one_between_them_fail() {
        assert_eq!(places(100, false), [1, 50, 100]);
        assert_eq!(places(1, false), [1]);
        assert_eq!(places(100, true), [40]);
        assert!(places(0, false).is_empty());
    }

    #[test]
    fn times_of_a_log_that_jump_are_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("progress.csv");
        for (times, holds) in [("1.5\n2.5", true), ("2.5\n1.5", false), ("1.5\n86401", false), ("", false)] {
            let rows = times.lines().map(|time| format!("1,{time}\n"));
            fs::write(&path, format!("step,seconds\n{}", rows.collect::<String>())).unwrap();
            assert_eq!(times_grow(&path).is_ok(), holds, "{times}");
        }
    }

    #[test]
    fn arrays_have_a_header_of_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        write_npy(&path, 3).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() % 64, 0);
        assert_eq!(bytes[bytes.len() - 3 * 64 - 1], b'\n');
    }
}
