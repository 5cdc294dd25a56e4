use std::net::TcpListener;
use std::rc::Rc;

use cm_model::Cond;
use cm_torch::dist::{Keeper, Limits, ProcessGroup, Rendezvous};
use cm_torch::optim::OptimKind;
use tch::{Kind, Tensor};

use crate::testing::{batch, spec, trainer};
use crate::{Batch, Result, StepReport, TrainSpec};

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
