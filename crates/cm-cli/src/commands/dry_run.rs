//! `--dry-run`: the real network and one real step on made-up pixels, with what it costs.

use std::rc::Rc;

use anyhow::Result;
use cm_model::{Cond, Mode, NoiseSource, Philox, Sigma, Site};
use cm_schedule::rng::Purpose;
use cm_torch::device;
use cm_train::{
    Batch, Distance, ImageDistance, MemoryModel, Networks, Trainable, Trainer, gigabytes, measure_activations,
};
use tch::{Device, Tensor};

use crate::exit::{OrUsage, Outcome};
use crate::experiment::Experiment;
use crate::lpips;
use crate::net::Net;
use crate::sources::stand_in;

/// A dry run takes at most this share of the memory that is free: the model's sum leaves out scratch memory, and a
/// look at an experiment must not drive a machine into swapping.
const SHARE_OF_FREE: f64 = 2.0 / 3.0;

/// Runs one step of the experiment at micro-batch 1 without its data and prints what was found.
pub fn dry_run(experiment: &Experiment, device: Device) -> Outcome {
    println!("# dry run: made-up pixels, fresh weights; nothing is read or kept");
    print!("{}", experiment.to_toml()?);
    println!();
    let mut small = experiment.clone();
    small.train.batch = 1;
    small.train.micro_batch = None;
    experiment.compute(device).or_usage()?;
    let perceptual = lpips::stand_in(&small.train.metric, small.network.image_shape(), device).or_usage()?;
    if perceptual.is_some() {
        println!(
            "metric            {}, with random weights here: cost is real, the loss is not",
            small.train.metric
        );
    }
    let distance = small.train.check_with(small.network.image_shape(), perceptual.clone()).or_usage()?;
    let student = Net::build(&small, device)?;
    let parameters = student.params().num_parameters();
    println!("parameters        {parameters}");
    let batch = made_up(&student, device)?;
    let mut memory = MemoryModel::new(student.params(), &small.train, student.compute().autocast.is_some());
    let started = std::time::Instant::now();
    memory.activations_per_image =
        Some(measure_activations(device, || forward(&student, &batch, &small, &distance))?);
    println!("forward, 1 image  {:.2} s", started.elapsed().as_secs_f64());
    let need = memory.total().unwrap_or(u64::MAX);
    println!("\nmemory model, micro-batch 1\n{memory}\n");
    let own = experiment.train.micro_batch() as u64;
    if own > 1 {
        let whole = MemoryModel { micro_batch: own, ..memory };
        println!("memory model, micro-batch {own}: {}\n", gigabytes(whole.total().unwrap_or(0)));
    }
    match available(device)? {
        Some(free) if need as f64 > SHARE_OF_FREE * free as f64 => {
            println!(
                "step              not run: {} is more than two thirds of the {} that are free here",
                gigabytes(need),
                gigabytes(free)
            );
            println!("                  (the network was built and ran forward)");
        }
        _ => step(&small, student, &batch, device, perceptual)?,
    }
    Ok(())
}

fn step(
    experiment: &Experiment,
    student: Net,
    batch: &Batch,
    device: Device,
    perceptual: Option<Rc<dyn ImageDistance>>,
) -> Result<()> {
    let another = || Net::build(experiment, device);
    let target = experiment.train.target.has_network().then(another).transpose()?;
    // Fresh weights, like the student's: a dry run asks what a step costs.
    let teacher = experiment.train.teacher.map(|_| stand_in(experiment, device)).transpose()?;
    let networks = Networks { student, target, teacher, perceptual };
    let mut trainer = Trainer::new(networks, &experiment.train, experiment.levels()?)?;
    let started = std::time::Instant::now();
    let report = trainer.step(batch)?;
    println!("step, 1 image     {:.2} s, loss {:.4}", started.elapsed().as_secs_f64(), report.loss);
    println!("measured peak     {}", gigabytes(device::memory(device)?.peak));
    Ok(())
}

/// One made-up image and, for a conditional network, class 0.
fn made_up(student: &Net, device: Device) -> Result<Batch> {
    let shape = Trainable::shape(student);
    let site = Site { samples: &[0], step: 0, purpose: Purpose::Synthetic };
    let images = Philox { seed: 0, device }.normal(shape, &site)?.tanh();
    let cond = Cond::labels(&[0], Trainable::num_classes(student), device)?;
    Ok(Batch { images, cond })
}

/// Network and metric, which keep what their backward pass needs.
fn forward(
    student: &Net,
    batch: &Batch,
    experiment: &Experiment,
    distance: &Distance,
) -> cm_train::Result<Tensor> {
    let sigma = Sigma::One(experiment.precond.sigma_data);
    let mode = Mode::Train { dropout_seed: 0 };
    let estimate = student.evaluate(&batch.images, sigma, &batch.cond, mode)?;
    Ok(distance.between(&estimate, &batch.images))
}

/// Memory that is free where the step would run, as far as the system tells: beside what is already in use.
fn available(device: Device) -> Result<Option<u64>> {
    if device != Device::Cpu {
        return Ok(None);
    }
    let Ok(text) = std::fs::read_to_string("/proc/meminfo") else { return Ok(None) };
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    Ok(match free {
        Some(kilobytes) => Some(kilobytes * 1024 + device::memory(device)?.current),
        None => None,
    })
}
