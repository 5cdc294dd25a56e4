use cm_model::{Cond, Mode, Sigma};
use cm_schedule::{SigmaRange, TargetEma, Weighting};
use tch::{Kind, Tensor};

use crate::testing::{LEVELS, Model, SHAPE, batch, mlp, spec, trainer};
use crate::{
    Batch, Distance, Example, Losses, Metric, Pairs, Target, TargetRule, TrainSpec, Trainable,
    consistency_loss,
};

#[test]
fn at_sigma_zero_the_target_is_the_image() {
    let model = mlp(0, 0.0);
    let Batch { images, cond } = batch(0, 4);
    let noise = batch(9, 4).images;
    let losses = |next: Vec<f64>| {
        let sigma = vec![1.0; 4];
        let pairs = Pairs { sigma, next, weight: vec![2.0; 4] };
        let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
        consistency_loss(&model, Target::Live, &example, &Distance::L1, Mode::Eval).unwrap()
    };
    let all = losses(vec![0.0; 4]);
    assert!(all.target.equal(&images));
    let some = losses(vec![0.0, 0.5, 0.0, 0.5]);
    let at_image = [0, 2].map(|i| some.target.get(i).equal(&images.get(i)));
    let elsewhere = [1, 3].map(|i| some.target.get(i).equal(&images.get(i)));
    assert_eq!((at_image, elsewhere), ([true; 2], [false; 2]));
    assert!(some.per_sample.get(0).equal(&all.per_sample.get(0)));
    assert!((&all.distance * 2.0).equal(&all.per_sample.detach()));
}

fn mlp_loss(student: &Model, target: Target<'_>, pairs: &Pairs, mode: Mode) -> Losses {
    let Batch { images, cond } = batch(0, pairs.sigma.len() as i64);
    let noise = batch(5, pairs.sigma.len() as i64).images;
    let example = Example { images: &images, noise: &noise, pairs, cond: &cond };
    consistency_loss(student, target, &example, &Distance::L2, mode).unwrap()
}

fn gradients(model: &Model) -> Vec<Tensor> {
    model.params().trainable().map(|(_, weight)| weight.grad()).collect()
}

#[test]
fn no_gradient_flows_through_the_target() {
    let pairs = Pairs::new([(1.0, 0.5), (3.0, 2.0)], Weighting::Uniform, 0.5);
    let live = mlp(0, 0.0);
    mlp_loss(&live, Target::Live, &pairs, Mode::Eval).per_sample.mean(Kind::Float).backward();
    let (student, twin) = (mlp(0, 0.0), mlp(0, 0.0));
    mlp_loss(&student, Target::Network(&twin), &pairs, Mode::Eval).per_sample.mean(Kind::Float).backward();
    assert!(gradients(&twin).iter().all(|grad| !grad.defined()));
    assert!(std::iter::zip(gradients(&live), gradients(&student)).all(|(a, b)| a.equal(&b)));
    // With the gradient through both ends the result is another one.
    let full = mlp(0, 0.0);
    let ends = [&pairs.sigma, &pairs.next].map(|levels| {
        let level = Tensor::from_slice(levels).to_kind(Kind::Float).view([-1, 1, 1, 1]);
        let x = batch(0, 2).images + batch(5, 2).images * level;
        full.evaluate(&x, Sigma::Each(levels), &Cond::none(), Mode::Eval).unwrap()
    });
    Distance::L2.between(&ends[0], &ends[1]).mean(Kind::Float).backward();
    assert!(
        std::iter::zip(gradients(&live), gradients(&full)).any(|(a, b)| !a.allclose(&b, 1e-3, 1e-6, false))
    );
}

#[test]
fn student_and_target_share_their_dropout() {
    let (student, twin) = (mlp(0, 0.5), mlp(0, 0.5));
    // In float32 both ends are one point: what differs is the mask alone.
    let pairs = Pairs::new([(1.0, 1.0 - 1e-12); 8], Weighting::Uniform, 0.5);
    for dropout_seed in 0..5 {
        let mode = Mode::Train { dropout_seed };
        for target in [Target::Live, Target::Network(&twin)] {
            let losses = mlp_loss(&student, target, &pairs, mode);
            assert_eq!(losses.per_sample.abs().max().double_value(&[]), 0.0);
        }
    }
    let [a, b] = [0, 1]
        .map(|dropout_seed| mlp_loss(&student, Target::Live, &pairs, Mode::Train { dropout_seed }).student);
    assert!(!a.equal(&b), "the masks of two seeds differ");
}

#[test]
fn a_target_without_memory_is_the_live_network() {
    let weights = |target| {
        let mut trainer = trainer(&TrainSpec { target, metric: Metric::L1, ..spec() }, 0.3);
        for step in 0..10 {
            trainer.step(&batch(step, 12)).unwrap();
        }
        trainer.student().params().snapshot()
    };
    let live = weights(TargetRule::Live {});
    let memoryless = weights(TargetRule::Ema { rule: TargetEma::Fixed { mu: 0.0 } });
    assert!(live.iter().all(|(name, tensor)| tensor.equal(&memoryless[name])));
    let slow = weights(TargetRule::Ema { rule: TargetEma::Fixed { mu: 0.5 } });
    assert!(live.iter().any(|(name, tensor)| !tensor.equal(&slow[name])));
}

#[test]
fn examples_that_do_not_fit_are_refused() {
    let model = mlp(0, 0.0);
    let Batch { images, cond } = batch(0, 2);
    let error = |noise: &Tensor, sigma: f64, next: f64, count: usize| {
        let pairs = Pairs { sigma: vec![sigma; count], next: vec![next; count], weight: vec![1.0; count] };
        let example = Example { images: &images, noise, pairs: &pairs, cond: &cond };
        consistency_loss(&model, Target::Live, &example, &Distance::L2, Mode::Eval).unwrap_err().to_string()
    };
    assert!(error(&images, 1.0, 0.5, 3).contains("2 of each"));
    assert!(error(&images, 1.0, 1.0, 2).contains("next = 1, sigma = 1"));
    assert!(error(&images, 1.0, f64::NAN, 2).contains("next = NaN"));
    assert!(error(&images.narrow(0, 0, 1), 1.0, 0.5, 2).contains("2 of each"));
    assert!(error(&images.narrow(2, 0, 2), 1.0, 0.5, 2).contains("training noise"));
    assert_eq!(SHAPE.numel(), 16);
    assert_eq!(LEVELS.range, SigmaRange::EDM);
}
