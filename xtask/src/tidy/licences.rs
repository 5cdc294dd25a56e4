//! What the project depends on, held against deny.toml: licences, sources and bans.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::graph::list;

/// The one place that dependencies come from, as cargo writes it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// All breaches of deny.toml by the packages in the output of `cargo metadata`.
pub fn check(root: &Path, metadata: &Value) -> Result<Vec<String>> {
    let rules = std::fs::read_to_string(root.join("deny.toml")).context("deny.toml")?;
    let rules = Rules { licences: quoted(&rules, "allow", None), bans: quoted(&rules, "deny", Some("name")) };
    Ok(list(metadata, "packages")?.iter().flat_map(|package| rules.breaches(package)).collect())
}

struct Rules {
    licences: Vec<String>,
    bans: Vec<String>,
}

impl Rules {
    fn breaches(&self, package: &Value) -> Vec<String> {
        let text = |key: &str| package[key].as_str();
        let name = text("name").unwrap_or_default();
        let mut breaches = Vec::new();
        if self.bans.iter().any(|ban| ban == name) {
            breaches.push(format!("{name} is banned by deny.toml"));
        }
        // Crates of the workspace have no source.
        if text("source").is_some_and(|source| source != REGISTRY) {
            breaches.push(format!(
                "{name} comes from {}, not from crates.io",
                text("source").unwrap_or_default()
            ));
        }
        match text("license") {
            Some(licence) if allows(licence, &self.licences) => {}
            Some(licence) => {
                breaches.push(format!("{name}: its licence, {licence}, is not allowed by deny.toml"))
            }
            None => breaches.push(format!("{name} names no licence")),
        }
        breaches
    }
}

/// The texts in the list `key = […]` of a TOML file, one item a line; of tables, the value of `field`.
fn quoted(toml: &str, key: &str, field: Option<&str>) -> Vec<String> {
    let start = format!("{key} = [");
    let lines = toml.lines().skip_while(|line| *line != start).skip(1).take_while(|line| *line != "]");
    let item = |line: &str| {
        let line = match field {
            Some(field) => line.split_once(&format!("{field} = "))?.1,
            None => line.trim_start(),
        };
        line.strip_prefix('"')?.split('"').next().map(str::to_owned)
    };
    lines.filter_map(item).collect()
}

/// Whether an SPDX expression can be met with the allowed licences. AND binds closer than OR; older crates write `/`
/// for OR.
fn allows(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut place = words.as_slice();
    let met = any(&mut place, allowed);
    met && place.is_empty()
}

fn any(words: &mut &[&str], allowed: &[String]) -> bool {
    let mut met = all(words, allowed);
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        met |= all(words, allowed);
    }
    met
}

fn all(words: &mut &[&str], allowed: &[String]) -> bool {
    let mut met = one(words, allowed);
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        met &= one(words, allowed);
    }
    met
}

fn one(words: &mut &[&str], allowed: &[String]) -> bool {
    match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let met = any(words, allowed);
            *words = words.strip_prefix(&[")"]).unwrap_or(words);
            met
        }
        // An exception only adds to what a licence allows, but is a text of its own that nobody has read.
        [_, "WITH", _, rest @ ..] => {
            *words = rest;
            false
        }
        [licence, rest @ ..] => {
            *words = rest;
            allowed.iter().any(|other| other == licence)
        }
        [] => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "[licenses]\nallow = [\n    \"MIT\", # why\n    \"ISC\",\n]\n[bans]\ndeny = [\n    { name = \"evil\", reason = \"x\" },\n]\n";

    #[test]
    fn expressions_are_met_or_not() {
        let allowed = quoted(TOML, "allow", None);
        assert_eq!(allowed, ["MIT", "ISC"]);
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("MIT OR GPL-3.0", true),
            ("MIT/GPL-3.0", true),
            ("MIT AND GPL-3.0", false),
            ("GPL-3.0 OR MIT AND ISC", true),
            ("(GPL-3.0 OR MIT) AND ISC", true),
            ("(GPL-3.0 OR X) AND ISC", false),
            ("MIT WITH Some-exception", false),
            ("X WITH Some-exception OR MIT", true),
            ("MIT ISC", false),
            ("MIT AND", false),
            ("", false),
        ] {
            assert_eq!(allows(expression, &allowed), met, "{expression}");
        }
    }

    #[test]
    fn packages_are_held_against_the_rules() {
        let rules = Rules { licences: quoted(TOML, "allow", None), bans: quoted(TOML, "deny", Some("name")) };
        let breaches = |name: &str, licence: Option<&str>, source: Option<&str>| {
            rules.breaches(&serde_json::json!({"name": name, "license": licence, "source": source}))
        };
        assert!(breaches("a", Some("MIT"), Some(REGISTRY)).is_empty());
        assert!(breaches("a", Some("MIT"), None).is_empty());
        assert!(breaches("evil", Some("MIT"), None)[0].contains("banned"));
        assert!(breaches("a", Some("AGPL-3.0"), None)[0].contains("AGPL-3.0"));
        assert!(breaches("a", None, None)[0].contains("no licence"));
        assert!(breaches("a", Some("MIT"), Some("git+https://example.org/a"))[0].contains("example.org"));
    }

    #[test]
    fn the_committed_rules_are_read() {
        let root = crate::tools::workspace_root();
        let rules = std::fs::read_to_string(root.join("deny.toml")).unwrap();
        assert!(quoted(&rules, "allow", None).contains(&"Apache-2.0".to_owned()));
        assert!(quoted(&rules, "deny", Some("name")).contains(&"openssl-sys".to_owned()));
    }
}
