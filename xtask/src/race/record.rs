//! What races have found, as it is kept: on which machine, in which runs, and each row with the run that it is of.
//!
//! A race writes its own record. The published ones lie in docs/race/, hold the newest of each row, and are what the
//! tables of docs/performance.md are made of.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::entry::Entry;
use super::rows::{self, Measure};

/// What must be the same for two runs to stand in one table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    pub size: String,
    /// `cpu` or `cuda`.
    pub device: String,
    /// The processor, and on CUDA the GPU with it.
    pub hardware: String,
    pub threads: usize,
    /// Versions of what the peers run on.
    pub versions: String,
}

/// One call of `cargo xtask race`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub date: String,
    pub commit: String,
    pub command: String,
    /// The machine's load before the first row and after the last.
    pub load: [String; 2],
}

/// What became of a row, against one peer if it was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Standing {
    Measured(Entry),
    /// It should have been measured and was not.
    Missing {
        missing: String,
        /// The peer that failed; none if the row failed as a whole.
        #[serde(default)]
        against: Option<String>,
    },
    Needs {
        needs: String,
    },
}

impl Standing {
    pub fn missing(error: &anyhow::Error, peer: Option<&str>) -> Self {
        Self::Missing { missing: format!("{error:#}"), against: peer.map(str::to_owned) }
    }

    /// The peer that it is about, if it is about one.
    fn peer(&self) -> Option<&str> {
        match self {
            Self::Measured(entry) => Some(&entry.peer),
            Self::Missing { against, .. } => against.as_deref(),
            Self::Needs { .. } => None,
        }
    }

    fn measure(&self) -> Option<Measure> {
        match self {
            Self::Measured(entry) => Some(entry.measure),
            _ => None,
        }
    }
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub row: String,
    pub about: String,
    /// The place of its run among the record's.
    pub run: usize,
    #[serde(flatten)]
    pub standing: Standing,
}

impl Line {
    /// Where it stands in the table.
    fn place(&self) -> (usize, bool, String) {
        let is_memory = self.standing.measure() == Some(Measure::Memory);
        (rows::place(&self.row), is_memory, self.standing.peer().unwrap_or_default().to_owned())
    }

    /// Whether `newer` takes its place: the same ratio, or anything else that became of the same row against that peer.
    fn gives_way_to(&self, newer: &Self) -> bool {
        let (old, new) = (&self.standing, &newer.standing);
        let about_one = old.peer().is_none() || new.peer().is_none() || old.peer() == new.peer();
        let alike = match (old.measure(), new.measure()) {
            (Some(old), Some(new)) => old == new,
            _ => true,
        };
        self.row == newer.row && about_one && alike
    }

    /// Prints it for people.
    pub fn print(&self) {
        let name = &self.row;
        match &self.standing {
            Standing::Measured(entry) => println!("{}", entry.line(name)),
            Standing::Missing { missing, against } => {
                println!(
                    "{name:<28} {}MISSING  {missing}",
                    against.as_ref().map_or(String::new(), |peer| format!("{peer}: "))
                );
            }
            Standing::Needs { needs } => println!("{name:<28} needs {needs}"),
        }
    }
}

/// Everything that one or more races found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub machine: Machine,
    pub runs: Vec<Run>,
    pub rows: Vec<Line>,
}

impl Record {
    /// The record at `path`, if there is one.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let record: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: no record of a race", path.display()))?;
        if let Some(line) = record.rows.iter().find(|line| line.run >= record.runs.len()) {
            bail!("{}: row {} is of run {}, which is not there", path.display(), line.row, line.run);
        }
        Ok(Some(record))
    }

    /// Rows of another machine do not go into one table with these.
    pub fn check_machine(&self, other: &Machine) -> Result<()> {
        if &self.machine != other {
            bail!(
                "what is published is of another machine ({} with {} threads, {}) than this one ({} with {} threads, {})",
                self.machine.hardware,
                self.machine.threads,
                self.machine.versions,
                other.hardware,
                other.threads,
                other.versions
            );
        }
        Ok(())
    }

    /// Puts the rows of `newer` in the place of those that were there, and forgets runs of which nothing is left.
    pub fn take_in(&mut self, newer: Self) {
        let first = self.runs.len();
        self.rows.retain(|old| !newer.rows.iter().any(|new| old.gives_way_to(new)));
        self.runs.extend(newer.runs);
        self.rows.extend(newer.rows.into_iter().map(|line| Line { run: line.run + first, ..line }));
        self.rows.sort_by_key(Line::place);
        let mut used = BTreeMap::new();
        for line in &mut self.rows {
            let next = used.len();
            line.run = *used.entry(line.run).or_insert(next);
        }
        let mut kept: Vec<(usize, Run)> = Vec::new();
        for (index, run) in self.runs.drain(..).enumerate() {
            kept.extend(used.get(&index).map(|place| (*place, run)));
        }
        kept.sort_by_key(|(place, _)| *place);
        self.runs = kept.into_iter().map(|(_, run)| run).collect();
    }

    /// Whether everything that could be measured was, and is where it should be.
    pub fn holds(&self) -> bool {
        self.rows.iter().all(|line| match &line.standing {
            Standing::Measured(entry) => entry.holds != Some(false),
            // The others are reported and not aimed at.
            Standing::Missing { against, .. } => {
                against.as_ref().is_some_and(|peer| ["c", "d"].contains(&peer.as_str()))
            }
            Standing::Needs { .. } => true,
        })
    }

    /// The record as JSON, with `holds` on top.
    pub fn json(&self) -> Result<String> {
        let mut value = serde_json::to_value(self).context("the record as JSON")?;
        value["holds"] = self.holds().into();
        Ok(format!("{value:#}\n"))
    }

    /// The record as a table, with the runs below.
    pub fn table(&self) -> String {
        let Machine { size, device, hardware, threads, versions } = &self.machine;
        let mut text = format!("Size {size} on {device}: {hardware}, {threads} threads; {versions}.\n\n");
        text += "| work | against | ours | theirs | ratio | target | | run |\n";
        text += "| --- | --- | --- | --- | --- | --- | --- | --- |\n";
        for Line { about, run, standing, .. } in &self.rows {
            let run = run + 1;
            let cells = match standing {
                Standing::Measured(entry) => entry.cells(about),
                Standing::Missing { missing, against } => {
                    let peer = against.as_deref().unwrap_or_default();
                    format!("{about} | {peer} | | | | | missing: {}", missing.replace('|', "/"))
                }
                Standing::Needs { needs } => format!("{about} | | | | | | needs {needs}"),
            };
            let _ = writeln!(text, "| {cells} | {run} |");
        }
        text += "\n";
        for (index, Run { date, commit, command, load }) in self.runs.iter().enumerate() {
            let [begin, end] = load;
            let number = index + 1;
            let _ = writeln!(
                text,
                "{number}. {date}, commit {commit}, load {begin} before and {end} after: `{command}`"
            );
        }
        text
    }
}

/// `text` with another content of the block `name`.
pub fn replaced(text: &str, name: &str, content: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- end of {name} -->"));
    let block = text.split_once(&begin).and_then(|(head, rest)| Some((head, rest.split_once(&end)?.1)));
    let Some((head, tail)) = block else { bail!("no block between '{begin}' and '{end}' to replace") };
    Ok(format!("{head}{begin}\n{content}{end}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            size: "tiny".to_owned(),
            device: "cpu".to_owned(),
            hardware: "a processor".to_owned(),
            threads: 2,
            versions: "torch 2".to_owned(),
        }
    }

    fn run(commit: &str) -> Run {
        Run {
            date: "2026-11-26".to_owned(),
            commit: commit.to_owned(),
            command: "cargo xtask race".to_owned(),
            load: ["0.1", "1.9"].map(str::to_owned),
        }
    }

    fn line(row: &str, peer: &str, ratio: f64, target: Option<f64>) -> Line {
        let dtypes = ["bf16".to_owned(), "fp32".to_owned()];
        let entry = Entry::of_rates("img/s", peer, dtypes, [&[ratio], &[1.0]], target);
        let about = rows::about(row).to_owned();
        Line { row: row.to_owned(), about, run: 0, standing: Standing::Measured(entry) }
    }

    fn record(commit: &str, rows: Vec<Line>) -> Record {
        Record { machine: machine(), runs: vec![run(commit)], rows }
    }

    fn entry(line: &Line) -> Option<&Entry> {
        match &line.standing {
            Standing::Measured(entry) => Some(entry),
            _ => None,
        }
    }

    fn missing(row: &str, against: Option<&str>) -> Line {
        let standing = Standing::missing(&anyhow::anyhow!("not built"), against);
        Line { standing, ..line(row, "a", 1.0, None) }
    }

    #[test]
    fn a_race_holds_when_all_that_can_be_measured_does() {
        let holds = |line: Line| record("1", vec![line]).holds();
        assert!(holds(line("ct", "a", 2.0, Some(2.0))) && holds(line("ct", "a", 2.0, None)));
        assert!(!holds(line("ct", "a", 2.0, Some(2.1))));
        assert!(holds(Line {
            standing: Standing::Needs { needs: "a GPU".to_owned() },
            ..missing("ct", None)
        }));
        assert!(
            !holds(missing("ct", None))
                && !holds(missing("ct", Some("b")))
                && holds(missing("ct", Some("c")))
        );
    }

    #[test]
    fn newer_rows_take_the_place_of_older_ones_and_the_others_stay() {
        let mut kept = record("old", vec![line("ct", "a", 2.0, None), line("ct", "b", 1.5, None)]);
        kept.take_in(record("data", vec![line("data", "a", 9.0, None)]));
        kept.take_in(record("new", vec![line("edm", "a", 4.0, None), line("ct", "b", 1.6, None)]));
        let seen: Vec<(&str, f64, &str)> = kept
            .rows
            .iter()
            .map(|line| (line.row.as_str(), entry(line).unwrap().ratio, kept.runs[line.run].commit.as_str()))
            .collect();
        assert_eq!(
            seen,
            [("ct", 2.0, "old"), ("ct", 1.6, "new"), ("edm", 4.0, "new"), ("data", 9.0, "data")]
        );
        // Nothing is left of the first run after this one.
        kept.take_in(record("third", vec![missing("ct", None)]));
        let commits: Vec<&str> = kept.runs.iter().map(|run| run.commit.as_str()).collect();
        assert_eq!(commits, ["third", "new", "data"]);
        assert_eq!(kept.rows[0].standing, missing("ct", None).standing);
        // One peer's failure takes the place of its own ratio alone.
        kept.take_in(record("fourth", vec![line("ct", "a", 2.0, None), line("ct", "b", 2.0, None)]));
        kept.take_in(record("fifth", vec![missing("ct", Some("b"))]));
        assert_eq!(entry(&kept.rows[0]).map(|entry| entry.peer.as_str()), Some("a"));
        assert_eq!(kept.rows[1].standing, missing("ct", Some("b")).standing);
        kept.take_in(record("last", vec![line("ct", "b", 2.0, None)]));
        assert!(kept.rows.iter().all(|line| entry(line).is_some()), "{:?}", kept.rows);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny-cpu.json");
        assert_eq!(Record::read(&path).unwrap(), None);
        let written = record("1", vec![line("ct", "a", 2.0, Some(2.0)), missing("edm", None)]);
        fs::write(&path, written.json().unwrap()).unwrap();
        assert_eq!(Record::read(&path).unwrap(), Some(written.clone()));
        assert!(written.check_machine(&machine()).is_ok());
        let error = written.check_machine(&Machine { threads: 1, ..machine() }).unwrap_err().to_string();
        assert!(error.contains("with 2 threads") && error.contains("with 1 threads"), "{error}");
        let lost = Record { runs: Vec::new(), ..written };
        fs::write(&path, lost.json().unwrap()).unwrap();
        assert!(Record::read(&path).unwrap_err().to_string().contains("which is not there"));
    }

    #[test]
    fn the_table_says_what_ran_when() {
        let table = record("abc", vec![line("ct", "a", 2.0, Some(1.0)), missing("edm", None)]).table();
        assert!(
            table.contains("| one CT step | a | 2.00 img/s (bf16) | 1.00 img/s (fp32) | 2.00 |"),
            "{table}"
        );
        assert!(table.contains("| one EDM step |  | | | | | missing: not built | 1 |"), "{table}");
        assert!(
            table.contains("1. 2026-11-26, commit abc, load 0.1 before and 1.9 after: `cargo xtask race`")
        );
    }

    #[test]
    fn only_the_block_changes() {
        let text = "a\n<!-- race tiny cpu -->\nold\n<!-- end of race tiny cpu -->\nb\n";
        assert_eq!(replaced(text, "race tiny cpu", "new\n").unwrap(), text.replace("old", "new"));
        assert!(replaced(text, "race cifar10 cpu", "new").is_err());
    }
}
