//! `--publish`: a report as docs/results-DATA.md, its pictures beside the others.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_model::files::write_atomic;

use super::page::{END_OF_NOTES, NOTES, page};
use super::plots::Drawn;
use super::results::Results;

const DOCS: &str = "docs";
const PICTURES: &str = "pictures";

/// The page of a data set, in the checkout that the command is called in.
fn place(data: &str) -> PathBuf {
    Path::new(DOCS).join(format!("results-{data}.md"))
}

/// Checks, before hours are spent, that this is the root of a checkout.
pub fn check() -> Result<()> {
    if !Path::new(DOCS).join("results.md").is_file() {
        bail!("{DOCS}/results.md: not found; --publish is for the root of a checkout of consistency-rs");
    }
    Ok(())
}

/// Writes the page and copies the pictures in `out`. What people wrote between the marks of the notes stays.
pub fn publish(results: &Results, drawn: &[Drawn], out: &Path) -> Result<()> {
    check()?;
    let data = &results.settings.data;
    let to = place(data);
    let old = match std::fs::read_to_string(&to) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        old => old.with_context(|| format!("{}: reading failed", to.display()))?,
    };
    let name = |picture: &str| format!("report-{data}-{picture}.png");
    for (picture, _) in drawn {
        let from = out.join(format!("{picture}.png"));
        let bytes = std::fs::read(&from).with_context(|| from.display().to_string())?;
        let copy = Path::new(DOCS).join(PICTURES).join(name(picture));
        write_atomic(&copy, |file| std::io::Write::write_all(file, &bytes))?;
    }
    let notes = notes(&old).unwrap_or("\n");
    let text = page(results, drawn, Some(notes), &|picture| format!("{PICTURES}/{}", name(picture)));
    write_atomic(&to, |file| std::io::Write::write_all(file, text.as_bytes()))?;
    println!("published into {} and {DOCS}/{PICTURES}/", to.display());
    Ok(())
}

/// What stands between the marks of the notes.
fn notes(page: &str) -> Option<&str> {
    let (_, rest) = page.split_once(NOTES)?;
    let (notes, _) = rest.split_once(END_OF_NOTES)?;
    Some(notes.strip_prefix('\n').unwrap_or(notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_stay_as_they_are() {
        let page = format!("a\n{NOTES}\n\nWhy.\n\n{END_OF_NOTES}\nb");
        assert_eq!(notes(&page), Some("\nWhy.\n\n"));
        assert_eq!(notes("a"), None);
    }
}
