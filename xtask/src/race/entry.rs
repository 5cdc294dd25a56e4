//! One ratio of this project by one peer.

use serde::{Deserialize, Serialize};

use super::rows::{Measure, Row};
use super::side::Side;

/// One ratio of this project by one peer, as it is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub measure: Measure,
    #[serde(rename = "against")]
    pub peer: String,
    /// Median over the rounds.
    pub ratio: f64,
    pub lowest: f64,
    pub highest: f64,
    pub target: Option<f64>,
    pub holds: Option<bool>,
    pub unit: String,
    pub ours: Figure,
    pub theirs: Figure,
    /// What else is to be said of it.
    pub note: Option<String>,
}

/// The median of one side, and what it computes in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    pub value: f64,
    pub dtype: String,
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
        unit: &str,
        peer: &str,
        dtypes: [String; 2],
        rates: [&[f64]; 2],
        target: Option<f64>,
    ) -> Self {
        let ratios: Vec<f64> = std::iter::zip(rates[0], rates[1]).map(|(a, b)| a / b).collect();
        let values = rates.map(|rates| spread(rates)[0]);
        Self::new(Measure::Speed, peer, spread(&ratios), target, values, dtypes, unit)
    }

    /// The ratio of two peaks in bytes, each with what its process held before it had anything to do.
    pub fn of_memory(peer: &str, dtypes: [String; 2], peaks: [[f64; 2]; 2], target: Option<f64>) -> Self {
        let [ours, theirs] = peaks.map(|[peak, _]| peak / 1e6);
        let [our_base, their_base] = peaks.map(|[_, base]| base / 1e6);
        let alone = (ours - our_base) / (theirs - their_base);
        let ratio = [ours / theirs; 3];
        let entry = Self::new(Measure::Memory, peer, ratio, target, [ours, theirs], dtypes, "MB");
        let note = format!("{alone:.2} without the {our_base:.0} and {their_base:.0} MB of idle processes");
        Self { note: (their_base > 0.0).then_some(note), ..entry }
    }

    fn new(
        measure: Measure,
        peer: &str,
        [ratio, lowest, highest]: [f64; 3],
        target: Option<f64>,
        values: [f64; 2],
        dtypes: [String; 2],
        unit: &str,
    ) -> Self {
        let holds = target.map(|target| match measure {
            Measure::Speed => ratio >= target,
            Measure::Memory => ratio <= target,
        });
        let [ours, theirs] = dtypes;
        Self {
            measure,
            peer: peer.to_owned(),
            ratio,
            lowest,
            highest,
            target,
            holds,
            unit: unit.to_owned(),
            ours: Figure { value: values[0], dtype: ours },
            theirs: Figure { value: values[1], dtype: theirs },
            note: None,
        }
    }

    fn verdict(&self) -> String {
        let word = match self.holds {
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
        if self.lowest == self.highest {
            return String::new();
        }
        format!(" ({:.2}–{:.2})", self.lowest, self.highest)
    }

    fn what(&self) -> &'static str {
        if self.measure == Measure::Memory { "peak memory of " } else { "" }
    }

    /// A line for people.
    pub fn line(&self, row: &str) -> String {
        let side = |figure: &Figure| format!("{} {} {}", shown(figure.value), self.unit, figure.dtype);
        format!(
            "{:<28} {}: {:>6.2} ×{:<14} target {:<7} {:<8} ours {}, theirs {}",
            format!("{}{row}", self.what()),
            self.peer,
            self.ratio,
            self.spread(),
            self.aim(),
            self.verdict(),
            side(&self.ours),
            side(&self.theirs)
        )
    }

    /// The cells of a table's row.
    pub fn cells(&self, about: &str) -> String {
        let side = |figure: &Figure| format!("{} {} ({})", shown(figure.value), self.unit, figure.dtype);
        format!(
            "{}{about} | {} | {} | {} | {:.2}{} | {} | {}",
            self.what(),
            self.peer,
            side(&self.ours),
            side(&self.theirs),
            self.ratio,
            self.spread(),
            self.aim(),
            self.verdict()
        )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_its_rounds() {
        // Round by round 2, 3 and 1: medians of the speeds alone would say 20/10.
        let dtypes = ["bf16".to_owned(), "fp32".to_owned()];
        let rates: [&[f64]; 2] = [&[20.0, 30.0, 5.0], &[10.0, 10.0, 5.0]];
        let entry = Entry::of_rates("img/s", "a", dtypes, rates, Some(2.0));
        assert_eq!([entry.ratio, entry.lowest, entry.highest], [2.0, 1.0, 3.0]);
        assert_eq!(entry.holds, Some(true));
        assert!(entry.line("ct").contains("2.00 × (1.00–3.00)") && entry.line("ct").contains("≥ 2.00"));
        assert_eq!(spread(&[4.0, 1.0])[0], 2.5);
    }

    #[test]
    fn memory_is_to_be_low() {
        let dtypes = || ["bf16".to_owned(), "bf16".to_owned()];
        let entry = |ours: f64| Entry::of_memory("b", dtypes(), [[ours, 1e7], [1e8, 5e7]], Some(1.0));
        assert_eq!((entry(9e7).holds, entry(1.1e8).holds), (Some(true), Some(false)));
        assert!(entry(6e7).verdict().ends_with("1.00 without the 10 and 50 MB of idle processes"));
    }
}
