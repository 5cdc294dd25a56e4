//! What is measured, how closely sides have to agree, and what is aimed at.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Rounds of a ratio that is published.
pub const PAIRS: usize = 7;
/// The row that starts processes of its own.
pub const COLD_START: &str = "cold-start";
/// The row of lower precision, whatever the peers compute in.
pub const REDUCED: &str = "reduced";

/// Sizes of the race.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// The network of the demo on 8×8 digits
    Tiny,
    /// EDM's DDPM++ and NCSN++ for CIFAR-10, 56 million parameters
    Cifar10,
    /// The U-Net of ImageNet-64, 296 million parameters: on a CPU sampling alone
    Imagenet64,
}

impl Size {
    pub fn name(self) -> &'static str {
        match self {
            Size::Tiny => "tiny",
            Size::Cifar10 => "cifar10",
            Size::Imagenet64 => "imagenet64",
        }
    }
}

/// One kind of work.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    pub name: &'static str,
    pub about: &'static str,
    /// What is counted a second.
    pub unit: &'static str,
    /// The peers that can do it.
    pub peers: &'static [&'static str],
    pub measures_memory: bool,
    /// Whether a network computes, and does it in a dtype of choice.
    pub has_network: bool,
}

impl Row {
    /// The row whose work it is, and whose files it reads.
    pub fn work(&self) -> &'static str {
        match self.name {
            COLD_START => "sample-1",
            REDUCED => "sample-16",
            name => name,
        }
    }

    fn trains(&self) -> bool {
        self.measures_memory
    }
}

const fn training(name: &'static str, about: &'static str) -> Row {
    Row { name, about, unit: "img/s", peers: &["a", "b", "c"], measures_memory: true, has_network: true }
}

const fn sampling(name: &'static str, about: &'static str) -> Row {
    Row { name, about, unit: "img/s", peers: &["a", "b", "c"], measures_memory: false, has_network: true }
}

const fn part(name: &'static str, about: &'static str, unit: &'static str) -> Row {
    Row { name, about, unit, peers: &["a", "b"], measures_memory: false, has_network: false }
}

const fn with_diffusers(name: &'static str, about: &'static str) -> Row {
    Row { peers: &["a", "b", "c", "d"], ..sampling(name, about) }
}

/// Every row, in the order of the table.
const ROWS: [Row; 17] = [
    training("ct", "one CT step"),
    training("cd-heun", "one CD step with Heun"),
    training("ect", "one ECT step"),
    training("edm", "one EDM step"),
    sampling("sample-1", "one-step sampling, batch 1"),
    sampling("sample-16", "one-step sampling, batch 16"),
    sampling("sample-64", "one-step sampling, batch 64"),
    sampling(REDUCED, "one-step sampling in bfloat16, weights packed once, batch 16"),
    with_diffusers("adm-1", "one-step sampling of an ADM U-Net, batch 1"),
    with_diffusers("adm-16", "one-step sampling of an ADM U-Net, batch 16"),
    sampling("heun-18", "EDM Heun, 18 steps"),
    part("update", "optimiser and all averages", "steps/s"),
    part("data", "data path, PNGs to batches", "img/s"),
    part("fid", "FID statistics of 2,000 images", "img/s"),
    part(COLD_START, "process start to first PNG", "starts/s"),
    part("checkpoint-save", "checkpoint save", "times/s"),
    part("checkpoint-load", "checkpoint load", "times/s"),
];

/// What is aimed at on a GPU, for the table of a machine without one.
pub const ON_A_GPU: [(&str, &str); 2] = [
    ("gpu-training", "training step, GPU"),
    ("gpu-sample-1", "one-step sampling, batch 1, GPU, graph captured"),
];

/// What a row is, in words.
pub fn about(name: &str) -> &'static str {
    let known = ROWS.iter().map(|row| (row.name, row.about)).chain(ON_A_GPU);
    known.into_iter().find(|(row, _)| *row == name).map_or("unknown", |(_, about)| about)
}

/// Where a row stands in the table.
pub fn place(name: &str) -> usize {
    let mut names = ROWS.iter().map(|row| row.name).chain(ON_A_GPU.map(|(row, _)| row));
    names.position(|row| row == name).unwrap_or(usize::MAX)
}

/// Whether a row of this size is for a GPU: the state of training of 296 million parameters takes 10 GB, and each side has
/// its own.
pub fn needs_gpu(size: Size, row: &Row) -> bool {
    let has_state = row.trains() || row.name == "update" || row.name.starts_with("checkpoint-");
    size == Size::Imagenet64 && has_state
}

/// A row that a size does not have, as there is no experiment.
fn is_absent(size: Size, row: &str) -> bool {
    size == Size::Imagenet64 && row == "ect"
}

/// The rows of a size that `names` asks for; all of them if it is empty.
pub fn chosen(size: Size, names: &[String]) -> Result<Vec<Row>> {
    if let Some(wrong) = names.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        let all: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("--rows {wrong}: the rows are {}", all.join(", "));
    }
    if let Some(absent) = names.iter().find(|name| is_absent(size, name)) {
        bail!("--rows {absent}: there is no such row at size {}", size.name());
    }
    let named = |row: &Row| names.is_empty() || names.iter().any(|name| name == row.name);
    let asked = |row: &Row| named(row) && !is_absent(size, row.name);
    Ok(ROWS.into_iter().filter(asked).collect())
}

/// What a ratio is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// Our speed by theirs: high is good.
    Speed,
    /// Our peak memory by theirs: low is good.
    Memory,
}

/// The ratio aimed at: at least this for speed, at most this for memory; none for what is only reported.
///
/// Where nothing else is said, the aim is to be ahead of PyTorch as published.
pub fn target(size: Size, gpu: bool, row: &Row, measure: Measure, peer: &str) -> Option<f64> {
    let both = |a: f64, b: f64| match peer {
        "a" => Some(a),
        "b" => Some(b),
        _ => None,
    };
    let ahead = (peer == "a").then_some(1.0);
    match (measure, size, row.name) {
        (Measure::Memory, Size::Cifar10, _) => both(0.8, 1.0),
        (Measure::Memory, _, _) => None,
        (_, Size::Cifar10, _) if row.trains() && gpu => both(2.5, 1.05),
        (_, Size::Cifar10, _) if row.trains() => both(2.0, 1.02),
        (_, Size::Tiny, _) if row.trains() && !gpu => both(2.0, 1.3),
        (_, Size::Cifar10, "sample-1") if gpu => both(4.0, 2.0),
        (_, Size::Cifar10, "sample-1") => both(1.7, 1.05),
        (_, Size::Cifar10, "sample-16") if !gpu => both(2.1, 1.05),
        (_, Size::Cifar10, REDUCED) if !gpu => both(3.0, 1.4),
        (_, Size::Cifar10, "update") => both(5.0, 1.5),
        (_, Size::Cifar10, COLD_START) if !gpu => both(3.0, 3.0),
        (_, Size::Tiny, COLD_START) if !gpu => both(5.0, 5.0),
        _ => ahead,
    }
}

/// How closely the numbers of two sides have to agree.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Of losses, norms and figures, relative.
    number: f64,
    /// Of the way that an average went, relative. In some dozens of updates it goes so little that the rounding of
    /// βθ⁻ + (1 − β)θ shows, which θ⁻ + (1 − β)(θ − θ⁻) does not have: 0.8 % of the way at β = 0.9999.
    average: f64,
    /// Root mean square between samples, as a share of the reference's.
    samples: f64,
}

impl Check {
    pub const FLOAT32: Self = Self { number: 1e-4, average: 2e-2, samples: 1e-4 };
    /// Eight bits of mantissa in every layer.
    pub const BFLOAT16: Self = Self { number: 5e-2, average: 5e-2, samples: 5e-2 };

    /// Compares what a side computed with what this project computes in float32.
    pub fn compare(&self, exact: &Value, got: &Value) -> Result<()> {
        let (Some(exact), Some(got)) = (exact.as_object(), got.as_object()) else {
            bail!("no numbers to compare");
        };
        if exact.len() != got.len() {
            bail!("{got:?} instead of {exact:?}");
        }
        for (key, want) in exact {
            let want = want.as_f64().with_context(|| format!("{key} is not a finite number"))?;
            let got = got.get(key).and_then(Value::as_f64).with_context(|| format!("{key} is missing"))?;
            let (difference, tolerance) = match key.as_str() {
                "distance" => (got, self.samples),
                "average" => ((got - want).abs() / want.abs().max(1e-12), self.average),
                _ => ((got - want).abs() / want.abs().max(1e-12), self.number),
            };
            if difference > tolerance {
                bail!("{key} = {got}, expected {want} (tolerance {tolerance})");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sides_that_differ_are_found() {
        let exact = json!({ "loss": 2.0, "moved": 1e-3 });
        let close = json!({ "loss": 2.0001, "moved": 1.00005e-3 });
        assert!(Check::FLOAT32.compare(&exact, &close).is_ok());
        let off = json!({ "loss": 2.06, "moved": 1e-3 });
        assert!(Check::FLOAT32.compare(&exact, &off).unwrap_err().to_string().contains("loss = 2.06"));
        assert!(Check::BFLOAT16.compare(&exact, &off).is_ok());
        let went = |average: f64| json!({ "average": average });
        assert!(Check::FLOAT32.compare(&went(1e-3), &went(1.01e-3)).is_ok());
        assert!(Check::FLOAT32.compare(&went(1e-3), &went(1.03e-3)).is_err());
        for wrong in [json!({ "loss": 2.0 }), json!({ "loss": 2.0, "moved": null }), json!(1)] {
            assert!(Check::BFLOAT16.compare(&exact, &wrong).is_err(), "{wrong}");
        }
        let exact = json!({ "distance": 0.0 });
        assert!(Check::FLOAT32.compare(&exact, &json!({ "distance": 1e-6 })).is_ok());
        assert!(Check::FLOAT32.compare(&exact, &json!({ "distance": 0.01 })).is_err());
    }

    #[test]
    fn every_row_has_an_aim_against_the_published_form() {
        for row in chosen(Size::Cifar10, &[]).unwrap() {
            for size in [Size::Tiny, Size::Cifar10] {
                assert!(target(size, false, &row, Measure::Speed, "a").is_some(), "{}", row.name);
                assert_eq!(target(size, false, &row, Measure::Speed, "c"), None);
            }
        }
        let ct = chosen(Size::Tiny, &["ct".to_owned()]).unwrap()[0];
        assert_eq!(target(Size::Tiny, false, &ct, Measure::Speed, "b"), Some(1.3));
        assert_eq!(target(Size::Cifar10, true, &ct, Measure::Speed, "a"), Some(2.5));
        assert_eq!(target(Size::Cifar10, false, &ct, Measure::Memory, "a"), Some(0.8));
        for wrong in ["cct", "ect"] {
            assert!(chosen(Size::Imagenet64, &[wrong.to_owned()]).unwrap_err().to_string().contains(wrong));
        }
    }
}
