//! How good samples are: figures on the features of a classifier that is trained on the data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use cm_data::{Dataset, LabelRule, SourceSpec, Split};
use cm_eval::{Collector, Measured, Moments, Parts, frechet_distance, precision_recall};
use cm_torch::device::DeviceSpec;
use tch::Tensor;

use super::results::Score;
use crate::args::SeedRange;
use crate::commands::eval::input::{self, Input};
use crate::commands::eval::judge::{About, Judge, shape_of};
use crate::ranks::Ranks;

const PARTS: Parts = Parts { moments: true, spatial: false, score: None, features: true };
/// The neighbour to which the balls of precision and recall reach.
const NEIGHBOUR: i64 = 3;
/// Real images that precision and recall look at: all pairs of them are compared.
const MOST_PAIRED: i64 = 10_000;
/// Samples computed together.
const BATCH: usize = 250;
/// Measured samples start from these seeds, apart from those of training's grids.
const FIRST_SEED: u64 = 10_000;

/// What measures samples against the training images.
pub struct Scorer {
    judge: Judge,
    is_new: bool,
    real: Measured,
    held_out: Arc<dyn Dataset>,
    measured: u64,
    device: DeviceSpec,
}

/// How samples are made, in the options of `cm sample`, and what it costs.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// The options.
    pub words: String,
    /// Evaluations of the network for a sample.
    pub evaluations: u64,
}

impl Sampling {
    /// Options and their cost.
    pub fn new(words: impl Into<String>, evaluations: u64) -> Self {
        Self { words: words.into(), evaluations }
    }
}

impl Scorer {
    /// Looks at the training images; the classifier is kept in the folder `cache`.
    pub fn new(data: &SourceSpec, measured: u64, cache: PathBuf, device: DeviceSpec) -> Result<Self> {
        let part = |split| {
            let mut spec = data.clone();
            // The training does without labels; a classifier learns from them.
            (spec.split, spec.labels) = (split, LabelRule::Auto);
            spec.open()
        };
        let (train, held_out) = (part(Split::Train)?, part(Split::Test)?);
        let (judge, is_new) =
            Judge::trained(Some(&cache), &*train, &input::digest_of(&*train)?, shape_of(&*train))?;
        let real = collect(&judge, &Input::Set(train.clone()), train.len() as u64)?;
        Ok(Self { judge, is_new, real, held_out, measured, device })
    }

    /// The digest of the training images of `data`.
    pub fn digest(data: &SourceSpec) -> Result<String> {
        input::digest_of(&*data.open()?)
    }

    /// Where the classifier comes from.
    pub fn judge(&self) -> Option<About> {
        self.judge.classifier.clone()
    }

    /// The SHA-256 of the classifier's weights.
    pub fn weights(&self) -> &str {
        &self.judge.weights
    }

    /// Whether the classifier was trained just now, rather than kept from before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The score of a model's samples; `range` chooses which seeds, disjoint from those of other ranges.
    pub fn of_model(&self, model: &Path, sampling: &Sampling, range: u64) -> Result<Score> {
        let name = model.display().to_string();
        let mut args = input::parse_sampling(&name, &sampling.words)?;
        let first = FIRST_SEED + range * self.measured;
        (args.seeds, args.batch) = (SeedRange((first..first + self.measured).collect()), BATCH);
        args.device = self.device;
        let found = collect(&self.judge, &Input::Model(Box::new(args)), self.measured);
        let score = self.score(&found.with_context(|| name)?, &sampling.words, sampling.evaluations)?;
        Ok(Score { range, ..score })
    }

    /// The score of images that are real and were not trained on.
    pub fn of_held_out(&self) -> Result<Score> {
        let count = self.held_out.len() as u64;
        let found = collect(&self.judge, &Input::Set(self.held_out.clone()), count)?;
        self.score(&found, "held-out real images", 0)
    }

    fn score(&self, found: &Measured, sampler: &str, evaluations: u64) -> Result<Score> {
        const WHAT: &str = "the collector was asked for moments and features";
        fn moments(of: &Measured) -> Result<&Moments> {
            of.moments.as_ref().context(WHAT)
        }
        let features = |of: &Measured| -> Result<Tensor> {
            let all = of.features.as_ref().context(WHAT)?;
            Ok(all.f_narrow(0, 0, all.size()[0].min(MOST_PAIRED))?)
        };
        let pr = precision_recall(&features(&self.real)?, &features(found)?, NEIGHBOUR)?;
        Ok(Score {
            sampler: sampler.to_owned(),
            evaluations,
            range: 0,
            images: found.count.unwrap_or(0),
            fcd: frechet_distance(moments(&self.real)?, moments(found)?)?,
            precision: pr.precision,
            recall: pr.recall,
        })
    }
}

fn collect(judge: &Judge, input: &Input, total: u64) -> Result<Measured> {
    let mut collector = Collector::new(PARTS, total)?;
    input::each_batch(input, BATCH, &Ranks::alone(), &mut |images| {
        Ok(collector.add(&judge.net.see(images)?)?)
    })?;
    Ok(collector.finish()?)
}
