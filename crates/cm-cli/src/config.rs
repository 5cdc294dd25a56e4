//! Experiment files: where they come from, how `--set` changes them, and errors that name file, key and value.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// A name and the text of its file, for each experiment in `configs/`.
macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../configs/", $name, ".toml")))),*]
    };
}

/// The experiments that are built into the command, so that `--config digits-ct` works from any folder: by data set,
/// and teachers before their students.
pub const PRESETS: &[(&str, &str)] = presets![
    "digits-edm",
    "digits-cd",
    "digits-ct",
    "digits-ict",
    "digits-ect",
    "digits-pd",
    "emoji-edm",
    "emoji-cd",
    "emoji-ct",
    "emoji-ict",
    "emoji-ect",
    "emoji-pd",
    "emoji-gallery-edm",
    "emoji-gallery",
    "fashion-edm",
    "fashion-cd",
    "fashion-ct",
    "fashion-ict",
    "fashion-ect",
    "fashion-pd",
    "cifar10-edm",
    "cifar10-edm-released",
    "cifar10-edm-ddpmpp",
    "cifar10-edm-cond",
    "cifar10-cd",
    "cifar10-cd-l1",
    "cifar10-cd-l2",
    "cifar10-pd",
    "cifar10-ct",
    "cifar10-ct-released",
    "cifar10-ict",
    "cifar10-ect",
    "cifar10-ect-1hour",
    "imagenet64-edm",
    "imagenet64-cd",
    "imagenet64-cd-released",
    "imagenet64-cd-l2",
    "imagenet64-ct",
    "imagenet64-ct-released",
    "lsun-bedroom256-edm",
    "lsun-bedroom256-cd",
    "lsun-bedroom256-cd-released",
    "lsun-bedroom256-cd-l2",
    "lsun-bedroom256-ct",
    "lsun-bedroom256-ct-released",
    "lsun-cat256-edm",
    "lsun-cat256-cd",
    "lsun-cat256-cd-released",
    "lsun-cat256-cd-l2",
    "lsun-cat256-ct",
    "lsun-cat256-ct-released",
];

/// The text of an experiment and what to call it in errors.
#[derive(Debug, Clone)]
pub struct Source {
    /// File name or `preset NAME`.
    pub name: String,
    text: String,
}

impl Source {
    /// Finds an experiment: a file, or the name of a preset.
    pub fn find(config: &str) -> Result<Self> {
        let path = Path::new(config);
        if path.is_file() {
            let text = std::fs::read_to_string(path).with_context(|| format!("{config}: reading failed"))?;
            return Ok(Self { name: config.to_owned(), text });
        }
        let preset = config.strip_suffix(".toml").unwrap_or(config);
        if let Some((name, text)) = PRESETS.iter().find(|(name, _)| *name == preset) {
            return Ok(Self { name: format!("preset {name}"), text: (*text).to_owned() });
        }
        let names: Vec<_> = PRESETS.iter().map(|(name, _)| *name).collect();
        bail!("{config}: neither a file nor a preset; the presets are {}", names.join(", "))
    }

    /// An experiment from a run folder's resolved config.
    pub fn file(path: PathBuf) -> Result<Self> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(&path).with_context(|| format!("{name}: reading failed"))?;
        Ok(Self { name, text })
    }

    /// The text as it stands.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Reads the experiment with the changes `section.key=value`.
    pub fn parse<T: DeserializeOwned>(&self, sets: &[String]) -> Result<T> {
        let mut table: Table = self.text.parse().map_err(|e: toml::de::Error| self.syntax_error(&e))?;
        let mut changed = Vec::new();
        for set in sets {
            changed.push(apply(&mut table, set)?);
        }
        serde_path_to_error::deserialize(Value::Table(table)).map_err(|error| {
            let path = error.path().to_string();
            let message = error.into_inner().message().trim_end().replace('\n', " ");
            // An error inside a tagged section is found at the section, one level above the key.
            let set = changed.iter().find(|key| key.starts_with(&path) || path.starts_with(key.as_str()));
            let place = match set {
                Some(key) => format!("--set {key}"),
                None => self.name.clone(),
            };
            anyhow!("{place}: {path}: {message}")
        })
    }

    fn syntax_error(&self, error: &toml::de::Error) -> anyhow::Error {
        let line = error.span().map_or(1, |span| {
            let before = self.text.as_bytes().iter().take(span.start);
            before.filter(|byte| **byte == b'\n').count() + 1
        });
        anyhow!("{}: line {line}: {}", self.name, error.message().replace('\n', " "))
    }
}

/// A value of `--set`. What is no TOML literal is a string, so that `--set train.metric=l2` needs no quotes.
pub fn literal(text: &str) -> Value {
    let parsed = format!("v = {text}").parse::<Table>().ok().filter(|table| table.len() == 1);
    parsed.and_then(|mut table| table.remove("v")).unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Puts `section.key=value` into the table and returns the key.
fn apply(table: &mut Table, set: &str) -> Result<String> {
    let (key, value) = set
        .split_once('=')
        .with_context(|| format!("--set {set}: expected section.key=value, as in train.lr=1e-4"))?;
    let value = literal(value);
    let mut names: Vec<&str> = key.split('.').collect();
    let last = names.pop().filter(|name| !name.is_empty()).with_context(|| format!("--set {set}: no key"))?;
    let mut place = table;
    for name in names {
        let next = place.entry(name).or_insert_with(|| Value::Table(Table::new()));
        place = next
            .as_table_mut()
            .with_context(|| format!("--set {set}: '{name}' is a value, not a section"))?;
    }
    // A section that is chosen by its kind may be given by the kind alone: `--set train.metric=l2`.
    let kept = match (place.get(last), &value) {
        (Some(Value::Table(old)), Value::String(kind)) if old.contains_key("kind") => {
            Value::Table(Table::from_iter([("kind".to_owned(), Value::String(kind.clone()))]))
        }
        _ => value,
    };
    place.insert(last.to_owned(), kept);
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        name: String,
        train: Inner,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        lr: f64,
        metric: Metric,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
    enum Metric {
        L1,
        Huber { c: f64 },
    }

    fn source() -> Source {
        let text = "name = 'a'\n[train]\nlr = 0.5\nmetric = { kind = 'huber', c = 1.0 }\n";
        Source { name: "x.toml".into(), text: text.into() }
    }

    fn error(source: &Source, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| (*s).to_owned()).collect();
        format!("{:#}", source.parse::<Outer>(&sets).unwrap_err())
    }

    #[test]
    fn sets_change_values_of_every_type() {
        let sets = ["train.lr=1e-3".to_owned(), "train.metric=l1".to_owned(), "name=two words".to_owned()];
        let outer: Outer = source().parse(&sets).unwrap();
        assert_eq!(outer, Outer { name: "two words".into(), train: Inner { lr: 1e-3, metric: Metric::L1 } });
    }

    #[test]
    fn errors_name_the_place_the_key_and_the_fault() {
        let unknown = error(&source(), &["train.lrr=3"]);
        assert!(unknown.starts_with("--set train.lrr") && unknown.contains("lrr"), "{unknown}");
        let wrong = error(&source(), &["train.lr=fast"]);
        assert!(wrong.starts_with("--set train.lr: train.lr: ") && wrong.contains("fast"), "{wrong}");
        let mut file = source();
        file.text.push_str("extra = 1\n");
        let unknown = error(&file, &[]);
        assert!(unknown.starts_with("x.toml: train") && unknown.contains("extra"), "{unknown}");
        file.text.push_str("= broken\n");
        assert!(error(&file, &[]).starts_with("x.toml: line 6: "), "{}", error(&file, &[]));
        assert!(error(&source(), &["train"]).contains("section.key=value"));
        assert!(error(&source(), &["name.x=1"]).contains("'name' is a value"));
    }

    #[test]
    fn a_config_that_is_nowhere_lists_the_presets() {
        let error = format!("{:#}", Source::find("nowhere").unwrap_err());
        assert!(error.contains("digits-ct") && error.contains("cifar10-ct"));
    }
}
