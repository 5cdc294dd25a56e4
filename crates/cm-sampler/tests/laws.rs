//! Laws of sampling on data whose consistency function and denoiser have a closed form.

use std::cell::RefCell;

use cm_sampler::model::{
    Cond, ConsistencyFn, Denoiser, GaussianOracle, ImageShape, NoiseSource, Philox, Recorded, Sigma, Site,
};
use cm_sampler::schedule::solver::Churn;
use cm_sampler::schedule::{KarrasGrid, Purpose, SigmaRange};
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{
    Error, Hooks, Method, Precision, Request, Result, Solver, Times, multistep, one_step, sample,
    sample_batches,
};

const SHAPE: ImageShape = ImageShape { channels: 3, height: 8, width: 8 };
const ORACLE: GaussianOracle = GaussianOracle { data_std: 0.5, shape: SHAPE, sigma_range: SigmaRange::EDM };

fn seeds(n: u64) -> Vec<u64> {
    (0..n).collect()
}

fn free(seeds: &[u64]) -> Request<'_> {
    Request { clip: false, ..Request::new(seeds) }
}

/// What the seeds draw for evaluation or start `step`.
fn noise(seeds: &[u64], step: u32) -> Tensor {
    let site = Site { samples: seeds, step, purpose: Purpose::Sample };
    Philox { seed: 0, device: Device::Cpu }.normal(SHAPE, &site).unwrap()
}

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

/// The oracle, noting its inputs.
struct Spy {
    inputs: RefCell<Vec<(Tensor, f64)>>,
}

impl Spy {
    fn new() -> Self {
        Self { inputs: RefCell::default() }
    }
}

impl ConsistencyFn for Spy {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        4
    }
    fn sigma_range(&self) -> SigmaRange {
        SigmaRange::EDM
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> cm_sampler::model::Result<Tensor> {
        let Sigma::One(level) = sigma else { panic!("samplers evaluate a batch at one level") };
        self.inputs.borrow_mut().push((x.copy(), level));
        // A class moves the image, so that a mixed-up label shows.
        let shift = match &cond.labels {
            Some(labels) => labels.to_kind(Kind::Float).view([-1, 1, 1, 1]),
            None => Tensor::zeros([1, 1, 1, 1], (Kind::Float, Device::Cpu)),
        };
        Ok(ORACLE.jump(x, sigma, cond)? + shift)
    }
}

#[test]
fn one_step_is_exact() {
    let seeds = seeds(5);
    let got = one_step(&ORACLE, &free(&seeds)).unwrap();
    let gain = 80.0 * ((0.25 + 0.002f64.powi(2)) / (0.25 + 80f64.powi(2))).sqrt();
    let want = noise(&seeds, 0) * gain;
    assert!(largest(&(got - &want)) < 1e-6 * largest(&want));
}

#[test]
fn clipping_bounds_estimates_and_result() {
    let seeds = seeds(8);
    // Position 20 of 40 is left as the level of the result, so that noise is added behind the last estimate.
    let times = Times::Indices { ts: vec![0, 20], steps: 40, rho: 7.0 };
    let method = Method::multistep(&ORACLE, &times).unwrap();
    let mut largest_estimate = 0.0f64;
    let mut look =
        |p: &cm_sampler::Progress<'_>| largest_estimate = largest_estimate.max(largest(p.estimate));
    let hooks = Hooks { noise: None, on_evaluation: Some(&mut look) };
    let clipped = sample(&method, &Request::new(&seeds), hooks).unwrap();
    assert_eq!((largest(&clipped), largest_estimate), (1.0, 1.0));
    let unclipped = sample(&method, &free(&seeds), Hooks::default()).unwrap();
    assert!(largest(&unclipped) > 2.0, "σ(20 of 40) = 2.2");
}

#[test]
fn multistep_keeps_the_variance_of_the_data() {
    // Each jump and each return to a level has the marginal of that level exactly, so any times will do.
    let seeds = seeds(200);
    for times in [
        Times::Sigmas(vec![80.0, 24.4, 5.84, 0.9, 0.661]),
        Times::Indices { ts: vec![0, 5, 22, 30, 39], steps: 40, rho: 7.0 },
    ] {
        let images = multistep(&ORACLE, &times, &free(&seeds)).unwrap().to_kind(Kind::Double);
        let (n, mean_square) = (images.numel() as f64, images.square().mean(None).double_value(&[]));
        // The start has σ_max² where data at that level would have σ_max² + s²: a share of 4e-5.
        let want = 0.25 + 0.002f64.powi(2);
        let four_errors = 4.0 * (2.0 / n).sqrt();
        assert!((mean_square / want - 1.0).abs() < four_errors, "{times:?}: {mean_square}");
        assert!(images.mean(None).double_value(&[]).abs() < 4.0 * 0.5 / n.sqrt());
    }
}

#[test]
fn a_seed_has_its_noise_at_any_batch_size_and_in_any_company() {
    let times = Times::Sigmas(vec![80.0, 0.8]);
    let all = seeds(7);
    let inputs = |seeds: &[u64], batch: usize| -> (Vec<Tensor>, Tensor) {
        let spy = Spy::new();
        let images = multistep(&spy, &times, &Request { batch, ..free(seeds) }).unwrap();
        let starts = spy.inputs.into_inner().into_iter().filter(|(_, sigma)| *sigma == 80.0);
        (starts.map(|(x, _)| x).collect(), images)
    };
    let (reference, images) = inputs(&all, 7);
    for batch in [1, 2, 3, 64] {
        let (starts, same_images) = inputs(&all, batch);
        assert_eq!(starts.len(), 7usize.div_ceil(batch));
        assert!(Tensor::cat(&starts, 0) == reference[0], "batch {batch}");
        assert!(largest(&(same_images - &images)) <= 1e-5 * largest(&images), "batch {batch}");
    }
    let (alone, _) = inputs(&[5], 1);
    assert!(alone[0] == reference[0].narrow(0, 5, 1));
    let (others, _) = inputs(&[6, 5], 2);
    assert!(others[0].narrow(0, 1, 1) == alone[0]);
}

#[test]
fn no_draw_is_wasted_or_missed() {
    let seeds = seeds(2);
    let draws = |n: usize| (0..n).map(|k| noise(&seeds, k as u32)).collect::<Vec<_>>();
    let heun = Solver::Heun { churn: Churn::NONE };
    let churned = Solver::Heun { churn: Churn { s_churn: 4.0, s_min: 0.05, s_max: 50.0, s_noise: 1.0 } };
    let levels = KarrasGrid::EDM.with_zero(9);
    let inside = levels.iter().filter(|sigma| (0.05..=50.0).contains(*sigma)).count();
    let methods = [
        (Method::one_step(&ORACLE).unwrap(), 1),
        (Method::multistep(&ORACLE, &Times::Sigmas(vec![80.0, 2.0, 0.5])).unwrap(), 3),
        (
            Method::multistep(&ORACLE, &Times::Indices { ts: vec![0, 22, 39], steps: 40, rho: 7.0 }).unwrap(),
            2,
        ),
        (
            Method::multistep(&ORACLE, &Times::Indices { ts: vec![0, 22, 30], steps: 40, rho: 7.0 }).unwrap(),
            3,
        ),
        (Method::solver(&ORACLE, heun, &levels).unwrap(), 1),
        (Method::solver(&ORACLE, churned, &levels).unwrap(), 1 + inside),
    ];
    for (method, needed) in methods {
        let run = |n: usize| -> Result<()> {
            let mut recorded = Recorded::new(draws(n));
            let hooks = Hooks { noise: Some(&mut recorded), on_evaluation: None };
            drop(sample(&method, &Request::new(&seeds), hooks)?);
            Ok(recorded.finish()?)
        };
        run(needed).unwrap();
        assert!(run(needed - 1).is_err(), "one draw too few: {method:?}");
        assert!(run(needed + 1).is_err(), "one draw too many: {method:?}");
    }
}

#[test]
fn labels_stay_with_their_seeds() {
    let (seeds, labels) = (seeds(5), [3, 0, 2, 1, 3]);
    let spy = Spy::new();
    let request = Request { labels: Some(&labels), batch: 2, ..free(&seeds) };
    let shifted = one_step(&spy, &request).unwrap() - one_step(&ORACLE, &free(&seeds)).unwrap();
    let want = Tensor::from_slice(&labels).to_kind(Kind::Float).view([-1, 1, 1, 1]);
    assert!(largest(&(shifted - want)) < 1e-5);
}

#[test]
fn batches_arrive_in_order_with_progress() {
    let seeds = seeds(5);
    let method = Method::multistep(&ORACLE, &Times::Sigmas(vec![80.0, 1.0])).unwrap();
    let (mut seen, mut arrived) = (Vec::new(), Vec::new());
    let mut look = |p: &cm_sampler::Progress<'_>| {
        assert_eq!((p.total, p.evaluations), (5, 2));
        seen.push((p.images.clone(), p.evaluation, p.sigma));
    };
    let hooks = Hooks { noise: None, on_evaluation: Some(&mut look) };
    let request = Request { batch: 3, ..free(&seeds) };
    sample_batches(&method, &request, hooks, &mut |range, images| {
        assert_eq!(images.kind(), Kind::Float);
        arrived.push((range, images.size()[0]));
        Ok(())
    })
    .unwrap();
    assert_eq!(arrived, [(0..3, 3), (3..5, 2)]);
    assert_eq!(seen, [(0..3, 0, 80.0), (0..3, 1, 1.0), (3..5, 0, 80.0), (3..5, 1, 1.0)]);
}

/// Error of a solver at σ_min against the closed-form flow.
fn solver_error(solver: Solver, n: usize) -> f64 {
    let seeds = seeds(1);
    let method = Method::solver(&Exact, solver, &KarrasGrid::EDM.descending(n)).unwrap();
    let request = Request { precision: Precision::Double, ..free(&seeds) };
    let got = sample(&method, &request, Hooks::default()).unwrap();
    assert_eq!(got.kind(), Kind::Double);
    let gain = 80.0 * ((0.25 + 0.002f64.powi(2)) / (0.25 + 80f64.powi(2))).sqrt();
    largest(&(got - noise(&seeds, 0).to_kind(Kind::Double) * gain))
}

/// The oracle in float64 throughout.
struct Exact;

impl Exact {
    fn scaled(x: &Tensor, sigma: Sigma<'_>, gain: impl Fn(f64) -> f64) -> Tensor {
        assert_eq!(x.kind(), Kind::Double);
        let Sigma::One(sigma) = sigma else { panic!("samplers evaluate a batch at one level") };
        x * gain(sigma)
    }
}

macro_rules! exact {
    ($trait:ident, $method:ident, $gain:expr) => {
        impl $trait for Exact {
            fn shape(&self) -> ImageShape {
                SHAPE
            }
            fn num_classes(&self) -> i64 {
                0
            }
            fn sigma_range(&self) -> SigmaRange {
                SigmaRange::EDM
            }
            fn device(&self) -> Device {
                Device::Cpu
            }
            fn $method(
                &self,
                x: &Tensor,
                sigma: Sigma<'_>,
                _cond: &Cond,
            ) -> cm_sampler::model::Result<Tensor> {
                Ok(Exact::scaled(x, sigma, $gain))
            }
        }
    };
}

exact!(Denoiser, denoise, |sigma| 0.25 / (0.25 + sigma * sigma));
exact!(ConsistencyFn, jump, |sigma| ((0.25 + 0.002f64.powi(2)) / (0.25 + sigma * sigma)).sqrt());

#[test]
fn solvers_converge_with_their_order_on_tensors() {
    for (solver, order) in [
        (Solver::Euler, 1.0),
        (Solver::Heun { churn: Churn::NONE }, 2.0),
        (Solver::Dpm2 { churn: Churn::NONE }, 2.0),
        (Solver::DpmPp2m, 2.0),
    ] {
        let errors = [81, 161, 321].map(|n| solver_error(solver, n));
        for pair in errors.windows(2) {
            let slope = (pair[0] / pair[1]).log2();
            assert!((slope - order).abs() < 0.1, "{solver:?}: {slope}");
        }
    }
}

/// Noise that is 1 in one pixel, another one for every draw, and 0 elsewhere: what a linear model makes of it are the
/// coefficients of the result on the draws.
struct Units;

impl NoiseSource for Units {
    fn normal(&mut self, shape: ImageShape, site: &Site<'_>) -> cm_sampler::model::Result<Tensor> {
        let mut unit = vec![0f64; shape.numel() as usize];
        unit[site.step as usize] = 1.0;
        Ok(Tensor::from_slice(&unit).view(shape.batch(1)))
    }
}

/// The variance of a method's images, exactly.
fn variance(method: &Method<'_>) -> f64 {
    let request = Request { precision: Precision::Double, ..free(&[0]) };
    let hooks = Hooks { noise: Some(&mut Units), on_evaluation: None };
    sample(method, &request, hooks).unwrap().square().sum(Kind::Double).double_value(&[])
}

#[test]
fn multistep_has_the_variance_of_its_recursion_to_rounding() {
    let exact = 0.25 + 0.002f64.powi(2);
    for levels in [vec![80.0], vec![80.0, 0.8], vec![80.0, 24.4, 5.84, 0.9, 0.661]] {
        // The start lacks the data's own variance, and each jump passes its share of that on.
        let shares = levels[1..].iter().map(|sigma| exact / (0.25 + sigma * sigma));
        let shortage = 0.25 / (0.25 + 80f64.powi(2)) * shares.product::<f64>();
        let got = variance(&Method::multistep(&Exact, &Times::Sigmas(levels)).unwrap());
        assert!((got / exact - 1.0 + shortage).abs() < 1e-12, "{got}");
    }
}

#[test]
fn stochastic_solvers_approach_the_variance_of_the_data() {
    let churn = Churn { s_churn: 10.0, s_min: 0.05, s_max: 50.0, s_noise: 1.0 };
    for solver in [Solver::Heun { churn }, Solver::Dpm2 { churn }, Solver::Ancestral] {
        let errors = [40, 160].map(|n| {
            let method = Method::solver(&Exact, solver, &KarrasGrid::EDM.with_zero(n)).unwrap();
            assert!(method.plan().draws() > n / 2);
            (variance(&method) / 0.25 - 1.0).abs()
        });
        assert!(errors[1] < errors[0] / 3.0, "{solver:?}: {errors:?}");
    }
}

#[test]
fn wrong_requests_are_typed_errors() {
    let (seeds, labels) = (seeds(2), [0, 1]);
    let spy = Spy::new();
    let ok = free(&seeds);
    let error = |f: &dyn ConsistencyFn, request: &Request<'_>| one_step(f, request).unwrap_err();
    assert!(matches!(error(&ORACLE, &free(&[])), Error::NoSeeds));
    assert!(matches!(error(&ORACLE, &free(&[1 << 56])), Error::Seed { .. }));
    assert!(matches!(error(&ORACLE, &Request { batch: 0, ..ok }), Error::EmptyBatch));
    assert!(matches!(error(&ORACLE, &Request { labels: Some(&labels), ..ok }), Error::Unconditional));
    assert!(matches!(error(&spy, &Request { labels: Some(&[0]), ..ok }), Error::NumLabels { .. }));
    let out_of_range = error(&spy, &Request { labels: Some(&[0, 4]), ..ok });
    assert!(matches!(out_of_range, Error::Model(_)), "{out_of_range}");
    assert!(spy.inputs.borrow().is_empty(), "a wrong request never reaches the model");
}

#[test]
fn wrong_times_are_typed_errors() {
    let indices = |ts: &[usize], steps: usize| Times::Indices { ts: ts.to_vec(), steps, rho: 7.0 };
    let cases = [
        Times::Sigmas(vec![]),
        Times::Sigmas(vec![80.0, 80.0]),
        Times::Sigmas(vec![1.0, 2.0]),
        Times::Sigmas(vec![80.0, 0.002]),
        Times::Sigmas(vec![80.0, f64::NAN]),
        indices(&[], 40),
        indices(&[0], 40),
        indices(&[0, 22, 22], 40),
        indices(&[22, 0], 40),
        indices(&[0, 40], 40),
    ];
    for times in cases {
        let error = Method::multistep(&ORACLE, &times).unwrap_err();
        assert!(matches!(error, Error::Schedule(_)), "{times:?}: {error:?}");
    }
    let above = Method::multistep(&ORACLE, &Times::Sigmas(vec![81.0])).unwrap_err();
    assert!(matches!(above, Error::Level { .. }), "{above:?}");
    let below = Method::solver(&ORACLE, Solver::Euler, &[80.0, 0.001, 0.0]).unwrap_err();
    assert!(matches!(below, Error::Level { .. }), "{below:?}");
    let plan = Solver::Euler.plan(&[80.0, 0.0]).unwrap();
    assert!(matches!(Method::jumps(&ORACLE, plan), Err(Error::Plan)));
}
