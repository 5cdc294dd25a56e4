//! An evaluation on paper: one JSON, one table, and two of them beside each other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::judge::About;

/// The version of the JSON.
const FORMAT: u32 = 1;

/// Figures by name.
pub type Figures = BTreeMap<String, f64>;

/// Everything that an evaluation found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of this form.
    pub format: u32,
    /// The day, UTC.
    pub date: String,
    /// What was judged.
    pub input: Subject,
    /// What it was compared with.
    pub reference: Option<Subject>,
    /// The networks that saw the images.
    pub judges: Vec<JudgeNote>,
    /// Numbers that figures depend on.
    pub settings: Settings,
    /// One for each range of seeds; one for images.
    pub runs: Vec<Run>,
    /// Each figure over the runs.
    pub summary: BTreeMap<String, Spread>,
    /// What a reader has to know.
    pub warnings: Vec<String>,
}

/// A set of images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Subject {
    /// What it is.
    pub source: String,
    /// How a model was to be sampled: the options of `cm sample` that were given.
    pub sample: Option<String>,
    /// How it was sampled: all that decide about the images.
    #[serde(default)]
    pub sampler: Option<String>,
    /// SHA-256 of the images, where they lie on the disk.
    pub data: Option<String>,
    /// SHA-256 of a model's weights, or of a file of statistics.
    #[serde(default)]
    pub file: Option<String>,
    /// Number of images, of each run; none if statistics do not say.
    pub images: Option<u64>,
}

impl Subject {
    /// What it holds, wherever it lies.
    fn digest(&self) -> Option<&String> {
        self.data.as_ref().or(self.file.as_ref())
    }

    /// Whether it is the same as another, by digests where both have one.
    fn is(&self, other: &Subject) -> bool {
        match (self.digest(), other.digest()) {
            (Some(own), Some(of_other)) => own == of_other,
            _ => self.source == other.source,
        }
    }
}

/// A network that saw the images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeNote {
    /// `inception` or `classifier`.
    pub name: String,
    /// SHA-256 of its weights.
    pub weights: String,
    /// Where a classifier comes from.
    pub classifier: Option<About>,
}

/// Numbers that figures depend on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Subsets of the kernel distance.
    pub kid_subsets: u32,
    /// Images in each.
    pub kid_size: u32,
    /// Chunks of the Inception score.
    pub is_splits: u64,
    /// The neighbour of precision and recall.
    pub pr_k: i64,
}

/// One set of images that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its seeds, or `images`.
    pub name: String,
    /// The seeds of a model's images, as `--seeds` takes them.
    #[serde(default)]
    pub seeds: Option<String>,
    /// Number of images.
    pub images: u64,
    /// Its figures.
    pub figures: Figures,
}

/// A figure over several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The standard deviation over the runs (sample); none of a single one.
    pub std: Option<f64>,
    /// Number of runs.
    pub runs: usize,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count.max(1) as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let std = (count > 1).then(|| (squares / (count - 1) as f64).sqrt());
        Self { mean, std, runs: count }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.std {
            Some(std) => write!(f, "{} ± {}", number(self.mean), number(std)),
            None => f.write_str(&number(self.mean)),
        }
    }
}

/// Five digits, as a person reads them.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        large if large >= 1000.0 => format!("{value:.1}"),
        small if small < 1e-3 => format!("{value:.2e}"),
        _ => format!("{value:.4}"),
    }
}

/// Whether more of a figure is better; none for what is no figure of quality.
fn more_is_better(name: &str) -> Option<bool> {
    match name {
        "fid" | "sfid" | "kid" | "fcd" | "kcd" => Some(false),
        "is" | "precision" | "recall" | "classifier_precision" | "classifier_recall" => Some(true),
        _ => None,
    }
}

impl Report {
    /// A report of `runs`, dated today.
    pub fn new(input: Subject, reference: Option<Subject>, settings: Settings, runs: Vec<Run>) -> Self {
        let names: std::collections::BTreeSet<&String> =
            runs.iter().flat_map(|run| run.figures.keys()).collect();
        let spread = |name: &String| {
            let values: Vec<f64> = runs.iter().filter_map(|run| run.figures.get(name).copied()).collect();
            (name.clone(), Spread::of(&values))
        };
        let summary = names.into_iter().map(spread).collect();
        Self {
            format: FORMAT,
            date: crate::ui::today(),
            input,
            reference,
            judges: Vec::new(),
            settings,
            runs,
            summary,
            warnings: Vec::new(),
        }
    }

    /// Reads what [`Report::write`] wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let place = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("{place}: reading failed"))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{place}: no JSON"))?;
        match value["format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) && value["runs"].is_array() => {}
            _ => bail!("{place}: expected the JSON of `cm eval` in format {FORMAT}"),
        }
        serde_json::from_value(value).with_context(|| format!("{place}: not the JSON of `cm eval`"))
    }

    /// Writes the JSON, and the table beside it.
    pub fn write(&self, path: &Path) -> Result<()> {
        let write = |path: &Path, text: String| {
            cm_model::files::write_atomic(path, |file| std::io::Write::write_all(file, text.as_bytes()))
        };
        write(path, serde_json::to_string_pretty(self)? + "\n")?;
        Ok(write(&path.with_extension("md"), self.table())?)
    }

    /// The figures as a table that reads well as it is and as Markdown.
    pub fn table(&self) -> String {
        let mut text = format!("{}: {}", self.date, self.input.source);
        if let Some(sample) = self.input.sampler.as_ref().or(self.input.sample.as_ref()) {
            let _ = write!(text, " ({sample})");
        }
        let images = self.runs.first().map_or(0, |run| run.images);
        let _ = write!(text, ", {images} images");
        if self.runs.len() > 1 {
            let _ = write!(text, " in each of {} runs, ± standard deviation", self.runs.len());
        }
        if let Some(reference) = &self.reference {
            let of = reference.images.map(|n| format!(" of {n} images")).unwrap_or_default();
            let _ = write!(text, "\nagainst {}{of}", reference.source);
        }
        text.push_str("\n\n");
        let mut rows = vec![["figure".to_owned(), "value".to_owned(), String::new()]];
        for (name, spread) in &self.summary {
            let better = match more_is_better(name) {
                Some(true) => "more is better",
                Some(false) => "less is better",
                None => "over subsets of one run",
            };
            rows.push([name.clone(), spread.to_string(), better.to_owned()]);
        }
        text.push_str(&markdown(&rows));
        for warning in &self.warnings {
            let _ = write!(text, "\nNote: {warning}.\n");
        }
        text
    }
}

/// Rows under a head, their columns aligned.
fn markdown<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for (place, row) in rows.iter().enumerate() {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(text, "| {cell:<width$} ");
        }
        text.push_str("|\n");
        if place == 0 {
            widths.iter().for_each(|width| text.push_str(&format!("|{}", "-".repeat(width + 2))));
            text.push_str("|\n");
        }
    }
    text
}

/// Two evaluations beside each other.
pub fn compare(names: [&str; 2], reports: [&Report; 2]) -> String {
    let [a, b] = reports;
    let mut text = format!("A: {} ({}), {}\n", names[0], a.input.source, a.date);
    let _ = write!(text, "B: {} ({}), {}\n\n", names[1], b.input.source, b.date);
    let head = ["figure", "A", "B", "B − A", "verdict"].map(str::to_owned);
    let mut rows = vec![head];
    for (name, of_a) in &a.summary {
        let (Some(of_b), Some(more)) = (b.summary.get(name), more_is_better(name)) else { continue };
        let gap = of_b.mean - of_a.mean;
        rows.push([
            name.clone(),
            of_a.to_string(),
            of_b.to_string(),
            number(gap),
            verdict(of_a, of_b, more).to_owned(),
        ]);
    }
    if rows.len() == 1 {
        return text + "They have no figure in common.\n";
    }
    text.push_str(&markdown(&rows));
    for difference in differences(a, b) {
        let _ = write!(text, "\nNote: {difference}.\n");
    }
    text
}

/// Which of two figures is the better one, if their gap is more than two standard deviations of it.
fn verdict(a: &Spread, b: &Spread, more: bool) -> &'static str {
    let (Some(of_a), Some(of_b)) = (a.std, b.std) else { return "one run: no spread" };
    let gap = b.mean - a.mean;
    if gap.abs() <= 2.0 * of_a.hypot(of_b) {
        return "unresolved";
    }
    if (gap > 0.0) == more { "B is better" } else { "A is better" }
}

/// Why two evaluations may not be comparable.
fn differences(a: &Report, b: &Report) -> Vec<String> {
    let mut found = Vec::new();
    let same = match (&a.reference, &b.reference) {
        (Some(of_a), Some(of_b)) => of_a.is(of_b),
        (of_a, of_b) => of_a.is_none() && of_b.is_none(),
    };
    if !same {
        found.push("they were compared with different references: the figures do not compare".to_owned());
    }
    if let (Some(of_a), Some(of_b)) = (a.input.digest(), b.input.digest()) {
        let sampler = a.input.sampler == b.input.sampler;
        if of_a == of_b && sampler {
            found.push("both judge the same images, or the same weights by the same sampler".to_owned());
        }
        if of_a != of_b && a.input.source == b.input.source {
            found.push(format!("{} held something else each time", a.input.source));
        }
    }
    for judge in &a.judges {
        let other = b.judges.iter().find(|other| other.name == judge.name);
        if other.is_some_and(|other| other.weights != judge.weights) {
            found.push(format!("their {} has other weights: its figures do not compare", judge.name));
        }
    }
    let images = |report: &Report| report.runs.first().map_or(0, |run| run.images);
    if images(a) != images(b) {
        let counts = format!("{} and {}", images(a), images(b));
        found.push(format!("they are of {counts} images: Fréchet distances fall with the number"));
    }
    if a.settings != b.settings {
        found.push("they have other subsets, chunks or neighbours".to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings { kid_subsets: 100, kid_size: 1000, is_splits: 10, pr_k: 3 };

    fn report(fids: &[f64]) -> Report {
        let subject = |source: &str| Subject {
            source: source.into(),
            sample: None,
            sampler: None,
            data: (source == "digits").then(|| "digest of digits".to_owned()),
            file: None,
            images: Some(100),
        };
        let run = |(place, &fid): (usize, &f64)| Run {
            name: place.to_string(),
            seeds: None,
            images: 100,
            figures: Figures::from([("fid".to_owned(), fid), ("kid_std".to_owned(), 0.1)]),
        };
        let runs = fids.iter().enumerate().map(run).collect();
        Report::new(subject("model"), Some(subject("digits")), SETTINGS, runs)
    }

    #[test]
    fn several_runs_have_mean_and_spread() {
        let report = report(&[1.0, 2.0, 6.0]);
        let fid = report.summary["fid"];
        assert_eq!((fid.mean, fid.runs), (3.0, 3));
        assert!((fid.std.unwrap() - 7f64.sqrt()).abs() < 1e-12);
        assert!(report.table().contains("| 3.0000 ± 2.6458 "), "{}", report.table());
        assert_eq!(Spread::of(&[4.0]), Spread { mean: 4.0, std: None, runs: 1 });
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let report = report(&[1.0, 0.1 + 0.2]);
        report.write(&path).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        assert!(std::fs::read_to_string(folder.path().join("a.md")).unwrap().contains("| fid"));
        for text in ["", "[]", "{\"format\": 1}", "{\"format\": 2, \"runs\": []}"] {
            std::fs::write(&path, text).unwrap();
            assert!(Report::read(&path).unwrap_err().to_string().contains("a.json"), "{text}");
        }
    }

    #[test]
    fn a_gap_counts_where_it_exceeds_two_deviations() {
        let verdicts = |a: &[f64], b: &[f64]| {
            let text = compare(["a", "b"], [&report(a), &report(b)]);
            text.lines().find(|line| line.starts_with("| fid")).unwrap().to_owned()
        };
        assert!(verdicts(&[9.9, 10.1], &[5.0, 5.2]).contains("B is better"));
        assert!(verdicts(&[5.0, 5.2], &[9.9, 10.1]).contains("A is better"));
        assert!(verdicts(&[5.0, 7.0], &[6.0, 8.5]).contains("unresolved"));
        assert!(verdicts(&[5.0], &[9.0]).contains("one run"));
    }

    #[test]
    fn what_does_not_compare_is_said() {
        let (a, mut b) = (report(&[1.0]), report(&[2.0]));
        assert!(!compare(["a", "b"], [&a, &b]).contains("Note"));
        b.runs[0].images = 50;
        b.settings.pr_k = 5;
        b.reference = None;
        let text = compare(["a", "b"], [&a, &b]);
        for words in ["different references", "100 and 50 images", "neighbours"] {
            assert!(text.contains(words), "{text}");
        }
        let noted = |a: &Report, b: &Report, words: &str| compare(["a", "b"], [a, b]).contains(words);
        // A file that was moved is the same, and one that was written over is not.
        let statistics = |source: &str, file: &str| {
            let of = |file: &str| Some(file.to_owned());
            let subject = Subject { source: source.into(), data: None, file: of(file), ..a.input.clone() };
            Report { reference: Some(subject), ..a.clone() }
        };
        let (one, moved, other) =
            (statistics("s.npz", "1"), statistics("t.npz", "1"), statistics("s.npz", "2"));
        assert!(!noted(&one, &moved, "different references"));
        assert!(noted(&one, &other, "different references"));
        let model = |file: &str, sampler: &str| {
            let (file, sampler) = (Some(file.to_owned()), Some(sampler.to_owned()));
            Report { input: Subject { file, sampler, ..a.input.clone() }, ..a.clone() }
        };
        assert!(noted(&model("1", "x"), &model("1", "x"), "the same weights by the same sampler"));
        assert!(!noted(&model("1", "x"), &model("1", "y"), "same weights"));
        assert!(noted(&model("1", "x"), &model("2", "x"), "model held something else"));
        b.summary.clear();
        assert!(compare(["a", "b"], [&a, &b]).contains("no figure in common"));
    }
}
