//! What a report trains: one factor at a time around a base, each run with an equal number of images.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use cm_schedule::NumScales;
use cm_train::{Metric, PairRule};
use serde::{Deserialize, Serialize};

use crate::args::{ReportArgs, ReportData};
use crate::config::Source;
use crate::experiment::Experiment;
use crate::lpips;

/// The teacher's name among the runs.
pub const TEACHER: &str = "teacher";

/// A way to train, that differs from another in one thing.
#[derive(Debug)]
pub struct Trial {
    /// Its name.
    pub name: &'static str,
    /// What it is, in a few words.
    pub what: &'static str,
    /// The recipe, which ends the preset's name: `cd` of `digits-cd`.
    recipe: &'static str,
    /// What differs from the preset. `{s0}` is the start of consistency training's N(k), `{mu18}` its μ at N = 18.
    sets: &'static [&'static str],
}

const HUBER: &str = "train.metric=pseudo_huber";
const N8: &str = "train.pairs.num_scales={kind='fixed', num_scales=8}";
const N18: &str = "train.pairs.num_scales={kind='fixed', num_scales=18}";
const N40: &str = "train.pairs.num_scales={kind='fixed', num_scales=40}";
const EULER: &str = "train.teacher.solver=euler";
const HEUN: &str = "train.teacher.solver=heun";
const ADAPTIVE: &str = "train.target={kind='ema', rule={kind='adaptive', mu0=0.9, s0={s0}}}";

/// Progressive distillation, by the steps of the student that a training ends at. Each is a training of its own: a student
/// on the way to fewer steps has seen a part of the images only.
const PROGRESSIVE: [(&str, u64); 3] = [("pd", 1), ("pd-2", 2), ("pd-4", 4)];

/// Every trial, the base of distillation first.
pub const TRIALS: [Trial; 16] = [
    Trial { name: "cd", what: "CD: Heun, N = 18, pseudo-Huber", recipe: "cd", sets: &[HUBER, HEUN, N18] },
    Trial { name: "cd-l1", what: "CD with l1", recipe: "cd", sets: &["train.metric=l1", HEUN, N18] },
    Trial { name: "cd-l2", what: "CD with l2", recipe: "cd", sets: &["train.metric=l2", HEUN, N18] },
    Trial { name: "cd-lpips", what: "CD with LPIPS", recipe: "cd", sets: &["train.metric=lpips", HEUN, N18] },
    Trial { name: "cd-euler", what: "CD with Euler", recipe: "cd", sets: &[HUBER, EULER, N18] },
    Trial { name: "cd-n8", what: "CD at N = 8", recipe: "cd", sets: &[HUBER, HEUN, N8] },
    Trial { name: "cd-n8-euler", what: "CD at N = 8 with Euler", recipe: "cd", sets: &[HUBER, EULER, N8] },
    Trial { name: "cd-n40", what: "CD at N = 40", recipe: "cd", sets: &[HUBER, HEUN, N40] },
    Trial { name: "ct", what: "CT: adaptive N(k) and μ(k)", recipe: "ct", sets: &[HUBER, ADAPTIVE] },
    Trial {
        name: "ct-n18",
        what: "CT at N = 18 and its μ",
        recipe: "ct",
        sets: &[HUBER, N18, "train.target={kind='ema', rule={kind='fixed', mu={mu18}}}"],
    },
    Trial {
        name: "ct-live",
        what: "CT: adaptive N(k), μ = 0",
        recipe: "ct",
        sets: &[HUBER, "train.target={kind='live'}"],
    },
    Trial { name: "ict", what: "iCT", recipe: "ict", sets: &[] },
    Trial { name: "ect", what: "ECT, from scratch", recipe: "ect", sets: &[] },
    Trial { name: "pd", what: "progressive distillation", recipe: "pd", sets: &[] },
    Trial { name: "pd-2", what: "progressive distillation to two steps", recipe: "pd", sets: &[] },
    Trial { name: "pd-4", what: "progressive distillation to four steps", recipe: "pd", sets: &[] },
];

/// The steps that a trial's student is distilled to; none for other recipes.
pub fn distilled_to(trial: &str) -> Option<u64> {
    PROGRESSIVE.iter().find(|(name, _)| *name == trial).map(|(_, steps)| *steps)
}

/// The trial whose samples of so many steps stand for `trial`: progressive distillation has one for each number.
pub fn sampled_in(trial: &str, steps: u64) -> &str {
    let of_steps = PROGRESSIVE.iter().find(|(_, wanted)| *wanted == steps).filter(|_| trial == "pd");
    of_steps.map_or(trial, |(name, _)| *name)
}

/// What makes figures of two reports comparable. A report that goes on must have the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Version of what is trained and measured.
    pub version: u32,
    /// `full`, `quick` or `smoke`.
    pub form: String,
    /// The data set.
    pub data: String,
    /// SHA-256 of its training images.
    pub images: String,
    /// SHA-256 of the weights of the classifier that scores. Reports from before it was noted have none.
    #[serde(default)]
    pub judge: Option<String>,
    /// Training images of a run.
    pub budget: u64,
    /// Training images of the teacher.
    pub teacher_budget: u64,
    /// Points of a run at which its samples are measured.
    pub points: u64,
    /// Samples that are measured.
    pub measured: u64,
    /// The second noise level of two-step samples. Those of four steps: 4, 1 and ¼ times it behind σ_max.
    pub second_sigma: f64,
    /// Numbers of noise levels at which the teacher's solvers are measured.
    pub levels: Vec<usize>,
    /// The device.
    pub device: String,
}

const VERSION: u32 = 1;
/// The levels of EDM's sampler for CIFAR-10.
pub const TEACHER_LEVELS: usize = 18;

/// A report that is to be made.
pub struct Plan {
    /// What it has in common with itself after a restart.
    pub settings: Settings,
    /// Runs of each trial.
    pub seeds: u64,
    /// The trials.
    pub trials: Vec<&'static Trial>,
    /// What cannot be tried here, and why.
    pub left_out: Vec<(String, String)>,
    /// The network, data and preconditioning of every student.
    base: Experiment,
    teacher: Experiment,
}

impl Plan {
    /// What the command asks for.
    ///
    /// # Errors
    /// For options that do not go together, and a budget of too few steps.
    pub fn new(args: &ReportArgs, device: String) -> Result<Self> {
        ensure!(
            args.images.is_some() != args.data.is_bundled(),
            match args.data {
                ReportData::Fashion =>
                    "--data fashion is not bundled: name the folder of its four IDX files with --images (Debian's \
                     package dataset-fashion-mnist puts them into /usr/share/datasets/fashion-mnist)",
                ReportData::Cifar10 =>
                    "--data cifar10 is not bundled: name the folder or archive of its binary version with --images",
                ReportData::Digits | ReportData::Emoji =>
                    "--images is for --data fashion and cifar10; this data set is bundled",
            }
        );
        let mut settings = settings(args, device);
        let read = |recipe: &str| preset(&settings.data, recipe, args.images.as_deref(), &[]);
        let (base, teacher) = (read("cd")?, read("edm")?);
        let (batch, least) = (base.train.batch as u64, least_steps(&read("pd")?));
        if settings.budget < least * batch {
            bail!(
                "--budget {}: expected at least {}, {least} steps of {batch} images",
                settings.budget,
                least * batch
            );
        }
        // A run of few steps has no more points than steps.
        settings.points = settings.points.min(settings.budget / base.train.batch as u64);
        let (mut trials, mut left_out) = (Vec::new(), Vec::new());
        for trial in &TRIALS {
            let asked = args.trials.iter().any(|name| name == trial.name);
            let usual = args.trials.is_empty() && (!args.smoke || SMOKE.contains(&trial.name));
            if !asked && !usual {
                continue;
            }
            let slow = args.quick && SLOW.contains(&trial.name) && !asked;
            let slow = slow.then(|| {
                let name = trial.name;
                format!("it takes longer than --quick has; ask for it with --trials {name}")
            });
            match (slow.or_else(|| cannot_be(trial, &base)), asked) {
                (None, _) => trials.push(trial),
                (Some(why), true) => bail!("--trials {}: {why}", trial.name),
                (Some(why), false) => left_out.push((trial.name.to_owned(), why)),
            }
        }
        let seeds = args.seeds.unwrap_or(if args.quick || args.smoke { 1 } else { 3 });
        Ok(Self { settings, seeds, trials, left_out, base, teacher })
    }

    /// The experiment of the teacher.
    pub fn teacher(&self) -> Experiment {
        let mut experiment = self.teacher.clone();
        self.set_length(&mut experiment, self.settings.teacher_budget);
        experiment
    }

    /// The experiment of one run of a trial.
    ///
    /// # Errors
    /// If the preset cannot take the trial's settings, which is a fault of the table above.
    pub fn experiment(&self, trial: &Trial, seed: u64) -> Result<Experiment> {
        let mut sets = vec![format!("train.seed={seed}")];
        let start = start_of_ct(&self.settings.data)?;
        let mu18 = (start as f64 * 0.9f64.ln() / 18.0).exp();
        let fill =
            |set: &&str| set.replace("{s0}", &start.to_string()).replace("{mu18}", &format!("{mu18:.4}"));
        sets.extend(trial.sets.iter().map(fill));
        let mut experiment = preset(&self.settings.data, trial.recipe, None, &sets)?;
        // One factor at a time: whatever a preset's authors did differently beside the recipe is made equal.
        let base = self.base.clone();
        (experiment.data, experiment.augment, experiment.network) = (base.data, base.augment, base.network);
        (experiment.precond, experiment.compute) = (base.precond, base.compute);
        experiment.train.batch = base.train.batch;
        experiment.name = trial.name.to_owned();
        self.set_length(&mut experiment, self.settings.budget);
        if let Some(last) = distilled_to(trial.name) {
            set_stages(&mut experiment, last);
        }
        Ok(experiment)
    }

    fn set_length(&self, experiment: &mut Experiment, images: u64) {
        let steps = (images / experiment.train.batch as u64).max(1);
        experiment.set_steps(steps);
        set_stops(experiment, steps.div_ceil(self.settings.points));
        (experiment.run.keep_last, experiment.run.log_every) = (1, (steps / 100).max(1));
    }
}

/// Grids and checkpoints every so many steps.
fn set_stops(experiment: &mut Experiment, every: u64) {
    let run = &mut experiment.run;
    (run.sample_every, run.checkpoint_every, run.milestone_every) = (every, every, every);
}

/// Divides a progressive distillation into stages of which the student of `last` steps has the end.
fn set_stages(experiment: &mut Experiment, last: u64) {
    let total = experiment.train.total_steps;
    let PairRule::Steps { num_scales: NumScales::ProgDist { start, steps_per_stage }, .. } =
        &mut experiment.train.pairs
    else {
        return;
    };
    if last > 1 {
        // The stage of two steps is as long as two others. What does not divide is missing at the end: a longer run would
        // begin the next stage.
        let halvings = u64::from(start.ilog2()) - u64::from(last.ilog2());
        let stages = halvings + if last == 2 { 2 } else { 1 };
        *steps_per_stage = total.div_ceil(stages);
    }
    // A stage's end is where its student can be looked at.
    let every = *steps_per_stage;
    set_stops(experiment, every);
}

/// The steps in which progressive distillation can have all its stages, of which the last two count double.
fn least_steps(progressive: &Experiment) -> u64 {
    match progressive.train.pairs {
        PairRule::Steps { num_scales: NumScales::ProgDist { start, .. }, .. } => u64::from(start.ilog2()) + 3,
        _ => 1,
    }
}

/// The trials that `--quick` leaves out: with the teacher it has 14 runs. Of a single seed no claim is decided anyhow.
const SLOW: [&str; 3] = ["cd-lpips", "pd-2", "pd-4"];
/// The trials of `--smoke`.
const SMOKE: [&str; 2] = ["cd", "ect"];

fn settings(args: &ReportArgs, device: String) -> Settings {
    let small = args.data != ReportData::Cifar10;
    let (budget, measured, levels): (u64, u64, &[usize]) = match (args.smoke, args.quick) {
        (true, _) => (9_600, 500, &[TEACHER_LEVELS]),
        (_, true) => (38_400, 1_000, &[2, 3, 5, 9, TEACHER_LEVELS]),
        _ if small => (128_000, 2_000, &[2, 3, 5, 9, TEACHER_LEVELS, 35]),
        _ => (12_800_000, 10_000, &[2, 3, 5, 9, TEACHER_LEVELS, 35]),
    };
    let budget = args.budget.unwrap_or(budget);
    Settings {
        version: VERSION,
        form: if args.smoke {
            "smoke"
        } else if args.quick {
            "quick"
        } else {
            "full"
        }
        .to_owned(),
        data: args.data.name().to_owned(),
        images: String::new(),
        judge: None,
        budget,
        teacher_budget: 2 * budget,
        points: if args.smoke { 2 } else { 5 },
        measured,
        second_sigma: if args.data == ReportData::Digits { 0.5 } else { 0.8 },
        levels: levels.to_vec(),
        device,
    }
}

fn preset(data: &str, recipe: &str, images: Option<&Path>, sets: &[String]) -> Result<Experiment> {
    let mut experiment = Experiment::read(&Source::find(&format!("{data}-{recipe}"))?, sets)?;
    if let Some(images) = images {
        let images: PathBuf = std::path::absolute(images).with_context(|| images.display().to_string())?;
        experiment.set_data(&images);
    }
    Ok(experiment)
}

/// s₀ of the data set's consistency training.
fn start_of_ct(data: &str) -> Result<usize> {
    match preset(data, "ct", None, &[])?.train.pairs {
        PairRule::Grid { num_scales: NumScales::Progressive { s0, .. }, .. } => Ok(s0),
        other => bail!("{data}-ct: expected a progressive N(k), found {other:?}"),
    }
}

/// Why a trial cannot be tried, if it cannot: LPIPS needs weights and images that are large enough.
fn cannot_be(trial: &Trial, base: &Experiment) -> Option<String> {
    if !trial.sets.contains(&"train.metric=lpips") {
        return None;
    }
    let metric: Metric = serde_json::from_str("\"lpips\"").ok()?;
    let small = lpips::check(&metric, base.network.image_shape()).err().map(|error| format!("{error:#}"));
    small.or_else(|| lpips::missing_weights(&metric).map(|error| error.to_string()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use cm_train::{Method, TargetRule};

    use super::*;

    #[derive(Parser)]
    struct Words {
        #[command(flatten)]
        args: ReportArgs,
    }

    fn trial(name: &str) -> Option<&'static Trial> {
        TRIALS.iter().find(|trial| trial.name == name)
    }

    fn plan(words: &[&str]) -> Result<Plan> {
        let args = Words::parse_from(["cm"].iter().chain(words)).args;
        Plan::new(&args, "Cpu".into())
    }

    #[test]
    fn every_trial_of_every_data_set_reads_and_sees_the_same_number_of_images() {
        for data in [["--data", "digits"], ["--data", "emoji"], ["--data", "fashion"], ["--data", "cifar10"]]
        {
            let images: &[&str] =
                if data[1] == "digits" || data[1] == "emoji" { &[] } else { &["--images", "x"] };
            let plan = plan(&[&data, images].concat()).unwrap();
            for trial in &TRIALS {
                let experiment = plan.experiment(trial, 2).unwrap();
                let train = &experiment.train;
                assert_eq!(
                    train.total_steps * train.batch as u64,
                    plan.settings.budget,
                    "{data:?} {}",
                    trial.name
                );
                assert_eq!((train.seed, &experiment.network), (2, &plan.base.network));
                assert_eq!(experiment.data, plan.base.data);
            }
        }
    }

    #[test]
    fn trials_differ_from_the_base_in_one_thing() {
        let plan = plan(&[]).unwrap();
        let of = |name| plan.experiment(trial(name).unwrap(), 0).unwrap().train;
        let base = of("cd");
        for name in ["cd-l1", "cd-l2"] {
            assert_eq!(cm_train::TrainSpec { metric: base.metric.clone(), ..of(name) }, base, "{name}");
        }
        for name in ["cd-n8", "cd-n40"] {
            assert_ne!(of(name).pairs, base.pairs);
            assert_eq!(cm_train::TrainSpec { pairs: base.pairs, ..of(name) }, base, "{name}");
        }
        assert_eq!(cm_train::TrainSpec { teacher: base.teacher, ..of("cd-euler") }, base);
        assert_eq!(cm_train::TrainSpec { teacher: base.teacher, ..of("cd-n8-euler") }, of("cd-n8"));
        let ct = of("ct");
        assert!(matches!(ct.target, TargetRule::Ema { .. }));
        assert_eq!(cm_train::TrainSpec { target: ct.target, ..of("ct-live") }, ct);
        assert_eq!(cm_train::TrainSpec { target: ct.target, pairs: ct.pairs, ..of("ct-n18") }, ct);
        assert!(matches!(of("pd").recipe().method(), Method::Progressive { .. }));
    }

    #[test]
    fn each_progressive_distillation_spends_all_images_and_ends_at_its_own_steps() {
        // Budgets of numbers of steps that divide into stages and of some that do not.
        for steps in (7..40).chain([500, 501, 1000]) {
            let budget = (steps * 128).to_string();
            let plan = plan(&["--budget", &budget]).unwrap();
            for (name, last) in PROGRESSIVE {
                let experiment = plan.experiment(trial(name).unwrap(), 0).unwrap();
                assert_eq!(experiment.train.total_steps, steps);
                assert_eq!(experiment.student_steps(steps), Some(last as usize), "{name} in {steps} steps");
                let first = experiment.student_steps(1);
                assert_eq!(first, Some(16), "all begin with the same student");
            }
        }
        assert_eq!([1, 2, 4].map(|steps| sampled_in("pd", steps)), ["pd", "pd-2", "pd-4"]);
        assert_eq!(sampled_in("cd", 2), "cd");
    }

    #[test]
    fn what_cannot_be_is_one_line() {
        let error = |words: &[&str]| format!("{:#}", plan(words).err().unwrap());
        assert!(error(&["--data", "fashion"]).contains("--images"));
        assert!(error(&["--images", "x"]).contains("bundled"));
        assert!(error(&["--budget", "100"]).contains("at least 896"));
        assert!(error(&["--trials", "cd-lpips"]).contains("--trials cd-lpips"));
        let smoke = plan(&["--smoke"]).unwrap();
        assert_eq!(smoke.trials.iter().map(|trial| trial.name).collect::<Vec<_>>(), SMOKE);
        let quick = plan(&["--quick"]).unwrap();
        assert!(quick.seeds == 1 && quick.trials.len() == 13, "with the teacher 14 runs");
        assert_eq!(quick.left_out.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), SLOW);
        for (name, why) in &quick.left_out {
            assert!(why.ends_with(&format!("--trials {name}")), "{why}");
        }
    }
}
