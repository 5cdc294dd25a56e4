//! Laws of edits: what is known stays, imposing twice is imposing once, and on correlated Gaussian data the loop has
//! the moments of its own recursion.

use std::ops::Range;

use cm_sampler::edit::{
    Colorize, Compose, Inpaint, LUMA, Measurement, Stroke, SuperRes, default_times, denoise, edit_from,
    estimate_sigma, feather, interpolate, slerp, stroke_times, within_range,
};
use cm_sampler::model::{
    Cond, ConsistencyFn, GaussianOracle, ImageShape, NoiseSource, Philox, Recorded, Sigma, Site,
};
use cm_sampler::schedule::{KarrasGrid, Purpose, SigmaRange};
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{Error, Hooks, Precision, Request, Times, edit, one_step};

const SHAPE: ImageShape = ImageShape { channels: 3, height: 8, width: 8 };
const ORACLE: GaussianOracle = GaussianOracle { data_std: 0.5, shape: SHAPE, sigma_range: SigmaRange::EDM };

fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

/// Standard normal numbers of a seed.
fn noise(shape: ImageShape, seeds: &[u64]) -> Tensor {
    let site = Site { samples: seeds, step: 0, purpose: Purpose::Synthetic };
    Philox { seed: 9, device: Device::Cpu }.normal(shape, &site).unwrap()
}

/// A picture in [−1, 1], with white and black in it.
fn picture(seed: u64) -> Tensor {
    noise(SHAPE, &[seed]).clamp(-1.0, 1.0)
}

/// 1 on the right of a diagonal, so that patches are cut by it.
fn diagonal_mask() -> Tensor {
    let values: Vec<f32> = (0..64).map(|i| if i / 8 + i % 8 > 8 { 1.0 } else { 0.0 }).collect();
    Tensor::from_slice(&values).view([1, 1, 8, 8])
}

fn parts(of: &Tensor, which: &str) -> Box<dyn Measurement + Send> {
    match which {
        "mask" => Box::new(Inpaint::new(of, &diagonal_mask()).unwrap()),
        "luma" => Box::new(Colorize::of(of).unwrap()),
        "means" => Box::new(SuperRes::of(of, 4).unwrap()),
        "canvas" => Box::new(Inpaint::outpaint(&of.narrow(2, 2, 5).narrow(3, 0, 6), SHAPE, 1, 2, 0).unwrap()),
        all => {
            let each = all.split('+').map(|which| parts(of, which)).collect();
            Box::new(Compose::new(each).unwrap())
        }
    }
}

const ALL: [&str; 8] =
    ["mask", "luma", "means", "canvas", "mask+luma", "mask+means", "luma+means", "mask+luma+means"];

#[test]
fn imposing_twice_is_imposing_once_and_leaves_what_is_there() {
    let of = picture(1).to_kind(Kind::Double);
    let x = noise(SHAPE, &[2, 3, 4]).to_kind(Kind::Double) * 2.0;
    for which in ALL {
        let measurement = parts(&of, which);
        let once = measurement.impose(&x, 0..3).unwrap();
        let twice = measurement.impose(&once, 0..3).unwrap();
        assert!(largest(&(&twice - &once)) < 1e-7, "{which}");
        assert!(largest(&(&once - &x)) > 0.1, "{which} changes something");
        if which != "canvas" {
            let same = measurement.impose(&of, 0..1).unwrap();
            assert!(largest(&(same - &of)) < 1e-9, "{which}: the picture itself has what is known of it");
        }
        // y has what is known, and nothing in other components: it is the nearest such picture to 0.
        let y = measurement.measure(0..3).unwrap();
        let of_nothing = measurement.impose(&x.zeros_like(), 0..3).unwrap();
        assert!(largest(&(y - of_nothing)) < 1e-7, "{which}");
    }
}

/// A projection that is orthogonal: what imposing changes is orthogonal to every difference of two pictures that have
/// what is known. So it gives the nearest one.
#[test]
fn imposing_gives_the_nearest_picture() {
    let of = picture(5).to_kind(Kind::Double);
    let [x, a, b] = [6, 7, 8].map(|seed| noise(SHAPE, &[seed]).to_kind(Kind::Double));
    for which in ALL {
        let measurement = parts(&of, which);
        let [x0, a0, b0] = [&x, &a, &b].map(|x| measurement.impose(x, 0..1).unwrap());
        let inner = ((&x - x0) * (a0 - b0)).sum(Kind::Double).double_value(&[]);
        assert!(inner.abs() < 1e-6, "{which}: {inner:e}");
    }
}

#[test]
fn each_measurement_keeps_what_it_is_named_after() {
    let of = picture(1);
    let seeds = [1, 2, 3];
    let request = Request { batch: 2, ..Request::new(&seeds) };
    let times = Times::Indices { ts: vec![0, 10, 25, 39], steps: 40, rho: 7.0 };
    let run = |which: &str| edit(&ORACLE, &*parts(&of, which), &times, &request, Hooks::default()).unwrap();
    let kept = 1.0 - diagonal_mask();
    let weights = Tensor::from_slice(&LUMA.map(|w| w as f32)).view([1, 3, 1, 1]);
    let luma = |x: &Tensor| (x * &weights).sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let off = |a: Tensor, b: Tensor| largest(&(a - b));
    for which in ["mask", "mask+luma", "mask+means"] {
        let images = run(which);
        assert_eq!(images.kind(), Kind::Float);
        assert!(off(&images * &kept, &of * &kept) < 1e-6, "{which}");
        let differ = images.narrow(0, 0, 1) - images.narrow(0, 1, 1);
        assert!(largest(&differ) > 0.1, "{which}: seeds differ");
    }
    assert!(off(run("mask") * &kept, (&of * &kept).repeat([3, 1, 1, 1])) == 0.0, "to the last bit");
    for which in ["luma", "mask+luma", "luma+means"] {
        assert!(off(luma(&run(which)), luma(&of)) < 1e-6, "{which}");
    }
    for which in ["means", "mask+means", "luma+means"] {
        let means = |x: &Tensor| x.avg_pool2d([4, 4], [4, 4], [0, 0], false, true, None::<i64>);
        assert!(off(means(&run(which)), means(&of)) < 1e-6, "{which}");
    }
}

#[test]
fn parts_that_contradict_each_other_are_one_error() {
    let one = picture(1).to_kind(Kind::Double);
    let other = &one + 0.01;
    for (first, second) in [("mask", "means"), ("luma", "means"), ("mask", "luma")] {
        let both = Compose::new(vec![parts(&one, first), parts(&other, second)]).unwrap();
        let error = both.measure(0..1).unwrap_err();
        assert!(matches!(error, Error::Contradiction { gap } if gap > 1e-4 && gap < 0.1), "{error}");
        let error = edit(&ORACLE, &both, &default_times(SHAPE, 7.0), &Request::new(&[1]), Hooks::default());
        assert!(matches!(error, Err(Error::Contradiction { .. })));
    }
    assert!(Compose::new(vec![]).is_err());
}

#[test]
fn the_range_is_kept_without_giving_up_what_is_known() {
    let of = picture(3);
    let x = noise(SHAPE, &[4]).clamp(-1.0, 1.0);
    for which in ["luma", "means", "mask+luma"] {
        let measurement = parts(&of, which);
        let imposed = measurement.impose(&x, 0..1).unwrap();
        assert!(largest(&imposed) > 1.02, "{which}: {}", largest(&imposed));
        let settled = within_range(&*measurement, &imposed, 0..1).unwrap();
        assert!(largest(&settled) <= 1.001, "{which}: {}", largest(&settled));
        let again = measurement.impose(&settled, 0..1).unwrap();
        assert!(largest(&(again - &settled)) < 1e-6, "{which}");
        // What is in the range already stays as it is.
        assert!(within_range(&*measurement, &settled, 0..1).unwrap() == settled, "{which}");
    }
}

#[test]
fn a_feather_falls_in_equal_steps_outside_the_mask() {
    let mask =
        Tensor::from_slice(&[0f32, 0., 0., 0., 0., 0., 1., 1.]).view([1, 1, 1, 8]).repeat([1, 1, 8, 1]);
    let soft = feather(&mask, 3).unwrap();
    let row = Vec::<f32>::try_from(soft.get(0).get(0).get(4)).unwrap();
    assert_eq!(row, [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]);
    assert!(feather(&mask, 0).unwrap() == mask);
    assert!(feather(&mask, 9).is_err());
    let of = picture(1);
    let images = edit(
        &ORACLE,
        &Inpaint::new(&of, &soft).unwrap(),
        &Times::Sigmas(vec![80.0, 1.0]),
        &Request::new(&[1]),
        Hooks::default(),
    );
    let off = (images.unwrap() - &of).abs().amax([0i64, 1, 2], false);
    assert_eq!(largest(&off.narrow(0, 0, 3)), 0.0, "what is farther off is exact");
    assert!(off.double_value(&[3]) > 0.01 && off.double_value(&[3]) < off.double_value(&[7]));
}

/// Data N(0, Σ) on pairs of pixels, each pair by itself: the pixels of a pair are the two columns of the image.
///
/// f(x, σ) = V diag(√((λ + ε²)/(λ + σ²))) Vᵀ x, with V the sum and the difference of the two.
struct Pairs {
    shape: ImageShape,
    variance: f64,
    covariance: f64,
}

impl Pairs {
    const NEW: Pairs =
        Pairs { shape: ImageShape { channels: 1, height: 64, width: 2 }, variance: 0.25, covariance: 0.2 };

    /// The diagonal and the other entry of the matrix of f at level `sigma`.
    fn matrix(&self, sigma: f64) -> (f64, f64) {
        let end = SigmaRange::EDM.min().powi(2);
        let gain = |lambda: f64| ((lambda + end) / (lambda + sigma * sigma)).sqrt();
        let (sum, difference) =
            (gain(self.variance + self.covariance), gain(self.variance - self.covariance));
        ((sum + difference) / 2.0, (sum - difference) / 2.0)
    }

    /// Mean and variance of the unknown pixel at the end of Algorithm 4, when the other one is known to be `known`.
    ///
    /// The unknown pixel u is Gaussian throughout: u ← o·(known + s·z₀) + d·(u + s·z₁), with s = t₁ at the start and
    /// √(t² − ε²) later, and u = 0 at the start.
    fn recursion(&self, sigmas: &[f64], known: f64) -> (f64, f64) {
        let end = SigmaRange::EDM.min().powi(2);
        let (mut mean, mut variance) = (0.0, 0.0);
        for (n, &sigma) in sigmas.iter().enumerate() {
            let added = if n == 0 { sigma * sigma } else { sigma * sigma - end };
            let (d, o) = self.matrix(sigma);
            (mean, variance) = (o * known + d * mean, o * o * added + d * d * (variance + added));
        }
        (mean, variance)
    }

    /// Mean and variance of one pixel of a pair, given the other.
    fn posterior(&self, known: f64) -> (f64, f64) {
        let slope = self.covariance / self.variance;
        (slope * known, self.variance - slope * self.covariance)
    }
}

impl ConsistencyFn for Pairs {
    fn shape(&self) -> ImageShape {
        self.shape
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
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, _cond: &Cond) -> cm_sampler::model::Result<Tensor> {
        let Sigma::One(sigma) = sigma else { panic!("one level for a batch") };
        let (d, o) = self.matrix(sigma);
        Ok(x * d + x.flip([3]) * o)
    }
}

fn grid(n: usize) -> (Times, Vec<f64>) {
    let levels = KarrasGrid::EDM.descending(n);
    (Times::Sigmas(levels[..n - 1].to_vec()), levels[..n - 1].to_vec())
}

#[test]
fn inpainting_on_correlated_data_has_the_moments_of_its_recursion() {
    let (data, known) = (Pairs::NEW, 0.7);
    let seeds: Vec<u64> = (0..400).collect();
    let request = Request { clip: false, precision: Precision::Double, batch: 400, ..Request::new(&seeds) };
    let picture = Tensor::full([1, 1, 64, 2], known, (Kind::Double, Device::Cpu));
    let right = Tensor::from_slice(&[0.0, 1.0]).view([1, 1, 1, 2]).repeat([1, 1, 64, 1]);
    let inpaint = Inpaint::new(&picture, &right).unwrap();
    for n in [3, 10, 40] {
        let (times, sigmas) = grid(n);
        let images = edit(&data, &inpaint, &times, &request, Hooks::default()).unwrap();
        assert!(largest(&(images.select(3, 0) - known)) == 0.0);
        let unknown = images.select(3, 1);
        let count = unknown.numel() as f64;
        let mean = unknown.mean(None).double_value(&[]);
        let variance = (&unknown - mean).square().sum(Kind::Double).double_value(&[]) / (count - 1.0);
        let (want_mean, want_variance) = data.recursion(&sigmas, known);
        // Four standard errors.
        let (of_mean, of_variance) = ((want_variance / count).sqrt(), want_variance * (2.0 / count).sqrt());
        assert!((mean - want_mean).abs() < 4.0 * of_mean, "N = {n}: mean {mean}, expected {want_mean}");
        assert!((variance - want_variance).abs() < 4.0 * of_variance, "N = {n}: {variance} {want_variance}");
    }
}

#[test]
fn the_gap_to_the_exact_posterior_shrinks_with_more_levels() {
    let (data, known) = (Pairs::NEW, 0.7);
    let exact = data.posterior(known);
    println!("   N     mean  variance   gap of mean   of variance   (exact: {:.4}, {:.4})", exact.0, exact.1);
    let mut last = (f64::INFINITY, f64::INFINITY);
    for n in [3, 5, 10, 18, 40, 80, 160, 320, 1000, 3000] {
        let (mean, variance) = data.recursion(&grid(n).1, known);
        let gap = ((mean - exact.0).abs(), (variance - exact.1).abs());
        println!("{n:>4}   {mean:.4}    {variance:.4}      {:.5}       {:.5}", gap.0, gap.1);
        assert!(gap.0 < last.0 && gap.1 < last.1, "N = {n}");
        last = gap;
    }
    assert!(last.0 < 0.01 * exact.0 && last.1 < 0.01 * exact.1, "{last:?}");
}

#[test]
fn the_start_is_the_measurement_plus_noise_and_draws_are_counted() {
    let of = picture(1);
    let inpaint = Inpaint::new(&of, &diagonal_mask()).unwrap();
    let seeds = [4, 5];
    let request = Request { clip: false, ..Request::new(&seeds) };
    let times = Times::Sigmas(vec![80.0, 2.0]);
    let draws = |n: usize| (0..n).map(|k| noise(SHAPE, &[k as u64, 7])).collect::<Vec<_>>();
    let run = |start: Option<&Tensor>, n: usize| {
        let mut recorded = Recorded::new(draws(n));
        let hooks = Hooks { noise: Some(&mut recorded), on_evaluation: None };
        let images = match start {
            None => edit(&ORACLE, &inpaint, &times, &request, hooks)?,
            Some(start) => edit_from(&ORACLE, &inpaint, &times, start, &request, hooks)?,
        };
        recorded.finish()?;
        Ok::<_, Error>(images)
    };
    let images = run(None, 2).unwrap();
    assert!(run(None, 1).is_err() && run(None, 3).is_err());
    // The same from a start that is handed over, with the second draw in its place.
    let start = inpaint.measure(0..2).unwrap() + &draws(1)[0] * 80.0;
    let mut recorded = Recorded::new(draws(2).into_iter().skip(1));
    let hooks = Hooks { noise: Some(&mut recorded), on_evaluation: None };
    let same = edit_from(&ORACLE, &inpaint, &times, &start, &request, hooks).unwrap();
    assert!(largest(&(same - &images)) < 1e-6);
    assert!(run(Some(&start.narrow(0, 0, 1)), 1).is_err(), "a start for each seed");
    // Of the last position only the noise counts, and it lies on everything.
    let noisy = Times::Indices { ts: vec![0, 20], steps: 40, rho: 7.0 };
    let images = edit(&ORACLE, &inpaint, &noisy, &request, Hooks::default()).unwrap();
    assert!(largest(&((images - &of) * (1.0 - diagonal_mask()))) > 1.0, "σ(20 of 40) = 2.2");
}

#[test]
fn a_picture_for_each_seed_stays_with_it_at_any_batch_size() {
    let pictures = Tensor::cat(&[picture(1), picture(2), picture(3)], 0);
    let masks = Tensor::cat(&[diagonal_mask(), 1.0 - diagonal_mask(), diagonal_mask() * 0.0], 0);
    let inpaint = Inpaint::new(&pictures, &masks).unwrap();
    let seeds = [1, 2, 3];
    let run = |batch| {
        let request = Request { batch, ..Request::new(&seeds) };
        edit(&ORACLE, &inpaint, &Times::Sigmas(vec![80.0, 2.0]), &request, Hooks::default()).unwrap()
    };
    let together = run(3);
    assert!(largest(&(run(2) - &together)) < 1e-6 && largest(&(run(1) - &together)) < 1e-6);
    assert!(largest(&((&together - &pictures) * (1.0 - &masks))) == 0.0);
    let four = [1, 2, 3, 4];
    let error = edit(&ORACLE, &inpaint, &Times::Sigmas(vec![80.0]), &Request::new(&four), Hooks::default())
        .unwrap_err();
    assert!(error.to_string().contains("one for each seed"), "{error}");
}

#[test]
fn a_stroke_keeps_more_of_the_drawing_at_a_lower_level() {
    let drawing = picture(1) * 0.5;
    let stroke = Stroke::new(&drawing).unwrap();
    let seeds = [1, 2, 3, 4];
    let request = Request { clip: false, ..Request::new(&seeds) };
    let distance = |sigma: f64| {
        let times = stroke_times(sigma, SigmaRange::EDM);
        largest(&(edit(&ORACLE, &stroke, &times, &request, Hooks::default()).unwrap() - &drawing))
    };
    let distances = [0.01, 0.1, 1.0].map(distance);
    assert!(
        distances[0] < 0.06 && distances[0] < distances[1] && distances[1] < distances[2],
        "{distances:?}"
    );
}

#[test]
fn noise_levels_are_found_on_smooth_pictures() {
    for side in [32, 64] {
        let shape = ImageShape::square(3, side);
        let ramp = Tensor::linspace(-1.0, 1.0, side, (Kind::Float, Device::Cpu));
        let smooth =
            (ramp.sin().view([1, 1, side, 1]) * ramp.cos().view([1, 1, 1, side])).repeat([8, 3, 1, 1]);
        for sigma in [0.02, 0.1, 0.5, 2.0] {
            let seeds: Vec<u64> = (0..8).collect();
            let found = estimate_sigma(&(&smooth + noise(shape, &seeds) * sigma)).unwrap();
            let mean = found.iter().sum::<f64>() / 8.0;
            assert!((mean / sigma - 1.0).abs() < 0.02, "{side}: σ = {sigma}, found {mean} on average");
            assert!(
                found.iter().all(|f| (f / sigma - 1.0).abs() < 0.08),
                "{side}: σ = {sigma}, found {found:?}"
            );
        }
    }
    // The stated biases: texture counts as noise, and clipped noise counts less.
    let shape = ImageShape::square(3, 32);
    let texture = noise(shape, &[1]) * 0.2;
    assert!((estimate_sigma(&texture).unwrap()[0] - 0.2).abs() < 0.02);
    let clipped = (noise(shape, &[1]) * 0.2 + 1.0).clamp(-1.0, 1.0);
    assert!(estimate_sigma(&clipped).unwrap()[0] < 0.15);
    assert!(estimate_sigma(&Tensor::zeros([1, 3, 1, 8], (Kind::Float, Device::Cpu))).is_err());
}

#[test]
fn denoising_is_one_jump() {
    let x = picture(1);
    let gain = ((0.25f64 + 4e-6) / (0.25 + 0.09)).sqrt();
    assert!(largest(&(denoise(&ORACLE, &x, 0.3, None).unwrap() - &x * gain)) < 1e-6);
    assert!(largest(&(denoise(&ORACLE, &x, 0.002, None).unwrap() - &x)) < 1e-6, "σ_min changes nothing");
    assert!(matches!(denoise(&ORACLE, &x, 81.0, None), Err(Error::Level { .. })));
    assert!(matches!(denoise(&ORACLE, &x, 0.3, Some(&[1])), Err(Error::Unconditional)));
    assert!(matches!(denoise(&ORACLE, &x.narrow(2, 0, 4), 0.3, None), Err(Error::Model(_))));
}

#[test]
fn slerp_runs_along_the_sphere_at_one_speed() {
    let a = noise(SHAPE, &[1]).to_kind(Kind::Double);
    let b = noise(SHAPE, &[2]).to_kind(Kind::Double);
    let norm = |x: &Tensor| x.square().sum(Kind::Double).double_value(&[]).sqrt();
    assert!(slerp(&a, &b, 0.0).unwrap() == a && slerp(&a, &b, 1.0).unwrap() == b, "to the last bit");
    let (low, high) = (norm(&a).min(norm(&b)), norm(&a).max(norm(&b)));
    let b = &b * (norm(&a) / norm(&b));
    let angle =
        |x: &Tensor, y: &Tensor| ((x * y).sum(Kind::Double).double_value(&[]) / (norm(x) * norm(y))).acos();
    let whole = angle(&a, &b);
    for i in 1..8 {
        let share = f64::from(i) / 8.0;
        let point = slerp(&a, &b, share).unwrap();
        assert!((norm(&point) / norm(&a) - 1.0).abs() < 1e-12, "ends of one length: all of it");
        assert!((angle(&a, &point) - share * whole).abs() < 1e-9, "{share}");
        let between = norm(&slerp(&a, &noise(SHAPE, &[2]).to_kind(Kind::Double), share).unwrap());
        assert!((low..=high).contains(&between), "{low} {between} {high}");
    }
    // No arc: the straight line.
    assert!(largest(&(slerp(&a, &(&a * 3.0), 0.5).unwrap() - &a * 2.0)) < 1e-12);
    assert!(slerp(&a, &a.narrow(2, 0, 4), 0.5).is_err() && slerp(&a, &b, 1.1).is_err());
}

#[test]
fn interpolation_begins_and_ends_with_the_samples_of_its_seeds() {
    let ends = Request { batch: 2, ..Request::new(&[11, 12]) };
    let way = interpolate(&ORACLE, 5, &ends).unwrap();
    let samples = one_step(&ORACLE, &ends).unwrap();
    for (frame, sample) in [(0, 0), (4, 1)] {
        assert!(largest(&(way.get(frame) - samples.get(sample))) < 1e-6);
    }
    assert!(largest(&(way.get(2) - way.get(0))) > 0.1);
    assert!(interpolate(&ORACLE, 1, &ends).is_err());
    assert!(interpolate(&ORACLE, 5, &Request::new(&[1])).is_err());
    assert!(matches!(
        interpolate(&ORACLE, 5, &Request { labels: Some(&[1, 1]), ..ends }),
        Err(Error::Unconditional)
    ));
}

/// Knows everything, in a shape of its own.
struct Odd(Vec<i64>);

impl Measurement for Odd {
    fn measure(&self, _images: Range<usize>) -> cm_sampler::Result<Tensor> {
        Ok(Tensor::zeros(&self.0, (Kind::Float, Device::Cpu)))
    }
    fn impose(&self, x: &Tensor, _images: Range<usize>) -> cm_sampler::Result<Tensor> {
        Ok(x.narrow(2, 0, 4))
    }
}

#[test]
fn shapes_that_do_not_fit_are_typed_errors() {
    let of = picture(1);
    let is_shape = |error: Error| {
        let shape = matches!(error, Error::Model(cm_sampler::model::Error::Shape { .. }));
        assert!(shape, "{error}");
    };
    is_shape(Inpaint::new(&of, &diagonal_mask().narrow(3, 0, 7)).unwrap_err());
    is_shape(Inpaint::new(&of.squeeze(), &diagonal_mask()).unwrap_err());
    is_shape(Colorize::of(&of.narrow(1, 0, 2)).unwrap_err());
    is_shape(Colorize::from_grey(&of).unwrap_err());
    is_shape(SuperRes::of(&of, 3).unwrap_err());
    is_shape(Inpaint::outpaint(&of, SHAPE, 1, 0, 0).unwrap_err());
    is_shape(Inpaint::outpaint(&of, ImageShape::square(1, 16), 1, 0, 0).unwrap_err());
    is_shape(Inpaint::outpaint(&of, SHAPE, usize::MAX, 0, 0).unwrap_err());
    let value = |error: Error| {
        assert!(matches!(error, Error::Model(cm_sampler::model::Error::Value { .. })), "{error}");
    };
    value(Inpaint::new(&of, &(diagonal_mask() * 2.0)).unwrap_err());
    value(Inpaint::new(&of, &(diagonal_mask() * f64::NAN)).unwrap_err());
    value(SuperRes::from_low(&of, 1).unwrap_err());
    for which in ALL {
        let measurement = parts(&of, which);
        is_shape(measurement.impose(&of.narrow(2, 0, 4), 0..1).unwrap_err());
        is_shape(measurement.impose(&of, 0..2).unwrap_err());
    }
    let run = |measurement: &dyn Measurement| {
        edit(&ORACLE, measurement, &Times::Sigmas(vec![80.0]), &Request::new(&[1, 2, 3]), Hooks::default())
    };
    is_shape(run(&Odd(vec![1, 3, 4, 8])).unwrap_err());
    is_shape(run(&Odd(vec![2, 3, 8, 8])).unwrap_err());
    is_shape(run(&Odd(vec![1, 3, 8, 8])).unwrap_err());
    is_shape(run(&SuperRes::from_low(&of, 2).unwrap()).unwrap_err());
}

#[test]
fn a_grey_picture_is_coloured_in_its_own_luma() {
    let grey = picture(1).narrow(1, 0, 1);
    let colorize = Colorize::from_grey(&grey).unwrap();
    assert!(largest(&(colorize.grey() - &grey)) < 1e-6);
    let same = Colorize::of(&grey.repeat([1, 3, 1, 1])).unwrap();
    assert!(colorize.measure(0..1).unwrap() == same.measure(0..1).unwrap());
    let low = SuperRes::of(&picture(2), 2).unwrap();
    assert_eq!(low.low().size(), [1, 3, 4, 4]);
    let from_low = SuperRes::from_low(low.low(), 2).unwrap();
    assert!(from_low.measure(0..1).unwrap() == low.measure(0..1).unwrap());
}
