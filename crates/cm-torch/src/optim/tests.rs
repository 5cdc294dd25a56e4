use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::memory_format::{channels_last, is_channels_last};

/// Deterministic values of order 1 without libtorch's generator, which other tests may move.
fn values(shape: &[i64], phase: f64) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + phase).sin() * 2.0)
        .to_kind(Kind::Float)
        .view(shape)
}

const SHAPES: [&[i64]; 5] = [&[3], &[1, 2049], &[8, 4, 3, 3], &[40_001], &[0]];

/// Weights with names, gradients set by hand, averages at two rates.
struct Model {
    weights: Vec<Tensor>,
    emas: [Vec<Tensor>; 2],
}

impl Model {
    fn new() -> Self {
        let make = |phase: f64| -> Vec<Tensor> {
            SHAPES.iter().zip(1..).map(|(shape, i)| values(shape, phase + f64::from(i))).collect()
        };
        let weights = make(0.1).into_iter().map(|w| w.set_requires_grad(true)).collect();
        Self { weights, emas: [make(0.1), make(0.7)] }
    }

    fn params(&self) -> Vec<(&str, &Tensor)> {
        ["a", "b", "c", "d", "e"].into_iter().zip(&self.weights).collect()
    }

    fn set_grads(&self, step: u64) {
        for (i, w) in (0..).zip(&self.weights) {
            (w * values(&w.size(), step as f64 * 0.37 + f64::from(i))).sum(Kind::Float).backward();
        }
    }

    fn step(&mut self, optimizer: &mut Optimizer, options: &StepOptions) -> Result<Vec<usize>> {
        self.set_grads(optimizer.steps_done());
        let [fast, slow] = &self.emas;
        let emas = [EmaTarget { beta: 0.5, tensors: fast }, EmaTarget { beta: 0.999, tensors: slow }];
        optimizer.step(options, &self.params(), &emas)
    }

    fn all(&self) -> Vec<&Tensor> {
        self.weights.iter().chain(&self.emas[0]).chain(&self.emas[1]).collect()
    }

    fn worst(&self, other: &Self) -> f64 {
        self.all().into_iter().zip(other.all()).map(|(a, b)| difference(a, b)).fold(0.0, f64::max)
    }
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    if a.numel() == 0 {
        return 0.0;
    }
    let _no_grad = tch::no_grad_guard();
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn kinds() -> Vec<OptimKind> {
    let mut kinds = Vec::new();
    for weight_decay in [0.0, 0.02] {
        let (beta1, beta2, eps) = (0.9, 0.99, 1e-6);
        kinds.push(OptimKind::Adam { beta1, beta2, eps, weight_decay });
        kinds.push(OptimKind::AdamW { beta1, beta2, eps, weight_decay });
        kinds.push(OptimKind::RAdam { beta1, beta2, eps, weight_decay });
    }
    kinds
}

/// The rules once more, in f64 and as the papers write them, on one number.
fn by_the_book(kind: OptimKind, lr: f64, start: f64, grads: &[f64]) -> f64 {
    let (rule, [b1, b2, eps, decay]) = kind.parts();
    let (mut x, mut m, mut v) = (start, 0.0, 0.0);
    for (t, &gradient) in (1..).zip(grads) {
        let g = if rule == 1 { gradient } else { gradient + decay * x };
        if rule == 1 {
            x -= lr * decay * x;
        }
        m = b1 * m + (1.0 - b1) * g;
        v = b2 * v + (1.0 - b2) * g * g;
        let m_hat = m / (1.0 - b1.powi(t));
        let v_scale = 1.0 - b2.powi(t);
        if rule < 2 {
            x -= lr * m_hat / ((v / v_scale).sqrt() + eps);
            continue;
        }
        let rho_inf = 2.0 / (1.0 - b2) - 1.0;
        let rho = rho_inf - 2.0 * f64::from(t) * b2.powi(t) / v_scale;
        if rho > 5.0 {
            let r = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
            x -= lr * m_hat * r.sqrt() * v_scale.sqrt() / (v.sqrt() + eps);
        } else {
            x -= lr * m_hat;
        }
    }
    x
}

#[test]
fn both_paths_follow_the_book() {
    let start = values(SHAPES[3], 4.1);
    let grads: Vec<Tensor> = (0..20).map(|step| values(SHAPES[3], f64::from(step) * 0.37 + 3.0)).collect();
    for kind in kinds() {
        for by_lists in [false, true] {
            let mut model = Model::new();
            let mut optimizer = Optimizer::new(kind, &model.params()).unwrap();
            optimizer.by_lists = by_lists;
            for _ in 0..20 {
                model.step(&mut optimizer, &StepOptions::new(0.01)).unwrap();
            }
            for at in [0, 1, 2047, 2048, 40_000] {
                let grads: Vec<f64> = grads.iter().map(|g| g.double_value(&[at])).collect();
                let want = by_the_book(kind, 0.01, start.double_value(&[at]), &grads);
                let got = model.weights[3].double_value(&[at]);
                assert!((got - want).abs() < 2e-6, "{kind:?} lists {by_lists} at {at}: {got} {want}");
            }
        }
    }
}

/// Element (1, 2) of golden file 04e: torch.optim of PyTorch 2.11 and OpenAI's `update_ema` at rate 0.9, lr 0.01.
/// (The whole file is the golden checker's; this pins one element without it.)
#[test]
fn one_element_of_the_reference_run() {
    const START: f32 = -0.005120234;
    const GRADS: [f32; 12] = [
        0.503542,
        0.5094643,
        -0.5433283,
        0.5064078,
        0.04887742,
        0.12537587,
        -0.17739931,
        -0.18790744,
        0.069962524,
        -0.11476166,
        -0.13522168,
        -0.56066704,
    ];
    let with_decay = OptimKind::RAdam { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    // Weight after steps 6 and 12, average after step 12.
    let cases = [
        (OptimKind::radam(), [-0.020709435, -0.020860929, -0.015618107]),
        (OptimKind::adam(), [-0.04006048, -0.04484948, -0.030329622]),
        (with_decay, [-0.020704407, -0.02085452, -0.01561458]),
    ];
    for (kind, want) in cases {
        let weight = Tensor::from_slice(&[START]).set_requires_grad(true);
        let ema = [Tensor::from_slice(&[START])];
        let params = [("w", &weight)];
        let mut optimizer = Optimizer::new(kind, &params).unwrap();
        let mut got = [0.0; 3];
        for (step, gradient) in (1..).zip(GRADS) {
            (&weight * f64::from(gradient)).sum(Kind::Float).backward();
            let emas = [EmaTarget { beta: 0.9, tensors: &ema }];
            optimizer.step(&StepOptions::new(0.01), &params, &emas).unwrap();
            if step == 6 {
                got[0] = weight.double_value(&[0]);
            }
        }
        got[1] = weight.double_value(&[0]);
        got[2] = ema[0].double_value(&[0]);
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-6, "{kind:?}: {got} {want}");
        }
    }
}

#[test]
fn both_paths_agree_everywhere() {
    let cases = [
        StepOptions::new(0.01),
        StepOptions { grad_scale: 0.25, grads: GradsAfter::Zero, ..StepOptions::new(0.01) },
        StepOptions { replace_non_finite: Some(3.0), grads: GradsAfter::Keep, ..StepOptions::new(0.01) },
    ];
    for kind in kinds() {
        for options in &cases {
            let run = |by_lists: bool| {
                let mut model = Model::new();
                let mut optimizer = Optimizer::new(kind, &model.params()).unwrap();
                optimizer.by_lists = by_lists;
                for _ in 0..8 {
                    model.step(&mut optimizer, options).unwrap();
                }
                model
            };
            let error = run(false).worst(&run(true));
            assert!(error < 2e-6, "{kind:?} {options:?}: {error}");
        }
    }
}

/// A constant gradient of 1 makes m̂ = 1 and √(1 − β₂ᵗ)/√v = 1, so each step is lr times the rectification.
#[test]
fn radam_trusts_the_variance_from_step_6() {
    let weight = Tensor::from_slice(&[0.0f32]).set_requires_grad(true);
    let params = [("w", &weight)];
    let mut optimizer = Optimizer::new(OptimKind::radam(), &params).unwrap();
    let mut before = 0.0;
    let mut steps = Vec::new();
    for _ in 0..100 {
        weight.sum(Kind::Float).backward();
        optimizer.step(&StepOptions::new(1.0), &params, &[]).unwrap();
        steps.push(before - weight.double_value(&[0]));
        before = weight.double_value(&[0]);
    }
    for (t, want) in [(1, 1.0), (5, 1.0), (6, 0.025821), (7, 0.032739), (10, 0.048998), (100, 0.215335)] {
        assert!((steps[t - 1] - want).abs() < 3e-6, "step {t}: {} {want}", steps[t - 1]);
    }
}

#[test]
fn averages_follow_the_new_weight() {
    let weight = Tensor::from_slice(&[1.0f32]).set_requires_grad(true);
    let ema = [Tensor::from_slice(&[10.0f32])];
    let copy = [Tensor::from_slice(&[10.0f32])];
    let frozen = [Tensor::from_slice(&[10.0f32])];
    let params = [("w", &weight)];
    let mut optimizer = Optimizer::new(OptimKind::adam(), &params).unwrap();
    weight.sum(Kind::Float).backward();
    let emas = [(0.75, &ema), (0.0, &copy), (1.0, &frozen)].map(|(beta, t)| EmaTarget { beta, tensors: t });
    optimizer.step(&StepOptions::new(0.5), &params, &emas).unwrap();
    // Adam's first step moves by lr against the sign: 1 → 0.5; then 0.75·10 + 0.25·0.5.
    assert!((weight.double_value(&[0]) - 0.5).abs() < 1e-6);
    assert!((ema[0].double_value(&[0]) - 7.625).abs() < 1e-6);
    assert_eq!(copy[0].double_value(&[0]), weight.double_value(&[0]));
    assert_eq!(frozen[0].double_value(&[0]), 10.0);

    for by_lists in [false, true] {
        let ema = [Tensor::from_slice(&[10.0f32])];
        ema::update(&params, &[EmaTarget { beta: 0.75, tensors: &ema }], by_lists).unwrap();
        assert!((ema[0].double_value(&[0]) - 7.625).abs() < 1e-6);
    }
}

#[test]
fn a_resumed_run_is_the_same_run() {
    for kind in kinds() {
        let mut model = Model::new();
        let mut optimizer = Optimizer::new(kind, &model.params()).unwrap();
        for _ in 0..7 {
            model.step(&mut optimizer, &StepOptions::new(0.01)).unwrap();
        }
        let saved: BTreeMap<String, Tensor> =
            optimizer.export().into_iter().map(|(name, t)| (name, t.copy())).collect();
        let mut resumed = Model::new();
        let copies = model.all().into_iter().map(|t| t.detach().copy());
        for (to, from) in resumed.all().into_iter().zip(copies) {
            tch::no_grad(|| to.shallow_clone().copy_(&from));
        }
        let mut fresh = Optimizer::new(kind, &resumed.params()).unwrap();
        fresh.import(&saved).unwrap();
        assert_eq!(fresh.steps_done(), 7);
        for _ in 0..3 {
            model.step(&mut optimizer, &StepOptions::new(0.01)).unwrap();
            resumed.step(&mut fresh, &StepOptions::new(0.01)).unwrap();
        }
        assert_eq!(model.worst(&resumed), 0.0, "{kind:?}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let run = |threads: usize| {
        crate::device::set_threads(threads).unwrap();
        let mut model = Model::new();
        let mut optimizer = Optimizer::new(OptimKind::radam(), &model.params()).unwrap();
        for _ in 0..8 {
            model.step(&mut optimizer, &StepOptions::new(0.01)).unwrap();
        }
        model.set_grads(0);
        let norm = grad_norm(&model.params()).unwrap();
        (model, norm)
    };
    let before = crate::device::threads();
    let ((one, norm_one), (three, norm_three)) = (run(1), run(3));
    crate::device::set_threads(before).unwrap();
    assert_eq!(one.worst(&three), 0.0);
    assert_eq!(norm_one, norm_three);
}

#[test]
fn memory_order_is_a_matter_of_speed_alone() {
    for by_lists in [false, true] {
        let run = |weight_last: bool, grad_last: bool, ema_last: bool| {
            let order = |t: Tensor, last: bool| if last { channels_last(&t) } else { t };
            let shape = [8, 4, 3, 3];
            let weight = order(values(&shape, 0.2), weight_last).set_requires_grad(true);
            let ema = [order(values(&shape, 0.5), ema_last)];
            let params = [("w", &weight)];
            let mut optimizer = Optimizer::new(OptimKind::adam(), &params).unwrap();
            optimizer.by_lists = by_lists;
            for step in 0..3 {
                // A gradient is set by hand, so that its layout is ours to choose; backward makes the first.
                if !weight.grad().defined() {
                    weight.sum(Kind::Float).backward();
                }
                let gradient = order(values(&shape, f64::from(step)), grad_last);
                weight.grad().set_data(&gradient);
                let options = StepOptions { grads: GradsAfter::Zero, ..StepOptions::new(0.1) };
                optimizer.step(&options, &params, &[EmaTarget { beta: 0.9, tensors: &ema }]).unwrap();
                assert_eq!(weight.grad().abs().max().double_value(&[]), 0.0, "zeroed in place");
            }
            assert_eq!((is_channels_last(&weight), is_channels_last(&ema[0])), (weight_last, ema_last));
            let [ema] = ema;
            (weight.detach(), ema)
        };
        let (weight, ema) = run(false, false, false);
        for case in 1..8u8 {
            let (w, e) = run(case & 1 != 0, case & 2 != 0, case & 4 != 0);
            assert_eq!((difference(&w, &weight), difference(&e, &ema)), (0.0, 0.0), "case {case}");
        }
    }
}

#[test]
fn gradients_stay_become_zero_or_go() {
    for by_lists in [false, true] {
        let mut model = Model::new();
        let mut optimizer = Optimizer::new(OptimKind::radam(), &model.params()).unwrap();
        optimizer.by_lists = by_lists;
        let with = |grads| StepOptions { grads, grad_scale: 0.5, ..StepOptions::new(0.01) };
        model.step(&mut optimizer, &with(GradsAfter::Keep)).unwrap();
        let kept = model.weights[0].grad().copy();
        assert_eq!(difference(&kept, &values(&[3], 0.0)), 0.0, "scaling does not touch the gradient itself");

        model.step(&mut optimizer, &with(GradsAfter::Zero)).unwrap();
        assert!(
            model
                .weights
                .iter()
                .all(|w| w.grad().defined()
                    && w.grad().count_nonzero(0).sum(Kind::Int64).int64_value(&[]) == 0)
        );

        model.step(&mut optimizer, &with(GradsAfter::Release)).unwrap();
        assert!(model.weights.iter().all(|w| !w.grad().defined()));
    }
}

#[test]
fn scaling_by_half_is_half_the_gradient() {
    // Plain RAdam steps are linear in the gradient.
    let run = |factor: f64, scale: f64| {
        let weight = Tensor::from_slice(&[1.0f32, -2.0]).set_requires_grad(true);
        let params = [("w", &weight)];
        let mut optimizer = Optimizer::new(OptimKind::radam(), &params).unwrap();
        (&weight * factor).sum(Kind::Float).backward();
        optimizer.step(&StepOptions { grad_scale: scale, ..StepOptions::new(0.1) }, &params, &[]).unwrap();
        weight.detach()
    };
    assert_eq!(difference(&run(3.0, 0.5), &run(1.5, 1.0)), 0.0);
    assert!(difference(&run(3.0, 1.0), &run(1.5, 1.0)) > 0.1);
}

#[test]
fn non_finite_gradients_can_be_replaced() {
    for by_lists in [false, true] {
        let weight = Tensor::zeros([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let params = [("w", &weight)];
        let mut optimizer = Optimizer::new(OptimKind::radam(), &params).unwrap();
        optimizer.by_lists = by_lists;
        let bad = Tensor::from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5]);
        (&weight * bad).sum(Kind::Float).backward();
        let options = StepOptions { replace_non_finite: Some(8.0), ..StepOptions::new(1.0) };
        optimizer.step(&options, &params, &[]).unwrap();
        let moved = Vec::<f32>::try_from(weight.detach()).unwrap();
        for (got, want) in moved.iter().zip([0.0, -8.0, 8.0, -0.5]) {
            assert!((got - want).abs() < 1e-5, "{moved:?}");
        }
    }
}

#[test]
fn a_weight_without_gradient_stays_and_is_reported() {
    for by_lists in [false, true] {
        let (a, b) = (values(&[5], 0.0).set_requires_grad(true), values(&[6], 1.0).set_requires_grad(true));
        let params = [("a", &a), ("b", &b)];
        let ema = [a.zeros_like(), b.zeros_like()];
        let mut optimizer = Optimizer::new(OptimKind::adam(), &params).unwrap();
        optimizer.by_lists = by_lists;
        b.sum(Kind::Float).backward();
        let emas = [EmaTarget { beta: 0.5, tensors: &ema }];
        let missing = optimizer.step(&StepOptions::new(0.1), &params, &emas).unwrap();
        assert_eq!(missing, [0]);
        assert_eq!(difference(&a, &values(&[5], 0.0)), 0.0);
        assert!((difference(&b, &values(&[6], 1.0)) - 0.1).abs() < 1e-6);
        assert!(difference(&(&ema[0] * 2.0), &a) < 1e-6, "its average moves on");
        assert_eq!(optimizer.step(&StepOptions::new(0.1), &params, &[]).unwrap(), [0, 1]);
    }
}

#[test]
fn a_graph_from_before_the_step_is_refused() {
    let weight = values(&[4], 0.0).set_requires_grad(true);
    let params = [("w", &weight)];
    let mut optimizer = Optimizer::new(OptimKind::adam(), &params).unwrap();
    let old_loss = weight.square().sum(Kind::Float);
    weight.sum(Kind::Float).backward();
    optimizer.step(&StepOptions::new(0.1), &params, &[]).unwrap();
    assert!(old_loss.f_backward().is_err());
}

#[test]
fn a_foreign_state_is_refused_whole() {
    let mut model = Model::new();
    let mut optimizer = Optimizer::new(OptimKind::adam(), &model.params()).unwrap();
    model.step(&mut optimizer, &StepOptions::new(0.1)).unwrap();
    let good = optimizer.export();
    assert_eq!(good.len(), 11);
    let mut bad: BTreeMap<String, Tensor> =
        good.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect();
    bad.remove("exp_avg.a");
    bad.insert("exp_avg.z".into(), values(&[3], 0.0));
    bad.insert("exp_avg_sq.a".into(), values(&[4], 0.0));
    bad.insert("exp_avg.c".into(), values(SHAPES[2], 0.0).to_kind(Kind::Double));
    bad.insert("step".into(), Tensor::from(-1i64));
    let mut fresh = Optimizer::new(OptimKind::adam(), &model.params()).unwrap();
    let Err(Error::State { differences }) = fresh.import(&bad) else { panic!("accepted") };
    for (text, part) in differences.iter().zip([
        "'exp_avg.a' is missing",
        "'exp_avg.c' is Double",
        "'exp_avg_sq.a' is Float [4], expected Float [3]",
        "'step' is",
        "'exp_avg.z' belongs to no parameter",
    ]) {
        assert!(text.contains(part), "{text} / {part}");
    }
    assert_eq!(differences.len(), 5);
    assert_eq!((fresh.steps_done(), fresh.exp_avg[1].abs().max().double_value(&[])), (0, 0.0));
    fresh.import(&good).unwrap();
    assert_eq!(fresh.steps_done(), 1);
}

#[test]
fn wrong_arguments_are_named() {
    let w = values(&[3], 0.0).set_requires_grad(true);
    let double = values(&[3], 0.0).to_kind(Kind::Double);
    let refuse = |result: Result<Optimizer>, part: &str| {
        let error = result.expect_err("accepted").to_string();
        assert!(error.contains(part), "{error}");
    };
    refuse(
        Optimizer::new(OptimKind::adam(), &[("w", &double)]),
        "'w': expected elements of kind Float, got Double",
    );
    refuse(Optimizer::new(OptimKind::adam(), &[("w", &w), ("w", &w)]), "'w' twice");
    let beta = OptimKind::Adam { beta1: 1.0, beta2: 0.9, eps: 1e-8, weight_decay: 0.0 };
    refuse(Optimizer::new(beta, &[("w", &w)]), "beta1");

    let params = [("w", &w)];
    let mut optimizer = Optimizer::new(OptimKind::adam(), &params).unwrap();
    w.sum(Kind::Float).backward();
    let (other, short, copy) = (values(&[3], 1.0), [values(&[2], 0.0)], [values(&[3], 0.0)]);
    let alias = [w.detach()];
    let ok = StepOptions::new(0.1);
    let ema = |beta, tensors| vec![EmaTarget { beta, tensors }];
    type Case<'a> = (StepOptions, Vec<(&'a str, &'a Tensor)>, Vec<EmaTarget<'a>>, &'a str);
    let cases: Vec<Case> = vec![
        (StepOptions::new(f64::NAN), params.to_vec(), vec![], "learning rate"),
        (StepOptions { grad_scale: f64::INFINITY, ..ok }, params.to_vec(), vec![], "gradient scale"),
        (ok, vec![], vec![], "expected 1 parameters, got 0"),
        (ok, vec![("v", &w)], vec![], "parameter 'w' at this place"),
        (ok, vec![("w", &short[0])], vec![], "expected shape [3], got [2]"),
        (ok, vec![("w", &other)], ema(1.5, &copy), "EMA beta"),
        (ok, params.to_vec(), ema(0.5, &short), "EMA of 'w'"),
        (ok, params.to_vec(), ema(0.5, &alias), "use a copy"),
    ];
    for (options, params, emas, part) in cases {
        let error = optimizer.step(&options, &params, &emas).unwrap_err().to_string();
        assert!(error.contains(part), "{error} / {part}");
    }
    assert_eq!(optimizer.steps_done(), 0, "a refused step is no step");
}

#[test]
fn rules_are_written_by_name() {
    let text = r#"{"kind":"radam","beta1":0.9,"beta2":0.999,"eps":1e-8,"weight_decay":0.0}"#;
    assert_eq!(serde_json::from_str::<OptimKind>(text).unwrap(), OptimKind::radam());
    assert_eq!(serde_json::to_string(&OptimKind::radam()).unwrap(), text);
    let misspelt = text.replace("eps", "epsilon");
    assert!(serde_json::from_str::<OptimKind>(&misspelt).is_err());
    assert!(serde_json::from_str::<OptimKind>(&text.replace("radam", "adam_w")).is_ok());
    let extra = text.replace("\"kind\"", "\"amsgrad\":true,\"kind\"");
    assert!(serde_json::from_str::<OptimKind>(&extra).is_err());
}
