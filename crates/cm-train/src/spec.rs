use std::rc::Rc;

use cm_model::{ImageDistance, ImageShape};
use cm_schedule::{EmaRule, LrRule, Weighting};
use cm_torch::optim::OptimKind;
use serde::{Deserialize, Serialize};

use crate::{Distance, Error, Metric, PairRule, Recipe, Result, TargetRule, TeacherRule};

/// Everything that decides what a training run computes, but for the network and the data: the section `[train]` of
/// an experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// Seed of noise, noise levels, dropout and (through the data loader) data order.
    pub seed: u64,
    /// The run's length K in steps; schedules are scaled to it, and the run ends there.
    pub total_steps: u64,
    /// Images in a step, on all ranks together.
    pub batch: usize,
    /// Images that go through the network at once, on each rank; all that it has if left out. Smaller parts need less
    /// memory and give the same gradient up to rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// How a pair of noise levels is drawn.
    pub pairs: PairRule,
    /// Where the target comes from.
    pub target: TargetRule,
    /// How a teacher moves noisy images, in consistency distillation; left out elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherRule>,
    /// How far apart two images are.
    pub metric: Metric,
    /// How much a pair counts.
    pub weighting: Weighting,
    /// The optimiser.
    pub optimizer: OptimKind,
    /// Learning rate.
    pub lr: f64,
    /// Factor on the learning rate as training goes.
    pub lr_rule: LrRule,
    /// Averages of the weights that are kept beside them.
    pub emas: Vec<EmaRule>,
    /// Largest norm of the gradient over all weights; longer ones are scaled down to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_clip: Option<f64>,
    /// As in EDM (which uses 1e5): NaN in a gradient becomes 0 and an infinity this number, with its sign, instead of
    /// stopping the run. A loss that is not finite stops it in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replace_non_finite: Option<f64>,
    /// Whether each of several ranks holds a share of averages and moments alone, which needs less memory and has the
    /// same result; one process holds them all in any case.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shard_state: bool,
}

/// Images of one step: more is a slip of the pen.
const MOST_IMAGES: usize = 1 << 20;

impl TrainSpec {
    /// The recipe alone.
    pub fn recipe(&self) -> Recipe {
        Recipe {
            pairs: self.pairs,
            target: self.target,
            teacher: self.teacher,
            metric: self.metric.clone(),
            weighting: self.weighting,
        }
    }

    /// Images that go through the network at once.
    pub fn micro_batch(&self) -> usize {
        self.micro_batch.unwrap_or(self.batch).min(self.batch)
    }

    /// Checks every number and that the metric can be built for images of `shape`, and returns the metric.
    ///
    /// # Errors
    /// [`Error::Setting`] or [`Error::MissingWeights`] with the key, its value and what to do.
    pub fn check(&self, shape: ImageShape) -> Result<Distance> {
        self.check_with(shape, None)
    }

    /// [`TrainSpec::check`] with what LPIPS measures with; see [`Metric::build_with`].
    ///
    /// # Errors
    /// As [`TrainSpec::check`].
    pub fn check_with(
        &self,
        shape: ImageShape,
        perceptual: Option<Rc<dyn ImageDistance>>,
    ) -> Result<Distance> {
        let count = |key, got: u64| match got {
            0 => Err(Error::setting(key, 0, "1 or more", "a step needs images, and a run needs steps")),
            _ => Ok(()),
        };
        count("train.total_steps", self.total_steps)?;
        count("train.batch", self.batch as u64)?;
        count("train.micro_batch", self.micro_batch() as u64)?;
        if self.batch > MOST_IMAGES {
            let most = format!("at most {MOST_IMAGES}");
            return Err(Error::setting(
                "train.batch",
                self.batch,
                most,
                "the published runs use 128 to 4096",
            ));
        }
        if self.total_steps > u64::from(u32::MAX) {
            let most = format!("at most {}", u32::MAX);
            let advice = "random numbers are counted in 32 bits of steps";
            return Err(Error::setting("train.total_steps", self.total_steps, most, advice));
        }
        let positive = |key, got: Option<f64>, advice| match got {
            Some(x) if !(x > 0.0 && x.is_finite()) => {
                Err(Error::setting(key, x, "a finite number above 0", advice))
            }
            _ => Ok(()),
        };
        positive("train.lr", Some(self.lr), "the published runs use 1e-5 to 1e-3")?;
        positive("train.grad_clip", self.grad_clip, "leave it out for no clipping")?;
        positive("train.replace_non_finite", self.replace_non_finite, "EDM uses 1e5; leave it out for none")?;
        self.check_emas()?;
        self.lr_rule.validate()?;
        self.optimizer.check()?;
        self.recipe().check()?;
        self.metric.build_with(shape, perceptual)
    }

    fn check_emas(&self) -> Result<()> {
        self.emas.iter().try_for_each(EmaRule::validate)?;
        let mut names: Vec<String> = self.emas.iter().map(ema_name).collect();
        names.sort();
        match names.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => {
                let advice = "each average is kept in a file of its own";
                Err(Error::setting("train.emas", &pair[0], "averages that differ", advice))
            }
        }
    }
}

/// The name of a weight average in files and on the command line: its β, as in `0.9999`, or its half-life in images
/// with a ramp-up ratio if it has one, as in `halflife-500000-rampup-0.05`.
pub fn ema_name(rule: &EmaRule) -> String {
    match *rule {
        EmaRule::Beta { beta } => beta.to_string(),
        EmaRule::HalfLife { halflife_images, rampup_ratio: None } => format!("halflife-{halflife_images}"),
        EmaRule::HalfLife { halflife_images, rampup_ratio: Some(ratio) } => {
            format!("halflife-{halflife_images}-rampup-{ratio}")
        }
    }
}

/// What differs between two sets of settings, as `train.lr: 0.0004 → 0.0001`; empty if they are equal.
///
/// A run that is resumed with other settings is no longer the run that it would have been.
pub fn changed_settings(old: &TrainSpec, new: &TrainSpec) -> Vec<String> {
    // Settings are plain data: writing them as JSON cannot fail.
    let value =
        |spec| serde_json::json!({ "train": serde_json::to_value::<&TrainSpec>(spec).unwrap_or_default() });
    differences(&value(old), &value(new))
}

/// The keys in which two tables differ, with both values.
pub(crate) fn differences(old: &serde_json::Value, new: &serde_json::Value) -> Vec<String> {
    let mut changes = Vec::new();
    compare("", Some(old), Some(new), &mut changes);
    changes
}

fn compare(
    key: &str,
    old: Option<&serde_json::Value>,
    new: Option<&serde_json::Value>,
    changes: &mut Vec<String>,
) {
    use serde_json::Value::Object;
    match (old, new) {
        (old, new) if old == new => {}
        (Some(Object(a)), Some(Object(b))) => {
            let keys: std::collections::BTreeSet<_> = a.keys().chain(b.keys()).collect();
            for name in keys {
                let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(&key, a.get(name), b.get(name), changes);
            }
        }
        (old, new) => {
            let text = |value: Option<&serde_json::Value>| value.map_or("none".to_owned(), |v| v.to_string());
            changes.push(format!("{key}: {} → {}", text(old), text(new)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::spec;

    const SHAPE: ImageShape = ImageShape { channels: 1, height: 4, width: 4 };

    #[test]
    fn specs_survive_a_file_and_unknown_keys_do_not() {
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<TrainSpec>(&text).unwrap(), spec());
        let wrong = text.replacen('{', "{\"learning_rate\":1,", 1);
        assert!(serde_json::from_str::<TrainSpec>(&wrong).unwrap_err().to_string().contains("learning_rate"));
    }

    #[test]
    fn wrong_numbers_are_named() {
        assert!(spec().check(SHAPE).is_ok());
        let error = |change: fn(&mut TrainSpec)| {
            let mut spec = spec();
            change(&mut spec);
            spec.check(SHAPE).unwrap_err().to_string()
        };
        assert!(error(|s| s.total_steps = 0).starts_with("train.total_steps = 0: "));
        assert!(error(|s| s.total_steps = 1 << 33).contains("32 bits"));
        assert!(error(|s| s.batch = 0).starts_with("train.batch = 0"));
        assert!(error(|s| s.micro_batch = Some(0)).starts_with("train.micro_batch = 0"));
        assert!(error(|s| s.lr = f64::NAN).starts_with("train.lr = NaN"));
        assert!(error(|s| s.grad_clip = Some(0.0)).starts_with("train.grad_clip = 0"));
        assert!(error(|s| s.replace_non_finite = Some(-1.0)).starts_with("train.replace_non_finite = -1"));
        assert!(
            error(|s| s.metric = Metric::of_lpips(cm_model::LpipsSpec::CONSISTENCY_MODELS))
                .contains("fetch lpips")
        );
        assert!(
            error(|s| s.optimizer = OptimKind::Adam { beta1: 1.0, beta2: 0.9, eps: 1e-8, weight_decay: 0.0 })
                .contains("beta1")
        );
        let twice = error(|s| s.emas = vec![EmaRule::Beta { beta: 0.99 }; 2]);
        assert!(error(|s| s.emas = vec![EmaRule::Beta { beta: 1.5 }]).starts_with("beta = 1.5"));
        assert!(error(|s| s.lr_rule = LrRule::Warmup { warmup_images: 0.0 }).contains("warmup_images = 0"));
        assert!(twice.starts_with("train.emas = 0.99"), "{twice}");
    }

    #[test]
    fn averages_have_names_of_their_own() {
        assert_eq!(ema_name(&EmaRule::Beta { beta: 0.9999432189950708 }), "0.9999432189950708");
        let half = |rampup_ratio| EmaRule::HalfLife { halflife_images: 5e5, rampup_ratio };
        assert_eq!(ema_name(&half(None)), "halflife-500000");
        assert_eq!(ema_name(&half(Some(0.05))), "halflife-500000-rampup-0.05");
    }

    #[test]
    fn changes_are_listed_by_key() {
        let mut new = spec();
        assert!(changed_settings(&spec(), &new).is_empty());
        new.lr = 0.25;
        new.grad_clip = Some(1.0);
        new.metric = Metric::L1;
        assert_eq!(
            changed_settings(&spec(), &new),
            ["train.grad_clip: none → 1.0", "train.lr: 0.01 → 0.25", "train.metric.kind: \"l2\" → \"l1\""]
        );
    }
}
