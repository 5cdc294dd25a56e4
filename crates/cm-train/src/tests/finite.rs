//! NaN and infinities in images, weights, gradients, averages and moments: what stops, and what is still there then.
//! A gradient alone is in the tests of the steps.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use tch::Tensor;

use crate::testing::{Model, batch, spec, trainer};
use crate::{
    Batch, BoxError, Checkpoints, Error, RunSpec, Session, TrainSpec, Trainable, Trainer, Weights, run,
};

fn metadata(_: Weights<'_>, _: u64) -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn batches(step: u64) -> std::result::Result<Batch, BoxError> {
    Ok(batch(step, 12))
}

fn fill(tensor: &Tensor, value: f64) {
    let _no_grad = tch::no_grad_guard();
    let _ = tensor.shallow_clone().view([-1]).narrow(0, 0, 1).fill_(value);
}

/// A trainer after two steps, in which one number is then replaced.
fn spoilt(spoil: impl Fn(&mut Trainer<Model>)) -> Trainer<Model> {
    let mut trainer = trainer(&spec(), 0.0);
    (0..2).for_each(|step| drop(trainer.step(&batch(step, 12)).unwrap()));
    spoil(&mut trainer);
    trainer
}

#[test]
fn a_weight_that_is_not_finite_is_named_and_no_step_taken_with_it() {
    for value in [f64::NAN, f64::INFINITY] {
        let mut trainer =
            spoilt(|trainer| fill(trainer.student().params().get("out.weight").unwrap(), value));
        let error = trainer.step(&batch(2, 12)).unwrap_err();
        assert!(
            matches!(&error, Error::NonFinite { step: 3, what, advice }
                if what.contains("weight 'out.weight'") && advice.contains("train.lr (0.01)")),
            "{error:?}"
        );
        assert_eq!(trainer.steps_done(), 2);
    }
}

#[test]
fn a_state_that_is_not_finite_is_not_saved() {
    type Spoil = fn(&mut Trainer<Model>);
    let spoils: [(Spoil, &str); 4] = [
        (|trainer| fill(trainer.student().params().get("in.bias").unwrap(), f64::NAN), "weight 'in.bias'"),
        (|trainer| fill(&trainer.emas[1].tensors[0], f64::INFINITY), "of the average halflife-100"),
        (
            |trainer| fill(&trainer.optimizer.export()["exp_avg.in.bias"], f64::NEG_INFINITY),
            "exp_avg.in.bias",
        ),
        (|trainer| fill(&trainer.optimizer.export()["exp_avg_sq.in.bias"], f64::NAN), "exp_avg_sq.in.bias"),
    ];
    for (spoil, what) in spoils {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::of_run(folder.path());
        let error = spoilt(spoil).save(&checkpoints, &metadata).unwrap_err().to_string();
        assert!(error.contains("after step 2: ") && error.contains(what), "{what}: {error}");
        assert_eq!(checkpoints.steps().unwrap(), Vec::<u64>::new(), "{what}");
    }
    // A number that is large and finite is the run's own business.
    let folder = tempfile::tempdir().unwrap();
    spoilt(|trainer| fill(&trainer.emas[0].tensors[0], 3e38))
        .save(&Checkpoints::of_run(folder.path()), &metadata)
        .unwrap();
}

/// A rate at which weights overflow at once: the loss of the step before was finite, and so were its gradients.
#[test]
fn a_run_that_explodes_stops_at_its_last_good_state() {
    let folder = tempfile::tempdir().unwrap();
    let every =
        RunSpec { log_every: 1, sample_every: 0, checkpoint_every: 1, keep_last: 3, milestone_every: 0 };
    let stop = AtomicBool::new(false);
    let session = Session { folder: folder.path(), spec: &every, stop: &stop, metadata: &metadata };
    let short = TrainSpec { total_steps: 4, ..spec() };
    run(&mut trainer(&short, 0.0), &mut batches, &session, &mut ()).unwrap();

    let wild = TrainSpec { lr: 1e38, ..spec() };
    let mut exploding = trainer(&wild, 0.0);
    crate::resume(&mut exploding, folder.path()).unwrap();
    let error = run(&mut exploding, &mut batches, &session, &mut ()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, Error::Diverged { checkpoint: Some(_), .. }), "{error:?}");
    for part in [
        "is not finite",
        "the last good checkpoint is",
        "lower train.lr (1e38)",
        "train.grad_clip (none is set)",
    ] {
        assert!(
            text.replace("100000000000000000000000000000000000000", "1e38").contains(part),
            "{part}: {text}"
        );
    }
    // Whatever was saved can be gone on from at a sane rate.
    let mut mended = trainer(&spec(), 0.0);
    let from = crate::resume(&mut mended, folder.path()).unwrap().step.unwrap();
    let (newest, broken) = Checkpoints::of_run(folder.path()).newest_whole().unwrap();
    assert!(broken.is_empty() && newest.unwrap().state.step == from);
    mended.check_state().unwrap();
    if from == 4 {
        mended.step(&batch(4, 12)).unwrap();
    }
}
