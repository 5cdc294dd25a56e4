use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use cm_model::Cond;
use cm_torch::dist::{Keeper, Limits, ProcessGroup, Rendezvous};
use cm_torch::optim::OptimKind;
use tch::{Kind, Tensor};

use crate::testing::{Model, batch, spec, trainer};
use crate::{
    Batch, BoxError, Checkpoints, Observer, Result, RunSpec, STATE_FILE, Session, StepReport, TrainSpec,
    Trainable, Trainer, resume, run,
};

/// Calls `work` on every rank of a group: a thread with a group and a trainer of its own.
fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Rc<ProcessGroup>) -> T + Sync) -> Vec<T> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let one = |rank: usize| {
        let rendezvous = Rendezvous {
            rank,
            local_rank: rank,
            world_size: ranks,
            address: "localhost".to_owned(),
            port,
            keeper: Keeper::RankZero,
            interface: None,
        };
        work(Rc::new(ProcessGroup::join(&rendezvous, Limits::default()).unwrap()))
    };
    let one = &one;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The weights, averages and moments after three steps, and the reports.
fn three_steps(group: Rc<ProcessGroup>, spec: &TrainSpec) -> (Vec<f64>, Vec<StepReport>) {
    let mut trainer = trainer(spec, 0.0);
    trainer.join(group.clone()).unwrap();
    let rows = trainer.rows();
    let reports = (0..3).map(|step| {
        let whole = batch(step, spec.batch as i64).images;
        let images = whole.narrow(0, rows.start as i64, rows.len() as i64);
        trainer.step(&Batch { images, cond: Cond::none() }).unwrap()
    });
    let reports = reports.collect();
    trainer.compare().unwrap();
    let mut state: Vec<Tensor> = trainer.weights.iter().map(|(_, weight)| weight.detach()).collect();
    state.extend(trainer.emas.iter().flat_map(|ema| &ema.tensors).map(Tensor::shallow_clone));
    state.extend(trainer.optimizer.export().into_values());
    let flat: Vec<Tensor> = state.iter().map(|tensor| tensor.to_kind(Kind::Double).view([-1])).collect();
    group.leave().unwrap();
    (Vec::try_from(Tensor::cat(&flat, 0)).unwrap(), reports)
}

#[test]
fn ranks_take_the_step_of_one_whatever_their_number_and_parts() {
    // Adam divides by the gradient's size, which magnifies roundings where it is near 0; its ε does not here.
    let optimizer = OptimKind::Adam { beta1: 0.9, beta2: 0.999, eps: 1e-2, weight_decay: 0.0 };
    let one = TrainSpec { optimizer, grad_clip: Some(0.5), ..spec() };
    let (alone, alone_reports) = three_steps(Rc::new(ProcessGroup::alone()), &one);
    let largest = alone.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    for (ranks, micro_batch) in [(2, None), (3, Some(3)), (5, Some(2))] {
        let spec = TrainSpec { micro_batch, ..one.clone() };
        let results = on_ranks(ranks, |group| three_steps(group, &spec));
        for (state, reports) in &results {
            assert!(*state == results[0].0 && *reports == results[0].1, "ranks differ from one another");
            let worst = state.iter().zip(&alone).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst < 1e-5 * largest, "{ranks} ranks: {worst:e} of {largest:e}");
            for (a, b) in reports.iter().zip(&alone_reports) {
                assert!((a.loss / b.loss - 1.0).abs() < 1e-5 && a.images == b.images);
                assert!(a.samples.iter().zip(&b.samples).all(|(a, b)| a.sigma == b.sigma));
            }
        }
    }
}

/// What a rank holds of averages and moments, in numbers.
fn held(trainer: &Trainer<Model>) -> usize {
    let averages = trainer.emas.iter().flat_map(|ema| &ema.tensors).map(Tensor::numel).sum::<usize>();
    averages + trainer.optimizer.export().values().map(Tensor::numel).sum::<usize>() - 1
}

/// Two steps from the newest checkpoint in `folder`, if there is one, and another checkpoint. Returns what this rank
/// holds at the end.
fn two_steps(group: Rc<ProcessGroup>, spec: &TrainSpec, folder: &Path) -> usize {
    let mut trainer = trainer(spec, 0.0);
    if group.is_first() {
        resume(&mut trainer, folder).unwrap();
    }
    trainer.join(group.clone()).unwrap();
    let rows = trainer.rows();
    let mut source = |step| {
        let images = batch(step, spec.batch as i64).images;
        Ok(Batch { images: images.narrow(0, rows.start as i64, rows.len() as i64), cond: Cond::none() })
    };
    let run_spec =
        RunSpec { log_every: 1, sample_every: 1, checkpoint_every: 1, keep_last: 9, milestone_every: 0 };
    let stop = AtomicBool::new(false);
    let session =
        Session { folder, spec: &run_spec, stop: &stop, metadata: &|_, _| std::collections::BTreeMap::new() };
    let mut drawn = Averages(Vec::new());
    run(&mut trainer, &mut source, &session, &mut drawn).unwrap();
    assert_eq!(drawn.0.len(), if group.is_first() { 2 * spec.emas.len() } else { 0 });
    assert!(drawn.0.iter().all(|sum| sum.is_finite()));
    let lent = trainer.with_ema("0.9", |_| ());
    assert_eq!(
        lent.is_err(),
        group.size() > 1 && spec.shard_state,
        "nothing is left of what was put together"
    );
    let held = held(&trainer);
    group.leave().unwrap();
    held
}

/// Looks at every average when samples are due.
struct Averages(Vec<f64>);

impl Observer<Model> for Averages {
    fn on_sample(&mut self, trainer: &Trainer<Model>) -> std::result::Result<(), BoxError> {
        let sum =
            |model: &Model| model.params().iter().map(|(_, t)| t.sum(Kind::Double).double_value(&[])).sum();
        for name in trainer.ema_names() {
            self.0.push(trainer.with_ema(name, sum)?);
        }
        Ok(())
    }
}

#[test]
fn averages_and_moments_in_shares_are_the_same_bits_and_less_memory() {
    let whole = TrainSpec { total_steps: 2, micro_batch: Some(3), grad_clip: Some(0.5), ..spec() };
    let shared = TrainSpec { shard_state: true, ..whole.clone() };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let numbers = held(&trainer(&whole, 0.0));
    let files = |name: &str, step: u64| -> Vec<(String, Vec<u8>)> {
        let folder = Checkpoints::of_run(&path(name)).path(step);
        let mut files: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let of = |path: &PathBuf| {
            (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
        };
        files.iter().filter(|path| !path.ends_with(STATE_FILE)).map(of).collect()
    };
    for ranks in [2, 3, 5] {
        let (one, other) = (format!("whole-{ranks}"), format!("shared-{ranks}"));
        on_ranks(ranks, |group| two_steps(group, &whole, &path(&one)));
        let held = on_ranks(ranks, |group| two_steps(group, &shared, &path(&other)));
        assert_eq!(held.iter().sum::<usize>(), numbers);
        let most = *held.iter().max().unwrap();
        assert!(most < numbers.div_ceil(ranks) + 4, "{ranks} ranks hold {held:?} of {numbers}");
        assert_eq!(files(&one, 2).len(), 5, "weights, two averages, target and moments");
        assert!(files(&one, 2) == files(&other, 2), "{ranks} ranks");
    }
    // Another number of ranks goes on, one process too, from the same files to the same ones.
    let longer = |spec: &TrainSpec| TrainSpec { total_steps: 4, ..spec.clone() };
    on_ranks(2, |group| two_steps(group, &longer(&whole), &path("whole-3")));
    on_ranks(2, |group| two_steps(group, &longer(&shared), &path("shared-3")));
    assert!(files("whole-3", 4) == files("shared-3", 4));
    two_steps(Rc::new(ProcessGroup::alone()), &longer(&whole), &path("whole-5"));
    two_steps(Rc::new(ProcessGroup::alone()), &longer(&shared), &path("shared-5"));
    assert!(files("whole-5", 4) == files("shared-5", 4));
}

#[test]
fn numbers_that_are_not_finite_in_one_share_are_known_to_all_ranks() {
    let shared = TrainSpec { shard_state: true, ..spec() };
    let errors = on_ranks(3, |group| {
        let mut trainer = trainer(&shared, 0.0);
        trainer.join(group.clone()).unwrap();
        if group.rank() == 2 {
            let _ = trainer.emas[1].tensors[0].get(0).fill_(f64::NAN);
        }
        let error = trainer.check_state().unwrap_err().to_string();
        group.leave().unwrap();
        error
    });
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    assert!(errors[0].contains("of the average halflife-100-rampup-0.05 is not finite"), "{errors:?}");
}

#[test]
fn ranks_take_over_the_state_of_rank_0() {
    let steps = on_ranks(2, |group| {
        let mut trainer = trainer(&spec(), 0.0);
        if group.is_first() {
            trainer.step(&batch(0, 12)).unwrap();
        }
        trainer.join(group.clone()).unwrap();
        let rows = trainer.rows();
        let whole = batch(1, 12).images.narrow(0, rows.start as i64, rows.len() as i64);
        let report = trainer.step(&Batch { images: whole, cond: Cond::none() }).unwrap();
        group.leave().unwrap();
        (report.step, report.images)
    });
    assert_eq!(steps, [(2, 24), (2, 24)]);
}

fn causes(ranks: usize, work: impl Fn(Rc<ProcessGroup>) -> Result<()> + Sync) -> Vec<String> {
    on_ranks(ranks, |group| {
        let error = work(group.clone()).unwrap_err().to_string();
        // All know it by then, and end in good order.
        group.leave().unwrap();
        error
    })
}

#[test]
fn an_image_that_is_not_finite_is_named_on_every_rank() {
    let errors = causes(3, |group| {
        let mut trainer = trainer(&spec(), 0.0);
        trainer.join(group).unwrap();
        let rows = trainer.rows();
        let whole = batch(0, 12).images;
        for bad in [5, 9] {
            let _ = whole.get(bad).fill_(f64::NAN);
        }
        let images = whole.narrow(0, rows.start as i64, rows.len() as i64);
        trainer.step(&Batch { images, cond: Cond::none() }).map(drop)
    });
    for error in errors {
        assert!(error.contains("image 5 of the batch is not finite and the loss (NaN)"), "{error}");
    }
}

#[test]
fn other_settings_another_state_and_too_many_ranks_are_named_on_every_rank() {
    let changed = causes(3, |group| {
        let lr = if group.rank() == 1 { 0.02 } else { 0.01 };
        trainer(&TrainSpec { lr, ..spec() }, 0.0).join(group)
    });
    for error in changed {
        let want =
            "rank 1: its settings are not those of rank 0, all ranks need the same: train.lr: 0.01 → 0.02";
        assert_eq!(error, want);
    }
    let drifted = causes(3, |group| {
        let mut trainer = trainer(&spec(), 0.0);
        trainer.join(group.clone()).unwrap();
        if group.rank() == 2 {
            let _no_grad = tch::no_grad_guard();
            let _ = trainer.weights[1].1.shallow_clone().view([-1]).get(0).g_add_scalar_(1e-3);
        }
        trainer.compare()
    });
    for error in drifted {
        let want = "rank 2: after step 0 its weight 'in.weight' is not that of rank 0";
        assert!(error.starts_with(want), "{error}");
    }
    let crowded = causes(2, |group| trainer(&TrainSpec { batch: 1, ..spec() }, 0.0).join(group));
    for error in crowded {
        assert!(
            error.starts_with("train.batch = 1: expected at least 1 image for each of 2 ranks"),
            "{error}"
        );
    }
}
