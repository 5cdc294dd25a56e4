//! Calls of cargo and of the programs that it builds, with their exit codes and signals passed through.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

use crate::{setup, tools};

/// Sets up, then becomes `cargo <command> --workspace <args>`.
pub fn cargo_on_workspace(command: &[&str], args: Vec<OsString>) -> Result<u8> {
    setup::ensure()?;
    let mut cargo = cargo(command);
    if !selects_packages(&args) {
        cargo.arg("--workspace");
    }
    cargo.args(args);
    become_it(cargo)
}

/// Sets up, builds the program `name`, then becomes it; it sees the caller's folder as its own.
///
/// The whole workspace is named, not the package, so that dependencies are built with the features that tests and
/// benches build them with, and torch-sys not a second time.
pub fn program(name: &str, command: &[&str], args: Vec<OsString>) -> Result<u8> {
    setup::ensure()?;
    let status = status_of(&mut cargo(&["build", "--release", "--workspace", "--bin", name]))?;
    if !status.success() {
        return Ok(code_of(status));
    }
    let mut program = Command::new(built(name)?);
    without_package_variables(&mut program);
    program.args(command).args(args);
    become_it(program)
}

/// The cargo that started this program, in the workspace wherever the caller stands.
pub fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    without_package_variables(&mut command);
    let (verb, rest) = args.split_first().map_or(("", args), |(verb, rest)| (*verb, rest));
    command.arg(verb);
    if verb != "fmt" {
        command.arg("--manifest-path").arg(tools::workspace_root().join("Cargo.toml"));
    }
    command.args(rest);
    command
}

/// A program in the release folder, which is where this one lies too, wherever the target folder is.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("cannot find this program's own folder")?;
    Ok(own.with_file_name(format!("{name}{}", env::consts::EXE_SUFFIX)))
}

/// Cargo describes xtask to the process it runs; passed on, that would describe the wrong package.
fn without_package_variables(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if is_package_variable(&name) {
            command.env_remove(name);
        }
    }
}

fn is_package_variable(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("CARGO_PKG_")
        || [
            "CARGO_MANIFEST_DIR",
            "CARGO_MANIFEST_PATH",
            "CARGO_BIN_NAME",
            "CARGO_CRATE_NAME",
            "CARGO_PRIMARY_PACKAGE",
        ]
        .contains(&name.as_ref())
}

/// Whether the arguments of cargo (those before `--`) name packages.
fn selects_packages(args: &[OsString]) -> bool {
    args.iter().map(|arg| arg.to_string_lossy()).take_while(|arg| arg != "--").any(|arg| {
        (arg.starts_with("-p") && !arg.starts_with("--"))
            || ["--package", "--workspace", "--all", "--manifest-path"]
                .iter()
                .any(|flag| arg == *flag || arg.strip_prefix(flag).is_some_and(|rest| rest.starts_with('=')))
    })
}

/// Sets libtorch up, builds the program `cm` as it stands, and says where it lies.
pub fn build_cm() -> Result<PathBuf> {
    setup::ensure()?;
    let status = status_of(&mut cargo(&["build", "--release", "--workspace", "--bin", "cm"]))?;
    if !status.success() {
        bail!("cm could not be built (exit code {}): see above", code_of(status));
    }
    built("cm")
}

/// Runs a command to its end.
pub fn status_of(command: &mut Command) -> Result<ExitStatus> {
    command.status().with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// The exit code to pass on; a child killed by a signal gives the shell's 128 + signal.
pub fn code_of(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    {
        use std::os::unix::process::ExitStatusExt;
        if let Some(signal) = status.signal() {
            return u8::try_from(128 + signal).unwrap_or(1);
        }
    }
    status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Replaces this process, so that Ctrl-C, signals and the exit code are the program's own.
#[cfg(unix)]
fn become_it(mut command: Command) -> Result<u8> {
    use std::os::unix::process::CommandExt;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// Where a process cannot be replaced, the exit code is passed on.
#[cfg(not(unix))]
fn become_it(mut command: Command) -> Result<u8> {
    status_of(&mut command).map(code_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selects(args: &[&str]) -> bool {
        selects_packages(&args.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_workspace_is_meant_unless_packages_are_named() {
        assert!(!selects(&[]) && !selects(&["--no-run", "name"]) && !selects(&["--", "-p", "x"]));
        assert!(
            selects(&["-p", "x"])
                && selects(&["-px"])
                && selects(&["--package=x"])
                && selects(&["--workspace"])
        );
        assert!(!selects(&["--profile", "release"]) && !selects(&["--all-targets"]));
    }

    #[test]
    fn only_what_describes_this_package_is_taken_away() {
        for name in ["CARGO_PKG_NAME", "CARGO_MANIFEST_DIR"] {
            assert!(is_package_variable(OsStr::new(name)));
        }
        for name in ["CARGO", "CARGO_HOME", "CARGO_TARGET_DIR", "PATH"] {
            assert!(!is_package_variable(OsStr::new(name)));
        }
    }

    #[cfg(unix)]
    #[test]
    fn exit_codes_and_signals_pass_through() {
        let code = |script: &str| code_of(status_of(Command::new("sh").args(["-c", script])).unwrap());
        assert_eq!((code("exit 0"), code("exit 7"), code("kill -TERM $$")), (0, 7, 143));
    }
}
