//! `cargo xtask doctor`: what this machine has, what is missing and what to do about it.

use std::env;
use std::fs;
use std::process::Command;

use anyhow::{Error, Result};

use crate::gpu::{Gpus, MIN_DRIVER};
use crate::install::Home;
use crate::libtorch::{self, Source};
use crate::tools::{self, Python};
use crate::wheels::{Depth, State, WheelSet, has_manifest, inspect};
use crate::{cuda_object, runner, setup};

/// How a finding bears on work.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Level {
    Ok,
    /// Worth knowing; nothing is blocked.
    Note,
    /// Blocks work.
    Fault,
}

/// One line of the report.
#[derive(Debug, PartialEq)]
struct Finding {
    level: Level,
    topic: &'static str,
    text: String,
}

impl Finding {
    fn new(level: Level, topic: &'static str, text: impl Into<String>) -> Self {
        Self { level, topic, text: text.into() }
    }

    /// Good news, or the error as a fault.
    fn from_result(topic: &'static str, result: Result<String>) -> Self {
        match result {
            Ok(text) => Self::new(Level::Ok, topic, text),
            Err(why) => Self::new(Level::Fault, topic, one_line(&why)),
        }
    }

    fn line(&self) -> String {
        let mark = match self.level {
            Level::Ok => "ok   ",
            Level::Note => "note ",
            Level::Fault => "FAULT",
        };
        format!("{mark}  {:<10} {}", self.topic, self.text)
    }
}

/// The command. Exit code 1 if a fault blocks work.
pub fn run() -> Result<u8> {
    let home = Home::of_workspace();
    let gpus = Gpus::probe();
    let mut findings = vec![system()];
    findings.extend(rust());
    findings.push(Finding::from_result("compiler", tools::check_cxx(true)));
    let managed = findings_of_libtorch(&home, &gpus, &mut findings);
    findings.push(python(managed));
    findings.push(cuda(&gpus, env::var("CUDA_VISIBLE_DEVICES").ok().as_deref()));
    if gpus.seen() {
        findings.push(object());
    }
    findings.push(disk(&home, managed));
    findings.push(Finding::new(Level::Ok, "machine", machine()));
    for finding in &findings {
        println!("{}", finding.line());
    }
    let mut faults = findings.iter().filter(|f| f.level == Level::Fault).count();
    faults += usize::from(!program_agrees()?);
    match faults {
        0 => println!("\nnothing blocks work here"),
        n => println!("\n{n} fault(s) block work; each line above says what to do"),
    }
    Ok(u8::from(faults > 0))
}

fn system() -> Finding {
    let name = format!("{} {}", env::consts::OS, env::consts::ARCH);
    match (tools::check_glibc(), setup::untested_system()) {
        (Err(why), _) => Finding::new(Level::Fault, "system", one_line(&why)),
        (Ok(_), Some(note)) => Finding::new(Level::Note, "system", note),
        (Ok(Some(glibc)), None) => Finding::new(Level::Ok, "system", format!("{name}, glibc {glibc}")),
        (Ok(None), None) => Finding::new(Level::Ok, "system", name),
    }
}

fn rust() -> Vec<Finding> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = tools::first_line(Command::new(rustc).arg("--version"))
        .map_err(|why| why.context("rustc cannot be started; install Rust from https://rustup.rs"));
    let mut findings = vec![Finding::from_result("rust", version)];
    for (part, verb) in [("clippy", "clippy"), ("rustfmt", "fmt")] {
        if tools::first_line(Command::new(&cargo).args([verb, "--version"])).is_err() {
            let text = format!("{part} is missing (CI needs it): rustup component add {part}");
            findings.push(Finding::new(Level::Note, "rust", text));
        }
    }
    findings
}

/// Python matters only where setup has something to install.
fn python(managed: Managed) -> Finding {
    match (Python::find(), managed) {
        (Ok(python), _) => {
            Finding::new(Level::Ok, "python", format!("Python {}, pip {}", python.version, python.pip))
        }
        (Err(why), Managed::Missing) => Finding::new(Level::Fault, "python", one_line(&why)),
        (Err(why), _) => {
            Finding::new(Level::Note, "python", format!("{} (only an install needs it)", one_line(&why)))
        }
    }
}

/// Whether setup's own install is in use and whole.
#[derive(Clone, Copy, PartialEq)]
enum Managed {
    NotUsed,
    Ready,
    Missing,
}

fn findings_of_libtorch(home: &Home, gpus: &Gpus, findings: &mut Vec<Finding>) -> Managed {
    let theirs = libtorch::source(home).and_then(|source| Ok((libtorch::check_theirs(&source)?, source)));
    match theirs {
        Err(why) => findings.push(Finding::new(Level::Fault, "libtorch", one_line(&why))),
        Ok((Some(theirs), _)) => {
            let text =
                format!("{} in {}, chosen by {}", theirs.version, theirs.torch.display(), theirs.variable);
            findings.push(Finding::new(Level::Ok, "libtorch", text));
        }
        Ok((None, Source::Managed)) => return managed_findings(home, gpus, findings),
        Ok((None, _)) => {}
    }
    Managed::NotUsed
}

fn managed_findings(home: &Home, gpus: &Gpus, findings: &mut Vec<Finding>) -> Managed {
    let place = home.site();
    match inspect(&place, Depth::Whole) {
        State::Ready(manifest) => {
            let adopted =
                if has_manifest(&place) { "" } else { "; made by hand, `cargo xtask setup` adopts it" };
            let text =
                format!("{}, {}, in {}{adopted}", manifest.torch, manifest.set.describe(), place.display());
            findings.push(Finding::new(Level::Ok, "libtorch", text));
            if gpus.seen() && manifest.set == WheelSet::Lean {
                let text = "a GPU is here, but the lean set has no CUDA libraries: run `cargo xtask setup`";
                findings.push(Finding::new(Level::Note, "libtorch", text));
            }
            Managed::Ready
        }
        State::Absent => {
            findings.push(Finding::new(
                Level::Fault,
                "libtorch",
                "not installed yet: run `cargo xtask setup`",
            ));
            Managed::Missing
        }
        State::Faulty(why) => {
            let text = format!("{}: {why}: run `cargo xtask setup`, which repairs it", place.display());
            findings.push(Finding::new(Level::Fault, "libtorch", text));
            Managed::Missing
        }
    }
}

/// A machine without a GPU is no fault; a GPU that cannot be used is worth a note.
fn cuda(gpus: &Gpus, visible: Option<&str>) -> Finding {
    if !gpus.seen() {
        let why = match &gpus.driver {
            Some(driver) => format!(
                "the NVIDIA driver {driver} is loaded, but no device can be opened: in a container start it with its \
                 GPUs (docker run --gpus all)"
            ),
            None => "no NVIDIA device and no driver on this machine; everything runs on the CPU".to_owned(),
        };
        return Finding::new(Level::Note, "cuda", why);
    }
    let devices = gpus.devices.join(", ");
    if let Some(driver) = gpus.outdated_driver() {
        let text = format!(
            "{devices}: driver {driver} is too old for CUDA 13.0, install version {MIN_DRIVER} or newer"
        );
        return Finding::new(Level::Note, "cuda", text);
    }
    if visible.is_some_and(|v| v.trim().is_empty() || v.trim() == "-1") {
        let text = format!("{devices}, hidden by CUDA_VISIBLE_DEVICES: unset it to use the GPU");
        return Finding::new(Level::Note, "cuda", text);
    }
    let driver = gpus.driver.as_deref().map(|d| format!(", driver {d}")).unwrap_or_default();
    Finding::new(Level::Ok, "cuda", format!("{devices}{driver}"))
}

/// What several ranks on GPUs and CUDA graphs need: where the variable says, or beside the program.
fn object() -> Finding {
    let named = env::var_os(cuda_object::VARIABLE).filter(|name| !name.is_empty());
    let file = match named {
        Some(name) => Ok(name.into()),
        None => runner::built("cm").map(|cm| cm.with_file_name(cuda_object::FILE)),
    };
    match file {
        Ok(file) if file.is_file() => Finding::new(Level::Ok, "graphs", file.display().to_string()),
        Ok(_) => {
            let text = "several ranks on GPUs, and --cuda-graph, need the CUDA object: run `cargo xtask cuda-object`";
            Finding::new(Level::Note, "graphs", text)
        }
        Err(why) => Finding::new(Level::Note, "graphs", one_line(&why)),
    }
}

fn disk(home: &Home, managed: Managed) -> Finding {
    let Some(free) = tools::free_bytes(&home.base) else {
        return Finding::new(Level::Note, "disk", "free space unknown (df is missing)");
    };
    let free_mb = free / 1_000_000;
    let (needed, _) = WheelSet::Lean.peak_and_final_mb();
    let text = format!("{:.1} GB free", free_mb as f64 / 1e3);
    if managed == Managed::Missing && free_mb < needed {
        return Finding::new(
            Level::Fault,
            "disk",
            format!("{text}, and the lean set needs {needed} MB: make room"),
        );
    }
    Finding::new(Level::Ok, "disk", text)
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or_else(|_| "unknown".to_owned(), |n| n.to_string());
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| memory_from(&text));
    match memory {
        Some((total, available)) => {
            format!("{cores} cores, {total:.1} GiB memory, {available:.1} GiB of it available")
        }
        None => format!("{cores} cores"),
    }
}

/// Total and available memory in GiB.
fn memory_from(meminfo: &str) -> Option<(f64, f64)> {
    let field = |name: &str| {
        let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib / f64::from(1 << 20))
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?))
}

/// Lets the built program say what it sees at run time; a program that is not built yet has nothing to say.
fn program_agrees() -> Result<bool> {
    let cm = runner::built("cm")?;
    if !cm.exists() {
        println!("\n{} is not built yet; `cargo xtask build` makes it", cm.display());
        return Ok(true);
    }
    println!("\ncm doctor:");
    Ok(runner::status_of(Command::new(cm).arg("doctor"))?.success())
}

fn one_line(why: &Error) -> String {
    format!("{why:#}").lines().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus(devices: &[&str], driver: Option<&str>) -> Gpus {
        Gpus { devices: devices.iter().map(|&d| d.to_owned()).collect(), driver: driver.map(str::to_owned) }
    }

    #[test]
    fn cuda_is_reported_with_the_reason_why_not() {
        let said = |g: &Gpus, v: Option<&str>| cuda(g, v).line();
        assert!(said(&gpus(&[], None), None).starts_with("note   cuda       no NVIDIA device"));
        assert!(said(&gpus(&[], Some("580.1")), None).contains("no device can be opened"));
        assert!(said(&gpus(&["/dev/nvidia0"], Some("570.1")), None).contains("driver 570.1 is too old"));
        assert!(said(&gpus(&["/dev/nvidia0"], None), Some("")).contains("CUDA_VISIBLE_DEVICES"));
        let good = said(&gpus(&["/dev/nvidia0"], Some("580.65")), Some("0"));
        assert_eq!(good, "ok     cuda       /dev/nvidia0, driver 580.65");
    }

    #[test]
    fn errors_become_faults_of_one_line() {
        let finding = Finding::from_result("rust", Err(Error::msg("a\nb").context("c")));
        assert_eq!(finding.line(), "FAULT  rust       c: a b");
    }

    #[test]
    fn memory_is_read_in_gib() {
        let text = "MemTotal:       2097152 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n";
        assert_eq!(memory_from(text), Some((2.0, 1.0)));
        assert_eq!(memory_from("nothing"), None);
    }

    #[test]
    fn an_absent_install_is_a_fault_and_python_then_matters() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home { base: dir.path().to_path_buf() };
        let mut findings = Vec::new();
        assert!(managed_findings(&home, &Gpus::default(), &mut findings) == Managed::Missing);
        assert_eq!(findings[0].line(), "FAULT  libtorch   not installed yet: run `cargo xtask setup`");
        crate::wheels::tests::fake_site(&home.site(), WheelSet::Lean, "2.11.0");
        findings.clear();
        let gpu = gpus(&["/dev/nvidia0"], None);
        assert!(managed_findings(&home, &gpu, &mut findings) == Managed::Ready);
        assert_eq!((findings[0].level, findings[1].level), (Level::Ok, Level::Note));
        assert!(findings[1].text.contains("the lean set has no CUDA libraries"));
    }
}
