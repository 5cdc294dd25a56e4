//! What the project depends on, held against deny.toml: licences, sources and bans.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;
use spdx::{Expression, ParseMode};

use super::graph::list;

/// The one place that dependencies come from, as cargo writes it.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// All breaches of deny.toml by the packages in the output of `cargo metadata`.
pub fn check(root: &Path, metadata: &Value) -> Result<Vec<String>> {
    let rules = Rules::parse(&std::fs::read_to_string(root.join("deny.toml")).context("deny.toml")?)?;
    Ok(list(metadata, "packages")?.iter().flat_map(|package| rules.breaches(package)).collect())
}

/// What the fuzzer alone depends on, with its licence: it has a lock file of its own, and asking cargo about that would
/// fetch packages that nothing here builds.
const OF_THE_FUZZER: &[(&str, &str)] = &[("libfuzzer-sys", "(MIT OR Apache-2.0) AND NCSA")];

/// The same for the fuzzer's lock file. Its packages are those of the workspace, whose licences [`check`] has seen, if in
/// other versions, and [`OF_THE_FUZZER`].
pub fn check_fuzzer(root: &Path) -> Result<Vec<String>> {
    let read = |name: &str| std::fs::read_to_string(root.join(name)).with_context(|| name.to_owned());
    let rules = Rules::parse(&read("deny.toml")?)?;
    let known = locked(&read("Cargo.lock")?)?.into_iter().map(|(name, _)| name).collect();
    Ok(rules.breaches_of_lock(&locked(&read("fuzz/Cargo.lock")?)?, &known))
}

/// Names and sources of the packages of a lock file.
fn locked(text: &str) -> Result<Vec<(String, Option<String>)>> {
    let table: toml::Table = text.parse().context("a lock file")?;
    let packages =
        table.get("package").and_then(toml::Value::as_array).context("a lock file without packages")?;
    let text = |package: &toml::Value, key: &str| package.get(key)?.as_str().map(str::to_owned);
    packages
        .iter()
        .map(|package| {
            Ok((text(package, "name").context("a package without a name")?, text(package, "source")))
        })
        .collect()
}

struct Rules {
    licences: Vec<String>,
    bans: Vec<String>,
}

impl Rules {
    fn parse(text: &str) -> Result<Self> {
        let table: toml::Table = text.parse().context("deny.toml")?;
        let items = |section: &str, key: &str| {
            let list =
                table.get(section).and_then(|section| section.get(key)).and_then(toml::Value::as_array);
            list.with_context(|| format!("deny.toml: expected a list {section}.{key}"))
        };
        let text = |value: &toml::Value| value.as_str().map(str::to_owned);
        let name = |value: &toml::Value| value.get("name").and_then(text);
        Ok(Self {
            licences: items("licenses", "allow")?.iter().filter_map(text).collect(),
            bans: items("bans", "deny")?.iter().filter_map(name).collect(),
        })
    }

    fn breaches_of_lock(
        &self,
        packages: &[(String, Option<String>)],
        known: &BTreeSet<String>,
    ) -> Vec<String> {
        let mut breaches = Vec::new();
        for (name, source) in packages {
            let licence = OF_THE_FUZZER.iter().find(|(other, _)| other == name).map(|(_, licence)| *licence);
            // Crates of the project have no source.
            let ours = source.is_none();
            let known = known.contains(name) || ours || licence.is_some_and(|l| allows(l, &self.licences));
            if !known {
                breaches.push(format!(
                    "fuzz/Cargo.lock: {name} is no package of the workspace, and its licence is not known as one that \
                     deny.toml allows (xtask/src/tidy/licences.rs)"
                ));
            }
            if self.bans.contains(name) {
                breaches.push(format!("fuzz/Cargo.lock: {name} is banned by deny.toml"));
            }
            if let Some(source) = source.as_ref().filter(|source| *source != REGISTRY) {
                breaches.push(format!("fuzz/Cargo.lock: {name} comes from {source}, not from crates.io"));
            }
        }
        breaches
    }

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

/// Whether an SPDX expression can be met with the allowed licences. Older crates write `/` for OR.
fn allows(expression: &str, allowed: &[String]) -> bool {
    let Ok(expression) = Expression::parse_mode(expression, ParseMode::LAX) else { return false };
    expression.evaluate(|wanted| {
        let name = wanted.license.id().map(|licence| licence.name);
        // An exception only adds to what a licence allows, but is a text of its own that nobody has read.
        wanted.addition.is_none() && name.is_some_and(|name| allowed.iter().any(|other| other == name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = "[licenses]\nallow = [\n    \"MIT\", # why\n    \"ISC\",\n]\n[bans]\ndeny = [\n    { name = \"evil\", reason = \"x\" },\n]\n";

    #[test]
    fn expressions_are_met_or_not() {
        let allowed = Rules::parse(TOML).unwrap().licences;
        assert_eq!(allowed, ["MIT", "ISC"]);
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("MIT OR GPL-3.0", true),
            ("MIT/GPL-3.0", true),
            ("MIT AND GPL-3.0", false),
            ("GPL-3.0 OR MIT AND ISC", true),
            ("(GPL-3.0 OR MIT) AND ISC", true),
            ("(GPL-3.0 OR AGPL-3.0) AND ISC", false),
            ("MIT WITH LLVM-exception", false),
            ("GPL-2.0 WITH LLVM-exception OR MIT", true),
            ("MIT ISC", false),
            ("no licence at all", false),
            ("MIT AND", false),
            ("", false),
        ] {
            assert_eq!(allows(expression, &allowed), met, "{expression}");
        }
    }

    #[test]
    fn packages_are_held_against_the_rules() {
        let rules = Rules::parse(TOML).unwrap();
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
    fn the_fuzzers_packages_are_held_against_the_rules() {
        let lock = |name: &str, source: &str| {
            let text = format!(
                "version = 4\n[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\nsource = \"{source}\"\n"
            );
            locked(&text).unwrap()
        };
        let known = BTreeSet::from(["zip".to_owned(), "evil".to_owned()]);
        let breaches = |toml: &str, name: &str, source: &str| {
            Rules::parse(toml).unwrap().breaches_of_lock(&lock(name, source), &known)
        };
        assert!(breaches(TOML, "zip", REGISTRY).is_empty());
        assert!(breaches(TOML, "unheard-of", REGISTRY)[0].contains("licence"));
        assert!(
            breaches(TOML, "libfuzzer-sys", REGISTRY)[0].contains("licence"),
            "NCSA is not allowed there"
        );
        assert!(breaches(&TOML.replace("ISC", "NCSA"), "libfuzzer-sys", REGISTRY).is_empty());
        assert!(breaches(TOML, "evil", REGISTRY)[0].contains("banned"));
        assert!(breaches(TOML, "zip", "git+https://example.org/zip")[0].contains("example.org"));
        assert!(locked("version = 4").is_err());
    }

    #[test]
    fn the_committed_rules_are_read() {
        let root = crate::tools::workspace_root();
        let rules = std::fs::read_to_string(root.join("deny.toml")).unwrap();
        let rules = Rules::parse(&rules).unwrap();
        assert!(rules.licences.contains(&"Apache-2.0".to_owned()));
        assert!(rules.bans.contains(&"openssl-sys".to_owned()));
        assert!(Rules::parse("[licenses]").is_err(), "rules that are missing allow nothing");
    }
}
