use std::ops::Range;

use cm_schedule::{
    Ect, EctAdjust, IndexDist, KarrasGrid, LogNormal, NumScales, Reading, SigmaRange, TargetEma, Weighting,
};

use crate::recipe::Schedule;
use crate::{Levels, Method, Metric, PairRule, Pairs, Place, Recipe, TargetRule, TeacherRule, TeacherSolver};

const LEVELS: Levels = Levels { range: SigmaRange::EDM, sigma_data: 0.5 };

fn ct() -> Recipe {
    Recipe {
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Progressive { s0: 2, s1: 150 },
            index: IndexDist::Uniform {},
        },
        target: TargetRule::Ema { rule: TargetEma::Adaptive { mu0: 0.9, s0: 2, reading: Reading::Paper } },
        teacher: None,
        metric: Metric::L2,
        weighting: Weighting::Uniform,
    }
}

fn ict() -> Recipe {
    Recipe {
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Doubling { s0: 10, s1: 1280 },
            index: IndexDist::LogNormal { mean: -1.1, std: 2.0 },
        },
        target: TargetRule::Live {},
        teacher: None,
        metric: Metric::PseudoHuber { c: None },
        weighting: Weighting::InverseStep,
    }
}

fn ect() -> Recipe {
    Recipe {
        pairs: PairRule::Continuous {
            sigma: LogNormal { mean: -1.1, std: 2.0 },
            map: Ect { q: 2.0, stages: 8, adjust: EctAdjust::Sigmoid { k: 8.0, b: 1.0 } },
        },
        target: TargetRule::Live {},
        teacher: None,
        metric: Metric::PseudoHuber { c: Some(0.0) },
        weighting: Weighting::InverseStep,
    }
}

fn edm() -> Recipe {
    Recipe {
        pairs: PairRule::Denoise { sigma: LogNormal { mean: -1.2, std: 1.2 } },
        target: TargetRule::Image {},
        teacher: None,
        metric: Metric::SquaredNorm,
        weighting: Weighting::Karras,
    }
}

fn pd() -> Recipe {
    Recipe {
        pairs: PairRule::Steps {
            rho: 7.0,
            num_scales: NumScales::ProgDist { start: 8, steps_per_stage: 100 },
        },
        target: TargetRule::TwoSteps {},
        teacher: None,
        metric: Metric::L2,
        weighting: Weighting::TruncatedSnr,
    }
}

fn cd() -> Recipe {
    Recipe {
        pairs: PairRule::Grid {
            rho: 7.0,
            num_scales: NumScales::Fixed { num_scales: 18 },
            index: IndexDist::Uniform {},
        },
        teacher: Some(TeacherRule { solver: TeacherSolver::Heun }),
        ..ct()
    }
}

fn draw(recipe: &Recipe, step: u64, samples: Range<u64>) -> Pairs {
    draw_of(recipe, step, 800_000, samples)
}

fn draw_of(recipe: &Recipe, step: u64, total_steps: u64, samples: Range<u64>) -> Pairs {
    recipe.pairs(&Place { seed: 5, step, total_steps }, samples, &LEVELS).unwrap()
}

#[test]
fn pairs_are_ordered_inside_the_range_and_a_function_of_position() {
    for recipe in [ct(), ict(), ect(), cd()] {
        for step in [0, 1, 400_000, 799_999] {
            let all = draw(&recipe, step, 0..64);
            for (sigma, next) in std::iter::zip(&all.sigma, &all.next) {
                assert!(next < sigma && LEVELS.range.contains(*sigma), "{next} {sigma}");
                assert!(*next == 0.0 || LEVELS.range.contains(*next), "{next}");
            }
            let part = draw(&recipe, step, 17..40);
            assert_eq!(part.sigma, all.sigma[17..40]);
            assert_eq!(part.weight, all.weight[17..40]);
            assert_ne!(draw(&recipe, step + 2, 0..64).sigma[..32], draw(&recipe, step, 32..64).sigma[..]);
        }
    }
}

#[test]
fn noise_levels_of_diffusion_are_log_normal_and_end_at_the_image() {
    let n = 20_000;
    let pairs = draw(&edm(), 3, 0..n);
    assert!(pairs.next.iter().all(|next| *next == 0.0));
    let logs: Vec<f64> = pairs.sigma.iter().map(|sigma| sigma.ln()).collect();
    let mean = logs.iter().sum::<f64>() / n as f64;
    let std = (logs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
    assert!((mean + 1.2).abs() < 0.04 && (std - 1.2).abs() < 0.03, "{mean} {std}");
    for (sigma, weight) in std::iter::zip(&pairs.sigma, &pairs.weight).take(100) {
        let want = (sigma * sigma + 0.25) / (sigma * 0.5).powi(2);
        assert!((weight / want - 1.0).abs() < 1e-12);
    }
}

#[test]
fn steps_of_progressive_distillation_tile_the_range_in_every_stage() {
    for (step, n) in [(0, 8), (100, 4), (250, 2), (400, 1), (599, 1)] {
        assert_eq!(pd().schedule(step, 600).num_scales, Some(n));
        let pairs = draw_of(&pd(), step, 600, 0..256);
        let levels = KarrasGrid::EDM.descending(n + 1);
        for (sigma, next) in std::iter::zip(&pairs.sigma, &pairs.next) {
            let i = levels.iter().position(|level| level == sigma).unwrap();
            assert!((next / levels[i + 1] - 1.0).abs() < 1e-12, "{next}");
        }
        for level in &levels[..n] {
            assert!(pairs.sigma.contains(level), "N = {n}: no step from {level}");
        }
    }
    assert_eq!(pd().stage(250, 600), Some(200..400));
    assert_eq!(ct().stage(250, 600), None);
}

#[test]
fn a_recipe_names_its_loss() {
    let heun = TeacherRule { solver: TeacherSolver::Heun };
    let methods = [
        (ct(), Method::Consistency, false),
        (ict(), Method::Consistency, false),
        (ect(), Method::Consistency, false),
        (cd(), Method::Distillation(heun), false),
        (edm(), Method::Denoising, true),
        (pd(), Method::Progressive { rho: 7.0 }, true),
    ];
    for (recipe, method, denoiser) in methods {
        assert_eq!(recipe.check().map_err(|e| e.to_string()), Ok(()));
        assert_eq!(recipe.method(), method);
        assert_eq!(recipe.method().trains_denoiser(), denoiser);
    }
}

/// N(k) and μ(k) of the paper's CIFAR-10 run (Song et al. 2023, appendix C), worked out by hand.
#[test]
fn ct_follows_the_schedules_of_the_paper() {
    let cases = [(0, 2, 0.9), (8_000, 16, 0.98692), (80_000, 48, 0.99562), (400_000, 107, 0.99803)];
    for (step, n, mu) in cases {
        let schedule = ct().schedule(step, 800_000);
        assert_eq!(schedule.num_scales, Some(n));
        assert!((schedule.mu.unwrap() - mu).abs() < 1e-5, "{:?}", schedule);
    }
    let first = draw(&ct(), 0, 0..8);
    assert!(first.sigma.iter().all(|s| *s == 80.0) && first.next.iter().all(|s| *s == 0.002));
    assert!(first.weight.iter().all(|w| *w == 1.0));
}

/// The index is uniform for CT; for iCT's first stage its probabilities were computed apart from this code.
#[test]
fn indices_have_their_distribution() {
    let n = 20_000;
    let grid = KarrasGrid::EDM.ascending(11);
    let counts = |pairs: &Pairs| -> Vec<f64> {
        let count = |level: f64| pairs.next.iter().filter(|s| **s == level).count() as f64 / n as f64;
        grid[..10].iter().map(|&level| count(level)).collect()
    };
    let ict_probabilities =
        [0.06263, 0.18174, 0.24550, 0.21349, 0.14245, 0.08060, 0.04108, 0.01958, 0.00894, 0.00398];
    let mut uniform = ict();
    if let PairRule::Grid { index, .. } = &mut uniform.pairs {
        *index = IndexDist::Uniform {};
    }
    for (recipe, want) in [(ict(), ict_probabilities), (uniform, [0.1; 10])] {
        for (got, want) in counts(&draw(&recipe, 0, 0..n)).into_iter().zip(want) {
            // Five standard deviations of a frequency.
            assert!((got - want).abs() < 5.0 * (want * (1.0 - want) / n as f64).sqrt(), "{got} {want}");
        }
    }
}

#[test]
fn ict_weights_pairs_by_their_distance() {
    let pairs = draw(&ict(), 0, 0..16);
    for i in 0..16 {
        assert_eq!(pairs.weight[i], 1.0 / (pairs.sigma[i] - pairs.next[i]));
    }
    assert_eq!(ict().schedule(0, 400_000), Schedule { num_scales: Some(11), stage: None, mu: None });
    assert_eq!(ict().schedule(399_999, 400_000).num_scales, Some(1281));
}

#[test]
fn ect_starts_at_the_clean_image_and_closes_in() {
    let first = draw(&ect(), 0, 0..256);
    let small = std::iter::zip(&first.sigma, &first.next).filter(|(sigma, _)| **sigma < 1.0);
    assert!(small.clone().count() > 100);
    small.for_each(|(_, next)| assert_eq!(*next, 0.0));
    let last = draw(&ect(), 799_999, 0..256);
    assert_eq!(first.sigma.len(), last.sigma.len());
    for (sigma, next) in std::iter::zip(&last.sigma, &last.next).filter(|(sigma, _)| **sigma > 0.1) {
        assert!((0.96..1.0).contains(&(next / sigma)), "{next} {sigma}");
    }
    assert_eq!(ect().schedule(799_999, 800_000).stage, Some(7));
}

#[test]
fn combinations_without_meaning_are_refused() {
    assert!([ct(), ict(), ect()].iter().all(|recipe| recipe.check().is_ok()));
    let image = Recipe { target: TargetRule::Image {}, ..ct() };
    assert!(
        image.check().unwrap_err().to_string().starts_with("train.target.kind = image: expected live or ema")
    );
    let live = Recipe { target: TargetRule::Live {}, ..edm() };
    assert!(live.check().unwrap_err().to_string().starts_with("train.target.kind = live: expected image"));
    let ema = Recipe { target: ct().target, ..pd() };
    assert!(ema.check().unwrap_err().to_string().starts_with("train.target.kind = ema: expected two_steps"));
    let taught = Recipe { teacher: cd().teacher, ..edm() };
    assert!(taught.check().unwrap_err().to_string().starts_with("train.teacher = "));
    let growing = PairRule::Steps { rho: 7.0, num_scales: NumScales::Progressive { s0: 2, s1: 150 } };
    let growing = Recipe { pairs: growing, ..pd() };
    assert!(growing.check().unwrap_err().to_string().starts_with("train.pairs.num_scales.kind"));
    let adaptive = Recipe { target: ct().target, ..ect() };
    assert!(adaptive.check().unwrap_err().to_string().contains("train.target.rule.kind"));
    let mut halving = ct();
    if let PairRule::Grid { num_scales, .. } = &mut halving.pairs {
        *num_scales = NumScales::ProgDist { start: 64, steps_per_stage: 10 };
    }
    assert!(halving.check().unwrap_err().to_string().contains("prog_dist"));
    let mut flat = ct();
    if let PairRule::Grid { rho, .. } = &mut flat.pairs {
        *rho = 0.0;
    }
    assert!(flat.check().unwrap_err().to_string().contains("rho"));
    let frozen = Recipe { target: TargetRule::Ema { rule: TargetEma::Fixed { mu: 1.0 } }, ..ect() };
    assert!(frozen.check().unwrap_err().to_string().starts_with("mu = 1"));
}

#[test]
fn recipes_survive_a_file_and_unknown_keys_do_not() {
    for recipe in [ct(), ict(), ect()] {
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
        let wrong = text.replacen("\"target\":{", "\"target\":{\"speed\":1,", 1);
        assert!(serde_json::from_str::<Recipe>(&wrong).unwrap_err().to_string().contains("speed"));
        let wrong = text.replacen('{', "{\"colour\":1,", 1);
        assert!(serde_json::from_str::<Recipe>(&wrong).unwrap_err().to_string().contains("colour"));
    }
}
