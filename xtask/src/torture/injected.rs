//! Errors that disks give and that no test can order from one: `EIO` and `EDQUOT`, out of calls of the C library that an
//! object fails which is loaded ahead of it (`xtask/torture/faults.c`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::faults::{copy, resumed_at};
use super::report::Outcome;
use super::runs::{Done, Runs, newest_step};
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

/// What fails in writing.
const WRITING: [(&str, Error); 8] = [
    ("write", EIO),
    ("fsync", EIO),
    ("rename", EIO),
    ("write", EDQUOT),
    ("create", EIO),
    ("mkdir", EIO),
    ("create", EDQUOT),
    ("mkdir", EDQUOT),
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
    Ok(Outcome::Held(format!(
        "{tried} calls of {} kinds fail in turn: one line, nothing half-written, and going on ends in the same bytes",
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

fn unread_data(runs: &Runs, object: &Object) -> Result<usize> {
    let data = runs.folder("shards");
    fs::create_dir_all(&data)?;
    write_npy(&data.join("images.npy"), 64)?;
    let train = || {
        let mut command = runs.train("starved");
        command.args(["--set", "data.kind=shards", "--set", "data.path=shards"]);
        command
    };
    let calm = object.run(runs, train(), "shards", Fault::NONE)?;
    ensure!(calm.done.code == Some(0), "{}", calm.done.last_line());
    let count = calm.calls.get("read").copied().unwrap_or(0);
    ensure!(count > 100, "{count} reads of the data");
    let mut tried = 0;
    for at in places(count, runs.quick) {
        drop(fs::remove_dir_all(runs.folder("starved")));
        let fault = Fault { call: "read", at, error: EIO };
        let Watched { done, failed, .. } = object.run(runs, train(), "shards", fault)?;
        ensure!(failed.is_some(), "read {at} of {count} was not made");
        let code = if newest_step(&runs.folder("starved")).is_none() && done.code == Some(2) { 2 } else { 1 };
        done.fails(code, &["shards/images.npy", EIO.text])
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
    fn arrays_have_a_header_of_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        write_npy(&path, 3).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() % 64, 0);
        assert_eq!(bytes[bytes.len() - 3 * 64 - 1], b'\n');
    }
}
