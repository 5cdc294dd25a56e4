//! What the command reads of what others wrote, for the fuzzer: each says what is wrong in one line, or nothing.

use std::path::PathBuf;

use cm_torch::device::DeviceSpec;

use crate::args::SeedRange;
use crate::commands::sweep::plan::plan;
use crate::config::Source;
use crate::exit::Failure;
use crate::experiment::Experiment;

fn said<T>(result: anyhow::Result<T>) -> Option<String> {
    result.err().map(|error| Failure::Usage(error).to_string())
}

/// An experiment, in the file of `--config`.
pub fn experiment(path: PathBuf) -> Option<String> {
    said(Source::file(path).and_then(|source| Experiment::read(&source, &[])))
}

/// One text as the value of every argument that has a grammar: `--set`, `--sweep`, `--seeds`, `--device`.
pub fn arguments(text: &str) -> Vec<String> {
    let preset = Source::find("digits-ct");
    let changed = preset.and_then(|preset| Experiment::read(&preset, &[text.to_owned()]));
    let sweep = said(plan(&[text.to_owned()]));
    let seeds = text.parse::<SeedRange>().err();
    let device = text.parse::<DeviceSpec>().err().map(|error| error.to_string());
    [said(changed), sweep, seeds, device].into_iter().flatten().collect()
}
