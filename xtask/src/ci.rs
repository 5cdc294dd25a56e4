//! `cargo xtask ci`: the steps of continuous integration, each with its time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cli::CiArgs;
use crate::runner::{built, cargo, code_of, status_of};
use crate::{setup, tidy, tools};

/// The whole run, from a bare clone on 2 cores, is to stay below this.
const BUDGET: Duration = Duration::from_secs(25 * 60);

/// How one step ended.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Passed,
    Failed(String),
    /// Not run, and why that is no failure.
    LeftOut(String),
}

struct Step {
    name: &'static str,
    outcome: Outcome,
    took: Duration,
}

/// What a step does in the workspace's root; the golden files may lie elsewhere.
type Work = fn(&Path, &Path) -> Result<Outcome>;

/// The steps behind `setup`, cheapest first where that is possible.
const STEPS: &[(&str, Work)] = &[
    ("fmt", |root, _| command(cargo(&["fmt", "--all", "--check"]).current_dir(root))),
    ("tidy", |_, _| {
        Ok(if tidy::run()? == 0 { Outcome::Passed } else { Outcome::Failed("see above".to_owned()) })
    }),
    ("clippy", |_, _| {
        let clippy =
            ["clippy", "--release", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        command(&mut cargo(&clippy))
    }),
    ("doc", |_, _| {
        let mut doc = cargo(&["doc", "--release", "--workspace", "--no-deps", "--locked"]);
        command(doc.env("RUSTDOCFLAGS", "-D warnings"))
    }),
    // The command of the README, as a user gives it.
    ("test", |root, _| command(cargo_xtask(root).arg("test"))),
    ("golden", check_golden),
    // The fast forms against the plain ones: below a recorded ratio it fails.
    ("speed", |_, _| {
        command(&mut cargo(&[
            "bench",
            "--profile",
            "release",
            "--workspace",
            "--locked",
            "--bench",
            "fast_paths",
        ]))
    }),
    ("demo", |root, _| demo(root)),
    ("report", |root, _| report(root)),
    ("torture", |root, _| {
        let out = built("xtask")?.with_file_name("ci-torture");
        command(cargo_xtask(root).args(["torture", "--quick", "--out"]).arg(out))
    }),
    ("outside", |root, _| outside(root)),
    ("publish", |root, _| publish(root)),
];

/// Their names.
pub fn step_names() -> Vec<&'static str> {
    STEPS.iter().map(|(name, _)| *name).collect()
}

/// Runs all steps; those after a failure run too, so that one run tells all, except that nothing runs without
/// libtorch.
pub fn run(args: &CiArgs) -> Result<u8> {
    let root = tools::workspace_root();
    let golden = args.golden.clone().unwrap_or_else(|| root.join("../shared/golden"));
    let start = Instant::now();
    let mut steps = vec![timed("setup", || setup::ensure().map(|()| Outcome::Passed))];
    if steps[0].outcome == Outcome::Passed {
        let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
        for (name, step) in STEPS.iter().filter(|(name, _)| wanted(name)) {
            steps.push(timed(name, || step(&root, &golden)));
        }
    }
    print!("{}", summary(&steps, start.elapsed()));
    Ok(u8::from(steps.iter().any(|s| matches!(s.outcome, Outcome::Failed(_)))))
}

fn timed(name: &'static str, step: impl FnOnce() -> Result<Outcome>) -> Step {
    println!("\n==> {name}");
    let start = Instant::now();
    let outcome = step().unwrap_or_else(|why| Outcome::Failed(format!("{why:#}")));
    let took = start.elapsed();
    if let Outcome::Failed(why) = &outcome {
        eprintln!("error: {name}: {why}");
    }
    println!("<== {name} {:.1} s", took.as_secs_f64());
    Step { name, outcome, took }
}

/// Runs a command with its output shown.
fn command(command: &mut Command) -> Result<Outcome> {
    let status = status_of(command)?;
    Ok(if status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("exit code {}", code_of(status)))
    })
}

/// This program, called as the alias calls it.
fn cargo_xtask(root: &Path) -> Command {
    let mut command = cargo(&["run", "--release", "--package", "xtask", "--"]);
    command.current_dir(root);
    command
}

fn check_golden(root: &Path, folder: &Path) -> Result<Outcome> {
    if !folder.is_dir() {
        let why = format!("{} is not here; the committed files ran with the tests", folder.display());
        return Ok(Outcome::LeftOut(why));
    }
    command(cargo_xtask(root).args(["golden", "--dir"]).arg(folder))
}

/// An empty place beside this program.
fn place(name: &str) -> Result<PathBuf> {
    let out: PathBuf = built("xtask")?.with_file_name(name);
    if out.exists() {
        fs::remove_dir_all(&out).with_context(|| format!("cannot remove {}", out.display()))?;
    }
    Ok(out)
}

/// The comparisons in their shortest form: that they run, and say something of every claim that they can.
fn report(root: &Path) -> Result<Outcome> {
    let mut report = cargo_xtask(root);
    command(report.args(["report", "--smoke", "--out"]).arg(place("ci-report")?))
}

/// A minute of training must already beat a Gaussian with the data's mean and covariance.
fn demo(root: &Path) -> Result<Outcome> {
    let out = place("ci-demo")?;
    let mut demo = cargo_xtask(root);
    command(demo.args(["demo", "--seconds", "60", "--check", "ci", "--out"]).arg(out))
}

/// A project outside of this workspace, built and run from another folder with nothing but the lines of
/// `cargo xtask env`. It shares the target folder, and so libtorch's bindings as far as features are the same.
fn outside(root: &Path) -> Result<Outcome> {
    let project = root.join("tests/downstream");
    // Its own lock file would fall behind; cargo takes out of this one what it needs.
    fs::copy(root.join("Cargo.lock"), project.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    let lines = cargo_xtask(root).arg("env").output().context("cannot start cargo xtask env")?;
    if !lines.status.success() {
        let why = String::from_utf8_lossy(&lines.stderr);
        return Ok(Outcome::Failed(why.lines().last().unwrap_or_default().to_owned()));
    }
    let release = built("xtask")?;
    let target = release.ancestors().nth(2).context("this program lies in no target folder")?;
    let elsewhere = target.join("ci-outside");
    if elsewhere.exists() {
        fs::remove_dir_all(&elsewhere).with_context(|| format!("cannot empty {}", elsewhere.display()))?;
    }
    fs::create_dir(&elsewhere).with_context(|| format!("cannot make {}", elsewhere.display()))?;
    let script = format!("set -e\n{}\n{OUTSIDE}", String::from_utf8_lossy(&lines.stdout));
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(script).arg(cargo(&["build"]).get_program()).arg(project.join("Cargo.toml"));
    shell.current_dir(elsewhere).env("CARGO_TARGET_DIR", target);
    for name in ["LIBTORCH", "LIBTORCH_USE_PYTORCH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"] {
        shell.env_remove(name);
    }
    command(&mut shell)
}

/// What a user types after `eval "$(cargo xtask env)"`; `$0` is cargo, `$1` the manifest. The program is called
/// once more by itself, since the lines are to serve what was built too.
const OUTSIDE: &str = r#"
"$0" build --release --manifest-path "$1"
"$0" run --release --manifest-path "$1" -p downstream-bare
"$CARGO_TARGET_DIR/release/downstream-picture" picture.ppm
test -s picture.ppm
"#;

/// What would be published. Nothing is compiled: the crates are those that were tested, and compiling what was packed
/// would compile libtorch's bindings once more.
fn publish(root: &Path) -> Result<Outcome> {
    let mut publish =
        cargo(&["publish", "--workspace", "--dry-run", "--no-verify", "--allow-dirty", "--locked"]);
    command(publish.current_dir(root))
}

fn summary(steps: &[Step], total: Duration) -> String {
    let mut text = "\nsummary\n".to_owned();
    for step in steps {
        let result = match &step.outcome {
            Outcome::Passed => "passed".to_owned(),
            Outcome::Failed(why) => format!("FAILED  {why}"),
            Outcome::LeftOut(why) => format!("left out  {why}"),
        };
        text += &format!("  {:<8} {:>7.1} s  {result}\n", step.name, step.took.as_secs_f64());
    }
    let over = if total > BUDGET { ", over the budget" } else { "" };
    let budget = BUDGET.as_secs();
    text + &format!("  {:<8} {:>7.1} s of {budget}{over}\n", "total", total.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_every_step_and_an_overrun() {
        let step = |name, outcome| Step { name, outcome, took: Duration::from_millis(1500) };
        let steps = [
            step("fmt", Outcome::Passed),
            step("test", Outcome::Failed("exit code 101".to_owned())),
            step("golden", Outcome::LeftOut("not here".to_owned())),
        ];
        let text = summary(&steps, Duration::from_secs(1600));
        for line in [
            "  fmt          1.5 s  passed\n",
            "  test         1.5 s  FAILED  exit code 101\n",
            "  golden       1.5 s  left out  not here\n",
            "  total     1600.0 s of 1500, over the budget\n",
        ] {
            assert!(text.contains(line), "{line:?} in {text}");
        }
        assert!(!summary(&steps, Duration::from_secs(60)).contains("over"));
    }

    #[test]
    fn absent_golden_files_are_left_out_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = check_golden(dir.path(), &dir.path().join("none")).unwrap();
        assert!(matches!(outcome, Outcome::LeftOut(why) if why.contains("is not here")));
    }

    #[cfg(unix)]
    #[test]
    fn a_failing_command_fails_its_step() {
        let sh = |script: &str| command(Command::new("sh").args(["-c", script])).unwrap();
        assert_eq!(sh("exit 0"), Outcome::Passed);
        assert_eq!(sh("exit 3"), Outcome::Failed("exit code 3".to_owned()));
    }
}
