//! Which crate may depend on which.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::runner;

/// What a crate of the workspace may depend on, its tests and benches included.
enum Allowed {
    These(&'static [&'static str]),
    /// All crates but the programs and the driver.
    Libraries,
    /// All crates but the driver.
    All,
}

/// The arrows: schedule → torch → model → {net, data} → {sampler, eval} → train → cli. A crate that is not here may
/// not exist. `?` marks a dependency that has to be optional.
const ARROWS: &[(&str, Allowed)] = &[
    ("cm-schedule", Allowed::These(&[])),
    ("cm-torch", Allowed::These(&["cm-schedule"])),
    ("cm-model", Allowed::These(&["cm-schedule", "cm-torch"])),
    ("cm-net", Allowed::These(&["cm-schedule", "cm-torch", "cm-model"])),
    ("cm-data", Allowed::These(&["cm-schedule", "cm-torch", "cm-model"])),
    ("cm-sampler", Allowed::These(&["cm-schedule", "cm-torch", "cm-model", "cm-net?"])),
    ("cm-eval", Allowed::These(&["cm-schedule", "cm-torch", "cm-model", "cm-data", "cm-net?"])),
    (
        "cm-train",
        Allowed::These(&["cm-schedule", "cm-torch", "cm-model", "cm-data", "cm-sampler", "cm-net@dev"]),
    ),
    ("cm-cli", Allowed::Libraries),
    ("cm-golden", Allowed::Libraries),
    ("cm-tests", Allowed::All),
    ("xtask", Allowed::These(&[])),
];

/// Crates that build without libtorch, however indirect the way to it.
const WITHOUT_LIBTORCH: &[&str] = &["cm-schedule", "xtask"];
const LIBTORCH: &[&str] = &["tch", "torch-sys"];
/// Programs and tests; libraries have typed errors.
const MAY_USE_ANYHOW: &[&str] = &["cm-cli", "cm-golden", "cm-tests", "xtask"];
const PROGRAMS: &[&str] = &["cm-cli", "cm-golden", "cm-tests"];

/// Asks cargo for the graph, of this machine's packages alone so that no other platform's are fetched.
pub fn metadata(root: &Path) -> Result<Value> {
    let version = Command::new("rustc").arg("-vV").output().context("cannot start rustc")?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let mut command = runner::cargo(&["metadata", "--format-version", "1", "--filter-platform", host]);
    let output = command.current_dir(root).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata printed something unexpected")
}

/// All breaches in the output of `cargo metadata`.
pub fn check(metadata: &Value) -> Result<Vec<String>> {
    let names: BTreeMap<&str, &str> = list(metadata, "packages")?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?)))
        .collect();
    let members: BTreeSet<&str> =
        list(metadata, "workspace_members")?.iter().filter_map(Value::as_str).collect();
    let member_names: BTreeSet<&str> = members.iter().filter_map(|id| names.get(id).copied()).collect();
    let mut breaches = Vec::new();
    for package in list(metadata, "packages")? {
        let name = package["name"].as_str().unwrap_or_default();
        if !package["id"].as_str().is_some_and(|id| members.contains(id)) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(crate_name, _)| *crate_name == name) else {
            breaches
                .push(format!("{name} has no row in the table of arrows (xtask/src/tidy/graph.rs): add it"));
            continue;
        };
        for dependency in list(package, "dependencies")? {
            breaches.extend(check_dependency(name, allowed, dependency, &member_names));
        }
    }
    breaches.extend(check_reach(metadata, &names, &members)?);
    Ok(breaches)
}

fn check_dependency(
    from: &str,
    allowed: &Allowed,
    dependency: &Value,
    members: &BTreeSet<&str>,
) -> Option<String> {
    let to = dependency["name"].as_str()?;
    if to == "anyhow" && !MAY_USE_ANYHOW.contains(&from) {
        return Some(format!("{from} → anyhow: libraries have typed errors (thiserror)"));
    }
    if !members.contains(to) {
        return None;
    }
    let optional = dependency["optional"].as_bool() == Some(true);
    let dev = dependency["kind"] == "dev";
    let row = |mark: &str| matches!(allowed, Allowed::These(c) if c.iter().any(|c| c.strip_suffix(mark) == Some(to)));
    let fits = match allowed {
        Allowed::These(crates) => {
            crates.contains(&to) || (row("?") && (optional || dev)) || (row("@dev") && dev)
        }
        Allowed::Libraries => to != "xtask" && !PROGRAMS.contains(&to),
        Allowed::All => to != "xtask",
    };
    if fits {
        return None;
    }
    let kind = dependency["kind"].as_str().map(|k| format!(" ({k}-dependency)")).unwrap_or_default();
    let why = match (row("?"), row("@dev")) {
        (true, _) => "only as an optional dependency",
        (_, true) => "only as a dependency of tests and benches",
        _ => "this arrow is not allowed",
    };
    Some(format!("{from} → {to}{kind}: {why}"))
}

/// Follows every dependency from the crates that must not reach libtorch.
fn check_reach(
    metadata: &Value,
    names: &BTreeMap<&str, &str>,
    members: &BTreeSet<&str>,
) -> Result<Vec<String>> {
    let mut edges: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in list(&metadata["resolve"], "nodes")? {
        let to = list(node, "dependencies")?.iter().filter_map(Value::as_str).collect();
        edges.insert(node["id"].as_str().unwrap_or_default(), to);
    }
    let mut breaches = Vec::new();
    for start in members.iter().filter(|id| names.get(*id).is_some_and(|n| WITHOUT_LIBTORCH.contains(n))) {
        let mut paths = vec![vec![*start]];
        let mut seen = BTreeSet::from([*start]);
        while let Some(path) = paths.pop() {
            let last = path[path.len() - 1];
            if names.get(last).is_some_and(|n| LIBTORCH.contains(n)) {
                let way: Vec<&str> = path.iter().filter_map(|id| names.get(id).copied()).collect();
                breaches.push(format!("{}: must build without libtorch", way.join(" → ")));
                continue;
            }
            for &next in edges.get(last).into_iter().flatten() {
                if seen.insert(next) {
                    paths.push([path.as_slice(), &[next]].concat());
                }
            }
        }
    }
    Ok(breaches)
}

pub(super) fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("cargo metadata has no list {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A graph of members and outside crates from (from, to, kind, optional).
    fn graph(members: &[&str], edges: &[(&str, &str, Option<&str>, bool)]) -> Value {
        let mut all: BTreeSet<&str> = members.iter().copied().collect();
        all.extend(edges.iter().flat_map(|e| [e.0, e.1]));
        let of = |name: &str| edges.iter().filter(move |e| e.0 == name).collect::<Vec<_>>();
        let packages: Vec<Value> = all
            .iter()
            .map(|&n| {
                let dependencies: Vec<Value> =
                    of(n).iter().map(|e| json!({"name": e.1, "kind": e.2, "optional": e.3})).collect();
                json!({"name": n, "id": format!("id-{n}"), "dependencies": dependencies})
            })
            .collect();
        let nodes: Vec<Value> = all
            .iter()
            .map(|&n| {
                let to: Vec<String> = of(n).iter().map(|e| format!("id-{}", e.1)).collect();
                json!({"id": format!("id-{n}"), "dependencies": to})
            })
            .collect();
        let members: Vec<String> = members.iter().map(|m| format!("id-{m}")).collect();
        json!({"packages": packages, "workspace_members": members, "resolve": {"nodes": nodes}})
    }

    fn breaches(members: &[&str], edges: &[(&str, &str, Option<&str>, bool)]) -> Vec<String> {
        check(&graph(members, edges)).unwrap()
    }

    #[test]
    fn arrows_that_run_the_right_way_pass() {
        let members =
            ["cm-schedule", "cm-torch", "cm-net", "cm-sampler", "cm-train", "cm-cli", "cm-tests", "xtask"];
        let edges = [
            ("cm-torch", "cm-schedule", None, false),
            ("cm-torch", "tch", None, false),
            ("cm-sampler", "cm-net", None, true),
            ("cm-train", "cm-net", Some("dev"), false),
            ("cm-cli", "cm-sampler", None, false),
            ("cm-cli", "anyhow", None, false),
            ("cm-tests", "cm-cli", Some("dev"), false),
            ("xtask", "anyhow", None, false),
        ];
        assert_eq!(breaches(&members, &edges), [""; 0]);
    }

    #[test]
    fn the_edge_that_breaks_a_rule_is_named() {
        let members = [
            "cm-schedule",
            "cm-torch",
            "cm-model",
            "cm-net",
            "cm-sampler",
            "cm-train",
            "cm-golden",
            "cm-cli",
        ];
        for (edge, said) in [
            (("cm-torch", "cm-model", None, false), "cm-torch → cm-model: this arrow is not allowed"),
            (
                ("cm-net", "cm-sampler", Some("dev"), false),
                "cm-net → cm-sampler (dev-dependency): this arrow is not allowed",
            ),
            (("cm-sampler", "cm-net", None, false), "cm-sampler → cm-net: only as an optional dependency"),
            (
                ("cm-train", "cm-net", None, false),
                "cm-train → cm-net: only as a dependency of tests and benches",
            ),
            (("cm-cli", "cm-golden", None, false), "cm-cli → cm-golden: this arrow is not allowed"),
            (("cm-net", "anyhow", None, false), "cm-net → anyhow: libraries have typed errors (thiserror)"),
        ] {
            assert_eq!(breaches(&members, &[edge]), [said]);
        }
        assert!(breaches(&["cm-new"], &[])[0].starts_with("cm-new has no row"));
    }

    #[test]
    fn libtorch_is_found_at_the_end_of_a_long_way() {
        let edges = [
            ("cm-schedule", "outside", None, false),
            ("outside", "torch-sys", None, false),
            ("outside", "harmless", None, false),
        ];
        let found = breaches(&["cm-schedule"], &edges);
        assert_eq!(found, ["cm-schedule → outside → torch-sys: must build without libtorch"]);
    }
}
