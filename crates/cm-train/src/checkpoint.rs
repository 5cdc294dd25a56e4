use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cm_model::{files, short, short_to};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, TrainSpec};

/// The file of a checkpoint that is written last and lists the others.
pub const STATE_FILE: &str = "state.json";
/// The student's weights.
pub const RAW_FILE: &str = "raw.safetensors";
/// The target network's weights, where there is one.
pub const TARGET_FILE: &str = "target.safetensors";
/// The optimiser's moments.
pub const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Version of the folder's layout.
const FORMAT: u32 = 1;
/// Longest `state.json` that is read, in bytes.
const MAX_STATE: u64 = 16 << 20;

/// The file of one weight average, such as `ema-0.9999.safetensors`.
pub fn ema_file(rate: &str) -> String {
    format!("ema-{rate}.safetensors")
}

/// Size and checksum of a file, by which a torn one is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32 of the content.
    pub crc32: u32,
}

/// What `state.json` holds: where the run stood, and every other file of the checkpoint.
///
/// No state of a random generator is among it: noise, indices, dropout and data order are functions of the seed and
/// the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Version of the layout.
    pub format: u32,
    /// Steps taken.
    pub step: u64,
    /// Images seen.
    pub images: u64,
    /// The settings that the run was trained with.
    pub train: TrainSpec,
    /// The other files, by name.
    pub files: BTreeMap<String, FileRecord>,
}

/// Which checkpoints stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest; at least 1.
    pub last: usize,
    /// Those at multiples of this step, for ever; 0 for none.
    pub milestone_every: u64,
}

/// A whole checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Its `state.json`.
    pub state: State,
}

/// A folder that looks like a checkpoint and is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// The folder.
    pub path: PathBuf,
    /// What is missing or wrong.
    pub problem: String,
}

/// The folder `checkpoints/` of a run: one folder `step-00001000` for each checkpoint.
///
/// A checkpoint is written under a hidden name, synced to the disk and renamed, so that a folder with its final name
/// was whole when it got it. What happened to it later (a disk error, a partial copy, a stray deletion) is found by
/// sizes and checksums, and the folder is kept beside its place (`step-00001000.damaged`) when the run comes to that
/// step again.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    root: PathBuf,
    known: Arc<Mutex<Known>>,
}

/// What a process has found out about the checkpoints of a run: reading gigabytes to prune is worth it once.
#[derive(Debug, Default)]
struct Known {
    /// Whether the checkpoint of a step was whole when this process wrote or read it.
    whole: BTreeMap<u64, bool>,
    /// Where damaged ones were put and nobody has been told of yet.
    set_aside: Vec<PathBuf>,
}

impl Checkpoints {
    /// The checkpoints of the run in `run_folder`.
    pub fn of_run(run_folder: &Path) -> Self {
        Self { root: run_folder.join("checkpoints"), known: Arc::default() }
    }

    /// The folder of the checkpoint of `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.root.join(format!("step-{step:08}"))
    }

    /// The steps that have a folder, whole or not, in ascending order.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder exists and cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let entries = match fs::read_dir(&self.root) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io(&self.root, "reading the folder", e))?,
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(|e| Error::io(&self.root, "reading the folder", e))?.file_name();
            let digits = name.to_str().and_then(|name| name.strip_prefix("step-"));
            steps.extend(digits.and_then(|digits| digits.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest whole checkpoint, and the newer ones that had to be passed over because they are not whole.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read.
    pub fn newest_whole(&self) -> Result<(Option<Checkpoint>, Vec<Broken>)> {
        let mut broken = Vec::new();
        for step in self.steps()?.into_iter().rev() {
            match self.open(step) {
                Ok(checkpoint) => return Ok((Some(checkpoint), broken)),
                Err(Error::Checkpoint { path, problem }) => broken.push(Broken { path, problem }),
                Err(other) => return Err(other),
            }
        }
        Ok((None, broken))
    }

    /// Opens the checkpoint of `step` with all its checksums, and remembers how that went.
    fn open(&self, step: u64) -> Result<Checkpoint> {
        let opened = Checkpoint::open(&self.path(step)).and_then(|checkpoint| match checkpoint.state.step {
            same if same == step => Ok(checkpoint),
            other => Err(Error::checkpoint(checkpoint.path, format!("{STATE_FILE} is of step {other}"))),
        });
        self.known().whole.insert(step, opened.is_ok());
        opened
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What is in there is whole between any two statements.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the checkpoint of `step`: `write` puts the files into the folder that it is given, and they are listed
    /// in `state.json`, synced and moved into place as one. A whole checkpoint of that step, by its checksums, stays as
    /// it is; a damaged one is set aside ([`take_set_aside`](Self::take_set_aside)).
    ///
    /// # Errors
    /// [`Error::Io`] or what `write` returns; the folder of that step is then as it was, or, where only the last sync
    /// fails, the new one, which may not be on the disk yet.
    pub fn save(
        &self,
        step: u64,
        images: u64,
        train: &TrainSpec,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        if self.has(step) { Ok(self.path(step)) } else { self.replace(step, images, train, write) }
    }

    /// [`save`](Self::save), whatever is there.
    pub(crate) fn replace(
        &self,
        step: u64,
        images: u64,
        train: &TrainSpec,
        write: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let (place, temp) = (self.path(step), self.hidden(step, "partial"));
        remove_tree(&temp)?;
        fs::create_dir_all(&temp).map_err(|e| Error::io(&temp, "creating the folder", e))?;
        let written = write(&temp).and_then(|()| {
            let state = State { format: FORMAT, step, images, train: train.clone(), files: records(&temp)? };
            let json = serde_json::to_vec_pretty(&state)
                .map_err(|e| Error::checkpoint(&temp, format!("{STATE_FILE} cannot be written: {e}")))?;
            files::write_atomic(&temp.join(STATE_FILE), |out| out.write_all(&json))?;
            files::sync_folder(&temp)?;
            self.move_in(step, &temp)
        });
        if let Err(error) = written {
            // The cause is what the caller has to know; a leftover folder is removed by the next save.
            let _ = remove_tree(&temp);
            return Err(error);
        }
        files::sync_folder(&self.root)?;
        self.known().whole.insert(step, true);
        Ok(place)
    }

    /// Gives the finished folder `temp` its name. What has that name is damaged and all that is left of something, so
    /// that it is kept under another one.
    fn move_in(&self, step: u64, temp: &Path) -> Result<()> {
        let place = self.path(step);
        let aside = place.exists().then(|| self.free_name(step));
        if let Some(aside) = &aside {
            fs::rename(&place, aside).map_err(|e| Error::io(&place, "moving aside", e))?;
        }
        fs::rename(temp, &place).map_err(|e| {
            // A failure stays hidden behind the one that led here.
            aside.iter().for_each(|aside| drop(fs::rename(aside, &place)));
            Error::io(&place, "renaming into place", e)
        })?;
        self.known().set_aside.extend(aside);
        Ok(())
    }

    /// A name for a damaged checkpoint of `step` that nothing has.
    fn free_name(&self, step: u64) -> PathBuf {
        let name = |n: u32| match n {
            1 => self.root.join(format!("step-{step:08}.damaged")),
            n => self.root.join(format!("step-{step:08}.damaged-{n}")),
        };
        (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(u32::MAX))
    }

    /// Where damaged checkpoints were put since this was last asked, for their steps to be written anew. They are never
    /// read and never removed: the caller should say so.
    pub fn take_set_aside(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.known().set_aside)
    }

    /// Whether the checkpoint of `step` is there and whole, by its checksums.
    pub(crate) fn has(&self, step: u64) -> bool {
        self.path(step).exists() && self.open(step).is_ok()
    }

    /// Whether the checkpoint of `step` is one that a run can go on from: its checksums are compared once, its lengths
    /// each time.
    fn is_sound(&self, step: u64) -> bool {
        let known = self.known().whole.get(&step).copied();
        Checkpoint::looks_whole(&self.path(step)) && known.unwrap_or_else(|| self.open(step).is_ok())
    }

    /// Removes old checkpoints, and what a killed run left behind half-written or half-removed.
    ///
    /// Those that are kept are counted by their checksums, so that a damaged one never stands for a whole one that is
    /// removed. Folders that are not whole are neither counted nor, but for damaged contents among old ones, removed:
    /// they may be all that is left of something. The newest whole checkpoint always stays.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be read or removed.
    pub fn prune(&self, keep: Keep) -> Result<Vec<PathBuf>> {
        let mut newest_first = self.steps()?.into_iter().rev();
        // Where fewer are sound than are to stay, this comes to the end of them.
        newest_first.by_ref().filter(|&step| self.is_sound(step)).take(keep.last.max(1)).for_each(drop);
        let mut old: Vec<u64> =
            newest_first.filter(|&step| Checkpoint::looks_whole(&self.path(step))).collect();
        old.reverse();
        let is_milestone = |step: u64| keep.milestone_every > 0 && step.is_multiple_of(keep.milestone_every);
        let mut removed = Vec::new();
        for &step in old.iter().filter(|&&step| !is_milestone(step)) {
            self.hide(step)?;
            remove_tree(&self.hidden(step, "old"))?;
            removed.push(self.path(step));
        }
        self.remove_leftovers()?;
        Ok(removed)
    }

    /// Moves the folder of `step`, if there is one, to its hidden name, so that a removal that is interrupted leaves
    /// nothing behind that looks like a checkpoint.
    fn hide(&self, step: u64) -> Result<()> {
        let (place, old) = (self.path(step), self.hidden(step, "old"));
        if place.exists() {
            remove_tree(&old)?;
            fs::rename(&place, &old).map_err(|e| Error::io(&place, "moving aside", e))?;
        }
        Ok(())
    }

    fn remove_leftovers(&self) -> Result<()> {
        let entries = fs::read_dir(&self.root).map_err(|e| Error::io(&self.root, "reading the folder", e))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(".step-") && (name.ends_with(".partial") || name.ends_with(".old")) {
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }

    fn hidden(&self, step: u64, suffix: &str) -> PathBuf {
        self.root.join(format!(".step-{step:08}.{suffix}"))
    }
}

impl Checkpoint {
    /// Opens a checkpoint and checks every file's size and checksum.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with what is missing or wrong.
    pub fn open(path: &Path) -> Result<Self> {
        let state = Self::read_state(path)?;
        let check = |(name, record): (&String, &FileRecord)| {
            let found =
                measure(&path.join(name)).map_err(|e| Error::checkpoint(path, format!("{name}: {e}")))?;
            if found.bytes != record.bytes {
                let problem = format!("{name} has {} bytes, {} were written", found.bytes, record.bytes);
                return Err(Error::checkpoint(path, problem));
            }
            if found.crc32 != record.crc32 {
                let problem = format!("{name} is not what was written (its checksum differs)");
                return Err(Error::checkpoint(path, problem));
            }
            Ok(())
        };
        // The first of the files that differ is named, whichever thread sees its own first.
        let found: Vec<Result<()>> = state.files.par_iter().map(check).collect();
        found.into_iter().collect::<Result<()>>()?;
        Ok(Self { path: path.to_owned(), state })
    }

    /// The path of one of its files.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the checkpoint has no such file.
    pub fn file(&self, name: &str) -> Result<PathBuf> {
        if self.state.files.contains_key(name) {
            return Ok(self.path.join(name));
        }
        let names: Vec<_> = self.state.files.keys().map(String::as_str).collect();
        let problem = format!("it holds no {name} ({}); the run's settings have changed", names.join(", "));
        Err(Error::checkpoint(&self.path, problem))
    }

    /// Whether every file is there in its full length, without reading the contents.
    fn looks_whole(path: &Path) -> bool {
        let length = |name: &str| fs::metadata(path.join(name)).map(|m| m.len()).ok();
        Self::read_state(path)
            .is_ok_and(|state| state.files.iter().all(|(name, record)| length(name) == Some(record.bytes)))
    }

    fn read_state(path: &Path) -> Result<State> {
        let problem = |problem: String| Error::checkpoint(path, problem);
        let text = read_text(&path.join(STATE_FILE)).map_err(|e| problem(format!("{STATE_FILE}: {e}")))?;
        let format = serde_json::from_slice::<serde_json::Value>(&text)
            .map_err(|e| problem(format!("{STATE_FILE}: {e}")))?
            .get("format")
            .and_then(serde_json::Value::as_u64);
        if format != Some(u64::from(FORMAT)) {
            let got = format.map_or_else(|| "none".to_owned(), |f| f.to_string());
            return Err(problem(format!("{STATE_FILE}: this version reads format {FORMAT}, got {got}")));
        }
        let unreadable =
            |e: serde_json::Error| problem(format!("{STATE_FILE}: {}", short_to(&e.to_string(), 300)));
        let state: State = serde_json::from_slice(&text).map_err(unreadable)?;
        let is_plain = |name: &&String| Path::new(name).file_name().is_some_and(|file| file == name.as_str());
        match state.files.keys().find(|name| !is_plain(name)) {
            None => Ok(state),
            Some(name) => Err(problem(format!("{STATE_FILE}: '{}' is no file of this folder", short(name)))),
        }
    }
}

/// Records every file of a folder, as it is on the disk.
fn records(folder: &Path) -> Result<BTreeMap<String, FileRecord>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(|e| Error::io(folder, "reading the folder", e))?;
    let record = |entry: &fs::DirEntry| {
        let record = measure(&entry.path()).map_err(|e| Error::io(entry.path(), "reading back", e))?;
        Ok((entry.file_name().to_string_lossy().into_owned(), record))
    };
    entries.par_iter().map(record).collect()
}

/// Reads `state.json`, which has about 100 bytes a file beside the settings.
fn read_text(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_STATE).read_to_end(&mut text)?;
    Ok(text)
}

fn measure(path: &Path) -> std::io::Result<FileRecord> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let (mut hasher, mut bytes, mut buffer) = (crc32fast::Hasher::new(), 0, vec![0u8; 1 << 20]);
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(FileRecord { bytes, crc32: hasher.finalize() });
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, "removing", e)),
        _ => Ok(()),
    }
}
