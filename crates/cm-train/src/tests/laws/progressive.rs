//! Progressive distillation: one step of the student where its teacher takes two.

use cm_model::{Cond, ImageShape, Init, Mode, Params, ParamsBuilder, Sigma};
use cm_schedule::{KarrasGrid, Weighting};
use tch::{Device, Kind, Tensor};

use super::gaussian::{DATA_STD, Form, Gaussian, SHAPE, on_pairs};
use crate::testing::{batch, mlp};
use crate::{Distance, Example, Losses, Pairs, Trainable, progressive_loss};

pub(super) const GRID: KarrasGrid = KarrasGrid::EDM;

/// A denoiser D(x; σ_j) = θ_j x with a parameter for each level σ_j at position j/n of the grid, j < n: as many as a
/// sampler of n steps asks.
pub(super) struct Gains {
    params: Params,
    n: usize,
}

impl Gains {
    pub(super) fn new(gains: &[f64]) -> Self {
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let n = gains.len();
        let weight = builder.root().param("gains", &[n as i64], Init::Zeros).unwrap();
        tch::no_grad(|| weight.shallow_clone().copy_(&Tensor::from_slice(gains)));
        Self { params: builder.finish(), n }
    }

    /// Those of the exact denoiser.
    pub(super) fn exact(n: usize) -> Self {
        let var = DATA_STD * DATA_STD;
        let gain = |j: usize| var / (var + GRID.halved_step(j, n)[0].powi(2));
        Self::new(&(0..n).map(gain).collect::<Vec<_>>())
    }

    pub(super) fn gains(&self) -> Vec<f64> {
        let weight = self.params.get("gains").unwrap().detach().to_kind(Kind::Double);
        Vec::try_from(weight).unwrap()
    }
}

impl Trainable for Gains {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, _: &Cond, _: Mode) -> cm_model::Result<Tensor> {
        let index = sigma.flat(x.device(), |sigma| (GRID.position(sigma) * self.n as f64).round());
        let gains = self.params.get("gains").unwrap().index_select(0, &index.to_kind(Kind::Int64));
        Ok(x * gains.view([-1, 1, 1, 1]))
    }
}

/// The product of the factors of Euler steps along the exact flow of the data: (v + σσ′)/(v + σ²) each.
pub(super) fn euler_product(levels: &[f64]) -> f64 {
    let var = DATA_STD * DATA_STD;
    levels.windows(2).map(|w| (var + w[0] * w[1]) / (var + w[0] * w[0])).product()
}

/// What the Euler step from `sigma` to `next` multiplies x by, where D(x; σ) = `gain`·x.
pub(super) fn euler_factor(gain: f64, sigma: f64, next: f64) -> f64 {
    1.0 + (next - sigma) * (1.0 - gain) / sigma
}

/// With the teacher of the tests, which is not linear in x, on images and at steps of any length.
#[test]
fn the_student_shall_go_in_one_step_where_the_teacher_goes_in_two() {
    let (student, teacher) = (mlp(0, 0.0), mlp(3, 0.0));
    let (images, noise) = (batch(1, 6).images, batch(4, 6).images);
    let steps = [(0, 1), (0, 64), (5, 8), (17, 18), (31, 32), (63, 64)];
    let pairs: Vec<_> = steps.iter().map(|&(i, n)| GRID.halved_step(i, n)).collect();
    let wanted = {
        let pairs = Pairs::new(pairs.iter().map(|&[a, _, b]| (a, b)), Weighting::TruncatedSnr, DATA_STD);
        let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &Cond::none() };
        progressive_loss(&student, &teacher, &GRID, &example, &Distance::L2, Mode::Eval).unwrap().target
    };
    for (i, [sigma, middle, next]) in pairs.into_iter().enumerate() {
        let pick = |t: &Tensor| t.narrow(0, i as i64, 1);
        let euler =
            |x: &Tensor, denoised: &Tensor, from: f64, to: f64| x + (x - denoised) * ((to - from) / from);
        let teach = |x: &Tensor, from: f64, to: f64| {
            let denoised = teacher.evaluate(x, Sigma::One(from), &Cond::none(), Mode::Eval).unwrap();
            euler(x, &denoised.detach(), from, to)
        };
        let start = pick(&images) + pick(&noise) * sigma;
        let there = teach(&teach(&start, sigma, middle), middle, next);
        let got = euler(&start, &pick(&wanted), sigma, next);
        let off = (got - &there).abs().max().double_value(&[]) / start.abs().max().double_value(&[]);
        assert!(off < 1e-6, "σ = {sigma}: {off}");
    }
}

/// One stage with a regression that leaves nothing: the loss is 0 there, so the solution holds for any weights and data.
fn distil(teacher: &dyn Trainable, n: usize) -> Gains {
    let steps: Vec<_> = (0..n).map(|i| GRID.halved_step(i, n)).collect();
    let pairs = Pairs::new(steps.iter().map(|&[a, _, b]| (a, b)), Weighting::TruncatedSnr, DATA_STD);
    let loss = |student: &Gains| -> Losses {
        on_pairs(&pairs, DATA_STD, |example| {
            progressive_loss(student, teacher, &GRID, example, &Distance::L2, Mode::Eval).unwrap()
        })
    };
    // θ = Σ x x̃/Σ x² over the pixels of each step; a student with gains of 1 shows x.
    let first = loss(&Gains::new(&vec![1.0; n]));
    let (x, wanted) = (first.student.detach().view([n as i64, -1]), first.target.view([n as i64, -1]));
    let sum = |t: Tensor| t.sum_dim_intlist(1, false, Kind::Double);
    let student = Gains::new(&Vec::<f64>::try_from(sum(&x * wanted) / sum(x.square())).unwrap());
    let left = loss(&student).distance.max().double_value(&[]);
    // In float32 x̃ is off by some 1e-4 where x is near 80.
    assert!(left < 1e-8, "N = {n}: {left}");
    student
}

#[test]
fn halving_multiplies_the_steps_of_the_first_teacher() {
    let mut student = distil(&Gaussian::new(Form::Denoiser, DATA_STD), 64);
    for n in [32, 16, 8, 4, 2, 1] {
        student = distil(&student, n);
    }
    let got = euler_factor(student.gains()[0], 80.0, 0.002);
    let want = euler_product(&GRID.descending(129));
    // The last x̃, near 0.5, is the difference of numbers near 80 in float32.
    assert!((got / want - 1.0).abs() < 3e-5, "{got} {want}");
}
