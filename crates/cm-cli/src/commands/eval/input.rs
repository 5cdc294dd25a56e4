//! What is judged, and what it is compared with: models, images and statistics, told apart by what they are.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cm_data::{Batch, Dataset, LabelRule, Shape, SourceSpec, Split, arrays, digest, inspect};
use cm_eval::{Measured, Moments};
use tch::{Device, Kind, Tensor};

use crate::args::{EvalArgs, SampleArgs};
use crate::commands::sample;
use crate::config::{PRESETS, Source};
use crate::experiment::Experiment;
use crate::ranks::Ranks;
use crate::runs::CONFIG_FILE;
use crate::ui::{self, Bar};

/// Endings of files of weights.
const WEIGHTS: [&str; 5] = ["safetensors", "pt", "pth", "ckpt", "bin"];
/// Images that are hashed before the bar moves.
const HASHED: usize = 2048;

/// Something that has images, or statistics of images.
pub enum Input {
    /// A model, and how it is sampled.
    Model(Box<SampleArgs>),
    /// Images.
    Set(Arc<dyn Dataset>),
    /// Statistics that were stored in this file.
    Statistics(PathBuf),
}

/// Stored statistics.
pub struct Statistics {
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub measured: Measured,
    /// The SHA-256 of the weights that they were measured with, if the file says so.
    pub weights: Option<String>,
}

/// The name of a source without a part of it, and the part: `digits-ct:test`.
pub fn part_of(text: &str) -> (&str, Option<Split>) {
    let parts = [Split::Train, Split::Test, Split::All];
    let named = |split: &Split| Some((text.strip_suffix(split.name())?.strip_suffix(':')?, Some(*split)));
    parts.iter().find_map(named).unwrap_or((text, None))
}

impl Input {
    /// Opens what the words of the command mean.
    pub fn open(text: &str, args: &EvalArgs) -> Result<Self> {
        let (name, part) = part_of(text);
        let path = Path::new(name);
        if is_model(path) {
            if part.is_some() {
                bail!("{text}: a model has no part; leave it out");
            }
            return Ok(Self::Model(Box::new(sampling(name, args)?)));
        }
        if path.is_file() && has_statistics(path) {
            return Ok(Self::Statistics(path.to_owned()));
        }
        let preset = PRESETS.iter().any(|(preset, _)| *preset == name);
        let mut spec = match path.extension().is_some_and(|e| e == "toml") || (preset && !path.exists()) {
            true => data_of(name)?,
            false => at_path(path)?,
        };
        spec.split = part.unwrap_or(spec.split);
        Ok(Self::Set(spec.open().with_context(|| text.to_owned())?))
    }

    /// The training data of a run, where `text` is the folder of one.
    pub fn data_of_run(text: &str) -> Result<Option<Self>> {
        let config = Path::new(text).join(CONFIG_FILE);
        if !config.is_file() {
            return Ok(None);
        }
        let spec = data_of(&config.display().to_string())?;
        Ok(Some(Self::Set(spec.open().with_context(|| config.display().to_string())?)))
    }

    /// The images, where there are some that lie on the disk.
    pub fn set(&self) -> Option<&Arc<dyn Dataset>> {
        match self {
            Self::Set(set) => Some(set),
            Self::Model(_) | Self::Statistics(_) => None,
        }
    }

    /// What it is, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Model(args) => args.model.display().to_string(),
            Self::Set(set) => set.source().to_owned(),
            Self::Statistics(path) => format!("statistics {}", path.display()),
        }
    }
}

/// Whether a path leads to weights: a file with their ending, a run, a checkpoint, or a folder of diffusers.
fn is_model(path: &Path) -> bool {
    if path.is_dir() {
        return path.join("checkpoints").is_dir()
            || path.join(cm_train::STATE_FILE).is_file()
            || cm_net::import::is_diffusers_folder(path);
    }
    path.extension().and_then(|e| e.to_str()).is_some_and(|e| WEIGHTS.contains(&e))
}

fn has_statistics(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "npz")
        && arrays::names(path).is_ok_and(|names| names.iter().any(|name| name == "mu"))
}

/// The data of an experiment, with its labels even if the experiment does without: a classifier learns from them.
fn data_of(config: &str) -> Result<SourceSpec> {
    let mut spec = Experiment::read(&Source::find(config)?, &[])?.data;
    if spec.labels == LabelRule::None {
        spec.labels = LabelRule::Auto;
    }
    Ok(spec)
}

fn at_path(path: &Path) -> Result<SourceSpec> {
    let kind = inspect::detect(path)?;
    let bundled = matches!(kind, cm_data::SourceKind::Digits | cm_data::SourceKind::Emoji);
    Ok(SourceSpec::new(kind, (!bundled).then(|| path.to_owned())))
}

/// Options of `cm sample` that decide where images go, of which there are none here.
const OUTPUTS: [&str; 2] = ["--out", "--subdirs"];

/// `--sample` read as the options of `cm sample`.
pub fn sampling(model: &str, args: &EvalArgs) -> Result<SampleArgs> {
    let words = args.sample.as_deref().unwrap_or_default();
    let given = || words.split_whitespace();
    if let Some(word) = given().find(|w| OUTPUTS.iter().any(|o| w.starts_with(o))) {
        bail!("--sample '{words}': {word} changes nothing here, where images are measured and not kept");
    }
    let own = [
        ("--seeds", "give --seeds to cm eval"),
        ("--batch", "give --batch to cm eval"),
        ("--device", "give --device to cm eval"),
    ];
    if let Some((word, instead)) = own.iter().find(|(o, _)| given().any(|w| w.starts_with(o))) {
        bail!("--sample '{words}': {word} is an option of its own here; {instead}");
    }
    let mut sampling = parse_sampling(model, words)?;
    (sampling.batch, sampling.device) = (args.batch, args.device);
    Ok(sampling)
}

/// Options of `cm sample` for a model, as one would type them.
pub fn parse_sampling(model: &str, words: &str) -> Result<SampleArgs> {
    #[derive(Parser)]
    #[command(name = "--sample", disable_help_flag = true)]
    struct Words {
        #[command(flatten)]
        args: SampleArgs,
    }
    let parsed = Words::try_parse_from(["--sample", model].into_iter().chain(words.split_whitespace()));
    let parsed = parsed.map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        anyhow::anyhow!("--sample '{words}': {first}")
    })?;
    Ok(parsed.args)
}

/// Hands this rank's share of the images of a set or of a model on in batches `[B, C, H, W]` in [-1, 1], as they are once
/// stored as bytes.
pub fn each_batch(
    input: &Input,
    batch: usize,
    ranks: &Ranks,
    sink: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<()> {
    match input {
        Input::Set(set) => {
            let indices: Vec<u32> = (0..set.len() as u32).collect();
            for part in ranks.share(&indices, batch).chunks(batch) {
                sink(&Batch::gather(&**set, part.iter().copied())?.to_images(Device::Cpu)?)?;
            }
            Ok(())
        }
        Input::Model(args) => sample::each_batch(args, ranks, &mut |images| sink(&as_stored(images)?)),
        Input::Statistics(path) => bail!("{}: statistics hold no images", path.display()),
    }
}

/// Samples `[B, C, H, W]` as they are once stored as bytes, on the CPU.
pub fn as_stored(images: &Tensor) -> Result<Tensor> {
    let bytes = cm_data::batch::from_tensor(images)?;
    Ok(cm_data::batch::to_tensor(&bytes, crate::pictures::shape_of(images), Device::Cpu)?)
}

/// The digest of a set, with a bar where that takes long.
pub fn digest_of(set: &dyn Dataset) -> Result<String> {
    let mut bar = (set.len() > HASHED && !set.is_resident() && !ui::is_quiet())
        .then(|| Bar::new("reading", "images", 0, set.len() as u64));
    let digest = digest::of_set(set, &mut |done| {
        if let Some(bar) = &mut bar {
            bar.set(done as u64, String::new());
        }
    });
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(digest?)
}

impl Statistics {
    /// Reads an archive with `mu` and `sigma`, and what may stand beside them: `mu_s` and `sigma_s` of spatial features,
    /// `count`, and `weights`, the digest of the network's weights.
    pub fn read(path: &Path) -> Result<Self> {
        let mut found = arrays::read(path, &["mu", "sigma", "mu_s", "sigma_s", "count", "weights"])?;
        let place = path.display();
        let count = match found.get("count").map(|count| count.values.as_slice()) {
            None => None,
            Some(&[count]) if count >= 2.0 && count.fract() == 0.0 => Some(count as u64),
            Some(other) => bail!("{place}: count: expected one whole number of at least 2, got {other:?}"),
        };
        let mut moments = |mu: &str, sigma: &str| -> Result<Option<Moments>> {
            let (mean, covariance) = match (found.remove(mu), found.remove(sigma)) {
                (None, None) => return Ok(None),
                (Some(mean), Some(covariance)) => (tensor(&mean)?, tensor(&covariance)?),
                _ => bail!("{place}: expected both {mu} and {sigma}, found one of them"),
            };
            let moments = Moments::from_parts(&mean, &covariance, count);
            Ok(Some(moments.with_context(|| format!("{place}: {mu} and {sigma}"))?))
        };
        let (of_features, spatial) = (moments("mu", "sigma")?, moments("mu_s", "sigma_s")?);
        let weights = found
            .get("weights")
            .map(|bytes| bytes.values.iter().map(|byte| format!("{:02x}", *byte as u8)).collect::<String>());
        let measured = Measured { count, moments: of_features, spatial, ..Measured::default() };
        Ok(Self { path: path.to_owned(), measured, weights })
    }

    /// Writes what [`Statistics::read`] reads.
    pub fn write(path: &Path, measured: &Measured, weights: &str) -> Result<()> {
        let mut all = Vec::new();
        for (moments, [mu, sigma]) in
            [(&measured.moments, ["mu", "sigma"]), (&measured.spatial, ["mu_s", "sigma_s"])]
        {
            if let Some(moments) = moments {
                all.extend([(mu, array(moments.mean())?), (sigma, array(moments.covariance())?)]);
            }
        }
        if let Some(count) = measured.count {
            all.push(("count", arrays::Array { shape: vec![], values: vec![count as f64] }));
        }
        let byte = |at: usize| weights.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        let bytes = (0..weights.len()).step_by(2).filter_map(byte).map(f64::from).collect();
        all.push(("weights", arrays::Array::list(bytes)));
        let all: Vec<_> = all.iter().map(|(name, array)| (*name, array)).collect();
        Ok(arrays::save(path, &all)?)
    }
}

fn tensor(array: &arrays::Array) -> Result<Tensor> {
    let shape: Vec<i64> = array.shape.iter().map(|&n| n as i64).collect();
    Ok(Tensor::f_from_slice(&array.values)?.f_view(shape.as_slice())?)
}

fn array(tensor: &Tensor) -> Result<arrays::Array> {
    let shape = tensor.size().iter().map(|&n| n as usize).collect();
    let values = Vec::<f64>::try_from(tensor.to_kind(Kind::Double).f_reshape([-1])?)?;
    Ok(arrays::Array { shape, values })
}

/// The shape of a set's images, for messages and for networks.
pub fn dims(shape: Shape) -> [i64; 3] {
    [shape.channels as i64, shape.height as i64, shape.width as i64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_stands_behind_a_colon() {
        assert_eq!(part_of("digits-ct:test"), ("digits-ct", Some(Split::Test)));
        assert_eq!(part_of("/data/cifar"), ("/data/cifar", None));
        assert_eq!(part_of("a:b:all"), ("a:b", Some(Split::All)));
        assert_eq!(part_of("latest"), ("latest", None));
    }

    #[test]
    fn statistics_are_written_and_read_with_their_weights() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stats.npz");
        let x = Tensor::from_slice(&[0.0, 1.0, 4.0, 2.0, 2.0, 7.0]).view([3, 2]);
        let moments = Some(Moments::of(&x).unwrap());
        let measured = Measured { count: Some(3), moments, ..Measured::default() };
        Statistics::write(&path, &measured, "00ff10").unwrap();
        let read = Statistics::read(&path).unwrap();
        assert_eq!((read.weights.as_deref(), read.measured.count), (Some("00ff10"), Some(3)));
        let (a, b) = (measured.moments.unwrap(), read.measured.moments.unwrap());
        assert!(a.mean().equal(b.mean()) && a.covariance().equal(b.covariance()));
    }
}
