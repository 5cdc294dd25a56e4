//! The commands, their arguments and their help.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};

use crate::race::Size;
use crate::{ci, cuda_object, doctor, exports, fuzz, race, runner, setup, soak, tidy, tools, torture};

/// Set libtorch up, then build, test, train and sample with it.
///
/// Every command but `env`, `doctor`, `cuda-object` and `tidy` first makes sure that libtorch is in place, so on a fresh machine
/// `cargo xtask demo` or `cargo xtask test` is all that is needed.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, arg_required_else_help = true)]
#[command(after_help = "Environment:
  LIBTORCH              use this libtorch (2.11.0, a folder with include/ and lib/) and install none
  LIBTORCH_USE_PYTORCH  use the torch of the active Python and install none
  PYTHON                the interpreter whose pip installs (default: python3)")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the pinned libtorch into .libtorch/ (nothing is done when it is there and whole)
    #[command(after_help = "Examples:
  cargo xtask setup                   lean CPU set, or the CUDA set where an NVIDIA GPU is seen
  cargo xtask setup --cuda            the CUDA set, on any machine
  cargo xtask setup --python          also a Python that can `import torch`
  cargo xtask setup --dir /opt/torch  elsewhere, to be shared by several checkouts")]
    Setup(SetupArgs),

    /// Print the exports with which other workspaces build against this libtorch and run what they built
    #[command(after_help = "Example:
  eval \"$(cargo xtask env)\"         here; then cargo build or cargo run, in any folder")]
    Env,

    /// Say what this machine has, what is missing and what to do about it (exit code 1 if work is blocked)
    Doctor,

    /// Build the workspace (cargo build --release)
    #[command(after_help = "Examples:
  cargo xtask build
  cargo xtask build -p cm-cli")]
    Build(Rest),

    /// Build libcm_cuda.so, which several ranks on GPUs and CUDA graphs need, beside the programs (needs CUDA's headers,
    /// but no GPU)
    #[command(name = "cuda-object")]
    #[command(after_help = "Examples:
  cargo xtask setup --cuda && cargo xtask cuda-object
  cargo xtask cuda-object --torch ENV/lib/python3.12/site-packages/torch --out DIR/libcm_cuda.so

Programs find it beside themselves, or where CM_CUDA_OBJECT says; one of other sources is refused.")]
    CudaObject(CudaObjectArgs),

    /// Run every test (cargo test --release)
    #[command(after_help = "Examples:
  cargo xtask test
  cargo xtask test -p cm-schedule
  cargo xtask test -- --nocapture")]
    Test(Rest),

    /// Run the benches (cargo bench, in the release profile)
    #[command(after_help = "Examples:
  cargo xtask bench
  cargo xtask bench -p cm-torch --bench optimizer
  cargo xtask bench -- --save-baseline before")]
    Bench(Rest),

    /// Check this project against numbers recorded from the reference implementations
    #[command(after_help = "Examples:
  cargo xtask golden                  the files under tests/golden
  cargo xtask golden --dir DIR        all the files in DIR
  cargo xtask golden --dir DIR --only 03

All arguments go to `cm-golden`.")]
    Golden(Rest),

    /// Train a small consistency model on the bundled digits and sample it in one step
    #[command(after_help = "Examples:
  cargo xtask demo
  cargo xtask demo --out /tmp/demo
  cargo xtask demo --recipe cd        by distillation; also ct, ict, ect, pd and all
  cargo xtask demo --data emoji       32×32 colour pictures, up to 30 minutes

All arguments go to `cm demo`; `cargo xtask cm demo --help` lists them.")]
    Demo(Rest),

    /// Draw the gallery: every zero-shot edit, with the committed model of emoji
    #[command(after_help = "Examples:
  cargo xtask gallery
  cargo xtask gallery --model runs/emoji-gallery --out out/gallery

All arguments go to `cm gallery`; `cargo xtask cm gallery --help` lists them.")]
    Gallery(Rest),

    /// Make the paper's comparisons on a data set: train, measure, judge the claims, draw
    #[command(after_help = "Examples:
  cargo xtask report --quick          12 minutes on two cores; into out/report
  cargo xtask report                  three seeds of every trial: hours
  cargo xtask report --publish        also into docs/

All arguments go to `cm report`; `cargo xtask cm report --help` lists them.")]
    Report(Rest),

    /// Train on CIFAR-10 with the settings of the paper
    #[command(name = "train-cifar10")]
    #[command(after_help = "Examples:
  cargo xtask train-cifar10 --dry-run
  cargo xtask train-cifar10 --data DIR --out runs/cifar10
  cargo xtask train-cifar10 --out runs/cifar10 --resume

All arguments go to `cm train-cifar10`; `cargo xtask cm train-cifar10 --help` lists them.")]
    TrainCifar10(Rest),

    /// Train an EDM diffusion model, the teacher of a distillation
    #[command(name = "train-teacher")]
    #[command(after_help = "Examples:
  cargo xtask train-teacher --dry-run
  cargo xtask train-teacher --data DIR --out runs/edm

All arguments go to `cm train-teacher`; `cargo xtask cm train-teacher --help` lists them.")]
    TrainTeacher(Rest),

    /// Distil a diffusion model into a consistency model
    #[command(after_help = "Examples:
  cargo xtask distill --teacher edm.safetensors --data DIR --out runs/cd
  cargo xtask distill --teacher runs/edm --config cifar10-cd --set train.metric=l2
  cargo xtask distill --config imagenet64-cd --dry-run

All arguments go to `cm distill`; `cargo xtask cm distill --help` lists them.")]
    Distill(Rest),

    /// Start several processes on this machine that train one model together
    #[command(after_help = "Examples:
  cargo xtask launch --nproc 2 -- train --config digits-ct --out runs/digits
  cargo xtask launch --nproc 4 -- train --out runs/digits --resume

All arguments go to `cm launch`; `cargo xtask cm launch --help` lists them.")]
    Launch(Rest),

    /// Download published weights, such as those of the metric LPIPS
    #[command(after_help = "Examples:
  cargo xtask fetch lpips             into data/lpips, where training looks for them
  cargo xtask fetch lpips --net all

All arguments go to `cm fetch`; `cargo xtask cm fetch --help` lists them.")]
    Fetch(Rest),

    /// Build the program cm and call it
    #[command(after_help = "Examples:
  cargo xtask cm --help
  cargo xtask cm sample model.safetensors --seeds 0-63")]
    Cm(CmArgs),

    /// Check the crate graph and the sources against the rules of docs/architecture.md
    Tidy,

    /// Kill, starve and damage a small training run in every way, and hold what it ends in against an undisturbed one
    #[command(after_help = "Examples:
  cargo xtask torture                 200 kills and all faults, some minutes
  cargo xtask torture --quick         24 kills and all faults, about a minute
  cargo xtask torture --kills 1000 --seed 7
  cargo xtask torture --only 'write errors'

A table at the end, and torture.json in the folder; exit code 1 if anything did not hold, and the runs stay then.")]
    Torture(TortureArgs),

    /// Train for hours and watch memory, file handles and steps a second: all must stay flat
    #[command(after_help = "Examples:
  cargo xtask soak                            two hours of digits
  cargo xtask soak --hours 0.1 --config emoji-ect --out out/short")]
    Soak(SoakArgs),

    /// Race this project against PyTorch on the same work, in turns, and hold every ratio against its target
    #[command(after_help = "Examples:
  cargo xtask race                    the small network, against all peers
  cargo xtask race --size cifar10 --against a,b
  cargo xtask race --rows ct,sample-1 --pairs 3 --seconds 0.5
  cargo xtask race --size cifar10 --rows update,fid --publish

Peers: a is eager PyTorch in float32 as the public references run it, b the same with channels-last, bf16 autocast and
fused updates, c is b under torch.compile, d diffusers. The first call installs them (5.3 GB). Writes race.json and
race.md; exit code 1 if a target was missed or a row could not be measured. docs/performance.md says more.")]
    Race(RaceArgs),

    /// Fuzz the parsers of outside bytes, guided by what of their code the bytes reach
    #[command(after_help = "Examples:
  cargo xtask fuzz                    every target, a million executions each
  cargo xtask fuzz torch --runs 10000000

Needs a nightly compiler and cargo-fuzz; what is missing is named with the command that installs it. What is found lies
under fuzz/artifacts/TARGET, and `cargo +nightly fuzz run TARGET FILE` shows it again.")]
    Fuzz(FuzzArgs),

    /// Run what CI runs: setup, formatting, tidy, clippy, docs, tests, golden numbers, fast forms against plain ones, a short demo and report, a tortured run, a project outside
    #[command(after_help = "Examples:
  cargo xtask ci
  cargo xtask ci --golden DIR         where the full set of golden files lies
  cargo xtask ci --only outside       a project of its own that uses the library")]
    Ci(CiArgs),
}

/// Where and what to install.
#[derive(Args)]
pub struct SetupArgs {
    /// Install the set with all CUDA libraries (4.0 GB), also where no GPU is seen
    #[arg(long)]
    pub cuda: bool,
    /// Also make .libtorch/python, a virtual environment that can `import torch` (5.0 GB; never used for linking)
    #[arg(long)]
    pub python: bool,
    /// Install again even if what is there is whole
    #[arg(long)]
    pub force: bool,
    /// Install under DIR instead of .libtorch/ of this checkout
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// What the object is built against, and where it goes.
#[derive(Args)]
pub struct CudaObjectArgs {
    /// The torch folder of an environment with all CUDA wheels [default: LIBTORCH, .libtorch/site or .libtorch/python]
    #[arg(long, value_name = "DIR")]
    pub torch: Option<PathBuf>,
    /// The file to make [default: libcm_cuda.so beside the programs]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Arguments that are passed on.
#[derive(Args)]
struct Rest {
    /// Passed on unchanged
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

/// Like [`Rest`], but `--help` belongs to cm as well.
#[derive(Args)]
#[command(disable_help_flag = true)]
struct CmArgs {
    /// Arguments of cm
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    args: Vec<OsString>,
}

/// How long a run is to be tortured.
#[derive(Args)]
pub struct TortureArgs {
    /// Fewer kills
    #[arg(long)]
    pub quick: bool,
    /// How many times the run is killed
    #[arg(long, value_name = "N")]
    pub kills: Option<usize>,
    /// One kind of fault alone, by its name in the table
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(torture::names()))]
    pub only: Option<String>,
    /// Where the moments of the kills come from
    #[arg(long, value_name = "N", default_value = "1")]
    pub seed: u64,
    /// Folder for the runs and the result
    #[arg(long, value_name = "DIR", default_value = "out/torture")]
    pub out: PathBuf,
}

/// What is soaked, and how long.
#[derive(Args)]
pub struct SoakArgs {
    /// How long it trains
    #[arg(long, value_name = "HOURS", default_value = "2")]
    pub hours: f64,
    /// The experiment: a preset or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "digits-ect")]
    pub config: String,
    /// A setting of it that differs, as of `cm train`
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Folder for the run and the result
    #[arg(long, value_name = "DIR", default_value = "out/soak")]
    pub out: PathBuf,
}

/// What is raced, against what.
#[derive(Args)]
pub struct RaceArgs {
    /// Which networks
    #[arg(long, value_enum, default_value = "tiny")]
    pub size: Size,
    /// Where to compute: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// These rows alone [default: all]
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    pub rows: Vec<String>,
    /// The peers to race against
    #[arg(long, value_name = "PEERS", value_delimiter = ',', default_value = "a,b,c,d")]
    pub against: Vec<String>,
    /// Rounds in which every side has its turn
    #[arg(long, value_name = "N", default_value = "7")]
    pub pairs: usize,
    /// Seconds of a turn, or one piece of work if that takes longer
    #[arg(long, value_name = "SECONDS", default_value = "1.0")]
    pub seconds: f64,
    /// Threads of every side [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Images in a training step [default: 128 for tiny, else 64 on a GPU and 8 on a CPU]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// What this project and peers b and c compute in (a and d: fp32)
    #[arg(long, default_value = "bf16", value_parser = PossibleValuesParser::new(["fp32", "bf16"]))]
    pub dtype: String,
    /// Change a setting of this project's experiments, as for `cm train`
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Folder for the files of the race and its result
    #[arg(long, value_name = "DIR", default_value = "out/race")]
    pub out: PathBuf,
    /// Put the rows into docs/race and docs/performance.md too, in place of the same rows there
    #[arg(long)]
    pub publish: bool,
    /// This program instead of the one that is built here
    #[arg(long, value_name = "FILE")]
    pub cm: Option<PathBuf>,
    /// This interpreter, with torch, numpy, safetensors, diffusers, pillow and scipy, instead of the peers' own
    #[arg(long, value_name = "FILE")]
    pub python: Option<PathBuf>,
}

/// What is fuzzed, and how long.
#[derive(Args)]
pub struct FuzzArgs {
    /// One target alone
    #[arg(value_name = "TARGET", value_parser = PossibleValuesParser::new(fuzz::targets()))]
    pub target: Option<String>,
    /// Executions of each target
    #[arg(long, value_name = "N", default_value = "1000000")]
    pub runs: u64,
    /// Folder for the inputs that reach new code, which later calls begin with
    #[arg(long, value_name = "DIR", default_value = "out/fuzz")]
    pub corpus: PathBuf,
}

/// What CI is to check.
#[derive(Args)]
pub struct CiArgs {
    /// Folder with the full set of golden files; left out where it does not exist
    #[arg(long, value_name = "DIR")]
    pub golden: Option<PathBuf>,
    /// Run this step alone (and setup); may be given several times
    #[arg(long, value_name = "STEP", value_parser = PossibleValuesParser::new(ci::step_names()))]
    pub only: Vec<String>,
}

/// Runs one command and returns its exit code.
pub fn run(cli: Cli) -> Result<u8> {
    match cli.command {
        Command::Setup(args) => setup::run(&args),
        Command::Env => exports::run(),
        Command::Doctor => doctor::run(),
        Command::CudaObject(args) => cuda_object::run(&args),
        Command::Tidy => tidy::run(),
        Command::Race(args) => race::run(args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Torture(args) => torture::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::Ci(args) => ci::run(&args),
        Command::Build(rest) => runner::cargo_on_workspace(&["build", "--release"], rest.args),
        Command::Test(rest) => runner::cargo_on_workspace(&["test", "--release"], rest.args),
        Command::Bench(rest) => {
            runner::cargo_on_workspace(&["bench", "--profile", "release"], bench_arguments(rest.args))
        }
        Command::Golden(rest) => runner::program("cm-golden", &[], golden_arguments(rest.args)),
        Command::Demo(rest) => runner::program("cm", &["demo"], rest.args),
        Command::Gallery(rest) => runner::program("cm", &["gallery"], rest.args),
        Command::Report(rest) => runner::program("cm", &["report"], rest.args),
        Command::TrainCifar10(rest) => runner::program("cm", &["train-cifar10"], rest.args),
        Command::TrainTeacher(rest) => runner::program("cm", &["train-teacher"], rest.args),
        Command::Distill(rest) => runner::program("cm", &["distill"], rest.args),
        Command::Launch(rest) => runner::program("cm", &["launch"], rest.args),
        Command::Fetch(rest) => runner::program("cm", &["fetch"], rest.args),
        Command::Cm(cm) => runner::program("cm", &[], cm.args),
    }
}

/// Adds the committed files if no folder is named.
fn golden_arguments(mut args: Vec<OsString>) -> Vec<OsString> {
    let names_folder = |arg: &OsString| arg == "--dir" || arg.to_string_lossy().starts_with("--dir=");
    if !args.iter().any(names_folder) {
        args.extend(["--dir".into(), tools::workspace_root().join("tests/golden").into_os_string()]);
    }
    args
}

/// Selects the benches alone if none is named: unit tests, which cargo would call too, do not know criterion's options.
fn bench_arguments(mut args: Vec<OsString>) -> Vec<OsString> {
    let names_bench = |arg: &OsString| arg.to_string_lossy().starts_with("--bench");
    if !args.iter().take_while(|arg| *arg != "--").any(names_bench) {
        args.splice(0..0, ["--bench".into(), "*".into()]);
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn benches_alone_are_selected_unless_named() {
        let of = |args: &[&str]| bench_arguments(args.iter().map(OsString::from).collect());
        assert_eq!(
            of(&["-p", "cm-torch", "--", "--bench"]),
            ["--bench", "*", "-p", "cm-torch", "--", "--bench"]
        );
        for named in [["--bench", "noise"], ["--benches", "x"]] {
            assert_eq!(of(&named), named);
        }
    }

    #[test]
    fn golden_files_are_the_committed_ones_unless_named() {
        for named in [vec!["--dir", "D"], vec!["--only", "03", "--dir=D"]] {
            let named: Vec<OsString> = named.into_iter().map(OsString::from).collect();
            assert_eq!(golden_arguments(named.clone()), named);
        }
        let added = golden_arguments(vec!["--only".into(), "03".into()]);
        assert_eq!(added[2], "--dir");
        assert!(std::path::Path::new(&added[3]).ends_with("tests/golden"));
    }

    #[test]
    fn arguments_of_cm_pass_through() {
        let cli = Cli::try_parse_from(["xtask", "demo", "--seconds", "60", "--out", "o", "--help"]).unwrap();
        let Command::Demo(rest) = cli.command else { panic!("not a demo") };
        assert_eq!(rest.args, ["--seconds", "60", "--out", "o", "--help"]);
        let cli = Cli::try_parse_from(["xtask", "fetch", "lpips", "--net", "all"]).unwrap();
        let Command::Fetch(rest) = cli.command else { panic!("not a fetch") };
        assert_eq!(rest.args, ["lpips", "--net", "all"]);
        let words = ["--nproc", "2", "--", "train", "--config", "c.toml"];
        let cli = Cli::try_parse_from([&["xtask", "launch"], &words[..]].concat()).unwrap();
        let Command::Launch(rest) = cli.command else { panic!("not a launch") };
        assert_eq!(rest.args, words);
        for (given, passed) in
            [(vec!["xtask", "cm", "--help"], vec!["--help"]), (vec!["xtask", "cm", "--", "-V"], vec!["-V"])]
        {
            let Command::Cm(cm) = Cli::try_parse_from(given).unwrap().command else { panic!("not cm") };
            assert_eq!(cm.args, passed);
        }
    }
}
