//! 04b, kinds CD, PD and EDM: OpenAI's distillation losses and its diffusion loss, on networks of 04a.

use std::cell::RefCell;
use std::rc::Rc;

use cm_model::{Cond, Denoiser, ImageShape, LpipsReading, Mode, Sigma};
use cm_schedule::SigmaRange;
use cm_train::{
    Distance, Example, Losses, Pairs, Target, Teacher, TeacherRule, TeacherSolver, Trainable, denoising_loss,
    distillation_loss, progressive_loss,
};
use tch::{Device, Tensor};

use super::{
    Watched, consistency_function, denoiser, distance, gradients, points, recorded_pairs, scaled, unit,
};
use crate::close::Tolerance;
use crate::golden::{Result, problem};
use crate::group02::labels;
use crate::group03::{grid, weighting};
use crate::hashed;
use crate::report::Checks;

/// Notes what a teacher was asked and what it answered.
struct WatchedTeacher<'a> {
    inner: &'a dyn Denoiser,
    calls: RefCell<Vec<Call>>,
}

struct Call {
    x: Tensor,
    sigma: Vec<f64>,
    denoised: Tensor,
}

impl Denoiser for WatchedTeacher<'_> {
    fn shape(&self) -> ImageShape {
        self.inner.shape()
    }
    fn num_classes(&self) -> i64 {
        self.inner.num_classes()
    }
    fn sigma_range(&self) -> SigmaRange {
        self.inner.sigma_range()
    }
    fn device(&self) -> Device {
        self.inner.device()
    }
    fn denoise(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> cm_model::Result<Tensor> {
        let denoised = self.inner.denoise(x, sigma, cond)?;
        let levels = match sigma {
            Sigma::One(level) => vec![level],
            Sigma::Each(levels) => levels.to_vec(),
        };
        self.calls.borrow_mut().push(Call { x: x.copy(), sigma: levels, denoised: denoised.copy() });
        Ok(denoised)
    }
}

/// `teacherN.x`, `.t` and `.denoised` of every recorded call, and that there were no others.
///
/// The file states no tolerance for points on the teacher's way. They get that of x_t2, with four units in the last
/// place of the image: behind a solver step the difference of image and denoised image, which nearly cancel at small σ,
/// is part of it.
fn teacher_calls(checks: &mut Checks<'_>, calls: &[Call], sigmas: &[f64]) -> Result<()> {
    let golden = checks.golden;
    let (loss, point) = (golden.tolerance("loss rel")?, golden.tolerance("x_t2 abs")?);
    let recorded = (0..).take_while(|i| golden.has(&format!("teacher{i}.x"))).count();
    checks.fact("teacher calls", recorded == calls.len(), format!("{} of {recorded}", calls.len()));
    for (i, call) in calls.iter().enumerate().take(recorded) {
        let name = format!("teacher{i}.x");
        let unit = unit(&golden.want(&name)?, sigmas, 4.0 * f64::from(f32::EPSILON) / point);
        scaled(checks, &name, &call.x, &unit, point)?;
        checks.values(&format!("teacher{i}.t"), &call.sigma, Tolerance::Rel(loss))?;
        checks.tensor(&format!("teacher{i}.denoised"), &call.denoised, Tolerance::Rel(loss))?;
    }
    Ok(())
}

/// Standard deviation of the data where the file does not name it.
const SIGMA_DATA: f64 = 0.5;

/// Loss, mean and gradients.
fn results(checks: &mut Checks<'_>, student: &dyn Trainable, losses: &Losses) -> Result<()> {
    let golden = checks.golden;
    let tolerance = Tolerance::Rel(golden.tolerance("loss rel")?);
    checks.tensor("loss", &losses.per_sample, tolerance)?;
    let mean = losses.per_sample.mean(None);
    for (name, got) in [("distiller", &losses.student), ("loss_mean", &mean)] {
        if golden.has(name) {
            checks.tensor(name, got, tolerance)?;
        }
    }
    mean.backward();
    gradients(checks, student.params(), "", Tolerance::Rel(golden.tolerance("grads rel")?))
}

/// 04b and 07, kind CD: consistency distillation with Heun steps of the teacher.
pub fn consistency_distillation(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if !golden.meta_or("student_distillation", true)? || golden.meta_or("teacher_distillation", false)? {
        return problem("expected a student with boundary scalings and a teacher without");
    }
    let grid = grid(golden)?;
    let sigma_data = golden.meta_or("sigma_data", SIGMA_DATA)?;
    // A file that names the student alone was recorded with the other two networks of its set.
    let file = |role: &str| {
        let usual = format!("04a_openai_net_{role}");
        checks.library.named(golden.meta_text(role).unwrap_or(&usual), checks.path)
    };
    let student = consistency_function(&*file("student")?, grid.range(), sigma_data)?;
    let target = consistency_function(&*file("target")?, grid.range(), sigma_data)?;
    let teacher = denoiser(&*file("teacher")?, grid.range(), sigma_data)?;
    let (student, target) = (Watched::new(&student), Watched::new(&target));
    let teacher = WatchedTeacher { inner: &teacher, calls: RefCell::default() };

    let pairs = recorded_pairs(golden, &grid, sigma_data)?;
    let (images, noise) = (golden.input("x_start")?, golden.input("noise")?);
    let cond = labels(golden, "y")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let distance = match golden.meta_text("loss_norm") {
        Some("lpips") => Distance::Perceptual(Rc::new(hashed::lpips(golden, LpipsReading::Piq)?)),
        _ => distance(&golden.meta::<String>("loss_norm")?)?,
    };
    let heun = Teacher { denoiser: &teacher, rule: TeacherRule { solver: TeacherSolver::Heun } };
    let losses =
        distillation_loss(&student, Target::Network(&target), heun, &example, &distance, Mode::Eval)?;
    if golden.has("x_t") {
        way(checks, &pairs, &student, &target)?;
        checks.tensor("distiller_target", &losses.target, Tolerance::Rel(golden.tolerance("loss rel")?))?;
        teacher_calls(checks, &teacher.calls.borrow(), &pairs.sigma)?;
    }
    results(checks, &student, &losses)
}

/// What student and target were given.
fn way(checks: &mut Checks<'_>, pairs: &Pairs, student: &Watched<'_>, target: &Watched<'_>) -> Result<()> {
    let golden = checks.golden;
    let (loss, point) = (Tolerance::Rel(golden.tolerance("loss rel")?), golden.tolerance("x_t2 abs")?);
    checks.values("t", &pairs.sigma, loss)?;
    checks.values("t2", &pairs.next, loss)?;
    points(checks, "x_t", student, &pairs.sigma, point)?;
    points(checks, "x_t2", target, &pairs.sigma, point)
}

/// 04b, kind PD: progressive distillation of a student with `num_scales` steps.
pub fn progressive_distillation(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if golden.meta::<bool>("student_distillation")? || golden.meta::<bool>("teacher_distillation")? {
        return problem("expected a student and a teacher without boundary scalings");
    }
    let grid = grid(golden)?;
    let sigma_data = golden.meta("sigma_data")?;
    let network = |role: &str| {
        let file = checks.library.named(&golden.meta::<String>(role)?, checks.path)?;
        denoiser(&file, grid.range(), sigma_data)
    };
    let (student, teacher) = (network("student")?, network("teacher")?);
    let student = Watched::new(&student);
    let teacher = Watched::new(&teacher);

    let steps: usize = golden.meta("num_scales")?;
    let indices = golden.input_integers("indices")?;
    if let Some(index) = indices.iter().find(|&&i| i < 0 || i as usize >= steps) {
        return problem(format!("index {index} is not one of the student's {steps} steps"));
    }
    let rule = weighting(&golden.meta::<String>("weight_schedule")?)?;
    let step = |&i: &i64| grid.halved_step(i as usize, steps);
    let pairs = indices.iter().map(step).map(|[start, _, end]| (start, end));
    let pairs = Pairs::new(pairs, rule, sigma_data);
    let (images, noise) = (golden.input("x_start")?, golden.input("noise")?);
    let cond = labels(golden, "y")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let distance = distance(&golden.meta::<String>("loss_norm")?)?;
    let losses = progressive_loss(&student, &teacher, &grid, &example, &distance, Mode::Eval)?;

    let (loss, point) = (Tolerance::Rel(golden.tolerance("loss rel")?), golden.tolerance("x_t2 abs")?);
    checks.values("t", &pairs.sigma, loss)?;
    points(checks, "x_t", &student, &pairs.sigma, point)?;
    let levels = [0, 1].map(|part| indices.iter().map(|i| step(i)[part]).collect::<Vec<f64>>());
    let calls: Vec<Call> = std::iter::zip(teacher.calls.borrow().iter(), levels)
        .map(|((x, denoised), sigma)| Call { x: x.copy(), sigma, denoised: denoised.copy() })
        .collect();
    teacher_calls(checks, &calls, &pairs.sigma)?;
    results(checks, &student, &losses)
}

/// 04b, kind EDM: OpenAI's loss of diffusion training.
pub fn diffusion(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    let sigma_data = golden.meta("sigma_data")?;
    let file = checks.library.named(&golden.meta::<String>("student")?, checks.path)?;
    let student = denoiser(&file, SigmaRange::EDM, sigma_data)?;
    let rule = weighting(&golden.meta::<String>("weight_schedule")?)?;
    let levels = golden.input_values("sigmas")?;
    let pairs = Pairs::new(levels.into_iter().map(|sigma| (sigma, 0.0)), rule, sigma_data);
    let (images, noise) = (golden.input("x_start")?, golden.input("noise")?);
    let cond = labels(golden, "y")?;
    let example = Example { images: &images, noise: &noise, pairs: &pairs, cond: &cond };
    let losses = denoising_loss(&student, &example, &distance("l2")?, Mode::Eval)?;
    let tolerance = Tolerance::Rel(golden.tolerance("loss rel")?);
    checks.tensor("xs_mse", &losses.distance, tolerance)?;
    checks.tensor("loss", &losses.per_sample, tolerance)?;
    losses.per_sample.mean(None).backward();
    gradients(checks, cm_model::Backbone::params(&student.net), "", tolerance)
}
