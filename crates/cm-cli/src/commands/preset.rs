//! `cm preset`: the built-in experiments.

use crate::args::PresetCommand;
use crate::config::{PRESETS, Source};
use crate::exit::{OrUsage, Outcome};
use crate::experiment::Experiment;

/// Runs `cm preset …`.
pub fn preset(command: &PresetCommand) -> Outcome {
    match command {
        PresetCommand::List => {
            for (name, _) in PRESETS {
                let experiment = Experiment::read(&Source::find(name)?, &[])?;
                println!(
                    "{name:<30} {} parameters, {} steps of {} images",
                    experiment.network.num_parameters()?,
                    experiment.train.total_steps,
                    experiment.train.batch
                );
            }
        }
        PresetCommand::Show { name } => print!("{}", Source::find(name).or_usage()?.text()),
    }
    Ok(())
}
