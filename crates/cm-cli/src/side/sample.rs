//! Sampling rows: one step of a consistency function, and EDM's Heun.

use std::time::Instant;

use anyhow::{Context, Result};
use cm_model::{Bundle, Compute, Recorded};
use cm_net::{Model, ModelFile, PrecondSpec, Role};
use cm_sampler::{Hooks, Method, Request, Solver, sample};
use cm_schedule::solver::Churn;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

use super::Row;
use super::files::source;
use super::train::wait_for;
use super::work::{Work, classes, weights};
use crate::net::HEUN_LEVELS;

pub struct SampleRow {
    model: Model,
    precond: PrecondSpec,
    shared: Bundle,
    batch: u64,
    next_seed: u64,
}

impl SampleRow {
    pub fn new(work: &Work, row: &str) -> Result<Self> {
        let experiment = work.experiment(source(row))?;
        experiment.switch(work.device)?;
        // One image on a GPU takes as long as the host needs to start its operations: `cm sample --cuda-graph`.
        let graph = work.device.is_cuda() && row == "sample-1";
        let compute = Compute { graph, ..work.compute(&experiment)? };
        let file = ModelFile::read(&work.file(&weights(source(row))))?;
        let model = file.model(work.device, compute)?;
        let shared = work.bundle(row)?;
        let batch = shared.tensors.get("noise").context("no noise")?.size()[0] as u64;
        Ok(Self { model, precond: file.spec.precond, shared, batch, next_seed: 0 })
    }

    /// The images that the model makes of `noise`.
    pub fn images_of(model: &Model, precond: &PrecondSpec, noise: &Tensor) -> Result<Tensor> {
        let seeds: Vec<u64> = (0..noise.size()[0] as u64).collect();
        let mut recorded = Recorded::new([noise.to_device(device_of(model))]);
        let hooks = Hooks { noise: Some(&mut recorded), on_evaluation: None };
        draw(model, precond, &seeds, hooks)
    }
}

fn device_of(model: &Model) -> tch::Device {
    match model {
        Model::Denoiser(model) => model.device(),
        Model::Consistency(model) => model.device(),
    }
}

fn draw(model: &Model, precond: &PrecondSpec, seeds: &[u64], hooks: Hooks<'_>) -> Result<Tensor> {
    let levels = precond.grid()?.with_zero(HEUN_LEVELS);
    let method = match model.role() {
        Role::Consistency => Method::one_step(model.consistency()?)?,
        Role::Denoiser => Method::solver(model.denoiser()?, Solver::Heun { churn: Churn::NONE }, &levels)?,
    };
    // As the public samplers: Consistency Models clamps, EDM does not.
    let clip = model.role() == Role::Consistency;
    let num_classes = match model {
        Model::Denoiser(model) => model.num_classes(),
        Model::Consistency(model) => model.num_classes(),
    };
    let labels = classes(seeds.len(), num_classes);
    let request = Request { batch: seeds.len(), clip, labels: labels.as_deref(), ..Request::new(seeds) };
    Ok(sample(&method, &request, hooks)?)
}

impl Row for SampleRow {
    fn check(&mut self) -> Result<Value> {
        let part = |name: &str| self.shared.tensors.get(name).with_context(|| format!("no {name}"));
        let images = Self::images_of(&self.model, &self.precond, part("noise")?)?;
        let reference = part("images")?.to_kind(Kind::Double);
        let gap = images.to_device(tch::Device::Cpu).to_kind(Kind::Double) - &reference;
        let size = |tensor: &Tensor| tensor.square().mean(Kind::Double).sqrt().double_value(&[]);
        Ok(json!({ "distance": size(&gap) / size(&reference) }))
    }

    fn run(&mut self, count: u64) -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..count {
            let seeds: Vec<u64> = (self.next_seed..self.next_seed + self.batch).collect();
            self.next_seed += self.batch;
            let images = draw(&self.model, &self.precond, &seeds, Hooks::default())?;
            wait_for(Some(&images));
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn items(&self) -> u64 {
        self.batch
    }
}
