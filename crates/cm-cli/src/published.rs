//! Laws of the files in `configs/`, and the numbers of the published runs that they stand for.

use cm_data::AugmentSpec;
use cm_schedule::curriculum::{EctAdjust, Reading};
use cm_schedule::{Ect, NumScales, TargetEma};
use cm_torch::optim::OptimKind;
use cm_train::{Method, PairRule, TargetRule};
use toml::{Table, Value};

use crate::config::{PRESETS, Source};
use crate::experiment::Experiment;
use crate::sources::differences;

fn read(name: &str) -> Experiment {
    Experiment::read(&Source::find(name).unwrap(), &[]).unwrap()
}

/// The presets of published runs: all but those of the demo.
fn published() -> impl Iterator<Item = (&'static str, Experiment)> {
    let of_the_demo = |name: &str| ["digits-", "emoji-", "fashion-"].iter().any(|set| name.starts_with(set));
    let names = PRESETS.iter().map(|(name, _)| *name).filter(move |name| !of_the_demo(name));
    names.map(|name| (name, read(name)))
}

/// Data set and method of a preset: `lsun-cat256-cd-l2` is `("lsun-cat256", "cd-l2")`.
fn parts(name: &str) -> (&str, &str) {
    let sets = ["cifar10", "imagenet64", "lsun-bedroom256", "lsun-cat256"];
    let part = |set| Some((set, name.strip_prefix(set)?.strip_prefix('-')?));
    sets.into_iter().find_map(part).unwrap()
}

#[test]
fn networks_have_the_published_numbers_of_parameters() {
    for (name, experiment) in published() {
        let want = match (parts(name), experiment.network.image_shape().height) {
            (("cifar10", "edm"), _) => 56_397_827,
            (("cifar10", "edm-ddpmpp"), _) => 55_733_891,
            (("cifar10", "edm-cond"), _) => 55_735_299,
            // DDPM++ without the 9 × 128 weights that augmentation enters through.
            (("cifar10", "ect" | "ect-1hour"), _) => 55_733_891 - 9 * 128,
            // NCSN++ without its 9 × 256.
            (_, 32) => 56_397_827 - 9 * 256,
            (_, 64) => 295_899_267,
            _ => 526_304_771,
        };
        assert_eq!(experiment.network.num_parameters().unwrap(), want, "{name}");
    }
}

/// EDM's own diffusion models are told how their images were augmented, and nothing else is augmented but by flips.
#[test]
fn the_augmentation_is_edms() {
    for (name, experiment) in published() {
        let told = ["edm", "edm-ddpmpp", "edm-cond"].contains(&parts(name).1) && parts(name).0 == "cifar10";
        assert_eq!(experiment.augment, told.then(AugmentSpec::edm_cifar10), "{name}");
        assert_eq!(experiment.network.augment_dim(), if told { 9 } else { 0 }, "{name}");
        // ECT's script does not mirror, and augmentation has a flip of its own.
        assert_eq!(experiment.data.flip, !told && !parts(name).1.starts_with("ect"), "{name}");
    }
}

/// What the scripts changed is how long and how fast is trained and what is averaged: never the task.
#[test]
fn released_values_have_the_papers_beside_them() {
    for (name, released) in published() {
        let Some(sibling) = name.strip_suffix("-released") else { continue };
        assert!(PRESETS.iter().any(|(name, _)| *name == sibling), "{name} has no {sibling}");
        let paper = read(sibling);
        assert_eq!(released.train.recipe().method(), paper.train.recipe().method(), "{name}");
        assert_eq!(released.train.metric, paper.train.metric, "{name}");
        assert_eq!(released.network.image_shape(), paper.network.image_shape(), "{name}");
        assert_ne!(released.train, paper.train, "{name} says nothing new");
    }
}

#[test]
fn variants_of_distillation_differ_in_what_their_name_says() {
    let values = |name: &str| Source::find(name).unwrap().text().parse::<Table>().unwrap();
    let mut seen = 0;
    for (name, _) in published() {
        let Some((base, metric)) = name.rsplit_once('-').filter(|(_, metric)| ["l1", "l2"].contains(metric))
        else {
            continue;
        };
        let mut want = values(base);
        want.insert("name".into(), Value::String(name.into()));
        let train = want["train"].as_table_mut().unwrap();
        train.insert("metric".into(), Value::String(metric.into()));
        if metric == "l1" {
            train.insert("lr".into(), Value::Float(2e-4));
        }
        assert_eq!(values(name), want, "{name}");
        seen += 1;
    }
    assert_eq!(seen, 5);
}

#[test]
fn students_take_the_weights_of_their_teachers() {
    for (teacher, students) in [
        ("cifar10-edm", ["cifar10-cd", "cifar10-cd-l1", "cifar10-cd-l2", "cifar10-pd"].as_slice()),
        ("cifar10-edm-released", &["cifar10-cd", "cifar10-cd-l1", "cifar10-cd-l2", "cifar10-pd"]),
        ("cifar10-edm-ddpmpp", &["cifar10-ect", "cifar10-ect-1hour"]),
        ("imagenet64-edm", &["imagenet64-cd", "imagenet64-cd-released", "imagenet64-cd-l2"]),
        (
            "lsun-bedroom256-edm",
            &["lsun-bedroom256-cd", "lsun-bedroom256-cd-released", "lsun-bedroom256-cd-l2"],
        ),
        ("lsun-cat256-edm", &["lsun-cat256-cd", "lsun-cat256-cd-released", "lsun-cat256-cd-l2"]),
    ] {
        let teacher_says = read(teacher);
        assert!(teacher_says.train.recipe().method().trains_denoiser());
        for student in students {
            let found = differences(&teacher_says.network, &teacher_says.precond, &read(student));
            assert!(found.is_empty(), "{teacher} and {student}: {found:?}");
        }
    }
}

/// A row of the table of published runs: presets, method, batch, learning rate, steps, metric.
type Row<'a> = (&'a [&'a str], &'a str, usize, f64, u64, &'a str);

#[test]
fn runs_are_as_long_and_as_large_as_the_published_ones() {
    let rows: &[Row<'_>] = &[
        (
            &["cifar10-edm", "cifar10-edm-ddpmpp", "cifar10-edm-cond"],
            "edm",
            512,
            1e-3,
            390_625,
            "squared_norm",
        ),
        (&["cifar10-edm-released"], "edm", 512, 1e-3, 400_000, "squared_norm"),
        (&["cifar10-cd"], "cd", 512, 4e-4, 800_000, "lpips"),
        (&["cifar10-cd-l1"], "cd", 512, 2e-4, 800_000, "l1"),
        (&["cifar10-cd-l2"], "cd", 512, 4e-4, 800_000, "l2"),
        (&["cifar10-pd"], "pd", 512, 5e-5, 800_000, "l2"),
        (&["cifar10-ct", "cifar10-ct-released"], "ct", 512, 4e-4, 800_000, "lpips"),
        (&["cifar10-ict"], "ct", 1024, 1e-4, 400_000, "pseudo_huber"),
        (&["cifar10-ect"], "ct", 128, 1e-4, 200_000, "pseudo_huber"),
        (&["cifar10-ect-1hour"], "ct", 128, 1e-4, 8_000, "pseudo_huber"),
        (&["imagenet64-edm"], "edm", 4096, 1e-4, 610_352, "l2"),
        (&["imagenet64-cd", "imagenet64-cd-released"], "cd", 2048, 8e-6, 600_000, "lpips"),
        (&["imagenet64-cd-l2"], "cd", 2048, 8e-6, 600_000, "l2"),
        (&["imagenet64-ct"], "ct", 2048, 8e-6, 800_000, "lpips"),
        (&["imagenet64-ct-released"], "ct", 2048, 1e-4, 800_000, "lpips"),
        (&["lsun-bedroom256-edm", "lsun-cat256-edm"], "edm", 256, 1e-4, 1_000_000, "l2"),
        (&["lsun-bedroom256-cd", "lsun-cat256-cd"], "cd", 2048, 1e-5, 600_000, "lpips"),
        (&["lsun-bedroom256-cd-l2", "lsun-cat256-cd-l2"], "cd", 2048, 1e-5, 600_000, "l2"),
        (&["lsun-bedroom256-cd-released", "lsun-cat256-cd-released"], "cd", 256, 1e-5, 600_000, "lpips"),
        (&["lsun-bedroom256-ct", "lsun-cat256-ct"], "ct", 2048, 1e-5, 1_000_000, "lpips"),
        (&["lsun-bedroom256-ct-released", "lsun-cat256-ct-released"], "ct", 256, 5e-5, 1_000_000, "lpips"),
    ];
    let mut named: Vec<&str> = Vec::new();
    for &(names, method, batch, lr, steps, metric) in rows {
        for &name in names {
            let train = read(name).train;
            let got = match train.recipe().method() {
                Method::Denoising => "edm",
                Method::Consistency => "ct",
                Method::Distillation(_) => "cd",
                Method::Progressive { .. } => "pd",
            };
            let got = (got, train.batch, train.lr, train.total_steps, train.metric.name());
            assert_eq!(got, (method, batch, lr, steps, metric), "{name}");
            named.push(name);
        }
    }
    named.sort_unstable();
    let mut all: Vec<&str> = published().map(|(name, _)| name).collect();
    all.sort_unstable();
    assert_eq!(named, all, "every published run has a row");
}

#[test]
fn levels_and_targets_are_the_published_ones() {
    let fixed = |num_scales| Some(NumScales::Fixed { num_scales });
    let grows = |s1| Some(NumScales::Progressive { s0: 2, s1 });
    let mu = |mu| TargetRule::Ema { rule: TargetEma::Fixed { mu } };
    for (name, experiment) in published() {
        let reading = if name.ends_with("-released") { Reading::Released } else { Reading::Paper };
        let adaptive = |mu0| TargetRule::Ema { rule: TargetEma::Adaptive { mu0, s0: 2, reading } };
        let (data, method) = parts(name);
        let want = match (data, method.split('-').next().unwrap()) {
            (_, "edm") => (None, TargetRule::Image {}),
            ("cifar10", "cd") => (fixed(18), TargetRule::Live {}),
            ("cifar10", "ct") => (grows(150), adaptive(0.9)),
            ("cifar10", "ict") => (Some(NumScales::Doubling { s0: 10, s1: 1280 }), TargetRule::Live {}),
            ("cifar10", "ect") => (None, TargetRule::Live {}),
            ("cifar10", _) => {
                (Some(NumScales::ProgDist { start: 4096, steps_per_stage: 50_000 }), TargetRule::TwoSteps {})
            }
            (_, "cd") => (fixed(40), mu(0.95)),
            ("imagenet64", _) => (grows(200), adaptive(0.95)),
            (_, _) => (grows(150), adaptive(0.95)),
        };
        let scales = match experiment.train.pairs {
            PairRule::Grid { num_scales, .. } | PairRule::Steps { num_scales, .. } => Some(num_scales),
            _ => None,
        };
        assert_eq!((scales, experiment.train.target), want, "{name}");
    }
}

#[test]
fn optimisers_and_stages_are_the_published_ones() {
    for (name, experiment) in published() {
        let train = &experiment.train;
        let adam = name.starts_with("cifar10-edm") || name == "cifar10-pd";
        assert_eq!(matches!(train.optimizer, OptimKind::Adam { .. }), adam, "{name}");
        assert_eq!(matches!(train.optimizer, OptimKind::RAdam { .. }), !adam, "{name}");
        assert_eq!(train.grad_clip, (name == "cifar10-pd").then_some(1.0), "{name}");
    }
    // iCT doubles N every 50,000 steps, ECT halves its step every 25,000.
    let ict = read("cifar10-ict").train;
    let scales = |step| ict.recipe().schedule(step, ict.total_steps).num_scales.unwrap();
    assert_eq!([0, 49_999, 50_000, 399_999].map(scales), [11, 11, 21, 1281]);
    let ect = read("cifar10-ect").train;
    let stage = |step| ect.recipe().schedule(step, ect.total_steps).stage.unwrap();
    assert_eq!([0, 24_999, 25_000, 199_999].map(stage), [0, 0, 1, 7]);
    let adjust = EctAdjust::Sigmoid { k: 8.0, b: 1.0 };
    let map = Ect { q: 256.0, stages: 1, adjust };
    assert!(
        matches!(read("cifar10-ect-1hour").train.pairs, PairRule::Continuous { map: got, .. } if got == map)
    );
    // 4096 steps after 11 stages of 50,000 have become 2, for 100,000 more, and then 1.
    let pd = read("cifar10-pd").train;
    let steps = |step| pd.recipe().schedule(step, pd.total_steps).num_scales.unwrap();
    assert_eq!([0, 549_999, 550_000, 649_999, 650_000].map(steps), [4096, 4, 2, 2, 1]);
}

#[test]
fn averages_of_the_weights_are_the_published_ones() {
    let (long, scripts) = ("0.9999432189950708", ["0.9999432189950708", "0.9999", "0.999"]);
    for (name, experiment) in published() {
        let want: &[&str] = match parts(name) {
            ("cifar10", "edm-released") => &["halflife-500000"],
            ("cifar10", "edm" | "edm-ddpmpp" | "edm-cond") => &["halflife-500000-rampup-0.05"],
            ("cifar10", "pd") | ("lsun-bedroom256", "cd" | "cd-l2") => &[],
            ("cifar10", "ict") => &["0.99993"],
            ("cifar10", "ect-1hour") => &["0.9993"],
            ("cifar10", _) => &["0.9999"],
            ("imagenet64", "cd-released" | "ct-released") | (_, "edm") => &scripts,
            (_, "cd-released" | "ct-released") => &[long, "0.99994", "0.9999"],
            _ => &["0.999943"],
        };
        let got: Vec<String> = experiment.train.emas.iter().map(cm_train::ema_name).collect();
        assert_eq!(got, want, "{name}");
    }
}
