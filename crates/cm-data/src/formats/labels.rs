//! Where the labels of a folder or zip of images come from.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::dataset::Labels;
use crate::error::{Error, Result};
use crate::limits::MAX_CLASSES;
use crate::names::Names;

/// What decides an image's class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelRule {
    /// Nothing: the set is unlabelled, whatever it holds.
    None,
    /// The labels that the source brings. For folders and zips: `dataset.json` where it has labels; else the file
    /// names' prefixes if every name has one and there are at least two, each on two images on average; else none.
    #[default]
    Auto,
    /// `dataset.json`, which has to be there: `{"labels": [["00000/img00000000.png", 6], …]}`, as EDM writes it.
    DatasetJson,
    /// The part of the file name before the first `_`, as OpenAI's loaders read it. Classes are numbered in the
    /// order of their sorted names.
    Prefix,
    /// The folder that an image lies in directly, numbered in the order of the sorted names.
    Folder,
}

#[derive(Deserialize)]
struct DatasetJson {
    #[serde(default)]
    labels: Option<Vec<(String, serde_json::Value)>>,
}

/// `dataset.json` as read from `file`.
pub(crate) struct Json<'a> {
    pub file: &'a str,
    pub bytes: &'a [u8],
}

/// The entries of a `dataset.json`: image name → label; `None` where it has no labels.
pub(crate) fn parse_json(json: &Json<'_>) -> Result<Option<HashMap<String, i64>>> {
    let parsed: DatasetJson = serde_json::from_slice(json.bytes)
        .map_err(|e| Error::format(json.file, r#"{"labels": [["name.png", 6], …]}"#, e.to_string()))?;
    let Some(entries) = parsed.labels else { return Ok(None) };
    let mut labels = HashMap::with_capacity(entries.len());
    for (index, (name, value)) in entries.into_iter().enumerate() {
        let name = name.replace('\\', "/");
        let Some(label) = value.as_i64() else {
            let found = format!("{} for {name} (entry {index})", crate::error::one_line(&value.to_string()));
            return Err(Error::format(json.file, "a whole number as label", found));
        };
        if label < 0 || label >= MAX_CLASSES.into() {
            return Err(Error::Label {
                file: format!("{}: {}", json.file, crate::error::one_line(&name)),
                index,
                value: label,
                classes: MAX_CLASSES,
            });
        }
        if labels.insert(name.clone(), label).is_some_and(|before| before != label) {
            return Err(Error::format(json.file, "one label for an image", format!("two for {name}")));
        }
    }
    Ok(Some(labels))
}

/// Labels for the images `names` (relative, `/` between folders) of the set at `place`, and the rule that gave them.
pub(crate) fn resolve(
    rule: LabelRule,
    names: &Names,
    json: Option<Json<'_>>,
    classes: Option<u32>,
    place: &str,
) -> Result<Option<(Labels, LabelRule)>> {
    if matches!(rule, LabelRule::Auto | LabelRule::DatasetJson)
        && let Some(json) = &json
        && let Some(entries) = parse_json(json)?
    {
        return Ok(Some((from_json(names, json.file, &entries, classes)?, LabelRule::DatasetJson)));
    }
    match rule {
        LabelRule::None => Ok(None),
        LabelRule::DatasetJson => Err(Error::Spec {
            key: "labels",
            value: "\"dataset_json\"".into(),
            reason: format!("{place} has no dataset.json with labels"),
        }),
        LabelRule::Prefix => by_name(names, prefix, "prefix before _", rule, classes, place).map(Some),
        LabelRule::Folder => by_name(names, folder, "folder", rule, classes, place).map(Some),
        LabelRule::Auto if looks_prefixed(names) => {
            by_name(names, prefix, "prefix before _", LabelRule::Prefix, classes, place).map(Some)
        }
        LabelRule::Auto => Ok(None),
    }
}

fn from_json(
    names: &Names,
    file: &str,
    entries: &HashMap<String, i64>,
    classes: Option<u32>,
) -> Result<Labels> {
    let limit = classes.unwrap_or(MAX_CLASSES);
    let mut values = Vec::with_capacity(names.len());
    for (index, name) in names.iter().enumerate() {
        let Some(&value) = entries.get(name) else {
            return Err(Error::Unlabelled { file: name.into(), labels_from: file.into() });
        };
        if value >= limit.into() {
            return Err(Error::Label { file: format!("{file}: {name}"), index, value, classes: limit });
        }
        values.push(value);
    }
    Labels::new(file, &values, classes)
}

fn by_name(
    names: &Names,
    class_of: fn(&str) -> Option<&str>,
    what: &str,
    rule: LabelRule,
    classes: Option<u32>,
    place: &str,
) -> Result<(Labels, LabelRule)> {
    let mut found = BTreeSet::new();
    for name in names.iter() {
        let unlabelled = || Error::Unlabelled { file: name.into(), labels_from: format!("{place}: {what}") };
        found.insert(class_of(name).ok_or_else(unlabelled)?);
    }
    let limit = classes.unwrap_or(MAX_CLASSES);
    if found.len() > limit as usize {
        return Err(Error::Spec {
            key: "num_classes",
            value: limit.to_string(),
            reason: format!("{place} has {} classes by {what}", found.len()),
        });
    }
    let number: BTreeMap<&str, u32> = found.iter().zip(0..).map(|(&name, i)| (name, i)).collect();
    let values = names.iter().filter_map(class_of).map(|class| number[class]).collect();
    let classes = classes.unwrap_or(found.len() as u32);
    // Classes without an image have no name, so names are given only where all have one.
    let names = (classes as usize == found.len()).then(|| found.iter().map(ToString::to_string).collect());
    Ok((Labels { values, classes, names }, rule))
}

fn prefix(name: &str) -> Option<&str> {
    let base = name.rsplit('/').next()?;
    base.split_once('_').map(|(class, _)| class).filter(|class| !class.is_empty())
}

fn folder(name: &str) -> Option<&str> {
    let (folders, _) = name.rsplit_once('/')?;
    folders.rsplit('/').next().filter(|f| !f.is_empty())
}

/// Whether prefixes are classes rather than chance: every name has one, and classes repeat.
fn looks_prefixed(names: &Names) -> bool {
    let classes: Option<BTreeSet<&str>> = names.iter().map(prefix).collect();
    classes.is_some_and(|c| c.len() >= 2 && c.len() * 2 <= names.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Names {
        Names::of(list)
    }

    fn json(text: &str) -> Option<Json<'_>> {
        Some(Json { file: "dataset.json", bytes: text.as_bytes() })
    }

    #[test]
    fn dataset_json_is_taken_by_name_not_by_order() {
        let images = names(&["00000/a.png", "00000/b.png"]);
        let text = r#"{"labels": [["00000\\b.png", 6], ["00000/a.png", 2], ["unused.png", 900]], "more": 1}"#;
        let (labels, rule) = resolve(LabelRule::Auto, &images, json(text), None, "p").unwrap().unwrap();
        assert_eq!((labels.values, labels.classes, rule), (vec![2, 6], 7, LabelRule::DatasetJson));
    }

    #[test]
    fn faults_of_dataset_json_are_named() {
        let images = names(&["a.png", "b.png"]);
        let fault = |text: &str, classes| {
            resolve(LabelRule::Auto, &images, json(text), classes, "p").unwrap_err().to_string()
        };
        let error = fault(r#"{"labels": [["a.png", 1]]}"#, None);
        assert!(error.contains("dataset.json: no label for b.png"), "{error}");
        let error = fault(r#"{"labels": [["a.png", 1], ["b.png", 10]]}"#, Some(10));
        assert_eq!(error, "dataset.json: b.png: image 1: label 10 is outside 0..=9");
        let error = fault(r#"{"labels": [["a.png", -1], ["b.png", 1]]}"#, None);
        assert!(error.contains("a.png: image 0: label -1 is outside"), "{error}");
        let error = fault(r#"{"labels": [["a.png", [0, 1]]]}"#, None);
        assert!(error.contains("a whole number as label, found [0,1] for a.png"), "{error}");
        let error = fault(r#"{"labels": [["a.png", 1], ["a.png", 2]]}"#, None);
        assert!(error.contains("two for a.png"), "{error}");
        let error = fault("{", None);
        assert!(error.starts_with("dataset.json: expected {\"labels\""), "{error}");
    }

    #[test]
    fn prefixes_and_folders_are_numbered_in_sorted_order() {
        let images = names(&["x/dog_1.png", "x/cat_1.png", "y/dog_2.png", "y/cat_9.png"]);
        let (labels, rule) = resolve(LabelRule::Auto, &images, None, None, "p").unwrap().unwrap();
        assert_eq!((labels.values.as_slice(), rule), (&[1, 0, 1, 0][..], LabelRule::Prefix));
        assert_eq!(labels.names.unwrap(), ["cat", "dog"]);
        let (labels, _) = resolve(LabelRule::Folder, &images, None, Some(3), "p").unwrap().unwrap();
        assert_eq!((labels.values.as_slice(), labels.classes, labels.names), (&[0, 0, 1, 1][..], 3, None));
    }

    #[test]
    fn auto_does_not_invent_classes() {
        for list in [
            &["img_1.png", "img_2.png", "img_3.png"][..],      // one prefix
            &["a_1.png", "b_2.png", "c_3.png"],                // as many prefixes as images
            &["cat_1.png", "cat_2.png", "dog_1.png", "x.png"], // one without
            &["00000/img0.png", "00000/img1.png"],             // folders that shard
        ] {
            assert_eq!(resolve(LabelRule::Auto, &names(list), None, None, "p").unwrap(), None, "{list:?}");
        }
        let labelled = names(&["cat_1.png", "cat_2.png", "dog_1.png", "dog_2.png"]);
        assert_eq!(resolve(LabelRule::None, &labelled, json("not even json"), None, "p").unwrap(), None);
    }

    #[test]
    fn a_rule_that_was_asked_for_has_to_hold() {
        let images = names(&["a.png"]);
        let fault = |rule, classes| resolve(rule, &images, None, classes, "p").unwrap_err().to_string();
        assert!(fault(LabelRule::DatasetJson, None).contains("p has no dataset.json with labels"));
        assert!(fault(LabelRule::Prefix, None).contains("p: prefix before _: no label for a.png"));
        assert!(fault(LabelRule::Folder, None).contains("no label for a.png"));
        let two = names(&["a_1.png", "b_1.png"]);
        assert!(resolve(LabelRule::Prefix, &two, None, Some(1), "p").is_err());
    }
}
