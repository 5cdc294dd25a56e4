//! Dropout of units and of labels. Both draw from a generator that the whole process shares, so these tests take
//! turns, and no other test is in this binary.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cm_model::schedule::{Boundary, NoiseCond, SigmaRange};
use cm_model::torch::rng::seed_dropout;
use cm_model::{Cond, Mode, ParamsBuilder, Preconditioned, Sigma};
use cm_net::{DhariwalUnet, DhariwalUnetSpec, NetSpec, SongUnet, SongUnetSpec, build};
use common::{adm, all, fill, ncsnpp, rel, wave};
use tch::{Device, Kind, Tensor};

type Model = Preconditioned<Box<dyn cm_model::Backbone + Send>, Boundary>;

fn model(spec: &NetSpec) -> Model {
    let net = build(spec, 1, Device::Cpu).unwrap();
    fill(net.params());
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    Preconditioned::new(net, precond, SigmaRange::new(0.002, 80.0).unwrap())
}

/// The generator, for one test.
fn generator() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn train(dropout_seed: u64) -> Mode {
    Mode::Train { dropout_seed }
}

fn song_with(label_dropout: f64) -> SongUnetSpec {
    SongUnetSpec { label_dropout, dropout: 0.0, ..ncsnpp() }
}

fn adm_with(label_dropout: f64) -> DhariwalUnetSpec {
    DhariwalUnetSpec { label_dropout, dropout: 0.0, ..adm() }
}

/// The networks that can drop labels, and drop nothing else.
fn droppers(label_dropout: f64) -> [NetSpec; 2] {
    [song_with(label_dropout).into(), adm_with(label_dropout).into()]
}

/// `count` class labels, none of them more frequent than the others.
fn classes(count: i64) -> Cond {
    let labels: Vec<i64> = (0..count).map(|i| i % 5).collect();
    Cond::labels(&labels, 5, Device::Cpu).unwrap()
}

/// For each row of `got`, whether it is that of `without` and not that of `with`. It has to be one of the two.
fn dropped(got: &Tensor, with: &Tensor, without: &Tensor) -> Vec<bool> {
    let gap = |to: &Tensor| {
        let gap = (got - to).abs().flatten(1, -1).amax(1, false) / to.abs().max();
        Vec::<f64>::try_from(gap.to_kind(Kind::Double)).unwrap()
    };
    let (kept, dropped) = (gap(with), gap(without));
    let either = |(kept, dropped): (f64, f64)| {
        assert!(
            (kept < 1e-5) != (dropped < 1e-5),
            "{kept:e} from the labelled answer, {dropped:e} from the other"
        );
        dropped < 1e-5
    };
    kept.into_iter().zip(dropped).map(either).collect()
}

#[test]
fn dropout_is_a_function_of_the_seed() {
    let _turn = generator();
    let x = wave(&[2, 3, 8, 8]);
    for spec in all() {
        let model = model(&spec);
        let cond = Cond::labels(&[1, 2], spec.num_classes(), Device::Cpu).unwrap();
        let run = |sigma: f64, mode| model.evaluate(&x, Sigma::One(sigma), &cond, mode).unwrap();
        assert!(run(1.0, train(3)).equal(&run(1.0, train(3))), "{spec:?}");
        assert!(rel(&run(1.0, train(3)), &run(1.0, train(4))) > 1e-3, "{spec:?}");
        assert!(rel(&run(1.0, train(3)), &run(1.0, Mode::Eval)) > 1e-3, "{spec:?}");
        assert!(run(1.0, Mode::Eval).equal(&run(1.0, Mode::Eval)), "{spec:?}");
    }
}

/// Almost every label is dropped: the answer in training is the unconditional one, in evaluation it is not.
#[test]
fn a_dropped_label_is_no_label_and_evaluation_drops_none() {
    let _turn = generator();
    let x = wave(&[2, 3, 8, 8]);
    for spec in droppers(0.999_999) {
        let model = model(&spec);
        let cond = classes(2);
        let run = |cond: &Cond, mode| model.evaluate(&x, Sigma::One(1.0), cond, mode).unwrap();
        assert!(rel(&run(&cond, train(0)), &run(&Cond::none(), Mode::Eval)) < 1e-6, "{spec:?}");
        assert!(rel(&run(&cond, Mode::Eval), &run(&Cond::none(), Mode::Eval)) > 1e-3, "{spec:?}");
    }
}

/// Whole rows, with the probability that the spec says: five standard deviations of a binomial count.
#[test]
fn labels_are_dropped_as_often_as_the_spec_says() {
    let _turn = generator();
    const COUNT: i64 = 4000;
    let (c_noise, cond) = (wave(&[COUNT]), classes(COUNT));
    for p in [0.1, 0.5] {
        let (song, adm) = (song_with(p), adm_with(p));
        let song = SongUnet::new(&song, ParamsBuilder::new(1, Device::Cpu)).unwrap();
        let adm = DhariwalUnet::new(&adm, ParamsBuilder::new(1, Device::Cpu)).unwrap();
        fill(cm_model::Backbone::params(&song));
        fill(cm_model::Backbone::params(&adm));
        type Embed<'a> = Box<dyn Fn(&Cond, bool) -> Tensor + 'a>;
        let song: Embed<'_> = Box::new(|cond, train| song.embed(&c_noise, cond, train).unwrap());
        let adm: Embed<'_> = Box::new(|cond, train| adm.embed(&c_noise, cond, train).unwrap());
        for embed in [song, adm] {
            seed_dropout(11);
            let trained = embed(&cond, true);
            let rows = dropped(&trained, &embed(&cond, false), &embed(&Cond::none(), false));
            let count = rows.iter().filter(|&&dropped| dropped).count() as f64;
            let deviation = (COUNT as f64 * p * (1.0 - p)).sqrt();
            assert!((count - COUNT as f64 * p).abs() < 5.0 * deviation, "{count} of {COUNT} at {p}");
        }
    }
}

/// The target is another network at another noise level; what they share is the seed.
#[test]
fn student_and_target_drop_the_same_labels() {
    let _turn = generator();
    let (x, cond) = (wave(&[32, 3, 8, 8]), classes(32));
    for spec in droppers(0.4) {
        let (student, target) = (model(&spec), model(&spec));
        {
            let _no_grad = tch::no_grad_guard();
            for (_, weight) in target.net.params().trainable() {
                let _ = weight.shallow_clone().g_mul_scalar_(0.9);
            }
        }
        let rows = |model: &Model, sigma: f64, mode| {
            let run = |cond: &Cond, mode| model.evaluate(&x, Sigma::One(sigma), cond, mode).unwrap();
            dropped(&run(&cond, mode), &run(&cond, Mode::Eval), &run(&Cond::none(), Mode::Eval))
        };
        let mask = rows(&student, 1.0, train(5));
        assert!(mask.contains(&true) && mask.contains(&false), "{spec:?}");
        assert_eq!(rows(&target, 0.7, train(5)), mask, "{spec:?}");
        assert_eq!(rows(&student, 1.0, train(5)), mask, "{spec:?}");
        assert_ne!(rows(&student, 1.0, train(6)), mask, "{spec:?}");
        assert_eq!(rows(&student, 1.0, Mode::Eval), [false; 32], "{spec:?}");
    }
}
