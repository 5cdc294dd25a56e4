//! The programs that must be on the machine, and how to install the missing ones.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};

/// The wheel's libraries are built against this glibc.
pub const MIN_GLIBC: (u32, u32) = (2, 28);
/// Installing for a named platform, more than one of them, came with pip 20.2 (tried with 20.2.4).
const MIN_PIP: (u32, u32) = (20, 2);

/// The root of the workspace.
pub fn workspace_root() -> PathBuf {
    // Cargo says at run time where the package lies; the compile-time value serves a direct call of the binary.
    let package = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// An empty folder at `out` for what `cargo xtask COMMAND` makes: a new one, or one that it made before and empties now.
/// Any other folder stays as it is, and is an error.
pub fn own_folder(out: &Path, command: &str) -> Result<PathBuf> {
    let out = std::path::absolute(out).context("the folder --out")?;
    let mark = out.join(format!(".{command}"));
    if out.exists() {
        if !mark.is_file() {
            bail!("{}: it is there and is no folder of this command; choose another --out", out.display());
        }
        fs::remove_dir_all(&out).with_context(|| format!("cannot empty {}", out.display()))?;
    }
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    fs::write(&mark, format!("This folder is replaced by the next `cargo xtask {command}`.\n"))?;
    Ok(out)
}

/// Finds a program as the shell would.
pub fn find_program(name: impl AsRef<OsStr>) -> Option<PathBuf> {
    find_in(name.as_ref(), env::var_os("PATH").as_deref())
}

fn find_in(name: &OsStr, path: Option<&OsStr>) -> Option<PathBuf> {
    let named = Path::new(name);
    if named.components().count() > 1 {
        return is_executable(named).then(|| named.to_path_buf());
    }
    let with_suffix = |folder: PathBuf| {
        let plain = folder.join(name);
        if cfg!(windows) && plain.extension().is_none() { plain.with_extension("exe") } else { plain }
    };
    env::split_paths(path?).map(with_suffix).find(|candidate| is_executable(candidate))
}

#[cfg(unix)]
fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(not(unix))]
fn is_executable(path: &Path) -> bool {
    path.is_file()
}

/// Something that this workspace needs and the system's package manager has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tool {
    Python,
    Pip,
    Venv,
    Cxx,
}

/// The command that installs `tool` on this machine.
pub fn install_command(tool: Tool) -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let system = if cfg!(target_os = "macos") {
        "macos"
    } else if cfg!(windows) {
        "windows"
    } else {
        "linux"
    };
    command_for(tool, system, &release, is_root())
}

/// Package names of (python, pip, venv, compiler) by package manager; `IDS` are words of ID and ID_LIKE in os-release.
const PACKAGES: &[(&[&str], &str, [&str; 4])] = &[
    (
        &["debian", "ubuntu"],
        "apt-get install -y",
        ["python3 python3-pip", "python3-pip", "python3-venv", "g++"],
    ),
    (
        &["fedora", "rhel", "centos", "amzn"],
        "dnf install -y",
        ["python3 python3-pip", "python3-pip", "python3", "gcc-c++"],
    ),
    (&["arch"], "pacman -S --needed", ["python python-pip", "python-pip", "python", "gcc"]),
    (
        &["suse", "opensuse", "opensuse-tumbleweed", "opensuse-leap", "sles"],
        "zypper install",
        ["python3 python3-pip", "python3-pip", "python3", "gcc-c++"],
    ),
];

fn command_for(tool: Tool, system: &str, os_release: &str, root: bool) -> String {
    match system {
        "macos" if tool == Tool::Cxx => return "xcode-select --install".to_owned(),
        "macos" => return "brew install python".to_owned(),
        "windows" if tool == Tool::Cxx => {
            return "winget install Microsoft.VisualStudio.2022.BuildTools (with the C++ workload)"
                .to_owned();
        }
        "windows" => return "winget install Python.Python.3.12".to_owned(),
        _ => {}
    }
    let words: Vec<&str> = os_release
        .lines()
        .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")))
        .flat_map(|value| value.trim_matches(['"', '\'']).split_whitespace())
        .collect();
    let known = PACKAGES.iter().find(|(ids, ..)| words.iter().any(|word| ids.contains(word)));
    let Some((_, manager, packages)) = known else {
        let what =
            ["Python 3 with pip", "pip for Python 3", "the venv module of Python 3", "a C++17 compiler"];
        return format!("your package manager ({})", what[tool as usize]);
    };
    format!("{}{manager} {}", if root { "" } else { "sudo " }, packages[tool as usize])
}

#[cfg(unix)]
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

#[cfg(not(unix))]
fn is_root() -> bool {
    false
}

/// A Python interpreter with pip.
#[derive(Clone, Debug)]
pub struct Python {
    /// The interpreter.
    pub program: OsString,
    /// Its version, as `3.11.7`.
    pub version: String,
    /// The version of its pip.
    pub pip: String,
}

impl Python {
    /// The interpreter in `PYTHON`, else `python3`.
    pub fn find() -> Result<Self> {
        let default = if cfg!(windows) { "python" } else { "python3" };
        Self::at(env::var_os("PYTHON").filter(|p| !p.is_empty()).unwrap_or_else(|| default.into()))
    }

    /// The interpreter `program`.
    pub fn at(program: OsString) -> Result<Self> {
        let name = program.to_string_lossy().into_owned();
        let Some(path) = find_program(&program) else {
            bail!("{name} was not found. Install it with: {}", install_command(Tool::Python));
        };
        let version = first_line(Command::new(&path).arg("--version"))
            .with_context(|| format!("{name} --version failed"))?
            .trim_start_matches("Python ")
            .to_owned();
        let pip = first_line(Command::new(&path).args(["-m", "pip", "--version"]))
            .map_err(|_| anyhow!("{name} has no pip. Install it with: {}", install_command(Tool::Pip)))?;
        let pip = pip.split_whitespace().nth(1).unwrap_or_default().to_owned();
        match two_numbers(&pip) {
            Some(found) if found < MIN_PIP => bail!(
                "pip {pip} is too old ({}.{} or newer is needed). Renew it with: {name} -m pip install --user --upgrade pip",
                MIN_PIP.0,
                MIN_PIP.1
            ),
            _ => Ok(Self { program: path.into_os_string(), version, pip }),
        }
    }
}

/// Checks that a C++17 compiler is there and returns its name and version. `thorough` also compiles a few lines,
/// which finds a compiler without its standard library.
pub fn check_cxx(thorough: bool) -> Result<String> {
    // The same choice as the cc crate makes for build scripts: CXX (which may hold arguments), else c++.
    let chosen = env::var("CXX").ok().filter(|v| !v.trim().is_empty()).unwrap_or_else(|| "c++".to_owned());
    let mut words = chosen.split_whitespace();
    let program = words.next().unwrap_or("c++");
    if cfg!(windows) {
        return Ok("left to the build scripts on Windows".to_owned());
    }
    if find_program(program).is_none() {
        bail!("the C++ compiler {program} was not found. Install one with: {}", install_command(Tool::Cxx));
    }
    if !thorough {
        return Ok(chosen);
    }
    let command = || {
        let mut command = Command::new(program);
        command.args(words.clone());
        command
    };
    let version =
        first_line(command().arg("--version")).with_context(|| format!("{chosen} --version failed"))?;
    let mut child = command()
        .args(["-std=c++17", "-fsyntax-only", "-x", "c++", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {chosen}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A compiler that closes its input early has failed already and says so below.
        let _ =
            stdin.write_all(b"#include <optional>\n#include <string>\nstd::optional<std::string> text;\n");
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{chosen} cannot compile C++17 ({}). Install a whole compiler with: {}",
            why.lines().next().unwrap_or("no message"),
            install_command(Tool::Cxx)
        );
    }
    Ok(version)
}

/// The C library's version, or why the wheel cannot run with it; `None` off Linux or where it cannot be told.
pub fn check_glibc() -> Result<Option<String>> {
    if cfg!(target_env = "musl") {
        bail!(
            "this is a musl system and libtorch's wheels need glibc: use a glibc distribution or container"
        );
    }
    if !cfg!(target_os = "linux") {
        return Ok(None);
    }
    let Ok(line) = first_line(Command::new("getconf").arg("GNU_LIBC_VERSION")) else { return Ok(None) };
    glibc_from(&line)
}

fn glibc_from(line: &str) -> Result<Option<String>> {
    let Some(version) = line.strip_prefix("glibc ") else { return Ok(None) };
    match two_numbers(version) {
        Some(found) if found < MIN_GLIBC => bail!(
            "glibc {version} is too old for libtorch's wheel ({}.{} or newer is needed): use a newer system or set \
             LIBTORCH to a libtorch built for this one",
            MIN_GLIBC.0,
            MIN_GLIBC.1
        ),
        Some(_) => Ok(Some(version.to_owned())),
        None => Ok(None),
    }
}

/// Reads `23.2` out of `23.2.1`.
pub fn two_numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim().split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// First line of what a command prints, or an error if it fails.
pub fn first_line(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{} ({})", output.status, why.lines().last().unwrap_or("no message").trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_owned())
}

/// Bytes that can still be written under `folder`, by `df`; `None` where that is not known.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|f| f.exists())?;
    let output = Command::new("df").arg("-Pk").arg(existing).output().ok().filter(|o| o.status.success())?;
    free_from_df(&String::from_utf8_lossy(&output.stdout))
}

fn free_from_df(text: &str) -> Option<u64> {
    // POSIX format: device, blocks of 1024, used, available, capacity, mount point.
    let available = text.lines().nth(1)?.split_whitespace().nth(3)?;
    Some(available.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_tools_are_named_with_the_command_of_the_distribution() {
        let ubuntu = "NAME=\"Ubuntu\"\nID=ubuntu\nID_LIKE=debian\n";
        let rocky = "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n";
        assert_eq!(command_for(Tool::Cxx, "linux", ubuntu, false), "sudo apt-get install -y g++");
        assert_eq!(command_for(Tool::Pip, "linux", ubuntu, true), "apt-get install -y python3-pip");
        assert_eq!(command_for(Tool::Cxx, "linux", rocky, true), "dnf install -y gcc-c++");
        assert_eq!(
            command_for(Tool::Python, "linux", "ID=arch\n", true),
            "pacman -S --needed python python-pip"
        );
        assert_eq!(command_for(Tool::Cxx, "macos", "", false), "xcode-select --install");
        assert_eq!(
            command_for(Tool::Cxx, "linux", "ID=plan9\n", false),
            "your package manager (a C++17 compiler)"
        );
    }

    #[test]
    fn a_missing_interpreter_says_how_to_install_it() {
        let error = Python::at("no-such-python-here".into()).unwrap_err().to_string();
        assert!(error.starts_with("no-such-python-here was not found. Install it with: "), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn missing_and_old_pips_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, pip: &str| {
            let body =
                format!("#!/bin/sh\nif [ \"$1\" = --version ]; then echo Python 3.9.1; else {pip}; fi\n");
            crate::pip::tests::write_script(&dir.path().join(name), &body)
        };
        let none = Python::at(script("none", "echo No module named pip >&2; exit 1").into())
            .unwrap_err()
            .to_string();
        assert!(none.contains("has no pip. Install it with: "), "{none}");
        let old = Python::at(script("old", "echo pip 19.3.1 from x").into()).unwrap_err().to_string();
        assert!(old.contains("pip 19.3.1 is too old (20.2 or newer is needed)"), "{old}");
        let good = Python::at(script("good", "echo pip 20.2 from x").into()).unwrap();
        assert_eq!((good.version.as_str(), good.pip.as_str()), ("3.9.1", "20.2"));
    }

    #[cfg(unix)]
    #[test]
    fn programs_are_found_along_the_path_only_if_they_can_run() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tool");
        fs::write(&file, "").unwrap();
        let path = Some(dir.path().as_os_str());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(find_in("tool".as_ref(), path), None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_in("tool".as_ref(), path), Some(file.clone()));
        assert_eq!(find_in(file.as_ref(), None), Some(file));
    }

    #[test]
    fn old_c_libraries_are_refused() {
        assert_eq!(glibc_from("glibc 2.28").unwrap().as_deref(), Some("2.28"));
        assert!(glibc_from("glibc 2.27").unwrap_err().to_string().contains("glibc 2.27 is too old"));
        assert_eq!(glibc_from("something else").unwrap(), None);
    }

    #[test]
    fn free_space_is_read_from_the_portable_format() {
        let df = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/x 100 40 60 40% /\n";
        assert_eq!(free_from_df(df), Some(60 * 1024));
        assert_eq!(free_from_df(""), None);
    }
}
