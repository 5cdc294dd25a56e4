//! Options of `cm launch`.

use std::ffi::OsString;

use clap::Args;

/// How ranks are started.
pub const LAUNCH_EXAMPLES: &str = "\
Examples:
  cm launch --nproc 2 -- train --config digits-ct --out runs/digits
  cm launch --nproc 4 -- train --out runs/digits --resume        (any number of ranks goes on)
  OMP_NUM_THREADS=8 cm launch --nproc 4 -- train-teacher --data ~/cifar --device cpu
  cm launch --nproc 4 -- sample runs/digits --seeds 0-49999
  cm launch --nproc 4 -- eval runs/digits

One rank alone sees no other: --nproc 1 is the command without launch. On several machines, torchrun --no-python or
srun start the ranks: docs/scaling.md.";

/// Options of `cm launch`.
#[derive(Debug, Args)]
pub struct LaunchArgs {
    /// Number of processes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub nproc: u16,
    /// Port on which they meet [default: one that is free].
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// The command that each of them runs: train, train-teacher, train-cifar10, distill, sample or eval, with its options.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}
