//! The log of a search: a line with its settings, and a line for each evaluation.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_sampler::search::{Scored, Scores};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::ScoreKind;

/// Everything but the time points that a score depends on. Two searches share a log where they agree in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// CRC-32 of the weights.
    pub model: String,
    /// Number of points of the grid.
    pub steps: usize,
    /// The grid's exponent.
    pub rho: f64,
    /// What is scored by.
    pub score: ScoreKind,
    /// SHA-256 of the weights of the network that looks at the images, where one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    /// Number of images for each score.
    pub samples: usize,
    /// What the samples are compared with.
    pub data: String,
}

/// An open log.
pub struct Log {
    file: File,
    path: PathBuf,
    /// What it held when it was opened.
    pub known: Scores,
}

impl Log {
    /// Opens the log at `path`, or begins it. A last line that was torn is cut off.
    pub fn open(path: &Path, settings: &Settings) -> Result<Self> {
        let shown = path.display();
        let mut text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("{shown}: reading the log")),
        };
        text.truncate(text.rfind('\n').map_or(0, |end| end + 1));
        let mut lines = text.lines().enumerate();
        if let Some((_, first)) = lines.next() {
            let found = serde_json::from_str(first).with_context(|| {
                format!("{shown}, line 1: not the log of a search; name another with --log")
            })?;
            check(&found, settings).with_context(|| shown.to_string())?;
        }
        let known = lines
            .map(|(index, line)| {
                serde_json::from_str::<Scored>(line).with_context(|| {
                    format!("{shown}, line {}: not an evaluation; remove the line", index + 1)
                })
            })
            .collect::<Result<Scores>>()?;
        let file = OpenOptions::new().create(true).write(true).truncate(false).open(path);
        let mut file =
            file.with_context(|| format!("{shown}: opening the log (--log names another place)"))?;
        let mut begin = || -> std::io::Result<()> {
            file.set_len(text.len() as u64)?;
            file.seek(SeekFrom::End(0)).map(drop)
        };
        begin().with_context(|| format!("{shown}: writing the log"))?;
        let mut log = Self { file, path: path.to_owned(), known };
        if text.is_empty() {
            log.line(settings)?;
        }
        Ok(log)
    }

    /// Adds an evaluation. It is on the disk when this returns.
    pub fn write(&mut self, evaluation: &Scored) -> Result<()> {
        self.line(evaluation)
    }

    fn line(&mut self, what: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_string(what)?;
        line.push('\n');
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("{}: writing the log", self.path.display()))
    }
}

/// Names every setting in which a log is of another search.
fn check(found: &Settings, wanted: &Settings) -> Result<()> {
    let (found, wanted) = (serde_json::to_value(found)?, serde_json::to_value(wanted)?);
    let keys = wanted.as_object().into_iter().flat_map(|map| map.keys());
    let differing: Vec<String> = keys
        .filter(|key| found[key.as_str()] != wanted[key.as_str()])
        .map(|key| {
            format!("{key} {} there, {} here", plain(&found[key.as_str()]), plain(&wanted[key.as_str()]))
        })
        .collect();
    if !differing.is_empty() {
        bail!("it is the log of another search ({}); name another with --log", differing.join("; "));
    }
    Ok(())
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(samples: usize) -> Settings {
        let (model, data) = ("0123abcd".to_owned(), "digits, 1797 images".to_owned());
        Settings { model, steps: 40, rho: 7.0, score: ScoreKind::Pixels, judge: None, samples, data }
    }

    fn evaluation(t: usize) -> Scored {
        Scored { ts: vec![0, t, 39], score: t as f64 / 3.0 }
    }

    #[test]
    fn what_was_written_is_known_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let mut log = Log::open(&path, &settings(100)).unwrap();
        assert!(log.known.is_empty());
        log.write(&evaluation(13)).unwrap();
        log.write(&evaluation(25)).unwrap();
        drop(log);
        let whole = std::fs::read_to_string(&path).unwrap();
        assert_eq!(whole.lines().count(), 3);
        std::fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        let mut log = Log::open(&path, &settings(100)).unwrap();
        assert_eq!(log.known, [evaluation(13)].into_iter().collect());
        log.write(&evaluation(25)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), whole);
        // A log that was torn in its first line begins anew.
        std::fs::write(&path, &whole[..20]).unwrap();
        assert!(Log::open(&path, &settings(100)).unwrap().known.is_empty());
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().next(), whole.lines().next());
    }

    #[test]
    fn the_log_of_another_search_is_refused_with_every_difference() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        drop(Log::open(&path, &settings(100)).unwrap());
        let other = Settings { steps: 80, ..settings(200) };
        let error = format!("{:#}", Log::open(&path, &other).err().unwrap());
        for word in ["log.jsonl: ", "samples 100 there, 200 here", "steps 40 there, 80 here", "--log"] {
            assert!(error.contains(word), "'{word}' is missing in: {error}");
        }
        for (text, said) in [("{}\n", "line 1: not the log"), ("x\n", "line 1: not the log")] {
            std::fs::write(&path, text).unwrap();
            assert!(format!("{:#}", Log::open(&path, &other).err().unwrap()).contains(said));
        }
        std::fs::write(&path, format!("{}\nx\n", serde_json::to_string(&other).unwrap())).unwrap();
        assert!(format!("{:#}", Log::open(&path, &other).err().unwrap()).contains("line 2: not an eval"));
    }
}
