use cm_model::{Cond, Denoiser, Mode, Sigma};
use cm_schedule::KarrasGrid;
use tch::Tensor;

use crate::{Distance, Error, Pairs, Result, TeacherRule, TeacherSolver, Trainable};

/// The network that a consistency loss compares the student with. It gets no gradient.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// The student's own weights, as they are now (iCT, ECT, and CD or CT with μ = 0).
    Live,
    /// Another network, whose weights are an average of the student's (θ⁻ of CM's Algorithms 2 and 3).
    Network(&'a dyn Trainable),
}

/// What a loss is computed on.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Clean images `[B, C, H, W]` in [-1, 1].
    pub images: &'a Tensor,
    /// Standard normal noise of the same shape.
    pub noise: &'a Tensor,
    /// The noise levels of each image.
    pub pairs: &'a Pairs,
    /// Labels and augmentation of each image.
    pub cond: &'a Cond,
}

/// Losses of a batch, and what they were made of.
#[derive(Debug)]
pub struct Losses {
    /// Weighted losses `[B]` with their graph; the batch's loss is their mean.
    pub per_sample: Tensor,
    /// Distances `[B]` before weighting, without a graph.
    pub distance: Tensor,
    /// The student's images with their graph, for whoever measures them in another way.
    pub student: Tensor,
    /// The images that they were compared with, without a graph.
    pub target: Tensor,
}

/// The loss of diffusion training, `w · d(D_θ(x + σz, σ), x)`: the student as a denoiser against the clean image.
///
/// The target's levels, which are 0, are not used.
///
/// # Source
/// Karras et al. 2022 (arXiv 2206.00364), eq. 2 and 8; with [`Distance::SquaredNorm`] and the weight
/// [`cm_schedule::Weighting::Karras`] it is EDM's loss.
///
/// # Errors
/// [`Error::Input`] or [`cm_model::Error`] if the parts of the example do not fit each other or the network.
pub fn denoising_loss(
    student: &dyn Trainable,
    example: &Example<'_>,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    example.check(student)?;
    compare(student, example, &example.noisy(), example.images.shallow_clone(), distance, mode)
}

/// The loss of consistency training, `w · d(f_θ(x + σz, σ), f_θ⁻(x + σ′z, σ′))`: both points lie on the ray from
/// the image `x` along one noise `z`.
///
/// Where σ′ = 0 the target is the image itself. Student and target are evaluated in the same `mode`, so that with
/// dropout they share the mask. Noise levels and weights come in f64 and are applied in float32, whatever the
/// network computes in.
///
/// # Source
/// Song et al. 2023, Algorithm 3; with [`Target::Live`] it is the loss of iCT (arXiv 2310.14189) and ECT
/// (arXiv 2406.14548).
///
/// # Errors
/// [`Error::Input`] or [`cm_model::Error`] if the parts of the example do not fit each other or the network.
pub fn consistency_loss(
    student: &dyn Trainable,
    target: Target<'_>,
    example: &Example<'_>,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    example.check(student)?;
    // Algorithm 3, line 5: x + t_n z.
    let nearer = example.images + example.noise * example.column(&example.pairs.next);
    let wanted = estimate(student, target, example, &nearer, mode)?;
    compare(student, example, &example.noisy(), wanted, distance, mode)
}

/// The loss of consistency distillation, `w · d(f_θ(x_σ, σ), f_θ⁻(x̂_σ′, σ′))` with `x_σ = x + σz` and with `x̂_σ′` one
/// step of the teacher's ODE from there.
///
/// The rest is as in [`consistency_loss`]. The teacher sees the labels of the images and no augmentation.
///
/// # Source
/// Song et al. 2023, Algorithm 2.
///
/// # Errors
/// [`Error::Input`] or [`cm_model::Error`] if the parts of the example do not fit each other or the networks.
pub fn distillation_loss(
    student: &dyn Trainable,
    target: Target<'_>,
    teacher: Teacher<'_>,
    example: &Example<'_>,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    example.check(student)?;
    let noisy = example.noisy();
    // Algorithm 2, line 6: x̂_{t_n} ← x_{t_{n+1}} + (t_n − t_{n+1}) Φ(x_{t_{n+1}}, t_{n+1}; φ).
    let nearer = teacher.step(example, &noisy)?;
    let wanted = estimate(student, target, example, &nearer, mode)?;
    compare(student, example, &noisy, wanted, distance, mode)
}

/// The loss of progressive distillation, `w · d(D_θ(x_σ, σ), x̃)`: the student shall reach in one Euler step from σ to
/// σ′ what the teacher reaches in two, so `x̃ = x_σ − σ (x_σ′ − x_σ)/(σ′ − σ)` with `x_σ′` the end of these two steps.
///
/// The steps of the teacher meet halfway along `grid`, whose range and ρ alone are used.
///
/// # Source
/// Salimans and Ho 2022 (arXiv 2202.00512), Algorithm 2, in the noise levels and Euler steps of EDM as Song et al. 2023
/// run it for comparison.
///
/// # Errors
/// [`Error::Input`] or [`cm_model::Error`] if the parts of the example do not fit each other or the networks.
pub fn progressive_loss(
    student: &dyn Trainable,
    teacher: &dyn Trainable,
    grid: &KarrasGrid,
    example: &Example<'_>,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    example.check(student)?;
    let noisy = example.noisy();
    let (sigma, next) = (&example.pairs.sigma, &example.pairs.next);
    let halfway = |(&a, &b): (&f64, &f64)| grid.sigma((grid.position(a) + grid.position(b)) / 2.0);
    let middle: Vec<f64> = std::iter::zip(sigma, next).map(halfway).collect();
    let wanted = {
        let _no_grad = tch::no_grad_guard();
        let euler = |x: &Tensor, from: &[f64], to: &[f64]| -> Result<Tensor> {
            let denoised =
                teacher.evaluate(x, Sigma::Each(from), &example.cond.without_augment(), Mode::Eval)?;
            Ok(x + (x - denoised) * example.ratios(from, to, |a, b| (b - a) / a))
        };
        let there = euler(&euler(&noisy, sigma, &middle)?, &middle, next)?;
        &noisy - (there - &noisy) * example.ratios(sigma, next, |a, b| a / (b - a))
    };
    compare(student, example, &noisy, wanted, distance, mode)
}

/// A denoiser that shows a student the way, and how.
#[derive(Clone, Copy)]
pub struct Teacher<'a> {
    /// The denoiser.
    pub denoiser: &'a dyn Denoiser,
    /// The solver of its ODE.
    pub rule: TeacherRule,
}

impl Teacher<'_> {
    /// One step of dx/dσ = (x − D(x; σ))/σ from σ to σ′, for each image of the example at its own levels.
    fn step(&self, example: &Example<'_>, x: &Tensor) -> Result<Tensor> {
        let (sigma, next) = (&example.pairs.sigma, &example.pairs.next);
        let cond = example.cond.without_augment();
        let slope = |x: &Tensor, levels: &[f64]| -> Result<Tensor> {
            let denoised = self.denoiser.denoise(x, Sigma::Each(levels), &cond)?;
            Ok((x - denoised) / example.column(levels))
        };
        let length = example.ratios(sigma, next, |a, b| b - a);
        let d = slope(x, sigma)?;
        let euler = x + &d * &length;
        Ok(match self.rule.solver {
            TeacherSolver::Euler => euler,
            TeacherSolver::Heun => x + (d + slope(&euler, &example.pairs.known_next())?) * (length / 2.0),
        })
    }
}

/// What the target network makes of `nearer` at σ′, without a gradient; the image itself where σ′ = 0.
fn estimate(
    student: &dyn Trainable,
    target: Target<'_>,
    example: &Example<'_>,
    nearer: &Tensor,
    mode: Mode,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let Example { images, pairs, cond, .. } = example;
    let target = match target {
        Target::Live => student,
        Target::Network(network) => network,
    };
    let at_image: Vec<bool> = pairs.next.iter().map(|&next| next == 0.0).collect();
    if at_image.iter().all(|&at| at) {
        return Ok(images.shallow_clone());
    }
    // Images at σ′ = 0 go along, so that the batch, and with it the dropout mask, is the student's; their result is
    // thrown away.
    let estimate = target.evaluate(nearer, Sigma::Each(&pairs.known_next()), cond, mode)?;
    let at_image = Tensor::from_slice(&at_image).to_device(images.device()).view([-1, 1, 1, 1]);
    Ok(images.where_self(&at_image, &estimate))
}

/// The weighted distance between the student at `noisy` (σ) and the image `wanted`, whatever brought that about.
///
/// It comes last in every loss: what the target needed is gone before the student's graph is built.
fn compare(
    student: &dyn Trainable,
    example: &Example<'_>,
    noisy: &Tensor,
    wanted: Tensor,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    let Example { images, pairs, cond, .. } = example;
    let estimate = student.evaluate(noisy, Sigma::Each(&pairs.sigma), cond, mode)?;
    let distances = distance.between(&estimate, &wanted);
    let weights = Sigma::Each(&pairs.weight).flat(images.device(), |weight| weight);
    let per_sample = &distances * weights;
    Ok(Losses { per_sample, distance: distances.detach(), student: estimate, target: wanted })
}

impl Example<'_> {
    /// Numbers for each image, each rounded once from f64, shaped `[B, 1, 1, 1]`.
    fn column(&self, values: &[f64]) -> Tensor {
        Sigma::Each(values).broadcast(self.images.device(), |value| value)
    }

    /// [`Example::column`] of a function of two levels.
    fn ratios(&self, from: &[f64], to: &[f64], ratio: impl Fn(f64, f64) -> f64) -> Tensor {
        self.column(&std::iter::zip(from, to).map(|(&a, &b)| ratio(a, b)).collect::<Vec<_>>())
    }

    /// The noisy images x + σz that the student is given.
    fn noisy(&self) -> Tensor {
        self.images + self.noise * self.column(&self.pairs.sigma)
    }

    fn check(&self, student: &dyn Trainable) -> Result<()> {
        let batch = student.shape().check("training images", self.images)?;
        student.shape().check("training noise", self.noise)?;
        let Pairs { sigma, next, weight } = self.pairs;
        let lengths = [self.noise.size()[0], sigma.len() as i64, next.len() as i64, weight.len() as i64];
        if lengths.iter().any(|&n| n != batch) {
            return Err(Error::Input {
                what: "noise, sigma, next and weight of a batch",
                expected: format!("{batch} of each, as there are images"),
                got: format!("{lengths:?}"),
            });
        }
        if let Some(i) = (0..sigma.len()).find(|&i| !(0.0 <= next[i] && next[i] < sigma[i])) {
            return Err(Error::Input {
                what: "pair of noise levels",
                expected: "0 ≤ next < sigma".into(),
                got: format!("next = {}, sigma = {} for image {i}", next[i], sigma[i]),
            });
        }
        Ok(())
    }
}
