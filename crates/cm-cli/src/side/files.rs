//! The files that all sides of a race read: weights, batches with their noise and levels, reference samples, pictures,
//! features, and what each row is made of as JSON.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use cm_data::{SourceKind, SourceSpec, grid};
use cm_eval::Moments;
use cm_model::{Bundle, Compute, NoiseSource, Params, Philox, Site, TensorMap};
use cm_net::{ModelFile, ModelSpec, PrecondSpec, Role};
use cm_schedule::rng::{Purpose, name_id};
use cm_torch::philox::{self, NormalSpec};
use cm_train::{Distance, Place};
use serde_json::{Value, json};
use tch::{Device, Kind as Dtype, Tensor};

use super::sample::SampleRow;
use super::work::{ADM, Kind, Work, kind, teacher, weights};
use crate::args::RaceSize;
use crate::experiment::Experiment;
use crate::net::HEUN_LEVELS;

/// The folder of diffusers that holds the same model.
const DIFFUSERS: &str = "adm-diffusers";
/// Pictures of the data path, and images of which statistics are taken.
const IMAGES: usize = 2_000;

/// Writes what the rows need.
pub fn write(work: &Work, rows: &[String]) -> Result<()> {
    std::fs::create_dir_all(&work.folder).with_context(|| work.folder.display().to_string())?;
    let mut training: Vec<&str> = Vec::new();
    for row in rows {
        training.extend(match kind(row)? {
            Kind::Train => Some(row.as_str()),
            Kind::Sample | Kind::Update | Kind::Checkpoint => Some(source(row)),
            Kind::Data | Kind::Fid => None,
        });
    }
    training.sort_unstable();
    training.dedup();
    for row in training {
        write_training(work, row).with_context(|| format!("files of {row}"))?;
    }
    for row in rows {
        match kind(row)? {
            Kind::Sample => write_sampling(work, row),
            Kind::Data => write_pictures(work, row),
            Kind::Fid => write_features(work, row),
            _ => Ok(()),
        }
        .with_context(|| format!("files of {row}"))?;
    }
    Ok(())
}

/// The training row whose network a row works with.
pub fn source(row: &str) -> &'static str {
    match row.split_once('-') {
        Some(("heun", _)) => "edm",
        Some(("adm", _)) => ADM,
        _ => "ct",
    }
}

fn write_training(work: &Work, row: &str) -> Result<()> {
    let experiment = work.experiment(row)?;
    write_weights(work, &weights(row), &experiment, experiment.model_spec(), 1)?;
    let distils = experiment.train.teacher.is_some();
    if distils {
        let spec = ModelSpec::new(Role::Denoiser, experiment.network.clone(), experiment.precond);
        write_weights(work, &teacher(row), &experiment, spec, 2)?;
    }
    let train = &experiment.train;
    let place = Place { seed: train.seed, step: 0, total_steps: train.total_steps };
    let positions = 0..train.batch as u64;
    let pairs = train.recipe().pairs(&place, positions.clone(), &experiment.levels()?)?;
    let samples: Vec<u64> = positions.collect();
    let shape = experiment.network.image_shape();
    let normal = |purpose| {
        let site = Site { samples: &samples, step: 0, purpose };
        Philox { seed: train.seed, device: Device::Cpu }.normal(shape, &site)
    };
    let tensors = TensorMap::from([
        ("images".to_owned(), (normal(Purpose::Synthetic)? * 0.5).clamp(-1.0, 1.0)),
        ("noise".to_owned(), normal(Purpose::Noise)?),
        ("sigma".to_owned(), Tensor::from_slice(&pairs.sigma)),
        ("next".to_owned(), Tensor::from_slice(&pairs.next)),
        ("weight".to_owned(), Tensor::from_slice(&pairs.weight)),
    ]);
    bundle(work, row, tensors)?;
    let mut about = describe(&experiment, row);
    about["teacher"] = json!(distils.then(|| teacher(row)));
    describe_training(&mut about, &experiment)?;
    json_file(&work.file(&format!("{row}.json")), &about)
}

/// What every row says of its network.
fn describe(experiment: &Experiment, row: &str) -> Value {
    json!({
        "network": experiment.network,
        "precond": experiment.precond,
        "consistency": !experiment.train.recipe().method().trains_denoiser(),
        "weights": weights(row),
        "batch": experiment.train.batch,
    })
}

fn describe_training(about: &mut Value, experiment: &Experiment) -> Result<()> {
    let train = &experiment.train;
    let schedule = train.recipe().schedule(0, train.total_steps);
    let c = match train.metric.build(experiment.network.image_shape())? {
        Distance::PseudoHuber { c } => Some(c),
        _ => None,
    };
    about["recipe"] = json!({ "pairs": train.pairs, "weighting": train.weighting });
    about["metric"] = json!({ "kind": train.metric.name(), "c": c });
    about["optimizer"] = json!(train.optimizer);
    about["lr"] = json!(train.lr);
    let betas: Vec<f64> = train.emas.iter().map(|rule| rule.beta(0, train.batch as u64)).collect();
    about["emas"] = json!(betas);
    about["mu"] = json!(schedule.mu);
    about["num_scales"] = json!(schedule.num_scales);
    about["stage"] = json!(schedule.stage);
    about["replace_non_finite"] = json!(train.replace_non_finite.is_some());
    Ok(())
}

/// Random weights of which every one matters: those that training starts at or near 0 get the size of the others, and
/// biases a size at all.
fn write_weights(work: &Work, name: &str, experiment: &Experiment, spec: ModelSpec, seed: u64) -> Result<()> {
    let net = cm_net::build(&experiment.network, seed, Device::Cpu)?;
    enlarge(net.params(), seed)?;
    Ok(cm_net::save_model(&work.file(name), net.params(), &spec)?)
}

/// What SongUNet multiplies the last layers of residual branches with at the start.
const SMALL_START: f64 = 1e-5;

fn enlarge(params: &Params, seed: u64) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    for (name, tensor) in params.trainable() {
        let mut tensor = tensor.shallow_clone();
        if ["conv1.weight", "proj.weight", "aux_conv.weight"].iter().any(|end| name.ends_with(end)) {
            let _ = tensor.divide_scalar_(SMALL_START);
        }
        let is_zero = tensor.abs().max().double_value(&[]) == 0.0;
        if tensor.dim() == 1 || is_zero {
            let (size, per_sample, samples) = (tensor.size(), tensor.numel(), [name_id(name)]);
            let spec = NormalSpec { seed, purpose: Purpose::Init, step: 1, samples: &samples, per_sample };
            let fan_in = (per_sample as i64 / size[0].max(1)) as f64;
            let scale = if tensor.dim() == 1 { 0.05 } else { 1.0 / fan_in.sqrt() };
            tensor += philox::normals(&spec, Device::Cpu)?.view(size.as_slice()) * scale;
        }
    }
    Ok(())
}

fn write_sampling(work: &Work, row: &str) -> Result<()> {
    let experiment = work.experiment(source(row))?;
    let mut about = describe(&experiment, source(row));
    let batch: usize = match row.split_once('-') {
        Some(("sample" | "adm", count)) => count.parse().with_context(|| format!("{row}: NAME-COUNT"))?,
        _ if work.size == RaceSize::Tiny => 64,
        _ => 2,
    };
    about["batch"] = json!(batch);
    about["levels"] = json!(HEUN_LEVELS);
    if source(row) == ADM {
        about["diffusers"] = json!(DIFFUSERS);
    }
    json_file(&work.file(&format!("{row}.json")), &about)?;
    let samples: Vec<u64> = (0..batch as u64).collect();
    let site = Site { samples: &samples, step: 0, purpose: Purpose::Synthetic };
    let noise = Philox { seed: 1, device: Device::Cpu }.normal(experiment.network.image_shape(), &site)?;
    let file = ModelFile::read(&work.file(&weights(source(row))))?;
    let plain = Compute::default();
    let model = file.model(work.device, plain)?;
    if source(row) == ADM {
        let folder = work.file(DIFFUSERS);
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        cm_net::import::export_diffusers(&file, &folder)?;
    }
    let precond: PrecondSpec = experiment.precond;
    let images = SampleRow::images_of(&model, &precond, &noise)?.to_device(Device::Cpu);
    let tensors = TensorMap::from([("noise".to_owned(), noise), ("images".to_owned(), images)]);
    bundle(work, row, tensors)
}

fn write_pictures(work: &Work, row: &str) -> Result<()> {
    let (source, batch) = match work.size {
        RaceSize::Tiny => (SourceKind::Digits, 128),
        RaceSize::Cifar10 | RaceSize::Imagenet64 => (SourceKind::Emoji, 128),
    };
    let set = SourceSpec::new(source, None).open()?;
    let indices = (0..IMAGES).map(|i| (i % set.len()) as u32);
    let pictures = cm_data::Batch::gather(&*set, indices)?;
    let seeds: Vec<u64> = (0..IMAGES as u64).collect();
    grid::save_samples(&work.file("pictures"), &pictures.pixels, pictures.shape, &seeds, false)?;
    json_file(&work.file(&format!("{row}.json")), &json!({ "batch": batch }))
}

/// Features as long as Inception's, or shorter for the tiny size, and the moments that they are held against.
fn write_features(work: &Work, row: &str) -> Result<()> {
    let dim = if work.size == RaceSize::Tiny { 256 } else { 2_048 };
    let normals = |step: u32, count: usize| -> Result<Tensor> {
        let samples: Vec<u64> = (0..count as u64).collect();
        let spec =
            NormalSpec { seed: 0, purpose: Purpose::Synthetic, step, samples: &samples, per_sample: dim };
        // Features of a network are neither negative nor independent.
        Ok((philox::normals(&spec, Device::Cpu)?.view([-1, dim as i64]) + 0.5).relu())
    };
    let real = Moments::of(&normals(1, 2 * IMAGES)?)?;
    let tensors = TensorMap::from([
        ("features".to_owned(), normals(2, IMAGES)?),
        ("mean".to_owned(), real.mean().to_kind(Dtype::Double)),
        ("covariance".to_owned(), real.covariance().to_kind(Dtype::Double)),
    ]);
    bundle(work, row, tensors)?;
    json_file(&work.file(&format!("{row}.json")), &json!({ "dim": dim }))
}

fn bundle(work: &Work, row: &str, tensors: TensorMap) -> Result<()> {
    let bundle = Bundle { tensors, metadata: BTreeMap::new() };
    Ok(bundle.write(&work.file(&format!("{row}.safetensors")))?)
}

fn json_file(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, value.to_string()).with_context(|| path.display().to_string())
}
