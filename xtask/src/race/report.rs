//! The ratios of a race: a line each, JSON, a table, and the table's place in docs/performance.md.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Race;
use super::rows::{Measure, Row};
use super::side::Side;

/// One ratio of this project by one peer.
#[derive(Clone, Debug)]
pub struct Entry {
    pub measure: Measure,
    pub peer: String,
    /// Median over the rounds, with the lowest and the highest.
    pub ratio: [f64; 3],
    pub target: Option<f64>,
    /// Medians, with dtypes.
    ours: (f64, String),
    theirs: (f64, String),
    unit: &'static str,
    /// What else is to be said of it.
    pub note: Option<String>,
}

impl Entry {
    /// The ratio of side `own` by side `peer`, whose speeds in each round are given.
    pub fn of_speed(
        row: &Row,
        sides: &[Side],
        own: usize,
        peer: usize,
        rates: &[Vec<f64>],
        target: Option<f64>,
    ) -> Self {
        let names = [&sides[own], &sides[peer]].map(|side| side.dtype.clone());
        Self::of_rates(row.unit, &sides[peer].name, names, [&rates[own], &rates[peer]], target)
    }

    /// The ratio of speeds that were measured in turns.
    pub fn of_rates(
        unit: &'static str,
        peer: &str,
        [ours, theirs]: [String; 2],
        rates: [&[f64]; 2],
        target: Option<f64>,
    ) -> Self {
        let ratios: Vec<f64> = std::iter::zip(rates[0], rates[1]).map(|(a, b)| a / b).collect();
        Self {
            measure: Measure::Speed,
            peer: peer.to_owned(),
            ratio: spread(&ratios),
            target,
            ours: (spread(rates[0])[0], ours),
            theirs: (spread(rates[1])[0], theirs),
            unit,
            note: None,
        }
    }

    /// The ratio of two peaks in bytes.
    pub fn of_memory(peer: &str, dtype: &str, (ours, theirs): (f64, f64), target: Option<f64>) -> Self {
        let of_peer = if peer == "a" { "fp32" } else { dtype };
        Self {
            measure: Measure::Memory,
            peer: peer.to_owned(),
            ratio: [ours / theirs; 3],
            target,
            ours: (ours / 1e6, dtype.to_owned()),
            theirs: (theirs / 1e6, of_peer.to_owned()),
            unit: "MB",
            note: None,
        }
    }

    fn holds(&self) -> Option<bool> {
        self.target.map(|target| match self.measure {
            Measure::Speed => self.ratio[0] >= target,
            Measure::Memory => self.ratio[0] <= target,
        })
    }

    fn verdict(&self) -> String {
        let word = match self.holds() {
            Some(true) => "holds",
            Some(false) => "misses",
            None => "reported",
        };
        self.note.as_ref().map_or(word.to_owned(), |note| format!("{word}; {note}"))
    }

    fn aim(&self) -> String {
        let sign = if self.measure == Measure::Speed { '≥' } else { '≤' };
        self.target.map_or("–".to_owned(), |target| format!("{sign} {target:.2}"))
    }

    fn spread(&self) -> String {
        let [_, low, high] = self.ratio;
        if low == high { String::new() } else { format!(" ({low:.2}–{high:.2})") }
    }

    fn what(&self) -> &'static str {
        if self.measure == Measure::Memory { "peak memory of " } else { "" }
    }

    /// A line for people.
    fn line(&self, row: &str) -> String {
        let side = |(value, dtype): &(f64, String)| format!("{} {} {dtype}", shown(*value), self.unit);
        format!(
            "{:<28} {}: {:>6.2} ×{:<14} target {:<7} {:<8} ours {}, theirs {}",
            format!("{}{row}", self.what()),
            self.peer,
            self.ratio[0],
            self.spread(),
            self.aim(),
            self.verdict(),
            side(&self.ours),
            side(&self.theirs)
        )
    }

    fn cells(&self, about: &str) -> String {
        let side = |(value, dtype): &(f64, String)| format!("{} {} ({dtype})", shown(*value), self.unit);
        format!(
            "| {}{about} | {} | {} | {} | {:.2}{} | {} | {} |",
            self.what(),
            self.peer,
            side(&self.ours),
            side(&self.theirs),
            self.ratio[0],
            self.spread(),
            self.aim(),
            self.verdict()
        )
    }

    fn json(&self, row: &str) -> Value {
        json!({
            "row": row,
            "measure": if self.measure == Measure::Speed { "speed" } else { "memory" },
            "against": self.peer,
            "note": self.note,
            "ratio": self.ratio[0],
            "lowest": self.ratio[1],
            "highest": self.ratio[2],
            "target": self.target,
            "holds": self.holds(),
            "unit": self.unit,
            "ours": { "value": self.ours.0, "dtype": self.ours.1 },
            "theirs": { "value": self.theirs.0, "dtype": self.theirs.1 },
        })
    }
}

/// Three digits that count.
fn shown(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v if v >= 1.0 => format!("{v:.2}"),
        v => format!("{v:.3}"),
    }
}

/// Median, lowest and highest.
pub fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(low), Some(high)) = (sorted.first(), sorted.last()) else { return [f64::NAN; 3] };
    let middle = sorted.len() / 2;
    let median =
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    [median, *low, *high]
}

/// What became of a row.
#[derive(Clone, Debug)]
pub enum Standing {
    Measured(Vec<Entry>),
    /// It should have been measured and was not.
    Missing(String),
    NeedsGpu,
}

/// A row and what became of it.
#[derive(Clone, Debug)]
pub struct Reported {
    pub row: &'static str,
    pub about: &'static str,
    pub standing: Standing,
}

/// Everything that a race found.
pub struct Report {
    rows: Vec<Reported>,
    about: Vec<(&'static str, String)>,
    size: &'static str,
    device: String,
}

impl Report {
    pub fn begin(race: &Race) -> Self {
        let args = &race.args;
        let about = vec![
            ("size", args.size.name().to_owned()),
            ("device", args.device.clone()),
            ("processor", processor()),
            ("threads", race.threads.to_string()),
            ("pairs", args.pairs.to_string()),
            ("load at the start", load()),
        ];
        let device = if race.has_gpu() { "cuda" } else { "cpu" };
        Self { rows: Vec::new(), about, size: args.size.name(), device: device.to_owned() }
    }

    pub fn end(&mut self) {
        self.about.push(("load at the end", load()));
    }

    /// Takes a row in and prints its lines.
    pub fn add(&mut self, reported: Reported) {
        let name = reported.row;
        match &reported.standing {
            Standing::Measured(entries) => entries.iter().for_each(|entry| println!("{}", entry.line(name))),
            Standing::Missing(why) => println!("{name:<28} MISSING  {why}"),
            Standing::NeedsGpu => println!("{name:<28} needs a GPU"),
        }
        self.rows.push(reported);
    }

    /// Whether everything that could be measured was, and is where it should be.
    pub fn holds(&self) -> bool {
        self.rows.iter().all(|row| match &row.standing {
            Standing::Measured(entries) => entries.iter().all(|entry| entry.holds() != Some(false)),
            Standing::Missing(_) => false,
            Standing::NeedsGpu => true,
        })
    }

    pub fn write(&self, out: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = out.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            println!("{}", path.display());
            anyhow::Ok(())
        };
        write("race.json", format!("{:#}\n", self.json()))?;
        write("race.md", self.table())
    }

    fn json(&self) -> Value {
        let mut rows = Vec::new();
        for Reported { row, standing, .. } in &self.rows {
            match standing {
                Standing::Measured(entries) => rows.extend(entries.iter().map(|entry| entry.json(row))),
                Standing::Missing(why) => rows.push(json!({ "row": row, "missing": why })),
                Standing::NeedsGpu => rows.push(json!({ "row": row, "needs": "gpu" })),
            }
        }
        let about: serde_json::Map<String, Value> =
            self.about.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        json!({ "about": about, "rows": rows, "holds": self.holds() })
    }

    fn table(&self) -> String {
        let about: Vec<String> = self.about.iter().map(|(key, value)| format!("{key} {value}")).collect();
        let mut text = format!("{}.\n\n", about.join(", "));
        text += "| work | against | ours | theirs | ratio | target | |\n| --- | --- | --- | --- | --- | --- | --- |\n";
        for Reported { about, standing, .. } in &self.rows {
            match standing {
                Standing::Measured(entries) => {
                    entries.iter().for_each(|entry| text += &format!("{}\n", entry.cells(about)));
                }
                Standing::Missing(why) => {
                    let why = why.replace('|', "/");
                    let _ = writeln!(text, "| {about} | | | | | | missing: {why} |");
                }
                Standing::NeedsGpu => {
                    let _ = writeln!(text, "| {about} | | | | | | needs a GPU |");
                }
            }
        }
        text
    }

    /// Puts the table into its block of `page`.
    pub fn publish(&self, page: &Path) -> Result<()> {
        let name = format!("race {} {}", self.size, self.device);
        let text = fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        let text = replaced(&text, &name, &self.table()).with_context(|| page.display().to_string())?;
        fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))?;
        println!("published into {}", page.display());
        Ok(())
    }
}

/// `text` with another content of the block `name`.
fn replaced(text: &str, name: &str, content: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- end of {name} -->"));
    let block = text.split_once(&begin).and_then(|(head, rest)| Some((head, rest.split_once(&end)?.1)));
    let Some((head, tail)) = block else { bail!("no block between '{begin}' and '{end}' to replace") };
    Ok(format!("{head}{begin}\n{content}{end}{tail}"))
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let has = |flag: &str| value("flags").is_some_and(|flags| flags.split(' ').any(|f| f == flag));
    let name = value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let extra: Vec<&str> = ["avx512_bf16", "amx_bf16"].into_iter().filter(|flag| has(flag)).collect();
    if extra.is_empty() { name } else { format!("{name} with {}", extra.join(" and ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(rates: [&[f64]; 2], target: Option<f64>) -> Entry {
        let dtypes = ["bf16".to_owned(), "fp32".to_owned()];
        Entry::of_rates("img/s", "a", dtypes, rates, target)
    }

    #[test]
    fn a_ratio_is_the_median_of_its_rounds() {
        // Round by round 2, 3 and 1: medians of the speeds alone would say 20/10.
        let entry = entry([&[20.0, 30.0, 5.0], &[10.0, 10.0, 5.0]], Some(2.0));
        assert_eq!(entry.ratio, [2.0, 1.0, 3.0]);
        assert_eq!(entry.holds(), Some(true));
        assert!(entry.line("ct").contains("2.00 × (1.00–3.00)") && entry.line("ct").contains("≥ 2.00"));
        assert_eq!(spread(&[4.0, 1.0])[0], 2.5);
    }

    #[test]
    fn memory_is_to_be_low() {
        let held = |ours: f64| Entry::of_memory("b", "bf16", (ours, 100.0), Some(1.0)).holds();
        assert_eq!((held(90.0), held(110.0)), (Some(true), Some(false)));
    }

    #[test]
    fn a_race_holds_when_all_that_can_be_measured_does() {
        let report = |standing: Standing| Report {
            rows: vec![Reported { row: "ct", about: "one CT step", standing }],
            about: Vec::new(),
            size: "tiny",
            device: "cpu".to_owned(),
        };
        let measured = |target| Standing::Measured(vec![entry([&[2.0], &[1.0]], target)]);
        assert!(report(measured(Some(2.0))).holds() && report(measured(None)).holds());
        assert!(!report(measured(Some(2.1))).holds());
        assert!(report(Standing::NeedsGpu).holds());
        assert!(!report(Standing::Missing("not built".to_owned())).holds());
        assert!(report(measured(Some(2.0))).table().contains("| one CT step | a | 2.00 img/s (bf16) |"));
    }

    #[test]
    fn only_the_block_changes() {
        let text = "a\n<!-- race tiny cpu -->\nold\n<!-- end of race tiny cpu -->\nb\n";
        assert_eq!(replaced(text, "race tiny cpu", "new\n").unwrap(), text.replace("old", "new"));
        assert!(replaced(text, "race cifar10 cpu", "new").is_err());
    }
}
