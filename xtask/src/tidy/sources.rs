//! Rules about files: where C++ and `unsafe` live, how long a file may be, how much a crate may bundle, no paths of
//! one machine.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::lexer;

/// Longest source file; a longer one wants to be two.
const MAX_LINES: usize = 800;
/// Tables and maps of names, which are long because what they list is long.
const MAY_BE_LONG: &[&str] = &[];
/// What a published crate may bundle in its folder `assets`, in bytes.
const MAX_ASSETS: u64 = 6_000_000;
/// The one folder of C++ and, but for the file below, of `unsafe`.
const BRIDGE: &str = "crates/cm-torch/";
const MEMORY_MAP: &str = "crates/cm-data/src/mmap.rs";
/// C that is part of no program: what makes the system's calls fail in the torture suite has to be loaded ahead of the C
/// library, as an object without a runtime of its own.
const INSTRUMENT: &str = "xtask/torture/faults.c";

/// What tells the time of day or the age of a file. A clock that is set while a run goes on, or between two sessions of
/// it, must change nothing: only what is shown may hold the time.
const CLOCKS: &[&str] = &["SystemTime", "OffsetDateTime", "modified"];
const MAY_SHOW_THE_TIME: &[&str] = &["crates/cm-cli/src/ui.rs", "crates/cm-train/src/events/mod.rs"];

const CPP: &[&str] = &["c", "cc", "cpp", "cxx", "cu", "cuh", "h", "hh", "hpp"];
const LENGTH_CHECKED: &[&str] = &["rs", "cpp", "h", "py", "sh"];
const IGNORED_FOLDERS: &[&str] = &["target", "out", "runs", ".git", ".libtorch"];

/// Folders whose absolute paths exist on one machine alone; in pieces, so that this file keeps its own rule.
const MACHINE_FOLDERS: &[&str] =
    &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), concat!("/wo", "rk/")];

/// All breaches in the files under `root`.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut breaches = Vec::new();
    let mut assets = BTreeMap::new();
    for file in files(root)? {
        if let Some(folder) = assets_folder(&file) {
            let bytes = fs::metadata(root.join(&file)).map_or(0, |file| file.len());
            *assets.entry(folder.to_owned()).or_insert(0) += bytes;
        }
        let extension = file.rsplit_once('.').map_or("", |(_, extension)| extension);
        if CPP.contains(&extension) && !file.starts_with(BRIDGE) && file != INSTRUMENT {
            breaches.push(format!("{file}: C and C++ live in {BRIDGE} alone"));
        }
        // A file that another process just removed, or that is no text, has nothing to check.
        let Ok(text) = fs::read_to_string(root.join(&file)) else { continue };
        breaches.extend(check_text(&file, extension, &text));
    }
    let too_large = assets.into_iter().filter(|(_, bytes)| *bytes > MAX_ASSETS);
    breaches
        .extend(too_large.map(|(folder, bytes)| format!("{folder}: {bytes} bytes, at most {MAX_ASSETS}")));
    Ok(breaches)
}

/// `crates/NAME/assets` of a file below it.
fn assets_folder(file: &str) -> Option<&str> {
    let (folder, _) = file.split_once("/assets/")?;
    let name = folder.strip_prefix("crates/")?;
    (!name.contains('/')).then(|| &file[..folder.len() + "/assets".len()])
}

fn check_text(file: &str, extension: &str, text: &str) -> Vec<String> {
    let mut breaches = Vec::new();
    let lines = text.lines().count();
    if LENGTH_CHECKED.contains(&extension) && lines > MAX_LINES && !MAY_BE_LONG.contains(&file) {
        breaches.push(format!("{file}: {lines} lines, at most {MAX_LINES}"));
    }
    if extension == "rs" && !file.starts_with(BRIDGE) && file != MEMORY_MAP {
        for (line, _) in lexer::words(text).into_iter().filter(|(_, word)| *word == "unsafe") {
            breaches.push(format!("{file}:{line}: unsafe code lives in {BRIDGE} and {MEMORY_MAP} alone"));
        }
    }
    let is_library = file.starts_with("crates/") && file.contains("/src/") && extension == "rs";
    if is_library && !MAY_SHOW_THE_TIME.contains(&file) {
        for (line, word) in lexer::words(text).into_iter().filter(|(_, word)| CLOCKS.contains(word)) {
            breaches
                .push(format!("{file}:{line}: {word}: nothing may depend on the time of day (use Instant)"));
        }
    }
    for (number, line) in text.lines().enumerate() {
        if let Some(path) = machine_path(line) {
            breaches.push(format!("{file}:{}: {path} exists on one machine alone", number + 1));
        }
    }
    breaches
}

/// An absolute path under one of the folders; `docs/…` and `$ROOT/…` are none.
fn machine_path(line: &str) -> Option<&str> {
    MACHINE_FOLDERS.iter().find_map(|folder| {
        line.match_indices(folder).find_map(|(at, _)| {
            let before = line[..at].chars().next_back();
            let part_of_longer = before.is_some_and(|c| c.is_alphanumeric() || "._-/$}~*<>)]".contains(c));
            let rest = &line[at..];
            let end = rest.find(|c: char| c.is_whitespace() || "\"'`)>,;".contains(c)).unwrap_or(rest.len());
            (!part_of_longer).then_some(&rest[..end])
        })
    })
}

/// Files that git tracks or would track; in a tree without git, all but the folders of build and output.
fn files(root: &Path) -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root);
    if root.join(".git").exists()
        && let Ok(output) = git.output()
        && output.status.success()
    {
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        return Ok(listed.split('\0').filter(|f| !f.is_empty()).map(str::to_owned).collect());
    }
    let mut found = Vec::new();
    walk(root, "", &mut found)?;
    Ok(found)
}

fn walk(root: &Path, below: &str, found: &mut Vec<String>) -> Result<()> {
    let folder = root.join(below);
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        if entry.file_type()?.is_dir() {
            if !IGNORED_FOLDERS.contains(&name.as_str()) {
                walk(root, &path, found)?;
            }
        } else {
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(file: &str, text: &str) -> Vec<String> {
        check_text(file, file.rsplit_once('.').unwrap().1, text)
    }

    #[test]
    fn unsafe_code_is_found_outside_its_rooms() {
        let code = "fn f() {}\nfn g() { unsafe { h() } }\n";
        assert_eq!(
            said("crates/cm-net/src/lib.rs", code),
            [
                "crates/cm-net/src/lib.rs:2: unsafe code lives in crates/cm-torch/ and crates/cm-data/src/mmap.rs alone"
            ]
        );
        assert_eq!(said("crates/cm-torch/src/lib.rs", code), [""; 0]);
        assert_eq!(said(MEMORY_MAP, code), [""; 0]);
        let words = "// unsafe\n#![deny(unsafe_code)]\nconst A: &str = \"unsafe\";\n";
        assert_eq!(said("crates/cm-net/src/lib.rs", words), [""; 0]);
    }

    #[test]
    fn long_files_are_named_with_their_length() {
        let at_most = "a\n".repeat(MAX_LINES);
        assert_eq!(said("a.rs", &at_most), [""; 0]);
        assert_eq!(said("a.rs", &(at_most.clone() + "a\n")), ["a.rs: 801 lines, at most 800"]);
        assert_eq!(said("a.csv", &(at_most + "a\n")), [""; 0]);
    }

    #[test]
    fn clocks_are_read_where_time_is_shown_alone() {
        let text = "// SystemTime\nlet now = SystemTime::now();\n";
        let breach =
            "crates/cm-data/src/x.rs:2: SystemTime: nothing may depend on the time of day (use Instant)";
        assert_eq!(said("crates/cm-data/src/x.rs", text), [breach]);
        for fine in ["crates/cm-train/src/events/mod.rs", "xtask/src/x.rs", "crates/cm-data/tests/x.rs"] {
            assert_eq!(said(fine, text), [""; 0]);
        }
    }

    #[test]
    fn a_crate_that_bundles_too_much_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for (file, bytes) in
            [("cm-a/assets/x", 3_000_000), ("cm-a/assets/y/z", 3_000_000), ("cm-b/assets/x", 1)]
        {
            let path = dir.path().join("crates").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![0; bytes]).unwrap();
        }
        assert_eq!(check(dir.path()).unwrap(), [""; 0]);
        fs::write(dir.path().join("crates/cm-a/assets/one-more"), "1").unwrap();
        assert_eq!(check(dir.path()).unwrap(), ["crates/cm-a/assets: 6000001 bytes, at most 6000000"]);
        assert_eq!(assets_folder("crates/cm-a/src/assets/x"), None);
    }

    #[test]
    fn paths_of_one_machine_are_found_and_others_are_not() {
        for folder in MACHINE_FOLDERS {
            let text = format!("x\nsee `{folder}me/x.txt`, there\n");
            assert_eq!(
                said("a.md", &text),
                [format!("a.md:2: {folder}me/x.txt exists on one machine alone")]
            );
            for fine in [format!("docs{folder}x"), format!("$A{folder}x"), format!("https://e.org{folder}x")]
            {
                assert_eq!(machine_path(&fine), None, "{fine}");
            }
        }
    }

    #[test]
    fn a_tree_without_git_is_walked() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["a.rs", "target/b.rs", "crates/cm-net/x.cpp", "crates/cm-torch/y.cpp", INSTRUMENT] {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let mut found = files(dir.path()).unwrap();
        found.sort();
        assert_eq!(found, ["a.rs", "crates/cm-net/x.cpp", "crates/cm-torch/y.cpp", INSTRUMENT]);
        let breaches = check(dir.path()).unwrap();
        assert_eq!(breaches, ["crates/cm-net/x.cpp: C and C++ live in crates/cm-torch/ alone"]);
    }
}
