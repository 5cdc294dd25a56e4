use std::ops::Range;
use std::rc::Rc;

use cm_model::{Cond, Denoiser, Mode, NoiseSource, Philox, Site};
use cm_schedule::rng::Purpose;
use cm_schedule::{EmaRule, KarrasGrid};
use cm_torch::dist::ProcessGroup;
use cm_torch::fused::note_change;
use cm_torch::optim::{EmaTarget, Optimizer, StepOptions, ema_update};
use cm_torch::recompute;
use cm_torch::rng::Rows;
use tch::{Device, Kind, Tensor};

use crate::networks;
use crate::recipe::{Levels, Place, Schedule};
use crate::shards::{Shard, copies, owned};
use crate::{
    Distance, Error, Example, Losses, Method, Networks, Result, Target, Teacher, TrainSpec, Trainable,
    consistency_loss, denoising_loss, distillation_loss, ema_name, progressive_loss,
};

/// Images with what they are conditioned on.
#[derive(Debug)]
pub struct Batch {
    /// `[B, C, H, W]` float32 in [-1, 1], on any device.
    pub images: Tensor,
    /// Labels and augmentation of each image, on the device of the network.
    pub cond: Cond,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Steps taken, this one included.
    pub step: u64,
    /// Images seen, those of this step included.
    pub images: u64,
    /// Mean loss of the batch.
    pub loss: f64,
    /// Mean distance between student and target, before weighting.
    pub distance: f64,
    /// Norm of the gradient over all weights, before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// N(k), where noise levels come from a grid.
    pub num_scales: Option<usize>,
    /// The stage of the t → r mapping, where they are continuous.
    pub stage: Option<usize>,
    /// μ(k), where there is a target network.
    pub mu: Option<f64>,
    /// Noise level and loss of each image.
    pub samples: Vec<SampleLoss>,
}

/// The loss of one image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleLoss {
    /// Its noise level.
    pub sigma: f64,
    /// Its weighted loss.
    pub loss: f64,
}

/// One average of the weights.
#[derive(Debug)]
pub(crate) struct Ema {
    pub(crate) name: String,
    pub(crate) rule: EmaRule,
    /// One tensor for each trained weight, in the order of [`Trainer::weights`]; of a share, one for each piece of it.
    pub(crate) tensors: Vec<Tensor>,
}

/// A training run between two steps: the student, the target network and the teacher if the recipe has them, the
/// averages, the optimiser and the position in the run.
///
/// Nothing else is state: noise, noise levels and dropout of a step are functions of the seed and the step, so that
/// a trainer restored from these continues bit for bit (on the CPU, with one libtorch and one thread count).
pub struct Trainer<M> {
    pub(crate) student: M,
    pub(crate) target: Option<M>,
    teacher: Option<Box<dyn Denoiser>>,
    pub(crate) weights: Vec<(String, Tensor)>,
    target_weights: Vec<Tensor>,
    pub(crate) emas: Vec<Ema>,
    pub(crate) optimizer: Optimizer,
    spec: TrainSpec,
    levels: Levels,
    distance: Distance,
    pub(crate) step: u64,
    pub(crate) images: u64,
    /// The other processes that train with this one, where there are some; see [`Trainer::join`].
    pub(crate) group: Option<Rc<ProcessGroup>>,
    /// This rank's share of averages and moments, where they are shared out.
    pub(crate) shard: Option<Shard>,
    /// Whether there are averages and moments. Where they are to be shared out they come last, so that a rank
    /// never makes more than its share; until then, averages are handles on the weights.
    pub(crate) has_state: bool,
}

impl<M: Trainable> Trainer<M> {
    /// A run before its first step. The averages, and the target network's weights, start as copies of the student's.
    ///
    /// # Errors
    /// [`Error::Setting`] and [`Error::MissingWeights`] for settings that cannot be used or do not go with the
    /// networks, [`Error::Model`] if the target's architecture is not the student's.
    pub fn new(networks: Networks<M>, spec: &TrainSpec, levels: Levels) -> Result<Self> {
        networks.check(spec)?;
        let Networks { student, target, teacher, perceptual } = networks;
        let distance = spec.check_with(student.shape(), perceptual)?;
        if let Some(target) = &target {
            target.params().copy_from(student.params())?;
            target.params().set_requires_grad(false);
        }
        let handles = |model: &M| -> Vec<(String, Tensor)> {
            model.params().trainable().map(|(name, t)| (name.to_owned(), t.shallow_clone())).collect()
        };
        let weights = handles(&student);
        let has_state = !spec.shard_state;
        let start = || match has_state {
            true => copies(&weights),
            false => weights.iter().map(|(_, weight)| weight.detach()).collect(),
        };
        let ema = |rule| Ema { name: ema_name(rule), rule: *rule, tensors: start() };
        let moved = if has_state { named(&weights) } else { Vec::new() };
        Ok(Self {
            emas: spec.emas.iter().map(ema).collect(),
            optimizer: Optimizer::new(spec.optimizer, &moved)?,
            target_weights: target.iter().flat_map(handles).map(|(_, weight)| weight).collect(),
            weights,
            student,
            target,
            teacher,
            spec: spec.clone(),
            levels,
            distance,
            step: 0,
            images: 0,
            group: None,
            shard: None,
            has_state,
        })
    }

    /// The network that is trained.
    pub fn student(&self) -> &M {
        &self.student
    }

    /// The target network, where the recipe has one.
    pub fn target(&self) -> Option<&M> {
        self.target.as_ref()
    }

    /// The settings.
    pub fn spec(&self) -> &TrainSpec {
        &self.spec
    }

    /// Steps taken.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Images seen.
    pub fn images_seen(&self) -> u64 {
        self.images
    }

    /// Whether the run has reached its last step.
    pub fn is_finished(&self) -> bool {
        self.step >= self.spec.total_steps
    }

    /// The names of the averages, in the order of the settings; see [`ema_name`].
    pub fn ema_names(&self) -> impl Iterator<Item = &str> {
        self.emas.iter().map(|ema| ema.name.as_str())
    }

    /// The device of the weights.
    pub fn device(&self) -> Device {
        self.student.params().device()
    }

    /// Lends the student with the weights of one average in place of its own. Nothing is copied, and the student has
    /// its own weights back afterwards, also after a panic.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such average; [`Error::Input`] if it is shared out among ranks, and
    /// [`Trainer::gather_averages`] has not put it together here.
    pub fn with_ema<T>(&self, name: &str, use_model: impl FnOnce(&M) -> T) -> Result<T> {
        let index = self.emas.iter().position(|ema| ema.name == name).ok_or_else(|| {
            let names: Vec<_> = self.ema_names().collect();
            Error::setting("ema", name, names.join(" or "), "these are the averages that the run keeps")
        })?;
        let tensors = self.whole_average(index).ok_or_else(|| Error::Input {
            what: "weight average",
            expected: "Trainer::gather_averages on all ranks first".to_owned(),
            got: format!("a share of {name}"),
        })?;
        let _borrowed = Borrowed::new(&self.weights, tensors);
        Ok(use_model(&self.student))
    }

    /// Takes one step on a batch, or on this rank's [`rows`](Trainer::rows) of one: of Algorithm 2 or 3 (Song et al.
    /// 2023), or of whatever the recipe says.
    ///
    /// Where a stage of progressive distillation begins, the student first becomes the teacher.
    ///
    /// The step waits for the device once, for the norm of the gradient and the losses: whether they are finite has
    /// to be known before the weights move.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if the loss or a gradient is not finite: weights, averages and moments are then as they
    /// were. [`Error::Input`] if the batch does not fit. Where several processes train, [`cm_torch::Error::Rank`] for
    /// another one that ended; there are no further steps then.
    pub fn step(&mut self, batch: &Batch) -> Result<StepReport> {
        let result = self.try_step(batch);
        if result.is_err() {
            self.drop_gradients();
        }
        result
    }

    fn try_step(&mut self, batch: &Batch) -> Result<StepReport> {
        // Those that were put together would be old.
        self.drop_averages();
        self.make_state()?;
        let place = Place { seed: self.spec.seed, step: self.step, total_steps: self.spec.total_steps };
        let stage = self.spec.recipe().stage(place.step, place.total_steps);
        if stage.as_ref().is_some_and(|stage| stage.start == self.step) && self.step > 0 {
            self.begin_stage()?;
        }
        let schedule = self.spec.recipe().schedule(place.step, place.total_steps);
        let samples = self.gradients(batch, &place)?;
        self.reduce_gradients()?;
        let samples = self.gather(samples)?;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / samples.len() as f64;
        let loss = mean(&mut samples.iter().map(|s| s.0.loss));
        let grad_norm = self.check_finite(loss, batch)?;
        // Each stage is a training of its own, to the learning rate and the averages too.
        let span = stage.unwrap_or(0..self.spec.total_steps);
        let (at, length) = (self.step - span.start, span.end - span.start);
        let seen = self.images.saturating_sub(span.start * self.spec.batch as u64);
        let lr = self.spec.lr * self.spec.lr_rule.factor(at, seen, length);
        self.update(&schedule, lr, grad_norm, seen)?;
        self.step += 1;
        self.images += samples.len() as u64;
        self.compare_when_due()?;
        Ok(StepReport {
            step: self.step,
            images: self.images,
            loss,
            distance: mean(&mut samples.iter().map(|s| s.1)),
            grad_norm,
            lr,
            num_scales: schedule.num_scales,
            stage: schedule.stage,
            mu: schedule.mu,
            samples: samples.into_iter().map(|s| s.0).collect(),
        })
    }

    /// Salimans and Ho 2022, Algorithm 2, last lines: the student becomes the next teacher, and training begins anew
    /// from its weights.
    fn begin_stage(&mut self) -> Result<()> {
        if let Some(target) = &self.target {
            target.params().copy_from(self.student.params())?;
        }
        let _no_grad = tch::no_grad_guard();
        let own = owned(self.shard.as_ref(), &self.weights);
        for ema in &self.emas {
            for (average, (_, weight)) in ema.tensors.iter().zip(own) {
                average.shallow_clone().copy_(weight);
            }
        }
        self.optimizer = Optimizer::new(self.spec.optimizer, &named(own))?;
        Ok(())
    }

    /// Runs every micro-batch forward and backward; the weights then hold what this rank's rows contribute to the
    /// gradient of the batch's mean loss. Returns loss and distance of each image.
    fn gradients(&self, batch: &Batch, place: &Place) -> Result<Vec<(SampleLoss, f64)>> {
        let (rows, size) = (self.rows(), self.student.shape().check("training batch", &batch.images)?);
        if size != rows.len() as i64 {
            let expected = match &self.group {
                None => format!("{} images, as train.batch says", rows.len()),
                Some(group) => format!("{} images, the share of rank {}", rows.len(), group.rank()),
            };
            return Err(Error::Input { what: "training batch", expected, got: format!("{size} images") });
        }
        let images = batch.images.to_device_(self.device(), Kind::Float, true, false);
        let mut results = Vec::new();
        let mut sigmas = Vec::new();
        let part_size = self.spec.micro_batch();
        let mut start = rows.start;
        while start < rows.end {
            // Parts are those of the whole batch, of which a rank may have a piece.
            let part = start / part_size;
            let whole = part * part_size..((part + 1) * part_size).min(self.spec.batch);
            let piece = start..whole.end.min(rows.end);
            start = piece.end;
            let (losses, sigma) = {
                let _rows = Rows::enter(whole.len() as i64, (piece.start - whole.start) as i64);
                let offset = (piece.start - rows.start) as i64;
                let images = images.narrow(0, offset, piece.len() as i64);
                let cond = batch.cond.narrow(offset, piece.len() as i64);
                self.part_losses(&images, &cond, place, part as u64, piece)?
            };
            recompute::backward(&(losses.per_sample.sum(Kind::Float) / self.spec.batch as f64))?;
            results.push(Tensor::stack(&[losses.per_sample.detach(), losses.distance], 1));
            sigmas.extend(sigma);
        }
        let results = Vec::<f64>::try_from(Tensor::cat(&results, 0).to_kind(Kind::Double).view([-1]))?;
        let pairs = results.chunks_exact(2).zip(sigmas);
        Ok(pairs.map(|(result, sigma)| (SampleLoss { sigma, loss: result[0] }, result[1])).collect())
    }

    /// The losses of the images at `positions` of the batch.
    fn part_losses(
        &self,
        images: &Tensor,
        cond: &Cond,
        place: &Place,
        part: u64,
        positions: Range<usize>,
    ) -> Result<(Losses, Vec<f64>)> {
        let positions = positions.start as u64..positions.end as u64;
        let pairs = self.spec.recipe().pairs(place, positions.clone(), &self.levels)?;
        let site = Site {
            samples: &positions.collect::<Vec<_>>(),
            step: place.step as u32,
            purpose: Purpose::Noise,
        };
        let noise =
            Philox { seed: place.seed, device: images.device() }.normal(self.student.shape(), &site)?;
        let example = Example { images, noise: &noise, pairs: &pairs, cond };
        let mode = Mode::Train { dropout_seed: place.stream(Purpose::Dropout, part).bits(0) };
        let losses = self.loss(&example, mode)?;
        Ok((losses, pairs.sigma))
    }

    /// The loss of the recipe's method.
    fn loss(&self, example: &Example<'_>, mode: Mode) -> Result<Losses> {
        let (student, distance): (&dyn Trainable, _) = (&self.student, &self.distance);
        let target = self.target.as_ref().map_or(Target::Live, |network| Target::Network(network));
        match (self.spec.recipe().method(), &self.teacher, &self.target) {
            (Method::Denoising, ..) => denoising_loss(student, example, distance, mode),
            (Method::Consistency, ..) => consistency_loss(student, target, example, distance, mode),
            (Method::Distillation(rule), Some(denoiser), _) => {
                let teacher = Teacher { denoiser: &**denoiser, rule };
                distillation_loss(student, target, teacher, example, distance, mode)
            }
            (Method::Progressive { rho }, _, Some(teacher)) => {
                let grid = KarrasGrid::new(self.levels.range, rho)?;
                progressive_loss(student, teacher, &grid, example, distance, mode)
            }
            // `Networks::check` has seen to it that they are there.
            (Method::Distillation(_), None, _) => Err(networks::no_teacher()),
            (Method::Progressive { .. }, _, None) => Err(networks::no_target(&self.spec)),
        }
    }

    /// Gradients of a step that was not taken must not be added to those of the next.
    fn drop_gradients(&self) {
        for (_, weight) in &self.weights {
            let mut grad = weight.grad();
            if grad.defined() {
                let _ = grad.zero_();
            }
        }
    }

    /// Moves the weights, then the averages and the target, in one pass over memory on the CPU.
    fn update(&mut self, schedule: &Schedule, lr: f64, grad_norm: f64, seen: u64) -> Result<()> {
        let clip = self.spec.grad_clip.filter(|&most| grad_norm.is_finite() && grad_norm > most);
        let options = StepOptions {
            grad_scale: clip.map_or(1.0, |most| most / grad_norm),
            replace_non_finite: self.spec.replace_non_finite,
            ..StepOptions::new(lr)
        };
        let batch = self.spec.batch as u64;
        let mut averages: Vec<EmaTarget<'_>> = self
            .emas
            .iter()
            .map(|ema| EmaTarget { beta: ema.rule.beta(seen, batch), tensors: &ema.tensors })
            .collect();
        // Algorithm 3, last lines: θ⁻ follows the θ that this step made.
        let target = schedule.mu.map(|mu| EmaTarget { beta: mu, tensors: &self.target_weights });
        let Some(shard) = &self.shard else {
            averages.extend(target);
            self.optimizer.step(&options, &named(&self.weights), &averages)?;
            return Ok(());
        };
        shard.take_gradients(&self.weights)?;
        self.optimizer.step(&options, &named(&shard.pieces), &averages)?;
        shard.share_weights(self.step + 1)?;
        // Every rank evaluates the target, and so holds all of it.
        Ok(ema_update(&named(&self.weights), target.as_slice())?)
    }
}

impl<M> std::fmt::Debug for Trainer<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer").field("step", &self.step).field("spec", &self.spec).finish_non_exhaustive()
    }
}

/// Handles on tensors with their names, as the optimiser takes them.
pub(crate) fn named(weights: &[(String, Tensor)]) -> Vec<(&str, &Tensor)> {
    weights.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect()
}

/// Weights that point at other values until this is dropped.
pub(crate) struct Borrowed<'a> {
    weights: &'a [(String, Tensor)],
    own: Vec<Tensor>,
}

impl<'a> Borrowed<'a> {
    pub(crate) fn new(weights: &'a [(String, Tensor)], values: &[Tensor]) -> Self {
        let _no_grad = tch::no_grad_guard();
        // A detached tensor is a handle of its own on the same memory, which `set_data` does not move.
        let own = weights.iter().map(|(_, weight)| weight.detach()).collect();
        for ((_, weight), value) in weights.iter().zip(values) {
            lend(weight, value);
        }
        Self { weights, own }
    }
}

/// Puts a weight on other memory, whose numbers nobody has followed.
fn lend(weight: &Tensor, memory: &Tensor) {
    weight.shallow_clone().set_data(memory);
    note_change(weight);
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let _no_grad = tch::no_grad_guard();
        for ((_, weight), own) in self.weights.iter().zip(&self.own) {
            lend(weight, own);
        }
    }
}
