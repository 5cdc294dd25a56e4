//! The optimum of diffusion training on Gaussian data.

use cm_model::Mode;
use cm_schedule::{LogNormal, Weighting};

use super::gaussian::{DATA_STD, Form, Gaussian, fixed_point, on_pairs};
use crate::{Distance, Losses, Pairs, denoising_loss};

const WEIGHTINGS: [Weighting; 6] = [
    Weighting::Uniform,
    Weighting::Snr,
    Weighting::SnrPlus1,
    Weighting::Karras,
    Weighting::TruncatedSnr,
    Weighting::InverseStep,
];

/// Levels at the places −3 … 3 of EDM's log-normal.
fn levels() -> Vec<f64> {
    let distribution = LogNormal { mean: -1.2, std: 1.2 };
    (-12..=12).map(|i| distribution.sigma(f64::from(i) / 4.0)).collect()
}

fn losses(student: &Gaussian, levels: &[f64], weighting: Weighting) -> Losses {
    let pairs = Pairs::new(levels.iter().map(|&sigma| (sigma, 0.0)), weighting, DATA_STD);
    on_pairs(&pairs, DATA_STD, |example| {
        denoising_loss(student, example, &Distance::SquaredNorm, Mode::Eval).unwrap()
    })
}

/// At each level the best gain is E[x_σ x]/E[x_σ²] = v/(v + σ²), and one s gives it for all of them.
///
/// With u = 2⁻²⁴, float32 leaves an error of some uv/σ² at a small level, which is 1.5e-6 at σ = 0.1.
#[test]
fn the_fixed_point_is_the_truth_at_any_level_and_weight() {
    let std = |levels: &[f64], weighting| {
        fixed_point(&Gaussian::new(Form::Denoiser, 1.0), |student| losses(student, levels, weighting))
    };
    for weighting in WEIGHTINGS {
        let got = std(&levels(), weighting);
        assert!((got - DATA_STD).abs() < 1e-5, "{weighting:?}: {got}");
    }
    for level in [0.1, 0.5, 3.0, 10.0] {
        let got = std(&[level], Weighting::Karras);
        assert!((got - DATA_STD).abs() < 1e-5, "σ = {level}: {got}");
    }
}

/// The variance of x given x_σ, v σ²/(v + σ²), remains; EDM's weight makes that 1 for each value of the image.
#[test]
fn the_least_loss_is_the_variance_that_remains() {
    let exact = Gaussian::new(Form::Denoiser, DATA_STD);
    let levels = levels();
    let var = DATA_STD * DATA_STD;
    for weighting in WEIGHTINGS {
        let least = Vec::<f32>::try_from(losses(&exact, &levels, weighting).per_sample.detach()).unwrap();
        for (&sigma, got) in std::iter::zip(&levels, least) {
            let want =
                4.0 * weighting.weight(sigma, 0.0, DATA_STD) * var * sigma * sigma / (var + sigma * sigma);
            assert!((f64::from(got) / want - 1.0).abs() < 1e-4, "{weighting:?} at {sigma}: {got} {want}");
            if weighting == Weighting::Karras {
                assert!((want / 4.0 - 1.0).abs() < 1e-12);
            }
        }
    }
    for wrong in [0.4, 0.6] {
        let more = losses(&Gaussian::new(Form::Denoiser, wrong), &levels, Weighting::Karras).per_sample;
        assert!(more.min().double_value(&[]) > 4.0 - 1e-3 && more.max().double_value(&[]) > 4.1);
    }
}
