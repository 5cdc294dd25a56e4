//! Which libtorch is in use: the one that setup installs, or the user's own.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::install::Home;
use crate::tools;
use crate::wheels::{check_version, parse_version_py};

/// Where libtorch comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// The install of setup.
    Managed,
    /// `LIBTORCH`, set by the user.
    Own(PathBuf),
    /// `LIBTORCH_USE_PYTORCH`, set by the user.
    Pytorch,
}

/// A libtorch of the user's that passed its checks.
#[derive(Debug)]
pub struct Theirs {
    /// The folder with `lib/` and `include/`.
    pub torch: PathBuf,
    pub version: String,
    /// The variable that chose it.
    pub variable: &'static str,
}

/// Reads the choice from the environment.
pub fn source(home: &Home) -> Result<Source> {
    choose(|name| env::var_os(name), &home.torch())
}

/// `default` is what `.cargo/config.toml` sets where the user sets nothing: cargo gives it to this program too, so a
/// value equal to it is no choice of the user's.
fn choose(get: impl Fn(&str) -> Option<OsString>, default: &Path) -> Result<Source> {
    // torch-sys looks at this variable first and takes any value as a yes.
    if get("LIBTORCH_USE_PYTORCH").is_some() {
        return Ok(Source::Pytorch);
    }
    match get("LIBTORCH") {
        None => Ok(Source::Managed),
        Some(value) if value.is_empty() => {
            bail!("LIBTORCH is set but empty: unset it to use the pinned wheel")
        }
        Some(value) if same_path(Path::new(&value), default) => Ok(Source::Managed),
        Some(value) => Ok(Source::Own(PathBuf::from(value))),
    }
}

fn same_path(a: &Path, b: &Path) -> bool {
    // The folder may not exist yet, so links are resolved only where both can be.
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Checks a libtorch of the user's; `None` if there is none and setup's install serves.
pub fn check_theirs(source: &Source) -> Result<Option<Theirs>> {
    let (torch, variable) = match source {
        Source::Managed => return Ok(None),
        Source::Own(torch) => (torch.clone(), "LIBTORCH"),
        Source::Pytorch => (torch_of_python()?, "LIBTORCH_USE_PYTORCH"),
    };
    let bypass = env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_some();
    let version = check_folder(&torch, variable, bypass)?;
    Ok(Some(Theirs { torch, version, variable }))
}

fn check_folder(torch: &Path, variable: &str, bypass_version: bool) -> Result<String> {
    let shown = torch.display();
    let way_out = format!("correct {variable}, or unset it to use the pinned wheel");
    if torch.is_relative() {
        bail!(
            "LIBTORCH={shown} is relative, and cargo runs build scripts in other folders: give the whole path"
        );
    }
    if !torch.is_dir() {
        bail!("{variable} leads to {shown}, which is no folder: {way_out}");
    }
    for needed in ["include/torch/csrc/api/include/torch/torch.h", "lib"] {
        if !torch.join(needed).exists() {
            bail!("{variable} leads to {shown}, which has no {needed}: {way_out}");
        }
    }
    let version = version_of(torch)
        .with_context(|| format!("{variable} leads to {shown}, where no version can be read: {way_out}"))?;
    if !bypass_version {
        check_version(&version, &format!("{shown} ({variable})")).with_context(|| way_out)?;
    }
    Ok(version)
}

/// The version of a libtorch folder: of a wheel, of the separate archive, or from the headers.
fn version_of(torch: &Path) -> Option<String> {
    let read = |file: &str| fs::read_to_string(torch.join(file)).ok();
    read("version.py")
        .and_then(|text| parse_version_py(&text))
        .or_else(|| read("build-version").map(|text| text.trim().to_owned()))
        .or_else(|| read("include/torch/csrc/api/include/torch/version.h").and_then(|text| version_h(&text)))
}

fn version_h(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("#define TORCH_VERSION "))?;
    Some(line.trim().trim_matches('"').to_owned())
}

/// The folder of the torch that the Python chosen by torch-sys would import.
fn torch_of_python() -> Result<PathBuf> {
    // The same choice of interpreter as in the build script of torch-sys.
    let program = if env::var_os("VIRTUAL_ENV").is_some() { "python" } else { "python3" };
    let script =
        "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')";
    let origin = tools::first_line(Command::new(program).args(["-c", script])).with_context(|| {
        format!("LIBTORCH_USE_PYTORCH is set, but {program} could not be asked for torch")
    })?;
    match Path::new(&origin).parent() {
        Some(folder) if !origin.is_empty() => Ok(folder.to_path_buf()),
        _ => bail!(
            "LIBTORCH_USE_PYTORCH is set, but {program} has no torch: activate the environment that has it, or unset it"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pairs: &[(&str, &str)]) -> Result<Source> {
        let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
        choose(get, Path::new("/checkout/.libtorch/site/torch"))
    }

    #[test]
    fn the_value_of_the_cargo_configuration_is_no_choice() {
        assert_eq!(chosen(&[]).unwrap(), Source::Managed);
        assert_eq!(chosen(&[("LIBTORCH", "/checkout/.libtorch/site/torch")]).unwrap(), Source::Managed);
        assert_eq!(chosen(&[("LIBTORCH", "/checkout/.libtorch/site/torch/")]).unwrap(), Source::Managed);
        assert_eq!(chosen(&[("LIBTORCH", "/opt/t")]).unwrap(), Source::Own("/opt/t".into()));
        let both = [("LIBTORCH", "/opt/t"), ("LIBTORCH_USE_PYTORCH", "")];
        assert_eq!(chosen(&both).unwrap(), Source::Pytorch);
        assert!(chosen(&[("LIBTORCH", "")]).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn a_libtorch_of_ones_own_is_checked() {
        let dir = tempfile::tempdir().unwrap();
        let torch = dir.path().join("torch");
        let error = |torch: &Path| format!("{:#}", check_folder(torch, "LIBTORCH", false).unwrap_err());
        assert!(error(Path::new("torch")).contains("is relative"));
        assert!(error(&torch).contains("which is no folder: correct LIBTORCH, or unset it"));
        let headers = torch.join("include/torch/csrc/api/include/torch");
        fs::create_dir_all(&headers).unwrap();
        assert!(error(&torch).contains("which has no include/"));
        fs::write(headers.join("torch.h"), "").unwrap();
        assert!(error(&torch).contains("which has no lib"));
        fs::create_dir(torch.join("lib")).unwrap();
        assert!(error(&torch).contains("no version can be read"));

        fs::write(headers.join("version.h"), "#define TORCH_VERSION \"2.11.0\"\n").unwrap();
        assert_eq!(check_folder(&torch, "LIBTORCH", false).unwrap(), "2.11.0");
        fs::write(torch.join("build-version"), "2.10.0+cpu\n").unwrap();
        assert!(error(&torch).contains("is 2.10.0+cpu, but this workspace needs 2.11.0"));
        assert_eq!(check_folder(&torch, "LIBTORCH", true).unwrap(), "2.10.0+cpu");
    }
}
