//! `--publish`: the demo's figures into the marked block of docs/results.md, its pictures beside it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_eval::Figures;
use cm_model::files::write_atomic;

use super::summary::Summary;
use crate::ui::{clock, today};

const RESULTS: &str = "docs/results.md";
const PICTURES: &str = "docs/pictures";

fn marks(preset: &str) -> (String, String) {
    (format!("<!-- demo {preset} -->"), format!("<!-- end of demo {preset} -->"))
}

/// Checks, before hours are spent, that there is a block to replace.
pub fn check(preset: &str) -> Result<()> {
    read(preset).map(drop)
}

fn read(preset: &str) -> Result<String> {
    let (begin, end) = marks(preset);
    let text = std::fs::read_to_string(RESULTS)
        .with_context(|| format!("{RESULTS}: --publish is for the root of a checkout of consistency-rs"))?;
    match (text.find(&begin), text.find(&end)) {
        (Some(from), Some(to)) if from < to => Ok(text),
        _ => bail!("{RESULTS}: no block between '{begin}' and '{end}' to replace"),
    }
}

/// Replaces the block of the summary's preset and copies the pictures in `out`.
pub fn publish(summary: &Summary, out: &Path) -> Result<()> {
    let pictures: Vec<_> = PICTURES_OF_A_DEMO
        .iter()
        .map(|(name, what)| (out.join(format!("{name}.png")), *name, *what))
        .collect();
    let has_two = summary.figures.two_step.is_some();
    let shown: Vec<_> = pictures.into_iter().filter(|(_, name, _)| has_two || *name != "two-step").collect();
    publish_block(&summary.preset, &block(summary)?, &shown)
}

const PICTURES_OF_A_DEMO: [(&str, &str); 4] = [
    ("one-step", "One step"),
    ("two-step", "Two steps"),
    ("training", "As training went"),
    ("loss", "The loss"),
];

/// Replaces a block, and copies pictures (file, name, what it shows), which stand below the text.
pub fn publish_block(preset: &str, text: &str, pictures: &[(PathBuf, &str, &str)]) -> Result<()> {
    let results = read(preset)?;
    let mut block = text.to_owned();
    for (from, name, what) in pictures {
        let bytes = std::fs::read(from).with_context(|| from.display().to_string())?;
        let to = Path::new(PICTURES).join(format!("{preset}-{name}.png"));
        write_atomic(&to, |file| std::io::Write::write_all(file, &bytes))?;
        writeln!(block, "\n![{what}](pictures/{preset}-{name}.png)")?;
    }
    let results = replaced(&results, preset, &block);
    write_atomic(Path::new(RESULTS), |file| std::io::Write::write_all(file, results.as_bytes()))?;
    println!("published {preset} into {RESULTS} and {PICTURES}/");
    Ok(())
}

fn replaced(text: &str, preset: &str, block: &str) -> String {
    let (begin, end) = marks(preset);
    let (head, rest) = text.split_once(&begin).unwrap_or((text, ""));
    let tail = rest.split_once(&end).map_or("", |(_, tail)| tail);
    format!("{head}{begin}\n{block}{end}{tail}")
}

fn block(summary: &Summary) -> Result<String> {
    let speed = &summary.speed;
    let mut text = String::new();
    writeln!(
        text,
        "{} on {} ({} threads), seed {}: {} parameters, {} steps in {} ({:.2} steps/s, {:.0} images/s), {} with \
         measuring.\n",
        today(),
        summary.device,
        summary.threads,
        summary.seed,
        summary.parameters,
        speed.steps,
        clock(speed.train_seconds),
        speed.steps_per_second,
        speed.images_per_second,
        clock(speed.total_seconds)
    )?;
    writeln!(text, "| | confident | near data | class entropy | nearest |\n| --- | --- | --- | --- | --- |")?;
    for (name, row) in summary.rows() {
        writeln!(text, "{}", row_of(&name, row))?;
    }
    if let Some(teacher) = &summary.teacher {
        writeln!(
            text,
            "\nIts teacher was trained before that: {} steps in {}.",
            teacher.steps,
            clock(teacher.total_seconds)
        )?;
    }
    Ok(text)
}

fn row_of(name: &str, row: &Figures) -> String {
    let optional = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.3}"));
    format!(
        "| {name} | {} | {:.3} | {} | {:.3} |",
        optional(row.confident_share),
        row.near_share,
        optional(row.class_entropy),
        row.nearest_distance
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_marked_block_changes() {
        let text =
            "a\n<!-- demo x -->\nold\n<!-- end of demo x -->\nb\n<!-- demo y -->\n<!-- end of demo y -->\n";
        let new = replaced(text, "x", "new\n");
        assert_eq!(new, text.replace("old\n", "new\n"));
        assert_eq!(replaced(&new, "x", "new\n"), new);
    }
}
