//! Whether there are images enough for what is asked.

use anyhow::{Result, bail};
use cm_eval::{Measured, SampleSize};

use super::Evaluation;
use super::input::Input;
use super::judge::Judge;
use crate::args::Metric;

/// What was found about numbers of images.
pub struct Counts<'a> {
    evaluation: &'a Evaluation<'a>,
    /// What a reader of the figures has to know.
    pub warnings: Vec<String>,
}

/// A Fréchet distance and one of its sides.
struct Side<'a> {
    figure: &'static str,
    what: &'a str,
    features: u64,
}

impl<'a> Counts<'a> {
    pub fn new(evaluation: &'a Evaluation<'a>) -> Self {
        Self { evaluation, warnings: Vec::new() }
    }

    /// Checks every number of images that is known: drawing and measuring them may take hours.
    pub fn before_measuring(&mut self, judges: &[Judge]) -> Result<()> {
        let compared = self.evaluation.metrics.iter().any(|metric| metric.needs_reference());
        let reference = self.evaluation.reference.as_ref().filter(|_| compared);
        let of_reference = reference.and_then(Input::set).map(|set| set.len() as u64);
        let of_images: Vec<u64> = match &self.evaluation.input {
            Input::Set(set) => vec![set.len() as u64],
            Input::Model(_) => self.evaluation.args.seeds.iter().map(|seeds| seeds.0.len() as u64).collect(),
            Input::Statistics(_) => Vec::new(),
        };
        for judge in judges {
            for (what, counts) in [("the reference", of_reference.as_slice()), ("the images", &of_images)] {
                for &count in counts {
                    self.check(judge, what, count)?;
                }
            }
        }
        Ok(())
    }

    /// Checks the `count` images of one side.
    fn check(&mut self, judge: &Judge, what: &str, count: u64) -> Result<()> {
        let evaluation = self.evaluation;
        let parts = evaluation.parts(judge, what == "the images");
        let [fid, kid, pr] = match judge.classifier {
            Some(_) => ["fcd", "kcd", "cpr"],
            None => ["fid", "kid", "pr"],
        };
        let spatial = parts.spatial.then(|| judge.net.spatial_features()).flatten();
        for (figure, features) in [(fid, parts.moments.then(|| judge.net.features())), ("sfid", spatial)] {
            let Some(features) = features else { continue };
            if count < 2 {
                bail!("{figure}: expected at least 2 images in {what}, got {count}");
            }
            self.size(&Side { figure, what, features }, SampleSize::of(count, features), count)?;
        }
        if let Some(splits) = parts.score.filter(|&splits| splits > count) {
            bail!("is: {splits} chunks of {count} images: expected --is-splits 1 to {count}");
        }
        let wants = |inception, classifier| {
            evaluation.wants(if judge.classifier.is_some() { classifier } else { inception })
        };
        if wants(Metric::Kid, Metric::Kcd) && count < 2 {
            bail!("{kid}: expected at least 2 images in {what}, got {count}");
        }
        let k = evaluation.args.pr_k;
        if wants(Metric::Pr, Metric::Cpr) && i64::try_from(count).is_ok_and(|count| count <= k) {
            bail!("{pr}: expected more images in {what} than --pr-k {k}, got {count}");
        }
        Ok(())
    }

    /// Checks what only measuring tells, such as the rank of stored statistics that do not say of how many images they are.
    pub fn of_measured(&mut self, judge: &Judge, measured: &Measured, what: &str) -> Result<()> {
        let fid = if judge.classifier.is_some() { "fcd" } else { "fid" };
        for (figure, moments) in [(fid, &measured.moments), ("sfid", &measured.spatial)] {
            let Some(moments) = moments else { continue };
            let side = Side { figure, what, features: moments.dim() as u64 };
            match moments.sample_size() {
                SampleSize::Unknown => {
                    let rank = moments.rank()?;
                    if rank < moments.dim() {
                        self.singular(&side, &format!("a covariance of rank {rank}"))?;
                    }
                }
                size => self.size(&side, size, moments.count().unwrap_or(0))?,
            }
        }
        Ok(())
    }

    /// Refuses a covariance that means nothing, and notes a distance that too few images bias.
    fn size(&mut self, side: &Side<'_>, size: SampleSize, count: u64) -> Result<()> {
        match size {
            SampleSize::Singular => self.singular(side, &format!("{count} images")),
            SampleSize::Biased => {
                let Side { figure, what, features } = side;
                self.note(format!(
                    "{figure}: {count} images are few for {features} numbers an image in {what}; the distance comes out \
                     larger than of more, and compares with figures of as many alone"
                ));
                Ok(())
            }
            SampleSize::Enough | SampleSize::Unknown => Ok(()),
        }
    }

    fn singular(&mut self, side: &Side<'_>, few: &str) -> Result<()> {
        let Side { figure, what, features } = side;
        let text = format!(
            "{figure}: {what} give {few} and a feature has {features} numbers, so the covariance is singular and the distance \
             means little"
        );
        if !self.evaluation.args.allow_few {
            bail!("{text}; take more than {features} images, or measure kid or kcd, or say --allow-few");
        }
        self.note(text);
        Ok(())
    }

    fn note(&mut self, text: String) {
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }
}
