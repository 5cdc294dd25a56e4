//! Blocks that are computed again in the backward pass: the same gradients for less memory. Dropout draws from a
//! generator that the whole process shares, so these tests take turns, and no other test is in this binary.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use cm_model::schedule::{Boundary, NoiseCond, SigmaRange};
use cm_model::torch::recompute::{Recompute, part};
use cm_model::torch::rng::Rows;
use cm_model::{Compute, Cond, Mode, Preconditioned, Sigma};
use cm_net::{NetSpec, build};
use common::{all, fill, wave};
use tch::{Device, Kind, Tensor};

/// The generator, for one test.
fn generator() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The loss of rows 1 to 3 of a batch of four, the gradients, and a number drawn afterwards.
fn gradients(spec: &NetSpec, compute: Compute) -> (f64, Vec<(String, Tensor)>, f64) {
    let net = build(spec, 1, Device::Cpu).unwrap();
    fill(net.params());
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    let model = Preconditioned { net, precond, sigma_range: SigmaRange::new(0.002, 80.0).unwrap(), compute };
    let x = wave(&[3, 3, 8, 8]);
    let cond = Cond::labels(&[1, 2, 3], spec.num_classes(), Device::Cpu).unwrap();
    let output = {
        let _rows = Rows::enter(4, 1);
        model.evaluate(&x, Sigma::One(1.0), &cond, Mode::Train { dropout_seed: 3 }).unwrap()
    };
    let loss = (output - wave(&[3, 3, 8, 8]) * 0.5).square().mean(Kind::Float);
    // The backward pass must neither follow the generator nor move it.
    let _ = Tensor::rand([5], (Kind::Float, Device::Cpu));
    loss.backward();
    let next = Tensor::rand([1], (Kind::Float, Device::Cpu)).double_value(&[0]);
    let grads = model.net.params().trainable().map(|(name, weight)| (name.to_owned(), weight.grad()));
    // A weight that the condition leaves out has none.
    (loss.double_value(&[]), grads.filter(|(_, grad)| grad.defined()).collect(), next)
}

/// The norm of the difference of all gradients, over that of the gradients.
fn difference(a: &[(String, Tensor)], b: &[(String, Tensor)]) -> f64 {
    let square = |t: &Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let gap: f64 = std::iter::zip(a, b).map(|((_, a), (_, b))| square(&(a - b))).sum();
    (gap / a.iter().map(|(_, a)| square(a)).sum::<f64>()).sqrt()
}

#[test]
fn gradients_are_the_same_in_every_network_with_dropout_in_any_dtype_and_order() {
    let _turn = generator();
    for spec in all() {
        for (autocast, tolerance) in [(None, 1e-6), (Some(Kind::BFloat16), 2e-3)] {
            let kept = Compute { autocast, channels_last: autocast.is_some(), ..Compute::default() };
            let (loss, grads, next) = gradients(&spec, kept);
            let (again_loss, again, again_next) =
                gradients(&spec, Compute { checkpoint_activations: true, ..kept });
            assert_eq!((loss, next), (again_loss, again_next), "{spec:?}");
            let form = |grads: &[(String, Tensor)]| -> Vec<(String, Vec<i64>, Kind)> {
                grads.iter().map(|(name, grad)| (name.clone(), grad.size(), grad.kind())).collect()
            };
            assert_eq!(form(&grads), form(&again), "{spec:?}");
            // Where an input is read twice in a block and once elsewhere, the three gradients are added in another order.
            let gap = difference(&grads, &again);
            assert!(gap < tolerance, "{autocast:?}: {gap:e} for {spec:?}");
        }
    }
}

#[test]
fn a_chain_of_parts_has_the_same_bits() {
    let _turn = generator();
    let run = |recompute: bool| {
        let _region = recompute.then(Recompute::enter);
        let weights: Vec<Tensor> =
            (0..4).map(|i| (wave(&[16, 16]) * (0.3 + 0.1 * f64::from(i))).set_requires_grad(true)).collect();
        cm_model::torch::rng::seed_dropout(5);
        let mut x = wave(&[8, 16]).set_requires_grad(true);
        let input = x.shallow_clone();
        for weight in &weights {
            let weight = weight.shallow_clone();
            x = part([x], move |[x]| x.matmul(&weight).silu().dropout(0.4, true));
        }
        x.square().sum(Kind::Float).backward();
        weights.iter().chain([&input]).map(Tensor::grad).collect::<Vec<_>>()
    };
    let (kept, again) = (run(false), run(true));
    assert!(std::iter::zip(&kept, &again).all(|(kept, again)| kept.equal(again)));
    assert!(kept.iter().all(|grad| grad.abs().max().double_value(&[]) > 0.0));
}

#[test]
fn a_part_is_computed_twice_where_gradients_are_asked_for_and_else_once() {
    let _turn = generator();
    let count = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let run = |grad: bool| {
        let counted = count.clone();
        let x = wave(&[4]).set_requires_grad(grad);
        let y = part([x], move |[x]| {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            x.exp()
        });
        if grad {
            y.sum(Kind::Float).backward();
        }
        count.swap(0, std::sync::atomic::Ordering::Relaxed)
    };
    assert_eq!(run(true), 1);
    let _region = Recompute::enter();
    assert_eq!((run(true), run(false)), (2, 1));
    let _no_grad = tch::no_grad_guard();
    assert_eq!(run(false), 1);
    // Nobody holds a part that is done with.
    assert_eq!(std::sync::Arc::strong_count(&count), 1);
}

#[test]
fn what_a_part_panics_with_is_what_its_caller_sees() {
    let _turn = generator();
    let _region = Recompute::enter();
    let x = || wave(&[4]).set_requires_grad(true);
    let text = |panic: Box<dyn std::any::Any + Send>| panic.downcast_ref::<&str>().unwrap().to_string();
    let forward = std::panic::catch_unwind(|| part([x()], |_| panic!("forward")));
    assert_eq!(text(forward.unwrap_err()), "forward");
    let later =
        part(
            [x()],
            |[x]| if x.requires_grad() && x.is_leaf() && again() { panic!("backward") } else { x.exp() },
        );
    AGAIN.with(|again| again.set(true));
    let loss = later.sum(Kind::Float);
    let backward = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cm_model::torch::recompute::backward(&loss)
    }));
    AGAIN.with(|again| again.set(false));
    assert_eq!(text(backward.unwrap_err()), "backward");
}

thread_local! {
    static AGAIN: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn again() -> bool {
    AGAIN.with(std::cell::Cell::get)
}
