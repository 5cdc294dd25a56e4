//! What a sweep runs: every combination of the values that `--sweep` names.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use crate::config::literal;

const MAX_RUNS: usize = 1000;
/// Longest text of one value in the name of a folder, and longest name.
const MAX_VALUE: usize = 40;
const MAX_NAME: usize = 200;

/// A key of the experiment and its values, as `--set` takes them.
type Axis = (String, Vec<String>);

/// The runs of a sweep.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// The keys, in the order of the command line.
    pub keys: Vec<String>,
    /// The runs; the last key changes fastest.
    pub runs: Vec<Planned>,
}

/// One run of a sweep.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// What its folder is called.
    pub name: String,
    /// A value for each key.
    pub values: BTreeMap<String, String>,
}

/// Reads all `--sweep KEY=VALUES` of a command line.
pub fn plan(sweeps: &[String]) -> Result<Plan> {
    let mut axes: Vec<Axis> = Vec::new();
    for sweep in sweeps {
        let (key, values) = axis(sweep)?;
        match axes.iter_mut().find(|(other, _)| *other == key) {
            Some((_, all)) => all.extend(values),
            None => axes.push((key, values)),
        }
    }
    let count = axes.iter().try_fold(1, |n: usize, (_, values)| n.checked_mul(values.len()));
    match count {
        Some(count) if count <= MAX_RUNS => {}
        _ => bail!("--sweep: more than {MAX_RUNS} runs; name fewer values"),
    }
    for (key, values) in &axes {
        for (i, value) in values.iter().enumerate() {
            if values[..i].iter().any(|other| literal(other) == literal(value)) {
                bail!("--sweep {key}: the value {value} is there twice");
            }
        }
    }
    Ok(Plan { keys: axes.iter().map(|(key, _)| key.clone()).collect(), runs: product(&axes) })
}

fn product(axes: &[Axis]) -> Vec<Planned> {
    let mut runs = vec![Planned { name: String::new(), values: BTreeMap::new() }];
    for (key, values) in axes {
        let short = short_key(key, axes);
        let with = |run: &Planned, value: &String| {
            let comma = if run.name.is_empty() { "" } else { "," };
            let name = format!("{}{comma}{short}={}", run.name, file_name(value, MAX_VALUE));
            let mut values = run.values.clone();
            values.insert(key.clone(), value.clone());
            Planned { name, values }
        };
        runs = runs.iter().flat_map(|run| values.iter().map(move |value| with(run, value))).collect();
    }
    runs.iter_mut().for_each(|run| run.name = file_name(&run.name, MAX_NAME));
    runs
}

/// `lr` for `train.lr`, unless another key ends so too.
fn short_key<'a>(key: &'a str, axes: &[Axis]) -> &'a str {
    let last = |key: &'a str| key.rsplit('.').next().unwrap_or(key);
    let same = axes.iter().filter(|(other, _)| other.rsplit('.').next() == Some(last(key))).count();
    if same > 1 { key } else { last(key) }
}

/// `text` as part of a file name. Where it has to be changed, a checksum keeps it apart from others.
fn file_name(text: &str, longest: usize) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "-+_.,=".contains(c);
    if text.chars().all(safe) && text.len() <= longest && !text.starts_with('.') {
        return text.to_owned();
    }
    let words: Vec<&str> = text.split(|c| !safe(c)).filter(|word| !word.is_empty()).collect();
    let mut name = words.join("-");
    name.truncate(longest);
    format!("{}-{:08x}", name.trim_start_matches('.'), crc32fast::hash(text.as_bytes()))
}

/// Reads `KEY=VALUES`. The values are a TOML list, or stand between commas; a comma within brackets, braces or quotes
/// separates nothing.
fn axis(sweep: &str) -> Result<Axis> {
    let expected = || format!("--sweep {sweep}: expected section.key=a,b,c, as in train.lr=1e-3,1e-4");
    let (key, text) = sweep.split_once('=').with_context(expected)?;
    let key = key.trim();
    if key.is_empty() || key.split('.').any(str::is_empty) {
        bail!(expected());
    }
    let values: Vec<String> =
        match format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v")) {
            Some(Value::Array(values)) => values.iter().map(text_of).collect(),
            _ => {
                let parts = parts(text);
                if parts.iter().any(|part| part.is_empty()) {
                    bail!("--sweep {sweep}: a value is empty; an empty text is ''");
                }
                parts.into_iter().map(plain).collect()
            }
        };
    if values.is_empty() {
        bail!(expected());
    }
    Ok((key.to_owned(), values))
}

/// A number as it was typed, a text without its quotes.
fn plain(part: &str) -> String {
    match literal(part) {
        text @ Value::String(_) => text_of(&text),
        _ => part.to_owned(),
    }
}

/// What `--set` reads as `value`.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) if literal(text) == *value => text.clone(),
        other => other.to_string(),
    }
}

fn parts(text: &str) -> Vec<&str> {
    let (mut parts, mut start) = (Vec::new(), 0);
    let (mut depth, mut quote, mut escaped) = (0_usize, None, false);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some('"'), '\\') if !escaped => {
                escaped = true;
                continue;
            }
            (Some(open), _) if open == c && !escaped => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '[' | '{') => depth += 1,
            (None, ']' | '}') => depth = depth.saturating_sub(1),
            (None, ',') if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
        escaped = false;
    }
    parts.push(text[start..].trim());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sweeps: &[&str]) -> Result<Plan> {
        plan(&sweeps.iter().map(|&sweep| sweep.to_owned()).collect::<Vec<_>>())
    }

    fn values(sweeps: &[&str], key: &str) -> Vec<String> {
        of(sweeps).unwrap().runs.iter().map(|run| run.values[key].clone()).collect()
    }

    fn names(sweeps: &[&str]) -> Vec<String> {
        of(sweeps).unwrap().runs.into_iter().map(|run| run.name).collect()
    }

    #[test]
    fn values_stand_between_commas_or_in_a_list() {
        assert_eq!(values(&["train.lr=1e-3, 5e-4"], "train.lr"), ["1e-3", "5e-4"]);
        assert_eq!(values(&["m=l2,'l1',\"a,b\""], "m"), ["l2", "l1", "a,b"]);
        assert_eq!(values(&["m=l2,{kind='huber', c=1}"], "m"), ["l2", "{kind='huber', c=1}"]);
        assert_eq!(values(&["n=[1, 2]"], "n"), ["1", "2"], "a list of values");
        assert_eq!(values(&["n=[[1, 2], [3]]"], "n"), ["[1, 2]", "[3]"], "a list of lists");
        assert_eq!(values(&["n=[1, 2],[3]"], "n"), ["[1, 2]", "[3]"], "lists between commas");
        assert_eq!(values(&["n=['a,b', 'c']"], "n"), ["a,b", "c"]);
        assert_eq!(values(&["n=\"a\\\",b\",c"], "n"), ["a\",b", "c"]);
        assert_eq!(
            values(&["n=1", "n='1'"], "n"),
            ["1", "\"1\""],
            "a number and a text; a key again adds values"
        );
    }

    #[test]
    fn several_keys_are_their_product() {
        let plan = of(&["train.lr=1e-3,1e-4", "train.metric=l1,l2"]).unwrap();
        assert_eq!(plan.keys, ["train.lr", "train.metric"]);
        let names: Vec<_> = plan.runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(
            names,
            ["lr=1e-3,metric=l1", "lr=1e-3,metric=l2", "lr=1e-4,metric=l1", "lr=1e-4,metric=l2"]
        );
        assert_eq!(plan.runs[2].values["train.lr"], "1e-4");
    }

    #[test]
    fn keys_that_end_alike_are_named_in_full() {
        let names = names(&["train.a.kind=x", "train.b.kind=y", "train.lr=1"]);
        assert_eq!(names, ["train.a.kind=x,train.b.kind=y,lr=1"]);
    }

    #[test]
    fn names_are_safe_short_and_different() {
        let names = names(&["p=../../x,..-..-x,{a = 1},{a = '1'},ü"]);
        for (i, name) in names.iter().enumerate() {
            assert!(!name.contains(['/', ' ', '\'', '{', 'ü']) && name.starts_with("p="), "{name}");
            assert!(!names[..i].contains(name), "{names:?}");
        }
        let long: Vec<String> = (0..9).map(|key| format!("k{key}={}", "v".repeat(90))).collect();
        let name = &plan(&long).unwrap().runs[0].name;
        assert!(name.len() < 255, "{name}");
    }

    #[test]
    fn what_is_no_sweep_is_refused() {
        for (sweeps, words) in [
            (&["train.lr"][..], "section.key=a,b,c"),
            (&["=1,2"], "section.key=a,b,c"),
            (&["train..lr=1"], "section.key=a,b,c"),
            (&["a=[]"], "section.key=a,b,c"),
            (&["a=1,,2"], "a value is empty"),
            (&["a="], "a value is empty"),
            (&["a=1,2,1"], "1 is there twice"),
            (&["a=1e-3", "a=0.001"], "0.001 is there twice"),
        ] {
            let error = of(sweeps).unwrap_err().to_string();
            assert!(error.starts_with("--sweep ") && error.contains(words), "{sweeps:?}: {error}");
        }
        let many = format!("={}", (0..40).map(|n| n.to_string()).collect::<Vec<_>>().join(","));
        let error = plan(&[format!("a{many}"), format!("b{many}")]).unwrap_err().to_string();
        assert!(error.contains("more than 1000 runs"), "{error}");
    }
}
