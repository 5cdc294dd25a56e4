//! `cm eval`: how good images are, beside those that they should look like.

pub mod cache;
mod counts;
pub mod input;
pub mod judge;
mod measure;
mod report;

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use cm_data::{Dataset, digest};
use cm_eval::{Measured, Moments, Parts, frechet_distance, kid, kid_subsets, precision_recall};
use serde_json::{Value, json};
use tch::Device;

use cache::Cache;
use counts::Counts;
use input::{Input, Statistics};
use judge::Judge;
use report::{Figures, JudgeNote, Report, Run, Settings, Subject};

use super::sample::{self, MadeBy};
use crate::args::{EvalArgs, Metric, SampleArgs};
use crate::exit::{OrUsage, Outcome};
use crate::ranks::Ranks;

/// The seed of the subsets of kernel distances.
const SUBSET_SEED: u64 = 0;

/// Runs `cm eval`.
pub fn eval(args: &EvalArgs, ranks: &Ranks) -> Outcome {
    if let [a, b] = &args.compare[..] {
        ranks.refuse("--compare", "start it without ranks").or_usage()?;
        let reports = [Report::read(a).or_usage()?, Report::read(b).or_usage()?];
        let names = [a, b].map(|path| path.display().to_string());
        print!("{}", report::compare([&names[0], &names[1]], [&reports[0], &reports[1]]));
        return Ok(());
    }
    let evaluation = Evaluation::open(args, ranks).or_usage()?;
    let report = evaluation.run()?;
    if !ranks.group.is_first() {
        return Ok(());
    }
    let out = evaluation.out();
    report.write(&out)?;
    print!("{}", report.table());
    println!("\n{}", out.display());
    Ok(())
}

/// An evaluation whose inputs are open.
struct Evaluation<'a> {
    args: &'a EvalArgs,
    ranks: &'a Ranks,
    device: Device,
    metrics: Vec<Metric>,
    input: Input,
    reference: Option<Input>,
    cache: Cache,
}

impl<'a> Evaluation<'a> {
    fn open(args: &'a EvalArgs, ranks: &'a Ranks) -> Result<Self> {
        let text = args.input.as_deref().context("INPUT is missing")?;
        let device = ranks.device(&args.device)?;
        let input = Input::open(text, args)?;
        let model = matches!(input, Input::Model(_));
        if !model && args.sample.is_some() {
            bail!("--sample is for models, and {} has its images already", input.describe());
        }
        let reference = match &args.reference {
            Some(reference) => Some(Input::open(reference, args)?),
            None => Input::data_of_run(text)?,
        };
        if let Some(Input::Model(args)) = &reference {
            bail!("--reference {}: a model; compare with data or statistics", args.model.display());
        }
        let metrics = metrics(args, reference.is_some())?;
        let compared = metrics.iter().find(|metric| metric.needs_reference());
        if let (Some(metric), None) = (compared, &reference) {
            bail!("{} compares with other images: say with which by --reference", metric.name());
        }
        if let (Some(one), Some(other)) = (input.set(), reference.as_ref().and_then(Input::set))
            && one.shape() != other.shape()
        {
            bail!(
                "{}: images of {}, and those of the reference ({}) are {}; scale one of them with resolution and fit in the \
                 data section of an experiment",
                input.describe(),
                one.shape(),
                other.source(),
                other.shape()
            );
        }
        let cache = Cache::new((!args.no_cache).then_some(args.cache.as_path()));
        Ok(Self { args, ranks, device, metrics, input, reference, cache })
    }

    fn out(&self) -> PathBuf {
        if let Some(out) = &self.args.out {
            return out.clone();
        }
        let text = self.args.input.as_deref().unwrap_or_default();
        let place = |name: &str| Path::new("out/eval").join(format!("{name}.json"));
        let (name, own) = (name_of(text), self.input.describe());
        // Two names may still come to one, such as a-b/c and a/b-c.
        match Report::read(&place(&name)) {
            Ok(other) if other.input.source != own => {
                let digest = digest::of_bytes([own.as_bytes()]);
                place(&format!("{name}-{}", digest.get(..8).unwrap_or(&digest)))
            }
            _ => place(&name),
        }
    }

    fn wants(&self, metric: Metric) -> bool {
        self.metrics.contains(&metric)
    }

    fn run(&self) -> Outcome<Report> {
        let reference_data = self.reference.as_ref().and_then(Input::set);
        let (reference_data, input_data) = {
            let _busy = self.ranks.group.busy();
            let digest = |set: Option<&Arc<dyn Dataset>>| {
                set.map(|set| input::digest_of(&**set)).transpose().or_usage()
            };
            (digest(reference_data)?, digest(self.input.set())?)
        };
        self.ranks.agree_on(|| self.settings([&input_data, &reference_data])).or_usage()?;
        let judges = self.judges(reference_data.as_deref(), input_data.as_deref()).or_usage()?;
        let mut counts = Counts::new(self);
        let data = reference_data.as_deref();
        // Stored statistics cost nothing, and what is wrong with them is told first.
        let stored = matches!(self.reference, Some(Input::Statistics(_)));
        let stored = stored.then(|| self.checked_reference(&judges, data, &mut counts)).transpose()?;
        counts.before_measuring(&judges).or_usage()?;
        let made_by = match &self.input {
            Input::Model(args) => Some(sample::made_by(args).or_usage()?),
            Input::Set(_) | Input::Statistics(_) => None,
        };
        let reference = match stored {
            Some(stored) => stored,
            None => self.checked_reference(&judges, data, &mut counts)?,
        };
        let measured = self.measured(&judges, input_data.as_deref())?;
        // Rank 0 has all that is left to do.
        let _busy = self.ranks.group.is_first().then(|| self.ranks.group.busy());
        let runs = self.runs(&judges, &reference, measured, &mut counts)?;
        let images = runs.first().map(|run| run.images);
        let mut input = self.subject(&self.input, input_data, images).or_usage()?;
        if let Some(MadeBy { weights, sampler }) = made_by {
            (input.file, input.sampler) = (Some(weights), Some(sampler));
            input.sample = self.args.sample.clone();
        }
        let images = reference.first().and_then(|measured| measured.count);
        let of_reference = self.reference.as_ref().filter(|_| !reference.is_empty());
        let of_reference = of_reference.map(|found| self.subject(found, reference_data, images));
        let of_reference = of_reference.transpose().or_usage()?;
        Ok(self.report(&judges, input, of_reference, runs, counts.warnings))
    }

    /// The figures of everything that was measured, and the statistics that were to be kept.
    fn runs(
        &self,
        judges: &[Judge],
        reference: &[Measured],
        measured: Vec<(String, Vec<Measured>)>,
        counts: &mut Counts<'_>,
    ) -> Outcome<Vec<Run>> {
        let mut runs = Vec::new();
        for (place, (name, measured)) in measured.into_iter().enumerate() {
            let mut figures = Figures::new();
            for (index, (judge, measured)) in judges.iter().zip(&measured).enumerate() {
                counts.of_measured(judge, measured, "the images").or_usage()?;
                figures.extend(self.figures(judge, reference.get(index), measured)?);
            }
            if let (true, 0, Some(path), Some(judge), Some(first)) =
                (self.ranks.group.is_first(), place, &self.args.save_stats, judges.first(), measured.first())
            {
                Statistics::write(path, first, &judge.weights)?;
                eprintln!("statistics of the {}: {}", judge.name, path.display());
            }
            let images = measured.first().and_then(|m| m.count).unwrap_or(0);
            let seeds = self.args.seeds.get(place).filter(|_| matches!(self.input, Input::Model(_)));
            let seeds = seeds.map(|seeds| ranges(&seeds.0));
            runs.push(Run { name, seeds, images, figures });
        }
        Ok(runs)
    }

    /// What is compared with, if it rests on enough images.
    fn checked_reference(
        &self,
        judges: &[Judge],
        data: Option<&str>,
        counts: &mut Counts<'_>,
    ) -> Outcome<Vec<Measured>> {
        let reference = self.reference(judges, data)?;
        for (judge, measured) in judges.iter().zip(&reference) {
            counts.of_measured(judge, measured, "the reference").or_usage()?;
        }
        Ok(reference)
    }

    /// All that decides about the figures and what is exchanged on the way, for ranks to compare.
    fn settings(&self, [input, reference]: [&Option<String>; 2]) -> Result<Value> {
        let args = self.args;
        let weights = args.weights.is_file().then(|| digest::of_file(&args.weights)).transpose()?;
        let mut samples = Vec::new();
        for seeds in &args.seeds {
            if let Input::Model(sampling) = &self.input {
                let model = sampling.model.display().to_string();
                let sampling = input::sampling(&model, args)?;
                samples.push(sample::settings(&SampleArgs { seeds: seeds.clone(), ..sampling })?);
            }
        }
        let metrics: Vec<_> = self.metrics.iter().map(|metric| metric.name()).collect();
        let statistics = |input: &Input| matches!(input, Input::Statistics(_));
        Ok(json!({
            "input": { "images": input, "statistics": statistics(&self.input), "samples": samples },
            "reference": { "images": reference, "statistics": self.reference.as_ref().map(statistics) },
            "metrics": metrics,
            "batch": args.batch,
            "is_splits": args.is_splits,
            "classifier": args.classifier.is_some(),
            "save_stats": args.save_stats.is_some(),
            "weights": weights,
        }))
    }

    /// The networks that are needed.
    fn judges(&self, reference: Option<&str>, input: Option<&str>) -> Result<Vec<Judge>> {
        let mut judges = Vec::new();
        let (inception, classifier): (Vec<Metric>, Vec<Metric>) =
            self.metrics.iter().partition(|metric| metric.needs_inception());
        let nothing = self.metrics.is_empty();
        if !inception.is_empty() || (nothing && self.args.weights.is_file() && self.args.classifier.is_none())
        {
            judges.push(Judge::inception(&self.args.weights, self.device)?);
        }
        if !classifier.is_empty() || (nothing && judges.is_empty()) {
            // Statistics that are saved for later are of the classifier of the images themselves.
            let of_reference = self.reference.as_ref().and_then(Input::set).zip(reference);
            let set =
                of_reference.or_else(|| self.input.set().zip(input).filter(|_| self.reference.is_none()));
            let shape = match (set, self.input.set(), &self.input) {
                (Some((set, _)), ..) | (None, Some(set), _) => judge::shape_of(&**set),
                (None, None, Input::Model(args)) => sample::shape(args)?,
                (None, None, _) => bail!("{}: statistics alone on both sides", self.input.describe()),
            };
            let set = set.map(|(set, data)| (&**set, data));
            judges.push(Judge::classifier(self.args, set, shape, self.ranks)?);
        }
        Ok(judges)
    }

    /// What each network has to keep; `of_input` adds what is needed of the judged images alone.
    fn parts(&self, judge: &Judge, of_input: bool) -> Parts {
        let any = |metrics: &[Metric]| metrics.iter().any(|metric| self.wants(*metric));
        let saved = of_input && self.args.save_stats.is_some();
        match judge.classifier {
            None => Parts {
                moments: self.wants(Metric::Fid) || saved,
                spatial: self.wants(Metric::Sfid),
                score: (of_input && self.wants(Metric::Is)).then_some(self.args.is_splits),
                features: any(&[Metric::Kid, Metric::Pr]),
            },
            Some(_) => Parts {
                moments: self.wants(Metric::Fcd) || saved,
                spatial: false,
                score: None,
                features: any(&[Metric::Kcd, Metric::Cpr]),
            },
        }
    }

    fn reference(&self, judges: &[Judge], data: Option<&str>) -> Outcome<Vec<Measured>> {
        let wanted: Vec<_> = judges.iter().map(|judge| (judge, self.parts(judge, false))).collect();
        let compared = self.metrics.iter().any(|metric| metric.needs_reference());
        let (Some(reference), true) = (&self.reference, compared) else { return Ok(Vec::new()) };
        match (reference, data) {
            (Input::Statistics(path), _) => {
                measure::of_statistics(Statistics::read(path).or_usage()?, &wanted)
            }
            (Input::Set(set), Some(data)) => {
                measure::of_set(reference, &**set, data, &wanted, &self.cache, self.args.batch, self.ranks)
            }
            _ => Ok(Vec::new()),
        }
        .or_usage()
    }

    /// The judged images: by seeds for a model, else all at once.
    fn measured(&self, judges: &[Judge], data: Option<&str>) -> Outcome<Vec<(String, Vec<Measured>)>> {
        let wanted: Vec<_> = judges.iter().map(|judge| (judge, self.parts(judge, true))).collect();
        let images = "images".to_owned();
        Ok(match (&self.input, data) {
            (Input::Set(set), Some(data)) => {
                let (batch, ranks) = (self.args.batch, self.ranks);
                let measured = measure::of_set(&self.input, &**set, data, &wanted, &self.cache, batch, ranks);
                vec![(images, measured.or_usage()?)]
            }
            (Input::Statistics(path), _) => {
                let stored = Statistics::read(path).or_usage()?;
                vec![("statistics".to_owned(), measure::of_statistics(stored, &wanted).or_usage()?)]
            }
            (Input::Model(sampling), _) => {
                let mut runs = Vec::new();
                for seeds in &self.args.seeds {
                    let model = sampling.model.display().to_string();
                    let mut sampling = input::sampling(&model, self.args).or_usage()?;
                    sampling.seeds = seeds.clone();
                    let total = seeds.0.len() as u64;
                    let input = Input::Model(Box::new(sampling));
                    let measured = measure::pass(&input, total, &wanted, self.args.batch, self.ranks)?;
                    runs.push((format!("seeds {}", ranges(&seeds.0)), measured));
                }
                runs
            }
            (Input::Set(_), None) => Vec::new(),
        })
    }

    fn figures(&self, judge: &Judge, reference: Option<&Measured>, found: &Measured) -> Result<Figures> {
        let (mut figures, classifier) = (Figures::new(), judge.classifier.is_some());
        let names = if classifier { ["fcd", "kcd"] } else { ["fid", "kid"] };
        if let Some(score) = found.score {
            figures.extend([("is".to_owned(), score.mean), ("is_std".to_owned(), score.std)]);
        }
        let Some(reference) = reference else { return Ok(figures) };
        let mut distance = |name: &str, a: &Option<Moments>, b: &Option<Moments>| -> Result<()> {
            if let (Some(a), Some(b)) = (a, b) {
                figures.insert(name.to_owned(), frechet_distance(a, b)?);
            }
            Ok(())
        };
        distance(names[0], &reference.moments, &found.moments)?;
        distance("sfid", &reference.spatial, &found.spatial)?;
        if let (Some(real), Some(generated)) = (&reference.features, &found.features) {
            let [real, generated] = [real, generated].map(|features| features.to_device(self.device));
            let [n, m] = [&real, &generated].map(|features| features.size()[0] as u32);
            if self.wants(if classifier { Metric::Kcd } else { Metric::Kid }) {
                let (count, size) = (self.args.kid_subsets, self.args.kid_size);
                let found = kid(&real, &generated, &kid_subsets(n, m, count, size, SUBSET_SEED))?;
                figures.insert(names[1].to_owned(), found.mean);
                figures.insert(format!("{}_std", names[1]), found.std);
            }
            if self.wants(if classifier { Metric::Cpr } else { Metric::Pr }) {
                let found = precision_recall(&real, &generated, self.args.pr_k)?;
                let prefix = if classifier { "classifier_" } else { "" };
                figures.insert(format!("{prefix}precision"), found.precision);
                figures.insert(format!("{prefix}recall"), found.recall);
            }
        }
        Ok(figures)
    }

    /// What is said about one side.
    fn subject(&self, input: &Input, data: Option<String>, images: Option<u64>) -> Result<Subject> {
        let file = match input {
            Input::Statistics(path) => Some(digest::of_file(path)?),
            Input::Set(_) | Input::Model(_) => None,
        };
        Ok(Subject { source: input.describe(), sample: None, sampler: None, data, file, images })
    }

    fn report(
        &self,
        judges: &[Judge],
        input: Subject,
        reference: Option<Subject>,
        runs: Vec<Run>,
        warnings: Vec<String>,
    ) -> Report {
        let args = self.args;
        let settings = Settings {
            kid_subsets: args.kid_subsets,
            kid_size: args.kid_size,
            is_splits: args.is_splits,
            pr_k: args.pr_k,
        };
        let note = |judge: &Judge| JudgeNote {
            name: judge.name.to_owned(),
            weights: judge.weights.clone(),
            classifier: judge.classifier.clone(),
        };
        let judges = judges.iter().map(note).collect();
        Report { judges, warnings, ..Report::new(input, reference, settings, runs) }
    }
}

/// What was asked for, or what can be measured here.
fn metrics(args: &EvalArgs, reference: bool) -> Result<Vec<Metric>> {
    let mut metrics = args.metrics.clone();
    if metrics.is_empty() && (reference || args.save_stats.is_none()) {
        metrics = match args.weights.is_file() {
            true => vec![Metric::Fid, Metric::Kid, Metric::Is, Metric::Pr],
            false => vec![Metric::Fcd, Metric::Kcd, Metric::Cpr],
        };
    }
    metrics.sort();
    metrics.dedup();
    Ok(metrics)
}

/// Seeds as one would type them.
fn ranges(seeds: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for &seed in seeds {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(seed) => *last = seed,
            _ => parts.push((seed, seed)),
        }
    }
    let typed = |&(first, last): &(u64, u64)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    parts.iter().map(typed).collect::<Vec<_>>().join(",")
}

/// The name of a report on `text` in the folder of all: every folder of its path, so that two files of one name in two
/// folders have two reports.
fn name_of(text: &str) -> String {
    let (path, part) = input::part_of(text);
    let path = Path::new(path);
    let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let folders = path.parent().into_iter().flat_map(Path::components);
    let names = folders.filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    let mut names: Vec<String> = names.chain(stem).map(|name| name.to_string_lossy().into_owned()).collect();
    names.extend(part.map(|part| part.name().to_owned()));
    if names.is_empty() { "eval".to_owned() } else { names.join("-") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_said_exactly() {
        assert_eq!(ranges(&[0, 1, 2, 3]), "0-3");
        assert_eq!(ranges(&[7, 1, 2, u64::MAX]), format!("7,1-2,{}", u64::MAX));
        let same: crate::args::SeedRange = ranges(&[5, 9, 10, 12]).parse().unwrap();
        assert_eq!(same.0, [5, 9, 10, 12]);
    }

    #[test]
    fn reports_are_named_by_the_whole_path() {
        for (text, name) in [
            ("a.npz", "a"),
            ("a/model.safetensors", "a-model"),
            ("./b/model.safetensors", "b-model"),
            ("../c/d/", "c-d"),
            ("digits-ct:test", "digits-ct-test"),
            ("x/a.npz:all", "x-a-all"),
            ("..", "eval"),
        ] {
            assert_eq!(name_of(text), name, "{text}");
        }
    }
}
