//! Faults of disks, folders, neighbours, clocks, numbers and memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

use super::report::Outcome;
use super::runs::{Done, Running, Runs, STEPS, checkpoints, newest_step, steps};

/// Does something to a run and says what was left of it.
type Fault = fn(&Runs) -> Result<Outcome>;

/// All of them, by the names of the table.
pub const FAULTS: [(&str, Fault); 13] = [
    ("full disk", full_disk),
    ("size limit", size_limit),
    ("write errors", super::injected::write_errors),
    ("read errors", super::injected::read_errors),
    ("read-only folder", read_only),
    ("half-deleted run", half_deleted),
    ("two processes", two_processes),
    ("two hosts", super::hosts::hosts),
    ("clock jumps", clock_jumps),
    ("turned clock", super::injected::turned_clock),
    ("explosion", explosion),
    ("out of memory", out_of_memory),
    ("damaged bytes", damaged_bytes),
];

/// A shell that runs `cm` as `"$@"`, with what the script does around it.
fn under(script: &str, command: &Command) -> Command {
    in_shell("env", &[], script, command)
}

/// The same with a mount of its own, which any user may make where user namespaces are allowed.
fn mounted(script: &str, command: &Command) -> Command {
    in_shell("unshare", &["-Urm"], script, command)
}

/// The same below a program that makes a place for it.
pub fn in_shell(program: &str, options: &[&str], script: &str, command: &Command) -> Command {
    let mut shell = Command::new(program);
    shell.args(options).args(["sh", "-c", script, "torture"]).arg(command.get_program());
    shell.args(command.get_args()).stdin(std::process::Stdio::null());
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(folder) = command.get_current_dir() {
        shell.current_dir(folder);
    }
    shell
}

/// Why there can be no mount; none if there can.
fn no_mounts(runs: &Runs) -> Option<Outcome> {
    let mut probe = mounted("mkdir -p probe && mount -t tmpfs tmpfs probe", &runs.cm("doctor"));
    match probe.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("refused").to_owned();
            Some(Outcome::LeftOut(format!("no mount in a user namespace: {why}")))
        }
        Err(error) => Some(Outcome::LeftOut(format!("no unshare: {error}"))),
    }
}

fn whole_run(runs: &Runs) -> PathBuf {
    runs.folder("whole")
}

/// A folder that has room for some checkpoints and not for the next; then it has.
fn full_disk(runs: &Runs) -> Result<Outcome> {
    if let Some(left_out) = no_mounts(runs) {
        return Ok(left_out);
    }
    // Room for about two and a half of the three checkpoints that stay, beside the one that is written.
    let one = folder_bytes(&checkpoints(&whole_run(runs)).join(format!("step-{STEPS:08}")))?;
    let room = one * 5 / 2 + 60_000;
    let script = format!(
        "mkdir -p full && mount -t tmpfs -o size={room} tmpfs full || exit 99\n\
         \"$@\" 2>errors; echo $? >code\n\
         ls -A full/run/checkpoints >left; cp -r full/run kept || true\n\
         mount -o remount,size=1g full || exit 98\n\
         \"$@\" 2>errors-again || exit 97\n\
         cp -r full/run healed"
    );
    let done = runs.finish(&mut mounted(&script, &runs.train("full/run")))?;
    let read = |name: &str| fs::read_to_string(runs.place().join(name)).unwrap_or_default();
    ensure!(done.code == Some(0), "code {:?}: {} {}", done.code, done.last_line(), read("errors-again"));
    let full = Done { code: read("code").trim().parse().ok(), stderr: read("errors") };
    full.fails(1, &["full/run/checkpoints/", "No space left on device"])?;
    ensure!(!read("left").contains(".partial"), "half of a checkpoint is left: {}", read("left"));
    runs.check_whole("kept")?;
    let saved =
        newest_step(&runs.folder("kept")).context("no checkpoint was written before the disk was full")?;
    let from = resumed_at(&read("errors-again")).context("it was not resumed")?;
    ensure!(from == saved, "resumed at {from}, saved was {saved}");
    runs.same_as_whole("healed")?;
    Ok(Outcome::Held(format!(
        "ENOSPC in step {}: step {saved} stays, and going on ends in the same bytes",
        saved + 1
    )))
}

/// No file may grow beyond a limit: the same path through the code on machines without namespaces.
fn size_limit(runs: &Runs) -> Result<Outcome> {
    runs.interrupted("limited")?;
    let before = newest_step(&runs.folder("limited"));
    // Where the signal is ignored, the write returns an error.
    let done = runs.finish(&mut under("trap '' XFSZ; ulimit -f 64; exec \"$@\"", &runs.resume("limited")))?;
    done.fails(1, &["limited/", "File too large"])?;
    runs.check_whole("limited")?;
    let after = newest_step(&runs.folder("limited"));
    ensure!(after == before, "the newest checkpoint was {before:?} and is {after:?}");
    runs.recovers("limited")?;
    Ok(Outcome::Held(format!(
        "EFBIG: step {} stays, and going on ends in the same bytes",
        before.unwrap_or(0)
    )))
}

fn read_only(runs: &Runs) -> Result<Outcome> {
    if let Some(left_out) = no_mounts(runs) {
        return Ok(left_out);
    }
    runs.interrupted("sealed")?;
    let before = listing(&runs.folder("sealed"))?;
    let script = "mount --bind sealed sealed && mount -o remount,bind,ro sealed || exit 99\nexec \"$@\"";
    let resumed = runs.finish(&mut mounted(script, &runs.resume("sealed")))?;
    resumed.fails(2, &["sealed/", "Read-only file system"])?;
    let begun = runs.finish(&mut mounted(script, &runs.train("sealed/new")))?;
    begun.fails(2, &["sealed/new", "Read-only file system"])?;
    ensure!(listing(&runs.folder("sealed"))? == before, "the folder was changed");
    runs.recovers("sealed")?;
    Ok(Outcome::Held("refused with exit code 2 and one line; nothing was changed".to_owned()))
}

/// Every file and folder of an interrupted run is taken away once.
fn half_deleted(runs: &Runs) -> Result<Outcome> {
    runs.interrupted("whole-half")?;
    let source = runs.folder("whole-half");
    let newest = newest_step(&source).context("no checkpoint")?;
    let newest = format!("checkpoints/step-{newest:08}");
    let mut parts: Vec<String> = listing(&source)?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with("checkpoints/") || name.starts_with(&newest))
        .collect();
    parts.extend([newest.clone(), "checkpoints".to_owned(), "samples".to_owned()]);
    let (mut resumed, mut anew) = (0, 0);
    for part in &parts {
        let folder = runs.folder("half");
        drop(fs::remove_dir_all(&folder));
        copy(&source, &folder)?;
        let path = folder.join(part);
        if path.is_dir() {
            fs::remove_dir_all(&path)?;
        } else if path.exists() {
            fs::remove_file(&path)?;
        }
        let check = || -> Result<bool> {
            if part == "config.toml" {
                runs.finish(&mut runs.resume("half"))?.fails(2, &["half: no config.toml"])?;
                let done = runs.finish(&mut runs.train("half"))?;
                ensure!(done.code == Some(0), "{}", done.last_line());
                runs.same_as_whole("half")?;
                return Ok(true);
            }
            // Rows of the log that were taken away do not come back; the weights are the same all the same.
            let done = match part == "progress.csv" {
                true => runs.finish(&mut runs.resume("half"))?,
                false => runs.recovers("half")?,
            };
            runs.same_checkpoint("half")?;
            ensure!(done.code == Some(0), "{}", done.last_line());
            let warned = done.stderr.contains("passed over");
            let in_newest = part.starts_with(&format!("{newest}/"));
            ensure!(warned == in_newest, "a warning: {warned}, expected {in_newest}: {}", done.stderr);
            Ok(resumed_at(&done.stderr).is_some())
        };
        match check().with_context(|| format!("without {part}"))? {
            true => resumed += 1,
            false => anew += 1,
        }
    }
    Ok(Outcome::Held(format!(
        "{} parts taken away in turn: {resumed} times it went on, {anew} times it began anew, to the same bytes",
        parts.len()
    )))
}

fn two_processes(runs: &Runs) -> Result<Outcome> {
    let mut first = Running::start(&mut runs.train("shared"))?;
    while newest_step(&runs.folder("shared")).is_none() {
        ensure!(first.ended()?.is_none(), "the first process ended early");
        std::thread::sleep(Duration::from_millis(2));
    }
    // Frozen, it cannot end while others try.
    first.freeze()?;
    let owner = format!("process {} on ", first.id());
    for command in [&mut runs.resume("shared"), &mut runs.train("shared")] {
        let second = runs.finish(command)?;
        second.fails(2, &["shared", "another process trains in this folder", &owner])?;
    }
    // Its lock goes with it, however it goes.
    first.kill()?;
    runs.recovers("shared")?;
    Ok(Outcome::Held(
        "the second is refused with pid and host of the first; after a kill the folder is free".to_owned(),
    ))
}

/// Nothing decides by the time of day: files from the future and from long ago change nothing.
fn clock_jumps(runs: &Runs) -> Result<Outcome> {
    const YEARS: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
    let times = [SystemTime::now() + YEARS, SystemTime::now() - YEARS, SystemTime::UNIX_EPOCH];
    for (i, time) in times.into_iter().enumerate() {
        let name = format!("clock-{i}");
        runs.interrupted(&name)?;
        // Every other file, so that old and new ones are mixed in either order.
        for (at, (file, _)) in listing(&runs.folder(&name))?.into_iter().enumerate() {
            if at % 2 == i % 2 {
                let file = fs::OpenOptions::new().append(true).open(runs.folder(&name).join(file))?;
                file.set_modified(time)?;
            }
        }
        runs.recovers(&name)?;
    }
    Ok(Outcome::Held(
        "files of 20 years ahead, 20 years ago and 1970: going on ends in the same bytes".to_owned(),
    ))
}

fn explosion(runs: &Runs) -> Result<Outcome> {
    runs.interrupted("wild")?;
    let done = runs.finish(runs.resume("wild").args(["--set", "train.lr=1e30"]))?;
    let words = [
        "is not finite",
        "the last good checkpoint is wild/checkpoints/step-",
        "lower train.lr",
        "train.grad_clip",
    ];
    done.fails(3, &words)?;
    runs.check_whole("wild")?;
    let step = newest_step(&runs.folder("wild")).context("no checkpoint")?;
    ensure!(done.last_line().contains(&format!("step-{step:08}")), "not the newest: {}", done.last_line());
    Ok(Outcome::Held(format!("exit code 3; the line names step {step}, which is whole, and what to lower")))
}

/// Less memory than the batch needs.
fn out_of_memory(runs: &Runs) -> Result<Outcome> {
    let mut command = runs.train("large");
    command.args(["--set", "train.batch=100000", "--set", "network.model_channels=64"]);
    // libtorch alone maps more than a gigabyte; the batch would take some dozens.
    let done = runs.finish(&mut under("ulimit -v 6000000; exec \"$@\"", &command))?;
    done.fails(1, &["memory", "lower train.micro_batch"])?;
    Ok(Outcome::Held("exit code 1 and one line: lower train.micro_batch".to_owned()))
}

/// A bit of every file of the newest checkpoint is turned round: an older one is taken, and it is said why.
fn damaged_bytes(runs: &Runs) -> Result<Outcome> {
    runs.interrupted("whole-bits")?;
    let source = runs.folder("whole-bits");
    let all = steps(&source);
    let newest = all.last().copied().context("no checkpoint")?;
    let folder = format!("checkpoints/step-{newest:08}");
    let files: Vec<String> =
        listing(&source.join(&folder))?.into_iter().map(|(name, _)| format!("{folder}/{name}")).collect();
    for file in &files {
        drop(fs::remove_dir_all(runs.folder("bits")));
        copy(&source, &runs.folder("bits"))?;
        let path = runs.folder("bits").join(file);
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x80;
        fs::write(&path, bytes)?;
        let done = runs.recovers("bits").with_context(|| format!("with a bit of {file} turned round"))?;
        ensure!(done.stderr.contains("passed over"), "{file}: nothing was said: {}", done.stderr);
        let from = resumed_at(&done.stderr).context("it was not resumed")?;
        ensure!(from < newest && all.contains(&from), "{file}: resumed at {from}");
        let aside = runs.folder("bits").join(format!("{folder}.damaged"));
        ensure!(aside.is_dir() && done.stderr.contains("is kept as"), "{file}: {}", done.stderr);
        runs.check_whole("bits")?;
    }
    Ok(Outcome::Held(format!(
        "a bit in each of {} files: the one before is taken, with a warning, to the same bytes; the damaged one is written anew \
         and kept beside",
        files.len()
    )))
}

/// The step in `resumed at step N`.
pub fn resumed_at(stderr: &str) -> Option<u64> {
    stderr.lines().find_map(|line| line.strip_prefix("resumed at step ")?.parse().ok())
}

/// Every file below a folder with its length, sorted; the lock is no part of a run.
fn listing(folder: &Path) -> Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    let mut pending = vec![(folder.to_owned(), String::new())];
    while let Some((folder, prefix)) = pending.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type()?.is_dir() {
                true => pending.push((entry.path(), format!("{name}/"))),
                false if name == ".lock" => {}
                false => files.push((name, entry.metadata()?.len())),
            }
        }
    }
    files.sort();
    Ok(files)
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    Ok(listing(folder)?.iter().map(|(_, bytes)| bytes).sum())
}

pub fn copy(from: &Path, to: &Path) -> Result<()> {
    for (name, _) in listing(from)? {
        let target = to.join(&name);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(from.join(&name), &target).with_context(|| name.clone())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_copied_whole_and_listed() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir_all(from.join("x/y")).unwrap();
        for (name, content) in [("1", "a"), ("x/2", "bb"), ("x/y/3", "ccc"), (".lock", "process 1")] {
            fs::write(from.join(name), content).unwrap();
        }
        copy(&from, &to).unwrap();
        let want = vec![("1".to_owned(), 1), ("x/2".to_owned(), 2), ("x/y/3".to_owned(), 3)];
        assert_eq!(listing(&to).unwrap(), want);
        assert_eq!(folder_bytes(&from).unwrap(), 6);
    }

    #[test]
    fn the_step_of_a_resumed_run_is_read() {
        assert_eq!(resumed_at("data: x\nresumed at step 17\n"), Some(17));
        assert_eq!(resumed_at("no checkpoint yet: starting from step 0\n"), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_script_runs_the_command_with_its_environment() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $NAME $1", "x", "two words"]).env("NAME", "value");
        let output = under("echo before; \"$@\"", &command).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "before\nvalue two words\n");
    }
}
