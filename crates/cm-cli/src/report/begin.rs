//! Whether a folder's report can go on: its figures have to be comparable with those that come.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::plan::Settings;
use super::score::Scorer;
use super::{results, train};

/// What a report was begun with.
const SETTINGS_FILE: &str = "settings.json";
/// The folder of its runs.
pub const RUNS: &str = "runs";

/// Opens the folder of a report: a new one, or one that was begun with the same settings. Of the classifier see [`judge`].
pub fn begin(settings: &Settings, out: &Path) -> Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("{}: creating the folder", out.display()))?;
    let place = out.join(SETTINGS_FILE);
    let Some(found) = results::read::<Settings>(&place)? else { return results::write(&place, settings) };
    let new = Settings { judge: found.judge.clone(), ..settings.clone() };
    if found == new {
        return Ok(());
    }
    let values = |settings: &Settings| serde_json::to_value(settings);
    let (old, new) = (values(&found)?, values(&new)?);
    let changed = old.as_object().into_iter().flatten().filter(|(key, value)| new[key.as_str()] != **value);
    let changed: Vec<String> =
        changed.map(|(key, value)| format!("{key} {value}, now {}", new[key.as_str()])).collect();
    bail!(
        "{}: a report with other settings ({}); repeat its options, or choose another --out",
        place.display(),
        changed.join("; ")
    )
}

/// Notes which classifier scores the runs of `settings`, and refuses another than the one that scored those that are there.
pub fn judge(settings: &mut Settings, out: &Path, scorer: &Scorer) -> Result<()> {
    let found: Option<Settings> = results::read(&out.join(SETTINGS_FILE))?;
    let noted = found.and_then(|found| found.judge);
    let now = scorer.weights();
    check_judge(noted.as_deref(), now, scorer.is_new(), any_finished(&out.join(RUNS)))
        .with_context(|| out.display().to_string())?;
    settings.judge = Some(now.to_owned());
    results::write(&out.join(SETTINGS_FILE), settings)
}

/// Whether the classifier `now` may score beside figures of the one that was `noted`. A report from before that was noted
/// goes on with the classifier that its cache holds; with a new one it is not known whether figures compare.
fn check_judge(noted: Option<&str>, now: &str, is_new: bool, any_finished: bool) -> Result<()> {
    const REST: &str = "put the report's cache/classifier-….safetensors back, or choose another --out";
    let short = |digest: &str| digest.get(..8).unwrap_or(digest).to_owned();
    match noted {
        _ if !any_finished => Ok(()),
        Some(noted) if noted == now => Ok(()),
        Some(noted) => bail!(
            "its finished runs were scored by another classifier ({}…, now {}…); {REST}",
            short(noted),
            short(now)
        ),
        None if is_new => bail!(
            "its finished runs were scored by a classifier that is gone, and whether the new one ({}…) is the same is not \
             known; {REST}",
            short(now)
        ),
        None => Ok(()),
    }
}

/// Whether a run of a report has figures.
fn any_finished(runs: &Path) -> bool {
    let folders =
        |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    folders(runs).flat_map(|trial| folders(&trial)).any(|run| run.join(train::RESULT_FILE).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_two_classifiers_do_not_stand_side_by_side() {
        let line =
            |noted, is_new| format!("{:#}", check_judge(noted, "bbbbbbbbbb", is_new, true).unwrap_err());
        for is_new in [false, true] {
            let changed = line(Some("aaaaaaaaaa"), is_new);
            assert!(changed.contains("aaaaaaaa…, now bbbbbbbb…") && changed.contains("--out"), "{changed}");
            check_judge(Some("bbbbbbbbbb"), "bbbbbbbbbb", is_new, true).unwrap();
            check_judge(Some("aaaaaaaaaa"), "bbbbbbbbbb", is_new, false).unwrap();
        }
        assert!(line(None, true).contains("is gone"));
        check_judge(None, "bbbbbbbbbb", false, true).unwrap();
    }

    #[test]
    fn a_run_with_figures_is_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!any_finished(folder.path()));
        let run = folder.path().join("cd/seed-0");
        std::fs::create_dir_all(&run).unwrap();
        assert!(!any_finished(folder.path()));
        std::fs::write(run.join(train::RESULT_FILE), "{}").unwrap();
        assert!(any_finished(folder.path()));
    }
}
