//! `cm search-ts`: the time points of multistep sampling, by greedy ternary search against a score.

pub mod log;
mod score;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_data::{Fit, LabelRule, SourceKind, SourceSpec};
use cm_model::{Compute, ConsistencyFn, ImageShape, TensorMap};
use cm_net::ModelSpec;
use cm_net::import::NUM_SCALES;
use cm_sampler::search::{Scored, TimeSearch};
use cm_sampler::{Method, Request, Times};
use log::{Log, Settings};
use score::Score;

use super::session;
use crate::args::{ScoreKind, SearchArgs};
use crate::config::Source;
use crate::exit::{OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::runs::CONFIG_FILE;
use crate::sources::ModelSource;
use crate::ui::{Bar, clock};

/// Points of the grid where neither the command nor the model says how many: those of the published time points.
const GRID: usize = 40;

/// Runs `cm search-ts`.
pub fn search_ts(args: &SearchArgs) -> Outcome {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref()).or_usage()?;
    let (path, file) = (&source.path, source.read().or_usage()?);
    let steps = args.steps.map_or_else(|| grid_of(&file.spec), Ok).or_usage()?;
    let search = TimeSearch::new(args.points, steps).or_usage()?;
    let device = session::device(&args.device).or_usage()?;
    let f = file.model(device, Compute::default()).and_then(cm_net::Model::into_consistency);
    let f = f.with_context(|| path.display().to_string()).or_usage()?;
    let data = data_of(args, f.shape()).or_usage()?;
    let set = data.open().or_usage()?;
    let score = Score::of(args, set.as_ref(), f.shape(), device).or_usage()?;
    let settings = Settings {
        model: checksum(&file.tensors),
        steps,
        rho: file.spec.precond.rho,
        score: args.score,
        judge: score.judge().map(str::to_owned),
        samples: args.samples,
        data: format!("{}, {} images", set.source(), set.len()),
    };
    let at = args.log.clone().unwrap_or_else(|| beside(path, args.score, steps));
    let mut log = Log::open(&at, &settings).or_usage()?;
    eprintln!("log: {} ({} evaluations known)", at.display(), log.known.len());
    let sampler = Sampler { f: f.as_ref(), args, steps, rho: settings.rho };
    let most = search.most_evaluations();
    let mut known = std::mem::take(&mut log.known);
    let started = std::time::Instant::now();
    let mut count = 0;
    let found = search.run(&mut known, |ts| -> Result<f64> {
        count += 1;
        let score = sampler.score(ts, &score)?;
        log.write(&Scored { ts: ts.to_vec(), score })?;
        let took = clock(started.elapsed().as_secs_f64());
        eprintln!("{count} of at most {most}: ts {} gives {score:.6} ({took})", list(ts));
        Ok(score)
    })?;
    let value = found.score.map(|score| format!(", with a score of {score:.6}")).unwrap_or_default();
    println!("best: {}{value}", list(&found.ts));
    println!("use:  {}", command(args, &found.ts, steps));
    Ok(())
}

/// What samples the same model with the points `ts`, for a shell.
fn command(args: &SearchArgs, ts: &[usize], steps: usize) -> String {
    let quoted = |text: &str| match text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./:=,~+".contains(c))
    {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    };
    let mut words = format!("cm sample {}", quoted(&args.model.to_string_lossy()));
    for (option, value) in [("--as", &args.kind), ("--ema", &args.ema)] {
        if let Some(value) = value {
            words += &format!(" {option} {}", quoted(value));
        }
    }
    format!("{words} --sampler multistep --ts {} --steps {steps}", list(ts))
}

fn grid_of(spec: &ModelSpec) -> Result<usize> {
    let Some(said) = spec.about.get(NUM_SCALES) else { return Ok(GRID) };
    said.parse().with_context(|| format!("the model says {NUM_SCALES} = {said}: expected a number"))
}

/// What the samples are to come near to.
fn data_of(args: &SearchArgs, shape: ImageShape) -> Result<SourceSpec> {
    let config = args.model.join(CONFIG_FILE);
    let mut spec = match &args.data {
        Some(path) => {
            let kind = cm_data::inspect::detect(path)?;
            let bundled = matches!(kind, SourceKind::Digits | SourceKind::Emoji);
            SourceSpec::new(kind, (!bundled).then(|| path.clone()))
        }
        None if config.is_file() => Experiment::read(&Source::find(&config.to_string_lossy())?, &[])?.data,
        None => bail!(
            "--data: the images to come near to are missing; expected digits, emoji, or a folder or file of images \
             (a run folder brings its own)"
        ),
    };
    if spec.labels == LabelRule::None {
        // The run does without them; a classifier learns from them.
        spec.labels = LabelRule::Auto;
    }
    if args.data.is_some() {
        spec.resolution = usize::try_from(shape.height).ok();
        spec.fit = Fit::CenterCrop;
        spec.channels =
            Some(if shape.channels == 1 { cm_data::Channels::Grey } else { cm_data::Channels::Rgb });
    }
    Ok(spec)
}

/// `model.safetensors` has its log in `model.search-ts-pixels-40.jsonl`: another grid or score is another log.
fn beside(model: &Path, score: ScoreKind, steps: usize) -> PathBuf {
    let mut name = model.file_stem().map_or_else(|| OsString::from("model"), OsString::from);
    name.push(format!(".search-ts-{}-{steps}.jsonl", score.name()));
    model.with_file_name(name)
}

/// CRC-32 of names and weights: a model that was trained further under the same name is another model.
fn checksum(tensors: &TensorMap) -> String {
    let mut hasher = crc32fast::Hasher::new();
    for (name, tensor) in tensors {
        hasher.update(name.as_bytes());
        hasher.update(&cm_model::tensor_bytes(tensor));
    }
    format!("{:08x}", hasher.finalize())
}

fn list(ts: &[usize]) -> String {
    ts.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// What samples with given time points.
struct Sampler<'a> {
    f: &'a dyn ConsistencyFn,
    args: &'a SearchArgs,
    steps: usize,
    rho: f64,
}

impl Sampler<'_> {
    /// Samples with the points `ts`, always the same seeds, and scores what comes out.
    fn score(&self, ts: &[usize], score: &Score) -> Result<f64> {
        let times = Times::Indices { ts: ts.to_vec(), steps: self.steps, rho: self.rho };
        let method = Method::multistep(self.f, &times)?;
        let seeds: Vec<u64> = (0..self.args.samples as u64).collect();
        let classes = self.f.num_classes();
        let labels: Vec<i64> = seeds.iter().map(|&seed| seed as i64 % classes.max(1)).collect();
        let labels = (classes > 0).then_some(labels.as_slice());
        let request = Request { labels, batch: self.args.batch, ..Request::new(&seeds) };
        let mut bar = Bar::new("sample", "images", 0, seeds.len() as u64);
        let mut running = score.start();
        for evaluation in method.stream(&request)? {
            let evaluation = evaluation?;
            if let Some(images) = evaluation.finished {
                running.add(&images)?;
                bar.set(evaluation.images.end as u64, format!("ts {}", list(ts)));
            }
        }
        bar.finish();
        running.finish()
    }
}
