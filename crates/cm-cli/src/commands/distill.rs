//! `cm distill`: a teacher, and the experiment that distils it.

use std::path::Path;

use anyhow::{Result, bail};
use cm_train::Method;

use super::train::{self, Data};
use crate::args::DistillArgs;
use crate::config::{PRESETS, Source};
use crate::exit::{Failure, OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::ranks::Ranks;
use crate::sources::{ModelSource, differences};
use crate::ui;

/// Runs `cm distill`.
pub fn distill(args: &DistillArgs, ranks: &Ranks) -> Outcome {
    let config = match (&args.config, &args.teacher) {
        (None, Some(teacher)) if !args.run.resume => {
            Some(preset_for(teacher, args.run.kind.as_deref()).or_usage()?)
        }
        (config, _) => config.clone(),
    };
    let (mut experiment, folder) = train::read(config.as_deref(), &args.run).or_usage()?;
    if let Some(teacher) = &args.teacher {
        let source = ModelSource::at(teacher, args.run.kind.as_deref()).or_usage()?;
        match experiment.train.recipe().method() {
            Method::Distillation(_) | Method::Progressive { .. } => experiment.teacher = Some(source),
            // Consistency training has no teacher at its side; it starts from its weights.
            Method::Consistency => experiment.init = Some(source),
            Method::Denoising => {
                return Err(Failure::Usage(anyhow::anyhow!(
                    "experiment {}: it trains a diffusion model, which distils nothing; train it further with cm train \
                     --init-from",
                    experiment.name
                )));
            }
        }
    }
    train::start(experiment, &folder, Data { given: args.data.as_deref(), fetch: true }, &args.run, ranks)
}

/// The preset of consistency distillation as the paper has it (they are named `…-cd`) that fits a teacher.
fn preset_for(teacher: &Path, kind: Option<&str>) -> Result<String> {
    let file = ModelSource::at(teacher, kind)?.read()?;
    let mut fitting = Vec::new();
    for (name, _) in PRESETS {
        let experiment = Experiment::read(&Source::find(name)?, &[])?;
        if differences(&file.spec.net, &file.spec.precond, &experiment).is_empty() {
            fitting.push((*name, experiment.train.recipe().method()));
        }
    }
    fitting.retain(|(_, method)| *method != Method::Denoising);
    let distils =
        |(name, method): &&(&str, Method)| matches!(method, Method::Distillation(_)) && name.ends_with("-cd");
    let choices: Vec<&str> = fitting.iter().filter(distils).map(|(name, _)| *name).collect();
    let path = teacher.display();
    match (choices.as_slice(), fitting.as_slice()) {
        ([one], _) => {
            ui::say(&format!(
                "config: preset {one}, which distils networks such as {path}; --config chooses another"
            ));
            Ok((*one).to_owned())
        }
        ([], []) => bail!(
            "{path}: no preset has a network like it; write an experiment of your own, from the output of \
             cm preset show cifar10-cd and of cm model info {path}, and name it with --config"
        ),
        ([], others) => bail!(
            "{path}: no preset of consistency distillation has a network like it; name one of those that can \
             start from it with --config: {}",
            names(others)
        ),
        (several, _) => bail!("{path}: several presets fit it; choose with --config: {}", several.join(", ")),
    }
}

fn names(presets: &[(&str, Method)]) -> String {
    presets.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}
