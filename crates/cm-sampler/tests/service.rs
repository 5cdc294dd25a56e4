//! Laws of sampling as a service does it: many jobs in one batch, images in the making, guidance towards a class.

use std::cell::RefCell;

use cm_sampler::model::{Cond, ConsistencyFn, Denoiser, ImageShape, NoiseSource, Philox, Sigma, Site};
use cm_sampler::schedule::solver::Churn;
use cm_sampler::schedule::{KarrasGrid, Purpose, SigmaRange};
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{
    Error, Guided, Hooks, Job, Method, ModelRef, Precision, Request, Sampler, SamplerOptions, Solver, Steps,
    Times, sample,
};

const SHAPE: ImageShape = ImageShape { channels: 1, height: 4, width: 4 };
const CLASSES: i64 = 4;
const VAR: f64 = 0.25;

/// The exact model of images of class c around `spread`·(c − 1.5) in every pixel, and around 0 without a class; it notes
/// the numbers of images that it is given and their levels.
struct Classes {
    spread: f64,
    calls: RefCell<Vec<(Tensor, Vec<f64>)>>,
}

impl Classes {
    fn new(spread: f64) -> Self {
        Self { spread, calls: RefCell::default() }
    }

    fn batches(&self) -> Vec<i64> {
        self.calls.borrow().iter().map(|(x, _)| x.size()[0]).collect()
    }

    /// m + g(σ)·(x − m).
    fn value(
        &self,
        x: &Tensor,
        sigma: Sigma<'_>,
        cond: &Cond,
        gain: impl Fn(f64) -> f64,
    ) -> cm_sampler::model::Result<Tensor> {
        let batch = SHAPE.check("x", x)?;
        sigma.check(batch)?;
        let levels = match sigma {
            Sigma::One(sigma) => vec![sigma; batch as usize],
            Sigma::Each(each) => each.to_vec(),
        };
        let gains: Vec<f64> = levels.iter().map(|&sigma| gain(sigma)).collect();
        let gains = Tensor::from_slice(&gains).to_kind(x.kind()).view([-1, 1, 1, 1]);
        let means: Vec<f64> = (0..CLASSES).map(|c| self.spread * (c as f64 - 1.5)).collect();
        let rows = cond.one_hot(batch, CLASSES, Device::Cpu)?.to_kind(Kind::Double);
        let means = rows.matmul(&Tensor::from_slice(&means)).to_kind(x.kind()).view([-1, 1, 1, 1]);
        self.calls.borrow_mut().push((x.copy(), levels));
        Ok(&means + (x - &means) * gains)
    }
}

macro_rules! implement {
    ($trait:ident, $method:ident, $gain:expr) => {
        impl $trait for Classes {
            fn shape(&self) -> ImageShape {
                SHAPE
            }
            fn num_classes(&self) -> i64 {
                CLASSES
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
                cond: &Cond,
            ) -> cm_sampler::model::Result<Tensor> {
                self.value(x, sigma, cond, $gain)
            }
        }
    };
}

implement!(Denoiser, denoise, |sigma| VAR / (VAR + sigma * sigma));
implement!(ConsistencyFn, jump, |sigma| ((VAR + 0.002f64.powi(2)) / (VAR + sigma * sigma)).sqrt());

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

fn noise(seed: u64) -> Tensor {
    let site = Site { samples: &[seed], step: 0, purpose: Purpose::Sample };
    Philox { seed: 0, device: Device::Cpu }.normal(SHAPE, &site).unwrap()
}

fn solver(solver: Solver, n: usize) -> Steps {
    Steps::Solver { solver, levels: KarrasGrid::EDM.with_zero(n) }
}

/// Jobs of all lengths; every third has no label.
fn jobs(steps: &[Steps]) -> Vec<Job> {
    let job = |i: usize| Job {
        seed: 100 + 7 * i as u64,
        label: (!i.is_multiple_of(3)).then_some(i as i64 % CLASSES),
        steps: steps[i % steps.len()].clone(),
    };
    (0..11).map(job).collect()
}

/// The image of a job when nobody else is there.
fn alone(model: ModelRef<'_>, job: &Job, clip: bool, precision: Precision) -> Tensor {
    let method = Method::new(model, &job.steps).unwrap();
    let (seeds, labels) = ([job.seed], job.label.map(|label| [label]));
    let labels = labels.as_ref().map(|labels| labels.as_slice());
    let request = Request { labels, clip, precision, ..Request::new(&seeds) };
    sample(&method, &request, Hooks::default()).unwrap().squeeze_dim(0)
}

fn all_steps() -> [Vec<Steps>; 2] {
    let churn = Churn { s_churn: 3.0, s_min: 0.1, s_max: 30.0, s_noise: 1.0 };
    let denoiser = vec![
        solver(Solver::Heun { churn: Churn::NONE }, 6),
        solver(Solver::DpmPp2m, 4),
        solver(Solver::Ancestral, 9),
        solver(Solver::Dpm2 { churn }, 3),
        solver(Solver::Euler, 1),
    ];
    let consistency = vec![
        Steps::One,
        Steps::Multistep(Times::Sigmas(vec![80.0, 5.0, 0.7])),
        Steps::Multistep(Times::Indices { ts: vec![0, 22, 30], steps: 40, rho: 7.0 }),
    ];
    [denoiser, consistency]
}

#[test]
fn a_job_in_company_gets_what_it_gets_alone() {
    let model = Classes::new(0.4);
    for (model_ref, steps) in
        [ModelRef::Denoiser(&model), ModelRef::Consistency(&model)].into_iter().zip(all_steps())
    {
        for (clip, precision, tolerance) in [
            (false, Precision::Double, 1e-13),
            (true, Precision::Double, 1e-13),
            (false, Precision::Mixed, 1e-5),
        ] {
            let jobs = jobs(&steps);
            let sampler = Sampler::new(model_ref, SamplerOptions { batch: 4, clip, precision }).unwrap();
            let images = sampler.batch(&jobs).unwrap();
            assert_eq!(images.len(), jobs.len());
            for (image, job) in images.iter().zip(&jobs) {
                let want = alone(model_ref, job, clip, precision);
                assert_eq!((image.size(), image.kind()), (vec![1, 4, 4], want.kind()));
                let error = largest(&(image - &want)) / largest(&want);
                assert!(error < tolerance, "{error:e}: {job:?}");
            }
        }
    }
}

#[test]
fn batches_are_full_while_jobs_wait_and_never_larger() {
    let model = Classes::new(0.4);
    let jobs: Vec<Job> = jobs(&all_steps()[0]).into_iter().map(|job| Job { label: Some(1), ..job }).collect();
    let evaluations =
        |job: &Job| Method::new(ModelRef::Denoiser(&model), &job.steps).unwrap().num_evaluations();
    let total: usize = jobs.iter().map(evaluations).sum();
    for batch in [1, 4, 64] {
        model.calls.borrow_mut().clear();
        let options = SamplerOptions { batch, ..SamplerOptions::default() };
        Sampler::new(ModelRef::Denoiser(&model), options).unwrap().batch(&jobs).unwrap();
        let batches = model.batches();
        assert_eq!(batches[0], batch.min(jobs.len()) as i64);
        assert!(batches.is_sorted_by(|a, b| a >= b), "{batches:?}");
        assert_eq!(batches.iter().sum::<i64>(), total as i64);
    }
}

#[test]
fn noise_in_company_is_that_of_the_seed_to_the_last_bit() {
    let model = Classes::new(0.0);
    let jobs = jobs(&[Steps::One]);
    Sampler::new(ModelRef::Consistency(&model), SamplerOptions::default()).unwrap().batch(&jobs).unwrap();
    // The first call is that which finds out whether the model can do without labels.
    let calls = model.calls.into_inner();
    let [_, (x, sigmas)] = calls.as_slice() else { panic!("{} calls", calls.len()) };
    assert_eq!(*sigmas, [80.0; 11]);
    for (row, job) in jobs.iter().enumerate() {
        let want = (noise(job.seed).to_kind(Kind::Double) * 80.0).to_kind(Kind::Float);
        assert!(x.narrow(0, row as i64, 1) == want);
    }
}

#[test]
fn short_jobs_are_handed_on_first() {
    let model = Classes::new(0.4);
    let job = |seed, n| Job { seed, label: None, steps: solver(Solver::Euler, n) };
    let jobs = [job(0, 5), job(1, 2), job(2, 3), job(3, 1)];
    let sampler =
        Sampler::new(ModelRef::Denoiser(&model), SamplerOptions { batch: 3, ..SamplerOptions::default() })
            .unwrap();
    let mut order = Vec::new();
    sampler
        .each(&jobs, &mut |index, image| {
            assert_eq!(image.size(), [1, 4, 4]);
            order.push(index);
            Ok(())
        })
        .unwrap();
    // The last one takes the place of the first that is done, beside one that is then done too.
    assert_eq!(order, [1, 2, 3, 0]);
    let stopped = sampler.each(&jobs, &mut |_, _| Err(Error::NoSeeds));
    assert!(matches!(stopped, Err(Error::NoSeeds)));
    assert!(sampler.batch(&[]).unwrap().is_empty());
}

/// A consistency function that cannot do without labels.
struct Strict(Classes);

impl Denoiser for Strict {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        CLASSES
    }
    fn sigma_range(&self) -> SigmaRange {
        SigmaRange::EDM
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn denoise(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> cm_sampler::model::Result<Tensor> {
        match &cond.labels {
            Some(_) => self.0.denoise(x, sigma, cond),
            None => Err(cm_sampler::model::Error::Value {
                what: "class labels".into(),
                expected: "some".into(),
                got: "none".into(),
            }),
        }
    }
}

#[test]
fn wrong_jobs_are_typed_errors_with_their_place() {
    let model = Classes::new(0.4);
    let sampler = Sampler::new(ModelRef::Denoiser(&model), SamplerOptions::default()).unwrap();
    let good = Job { seed: 1, label: Some(0), steps: solver(Solver::Euler, 2) };
    let refused = |job: Job| {
        assert!(sampler.check(&job).is_err());
        match sampler.batch(&[good.clone(), job]) {
            Err(Error::Job { index: 1, source }) => *source,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(refused(Job { seed: 1 << 56, ..good.clone() }), Error::Seed { .. }));
    assert!(matches!(refused(Job { label: Some(4), ..good.clone() }), Error::Model(_)));
    assert!(matches!(refused(Job { label: Some(-1), ..good.clone() }), Error::Model(_)));
    assert!(matches!(refused(Job { steps: Steps::One, ..good.clone() }), Error::NeedsConsistency));
    let levels = vec![90.0, 0.0];
    let steps = Steps::Solver { solver: Solver::Euler, levels };
    assert!(matches!(refused(Job { steps, ..good.clone() }), Error::Level { .. }));
    assert!(model.batches().is_empty(), "nothing was computed");
    sampler.check(&good).unwrap();

    let none = SamplerOptions { batch: 0, ..SamplerOptions::default() };
    assert!(matches!(Sampler::new(ModelRef::Denoiser(&model), none), Err(Error::EmptyBatch)));
    let consistency = Sampler::new(ModelRef::Consistency(&model), SamplerOptions::default()).unwrap();
    assert!(matches!(consistency.check(&good), Err(Error::NeedsDenoiser)));

    // What a model refuses to do alone it does not do in company either.
    let strict = Strict(Classes::new(0.4));
    let sampler = Sampler::new(ModelRef::Denoiser(&strict), SamplerOptions::default()).unwrap();
    let unlabelled = Job { label: None, ..good.clone() };
    let error = sampler.batch(&[good.clone(), unlabelled]).unwrap_err();
    assert!(matches!(error, Error::Job { index: 1, .. }), "{error}");
    sampler.batch(&[good]).unwrap();
}

#[test]
fn a_stream_shows_every_evaluation_and_ends_with_the_images() {
    let model = Classes::new(0.4);
    let heun =
        Method::new(ModelRef::Denoiser(&model), &solver(Solver::Heun { churn: Churn::NONE }, 4)).unwrap();
    let (seeds, labels) = ([3, 1, 4, 1_000, 5], [0, 1, 2, 3, 0]);
    let request =
        Request { labels: Some(&labels), batch: 3, precision: Precision::Double, ..Request::new(&seeds) };
    let mut stream = heun.stream(&request).unwrap();
    let mut images = Vec::new();
    for (batch, range) in [0..3, 3..5].into_iter().enumerate() {
        for (k, sigma) in heun.plan().evaluation_sigmas().into_iter().enumerate() {
            assert_eq!(stream.len(), 14 - 7 * batch - k);
            let seen = stream.next().unwrap().unwrap();
            assert_eq!((seen.images.clone(), seen.total), (range.clone(), 5));
            assert_eq!((seen.evaluation, seen.evaluations, seen.sigma), (k, 7, sigma));
            let cond = Cond::labels(&labels[range.clone()], CLASSES, Device::Cpu).unwrap();
            let estimate = model.denoise(&seen.x, Sigma::One(sigma), &cond).unwrap().clamp(-1.0, 1.0);
            assert!(seen.estimate == estimate);
            assert_eq!(seen.finished.is_some(), k == 6);
            images.extend(seen.finished);
        }
    }
    assert!(stream.next().is_none() && stream.len() == 0);
    assert!(Tensor::cat(&images, 0) == sample(&heun, &request, Hooks::default()).unwrap());
}

#[test]
fn an_error_ends_a_stream() {
    let strict = Strict(Classes::new(0.4));
    let method = Method::new(ModelRef::Denoiser(&strict), &solver(Solver::Euler, 3)).unwrap();
    let mut stream = method.stream(&Request::new(&[1, 2])).unwrap();
    assert!(matches!(stream.next(), Some(Err(Error::Model(_)))));
    assert!(stream.next().is_none());
    assert!(matches!(method.stream(&Request::new(&[])), Err(Error::NoSeeds)));
}

/// On Gaussian classes around m_c and 0 without a class, guidance by w is the model of classes around w·m_c.
#[test]
fn guidance_moves_the_mean() {
    let model = Classes::new(0.4);
    let labels = [3, 0, 2];
    let cond = Cond::labels(&labels, CLASSES, Device::Cpu).unwrap();
    let x = Tensor::cat(&[noise(1), noise(2), noise(3)], 0).to_kind(Kind::Double) * 2.0;
    for weight in [0.0, 0.5, 2.5, -1.0] {
        let guided = Guided::new(&model, weight).unwrap();
        let moved = Classes::new(0.4 * weight);
        for sigma in [Sigma::One(0.7), Sigma::Each(&[80.0, 0.7, 0.002])] {
            model.calls.borrow_mut().clear();
            let got = guided.denoise(&x, sigma, &cond).unwrap();
            assert_eq!(model.batches(), [6], "one call of twice the batch");
            let want = moved.denoise(&x, sigma, &cond).unwrap();
            assert!(largest(&(got - want)) < 1e-14, "w = {weight}");
        }
        // And so are the images.
        let heun = solver(Solver::Heun { churn: Churn::NONE }, 12);
        let request = Request {
            labels: Some(&labels),
            clip: false,
            precision: Precision::Double,
            ..Request::new(&[1, 2, 3])
        };
        let [got, want] = [ModelRef::Denoiser(&guided), ModelRef::Denoiser(&moved)]
            .map(|model| sample(&Method::new(model, &heun).unwrap(), &request, Hooks::default()).unwrap());
        assert!(largest(&(got - want)) < 1e-12, "w = {weight}");
    }
}

#[test]
fn guidance_by_one_is_the_model_itself() {
    let model = Classes::new(0.4);
    let guided = Guided::new(&model, 1.0).unwrap();
    let cond = Cond::labels(&[1], CLASSES, Device::Cpu).unwrap();
    let got = guided.denoise(&noise(1), Sigma::One(0.3), &cond).unwrap();
    assert!(got == model.denoise(&noise(1), Sigma::One(0.3), &cond).unwrap());
    assert_eq!(model.batches(), [1, 1], "no second half");
}

#[test]
fn guidance_needs_classes_a_class_and_a_number() {
    let model = Classes::new(0.4);
    for weight in [f64::NAN, f64::INFINITY] {
        assert!(matches!(Guided::new(&model, weight), Err(Error::Guidance { .. })));
    }
    for weight in [1.0, 2.0] {
        let guided = Guided::new(&model, weight).unwrap();
        let error = guided.denoise(&noise(1), Sigma::One(0.3), &Cond::none()).unwrap_err().to_string();
        assert!(error.contains("a class for each image"), "{error}");
    }
    assert!(model.batches().is_empty());
}

/// Guided jobs keep their own classes, and one without a class is refused beside others as it is alone.
#[test]
fn guided_jobs_share_batches() {
    let model = Classes::new(0.4);
    let guided = Guided::new(&model, 3.0).unwrap();
    let options = SamplerOptions { batch: 4, precision: Precision::Double, clip: false };
    let sampler = Sampler::new(ModelRef::Denoiser(&guided), options).unwrap();
    let mut jobs = jobs(&all_steps()[0]);
    assert!(matches!(sampler.batch(&jobs), Err(Error::Job { index: 0, .. })));
    jobs.retain(|job| job.label.is_some());
    for (image, job) in sampler.batch(&jobs).unwrap().iter().zip(&jobs) {
        let want = alone(ModelRef::Denoiser(&guided), job, false, Precision::Double);
        assert!(largest(&(image - want)) < 1e-12);
    }
}

/// A network of a user's own that answers about fewer images than it was asked about, and noise of another size.
struct Short;

impl ConsistencyFn for Short {
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
    fn jump(&self, x: &Tensor, _: Sigma<'_>, _: &Cond) -> cm_sampler::model::Result<Tensor> {
        Ok(x.narrow(0, 0, 1))
    }
}

impl NoiseSource for Short {
    fn normal(&mut self, _: ImageShape, _: &Site<'_>) -> cm_sampler::model::Result<Tensor> {
        Ok(Tensor::zeros([1, 1, 4, 4], (Kind::Float, Device::Cpu)))
    }
}

#[test]
fn what_is_of_another_shape_than_asked_for_is_an_error_and_not_spread() {
    let says = |error: Error, words: &str| {
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("[2, 1, 4, 4]"), "{text}");
    };
    let method = Method::one_step(&Short).unwrap();
    says(sample(&method, &Request::new(&[1, 2]), Hooks::default()).unwrap_err(), "estimate of the model");
    let job = |seed| Job { seed, label: None, steps: Steps::One };
    let sampler = Sampler::new(ModelRef::Consistency(&Short), SamplerOptions::default()).unwrap();
    says(sampler.batch(&[job(1), job(2)]).unwrap_err(), "estimate of the model");
    let whole = Classes::new(0.0);
    let method = Method::one_step(&whole).unwrap();
    let hooks = Hooks { noise: Some(&mut Short), on_evaluation: None };
    says(sample(&method, &Request::new(&[1, 2]), hooks).unwrap_err(), "noise");
}

#[test]
fn an_ode_solver_edits_nothing() {
    let model = Classes::new(0.0);
    let levels = KarrasGrid::EDM.with_zero(3);
    let euler = Method::solver(&model, Solver::Euler, &levels).unwrap();
    let picture = Tensor::zeros([1, 1, 4, 4], (Kind::Float, Device::Cpu));
    let stroke = cm_sampler::edit::Stroke::new(&picture).unwrap();
    let refused = euler.stream_edit(&stroke, &Request::new(&[1])).err();
    assert!(matches!(refused, Some(Error::NeedsConsistency)), "{refused:?}");
    // One evaluation after the other, an edit ends as it does at once.
    let times = Times::Sigmas(vec![5.0, 1.0]);
    let method = Method::multistep(&model, &times).unwrap();
    let last = method.stream_edit(&stroke, &Request::new(&[1])).unwrap().last().unwrap().unwrap();
    let whole = cm_sampler::edit(&model, &stroke, &times, &Request::new(&[1]), Hooks::default()).unwrap();
    assert!(last.finished.unwrap().equal(&whole));
}
