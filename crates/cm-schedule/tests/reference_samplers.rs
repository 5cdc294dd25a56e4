//! One pixel of the reference implementations' samplers, on their analytic denoiser.
//!
//! The numbers come from the project's golden files: EDM's `edm_sampler` and k-diffusion's `sample_dpmpp_2m` in f64,
//! OpenAI's `sample_dpm` and `sample_euler_ancestral` in f32. They pin what a law does not: where churn begins and
//! ends, which step is first order, where noise is drawn.

use cm_schedule::KarrasGrid;
use cm_schedule::solver::{Churn, Plan, Scalars, execute};

/// D(x; σ) = x/(4q) + 0.3 σ/√q · tanh(x/√q + 0.2) with q = σ² + ¼.
fn denoise(x: f64, sigma: f64) -> f64 {
    let q = sigma * sigma + 0.25;
    0.25 * x / q + 0.3 * sigma / q.sqrt() * (x / q.sqrt() + 0.2).tanh()
}

struct Case<'a> {
    plan: Plan,
    start: f64,
    /// The reference draws one number per step, whether it uses it or not.
    noise: &'a [f64],
    /// OpenAI's samplers clamp what the denoiser says to [−1, 1].
    clip: bool,
    end: f64,
    tolerance: f64,
}

fn check(case: &Case) {
    let model = |x: &f64, sigma| {
        let denoised = denoise(*x, sigma);
        Ok(if case.clip { denoised.clamp(-1.0, 1.0) } else { denoised })
    };
    let noise = |k: usize| case.noise.get(k).copied().ok_or("no noise was recorded");
    let end = execute(&Scalars::<f64>::new(), &case.plan, case.start, model, noise).unwrap();
    assert!((end - case.end).abs() < case.tolerance, "got {end}, want {}", case.end);
}

#[test]
fn edm_stochastic_heun() {
    let churn = Churn { s_churn: 30.0, s_min: 0.01, s_max: 1.0, s_noise: 1.007 };
    check(&Case {
        plan: Plan::heun(&KarrasGrid::EDM.with_zero(12), &churn).unwrap(),
        start: 80.0 * -0.966_588_152_881_598_2,
        noise: &[
            -1.010_716_216_429_603_5,
            0.943_086_619_117_730_6,
            0.065_757_956_391_066_9,
            2.334_833_679_069_852,
            -0.160_113_205_110_574_86,
            1.489_101_533_791_155_5,
            0.317_501_964_366_856_07,
            -0.780_142_153_605_590_4,
            0.074_237_015_663_938_31,
            -0.735_246_359_950_280_5,
            -0.988_320_549_255_747_2,
            0.401_383_589_895_224_05,
        ],
        clip: false,
        end: -1.226_367_907_152_863_5,
        tolerance: 1e-12,
    });
}

#[test]
fn k_diffusion_dpmpp_2m() {
    check(&Case {
        plan: Plan::dpmpp_2m(&KarrasGrid::EDM.with_zero(10)).unwrap(),
        start: 4.862_628_540_491_351,
        noise: &[],
        clip: false,
        end: 0.224_588_172_348_011_7,
        tolerance: 1e-12,
    });
}

#[test]
fn openai_dpm2_with_churn() {
    let churn = Churn { s_churn: 3.0, s_min: 0.1, s_max: 30.0, s_noise: 1.01 };
    check(&Case {
        plan: Plan::dpm2(&KarrasGrid::EDM.with_zero(8), &churn).unwrap(),
        start: 80.0 * -0.145_138_76,
        noise: &[
            -0.749_148_309,
            0.900_731_325,
            0.150_430_605,
            -1.572_608_11,
            0.033_286_325_6,
            0.200_358_346,
            0.151_155_248,
            -1.852_431_77,
        ],
        clip: true,
        end: -0.727_464_56,
        tolerance: 1e-5,
    });
}

#[test]
fn openai_ancestral() {
    check(&Case {
        plan: Plan::ancestral(&KarrasGrid::EDM.with_zero(8)).unwrap(),
        start: 80.0 * -0.851_030_6,
        noise: &[
            0.286_926_121,
            -2.080_323_7,
            -0.622_957_706,
            1.006_189_23,
            -2.475_283_38,
            0.079_565_130_2,
            -0.095_818_109_8,
        ],
        clip: true,
        end: -0.413_607_54,
        tolerance: 1e-5,
    });
}
