//! Dropout draws from a generator that the whole process shares, so this binary has one test.

mod common;

use cm_model::schedule::{Boundary, NoiseCond, SigmaRange};
use cm_model::{Cond, Mode, Preconditioned, Sigma};
use cm_net::{DhariwalUnetSpec, NetSpec, build};
use common::{adm, all, fill, rel, wave};
use tch::Device;

fn model(spec: &NetSpec) -> Preconditioned<Box<dyn cm_model::Backbone>, Boundary> {
    let net = build(spec, 1, Device::Cpu).unwrap();
    fill(net.params());
    let precond = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    Preconditioned::new(net, precond, SigmaRange::new(0.002, 80.0).unwrap())
}

#[test]
fn dropout_is_a_function_of_the_seed() {
    let x = wave(&[2, 3, 8, 8]);
    for spec in all() {
        let model = model(&spec);
        let cond = Cond::labels(&[1, 2], spec.num_classes(), Device::Cpu).unwrap();
        let run = |sigma: f64, mode| model.evaluate(&x, Sigma::One(sigma), &cond, mode).unwrap();
        let train = |seed| Mode::Train { dropout_seed: seed };
        assert!(run(1.0, train(3)).equal(&run(1.0, train(3))), "{spec:?}");
        assert!(rel(&run(1.0, train(3)), &run(1.0, train(4))) > 1e-3, "{spec:?}");
        assert!(rel(&run(1.0, train(3)), &run(1.0, Mode::Eval)) > 1e-3, "{spec:?}");
        assert!(run(1.0, Mode::Eval).equal(&run(1.0, Mode::Eval)), "{spec:?}");
    }
    // Almost every label is dropped: the answer in training is the unconditional one, in evaluation it is not.
    let spec = DhariwalUnetSpec { label_dropout: 0.999_999, dropout: 0.0, ..adm() };
    let model = model(&spec.into());
    let cond = Cond::labels(&[1, 2], 5, Device::Cpu).unwrap();
    let run = |cond: &Cond, mode| model.evaluate(&x, Sigma::One(1.0), cond, mode).unwrap();
    let train = Mode::Train { dropout_seed: 0 };
    assert!(run(&cond, train).equal(&run(&Cond::none(), Mode::Eval)));
    assert!(rel(&run(&cond, Mode::Eval), &run(&Cond::none(), Mode::Eval)) > 1e-3);
}
