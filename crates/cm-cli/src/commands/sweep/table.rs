//! The table of a sweep: in the terminal, as `sweep.csv`, and as `sweep.json`, which a sweep is resumed from.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use cm_model::files::write_atomic;
use cm_train::STATS_FILE;
use serde::{Deserialize, Serialize};

use super::plan::{Plan, Planned};

/// The table, for programs.
pub const JSON_FILE: &str = "sweep.json";
const CSV_FILE: &str = "sweep.csv";

/// All runs of a sweep.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// The keys that the runs differ in.
    pub keys: Vec<String>,
    /// A row each.
    pub runs: Vec<Row>,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not begun.
    Waiting,
    /// Saved before its end.
    Interrupted,
    /// Ended by an error.
    Failed,
    /// At its last step.
    Finished,
}

/// A run of a sweep and what came of it.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of its folder, in that of the sweep.
    pub name: String,
    /// The value of each key, as `--set` takes it.
    pub values: BTreeMap<String, String>,
    /// How far it is.
    pub status: Status,
    /// What came of it; none before the first entry of its log.
    #[serde(flatten)]
    pub figures: Figures,
    /// Its folder.
    pub folder: String,
    /// Why it failed.
    pub error: Option<String>,
}

/// What a run's log comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Steps in the log.
    pub step: Option<u64>,
    /// The loss of the last entry.
    pub loss: Option<f64>,
    /// Images a second, over all sessions of the run.
    pub images_per_second: Option<f64>,
    /// Minutes of training, over all sessions.
    pub minutes: Option<f64>,
}

/// What is read of an entry of the log.
#[derive(Deserialize)]
struct Entry {
    step: u64,
    images: u64,
    loss: f64,
    images_per_second: f64,
}

impl Figures {
    /// Reads the log of the run in `folder`.
    pub fn of_run(folder: &Path) -> Result<Self> {
        let path = folder.join(STATS_FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text.with_context(|| format!("{}: reading failed", path.display()))?,
        };
        let (mut figures, mut images, mut seconds) = (Self::default(), 0, 0.0);
        // A line that a crash has torn is cut off where the run goes on, and counts for nothing here.
        for entry in text.lines().filter_map(|line| serde_json::from_str::<Entry>(line).ok()) {
            // Clocks of sessions start at 0: the time is that of each entry's own images.
            seconds += entry.images.saturating_sub(images) as f64 / entry.images_per_second.max(1e-9);
            images = entry.images;
            figures.step = Some(entry.step);
            figures.loss = Some(entry.loss);
            figures.images_per_second = Some(images as f64 / seconds.max(1e-9));
            figures.minutes = Some(seconds / 60.0);
        }
        Ok(figures)
    }
}

impl Table {
    /// The runs that wait for their beginning.
    pub fn new(plan: Plan, out: &Path) -> Self {
        let row = |Planned { name, values }| Row {
            folder: out.join(&name).display().to_string(),
            name,
            values,
            status: Status::Waiting,
            figures: Figures::default(),
            error: None,
        };
        Self { keys: plan.keys, runs: plan.runs.into_iter().map(row).collect() }
    }

    /// The plan of the sweep in `out`, if there is one.
    pub fn plan_in(out: &Path) -> Result<Option<Plan>> {
        let path = out.join(JSON_FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.with_context(|| format!("{}: reading failed", path.display()))?,
        };
        let table: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: this is no table of a sweep", path.display()))?;
        let runs = table.runs.into_iter().map(|Row { name, values, .. }| Planned { name, values }).collect();
        let plan = Plan { keys: table.keys, runs };
        let is_name = |name: &str| Path::new(name).file_name().is_some_and(|file| file == name);
        if let Some(run) = plan.runs.iter().find(|run| !is_name(&run.name)) {
            bail!("{}: {:?}: expected the name of a folder beside this file", path.display(), run.name);
        }
        Ok(Some(plan))
    }

    /// How many runs have this status.
    pub fn count(&self, status: Status) -> usize {
        self.runs.iter().filter(|run| run.status == status).count()
    }

    /// Writes `sweep.csv` and `sweep.json`.
    pub fn write(&self, out: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).context("writing the table as JSON")?;
        write_atomic(&out.join(JSON_FILE), |file| writeln!(file, "{json}"))?;
        let csv = self.cells(|value| value.to_string());
        let line = |row: &Vec<String>| row.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",");
        write_atomic(&out.join(CSV_FILE), |file| {
            csv.iter().try_for_each(|row| writeln!(file, "{}", line(row)))
        })?;
        Ok(())
    }

    /// The table for a person: columns one below the other, numbers of four digits.
    pub fn text(&self) -> String {
        let rows = self.cells(four_digits);
        let columns = rows.first().map_or(0, Vec::len);
        let length = |cell: &String| cell.chars().count();
        let width =
            |column: usize| rows.iter().filter_map(|row| row.get(column)).map(length).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        rows.iter().map(line).collect()
    }

    /// A header and a row for each run.
    fn cells(&self, number: impl Fn(f64) -> String) -> Vec<Vec<String>> {
        let fixed = ["status", "loss", "images_per_second", "minutes", "folder"].map(str::to_owned);
        let header = self.keys.iter().cloned().chain(fixed).collect();
        let row = |run: &Row| {
            let values = self.keys.iter().map(|key| run.values.get(key).cloned().unwrap_or_default());
            let Figures { loss, images_per_second, minutes, .. } = run.figures;
            let numbers = [loss, images_per_second, minutes].map(|n| n.map(&number).unwrap_or_default());
            let status = format!("{:?}", run.status).to_lowercase();
            values.chain([status]).chain(numbers).chain([run.folder.clone()]).collect()
        };
        [header].into_iter().chain(self.runs.iter().map(row)).collect()
    }
}

fn four_digits(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    match digits {
        -3..=3 => format!("{value:.*}", (3 - digits) as usize),
        4..=9 => format!("{value:.0}"),
        _ => format!("{value:.3e}"),
    }
}

/// A cell of a CSV file (RFC 4180).
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::sweep::plan::plan;

    fn table(folder: &Path) -> Table {
        let sweeps = ["train.lr=1e-3,1e-4".to_owned(), "train.metric={kind='huber', c=1}".to_owned()];
        let mut table = Table::new(plan(&sweeps).unwrap(), folder);
        table.runs[0].figures =
            Figures { step: Some(3), loss: Some(0.25), images_per_second: Some(12345.6), minutes: Some(1.5) };
        table.runs[0].status = Status::Finished;
        table
    }

    #[test]
    fn a_written_table_is_the_plan_of_the_next_session() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Table::plan_in(folder.path()).unwrap(), None);
        let table = table(folder.path());
        table.write(folder.path()).unwrap();
        let plan = Table::plan_in(folder.path()).unwrap().unwrap();
        assert_eq!(plan.keys, table.keys);
        assert_eq!(plan.runs[1].name, table.runs[1].name);
        assert_eq!(plan.runs[1].values, table.runs[1].values);
        let csv = std::fs::read_to_string(folder.path().join(CSV_FILE)).unwrap();
        let lines: Vec<_> = csv.lines().collect();
        assert_eq!(lines[0], "train.lr,train.metric,status,loss,images_per_second,minutes,folder");
        assert!(lines[1].starts_with("1e-3,\"{kind='huber', c=1}\",finished,0.25,12345.6,1.5,"), "{csv}");
        assert!(lines[2].starts_with("1e-4,\"{kind='huber', c=1}\",waiting,,,,"), "{csv}");
    }

    #[test]
    fn a_table_that_leaves_its_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["../x", "a/b", "/x", "..", ""] {
            let mut table = table(folder.path());
            table.runs[0].name = name.to_owned();
            table.write(folder.path()).unwrap();
            let error = Table::plan_in(folder.path()).unwrap_err().to_string();
            assert!(error.contains("sweep.json") && error.contains("name of a folder"), "{error}");
        }
        std::fs::write(folder.path().join(JSON_FILE), "{}").unwrap();
        assert!(Table::plan_in(folder.path()).unwrap_err().to_string().contains("no table of a sweep"));
    }

    #[test]
    fn columns_stand_below_each_other() {
        let text = table(Path::new("out")).text();
        let lines: Vec<_> = text.lines().collect();
        let at = lines[0].find("status").unwrap();
        assert!(lines[1][at..].starts_with("finished") && lines[2][at..].starts_with("waiting"), "{text}");
        assert!(lines[1].contains("0.2500  12346 ") && lines[1].contains("1.500"), "{text}");
    }

    #[test]
    fn time_is_that_of_all_sessions() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Figures::of_run(folder.path()).unwrap(), Figures::default());
        let entry = |step: u64, rate: f64| {
            format!(
                "{{\"step\":{step},\"images\":{},\"loss\":{step}.5,\"images_per_second\":{rate},\"seconds\":0}}\n",
                step * 60
            )
        };
        // 60 images at 1 a second, 60 at 2 a second in another session, and a torn line.
        let log = entry(1, 1.0) + &entry(2, 2.0) + "{\"step\":3,";
        std::fs::write(folder.path().join(STATS_FILE), log).unwrap();
        let figures = Figures::of_run(folder.path()).unwrap();
        let rate = 120.0 / 90.0;
        assert_eq!(
            figures,
            Figures { step: Some(2), loss: Some(2.5), images_per_second: Some(rate), minutes: Some(1.5) }
        );
    }
}
