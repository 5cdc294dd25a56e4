//! The networks that images are compared by.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_data::{Batch, Dataset, digest};
use cm_eval::{Classifier, ClassifierSpec, FeatureNet};
use cm_model::Bundle;
use cm_net::Inception;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::cache::digest_of;
use super::input::dims;
use crate::args::EvalArgs;
use crate::ranks::Ranks;

/// A network, and what to call it.
pub struct Judge {
    /// `inception` or `classifier`.
    pub name: &'static str,
    /// What sees the images.
    pub net: Box<dyn FeatureNet>,
    /// The SHA-256 of its weights.
    pub weights: String,
    /// Where a classifier comes from.
    pub classifier: Option<About>,
}

/// Where a classifier comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The data that it was trained on: SHA-256 of the reference images' own and of their labels.
    pub data: String,
    /// `labels`, or `rotations` for data without any.
    pub task: String,
    /// Images that it was trained on.
    pub train_images: usize,
    /// Share of right answers on every tenth image, which it was not trained on.
    pub accuracy: f64,
    /// Version of the training, which makes other classifiers when it changes.
    pub version: u32,
}

const VERSION: u32 = 1;
/// Most images that a classifier is trained on, every k-th of more.
const MOST_IMAGES: usize = 20_000;
/// Images that it sees in training, over all passes.
const SEEN: usize = 60_000;
/// Longest side of its images.
const MOST_SIDE: usize = 64;
/// Every so many images are held out to say how good it is.
const HELD_OUT: usize = 10;

impl Judge {
    /// Inception, from the file of its weights.
    pub fn inception(file: &Path, device: Device) -> Result<Self> {
        if !file.is_file() {
            bail!(
                "{}: no weights of Inception; fetch them with `cm fetch inception`, or where there is no network make them of \
                 pt_inception-2015-12-05-6726825d.pth with `cm model import FILE --as inception -o {}`; without them \
                 measure --metrics fcd,kcd,cpr",
                file.display(),
                file.display()
            );
        }
        let net = Box::new(Inception::load(file, device)?);
        Ok(Self { name: "inception", net, weights: digest::of_file(file)?, classifier: None })
    }

    /// The classifier that was asked for, or one for the reference images: out of the cache, or trained here. Ranks have
    /// that of rank 0.
    pub fn classifier(
        args: &EvalArgs,
        set: Option<(&dyn Dataset, &str)>,
        shape: [i64; 3],
        ranks: &Ranks,
    ) -> Result<Self> {
        let folder = scratch()?;
        let file = ranks.file_of_first(folder.path().join("received.safetensors"), || {
            let cache = (!args.no_cache).then_some(&args.cache);
            match (&args.classifier, set) {
                (Some(file), _) => Ok(file.clone()),
                (None, Some((set, data))) => trained_file(cache, set, data, shape, folder.path()).map(|(file, _)| file),
                (None, None) => bail!(
                    "fcd, kcd and cpr need a classifier, which is trained on images of the reference, and it holds \
                     statistics alone; name the one that they were measured with by --classifier"
                ),
            }
        })?;
        Self::load(&file, shape)
    }

    /// A classifier for the images of a set with the digest `data`: out of the folder `cache`, or trained here, and
    /// whether it was trained.
    pub fn trained(
        cache: Option<&PathBuf>,
        set: &dyn Dataset,
        data: &str,
        shape: [i64; 3],
    ) -> Result<(Self, bool)> {
        let folder = scratch()?;
        let (file, is_new) = trained_file(cache, set, data, shape, folder.path())?;
        Ok((Self::load(&file, shape)?, is_new))
    }

    fn load(file: &Path, shape: [i64; 3]) -> Result<Self> {
        let (net, about) = Classifier::load(file, shape)?;
        let about = serde_json::from_str(&about)
            .with_context(|| format!("{}: what it says about itself cannot be read", file.display()))?;
        // Of the numbers: two files of the same may have their texts in another order.
        let weights = digest_of(&Bundle::read(file)?.tensors);
        Ok(Self { name: "classifier", net: Box::new(net), weights, classifier: Some(about) })
    }
}

fn scratch() -> Result<tempfile::TempDir> {
    tempfile::tempdir().context("a folder for the classifier")
}

/// The file of [`Judge::trained`], in `scratch` where there is no cache, and whether it is new.
fn trained_file(
    cache: Option<&PathBuf>,
    set: &dyn Dataset,
    data: &str,
    shape: [i64; 3],
    scratch: &Path,
) -> Result<(PathBuf, bool)> {
    let data = &with_labels(set, data);
    let digits = data.get(..16).unwrap_or(data);
    let file = cache.map_or(scratch, PathBuf::as_path).join(format!("classifier-{digits}.safetensors"));
    if file.is_file() {
        match Judge::load(&file, shape) {
            Ok(judge)
                if judge.classifier.as_ref().is_some_and(|a| a.data == *data && a.version == VERSION) =>
            {
                return Ok((file, false));
            }
            Ok(_) => eprintln!("{}: the classifier of other data; training anew", file.display()),
            Err(error) => eprintln!("{error:#}; training anew"),
        }
    }
    let (classifier, about) = train(set, data)?;
    classifier.save(&file, &serde_json::to_string(&about)?)?;
    Ok((file, true))
}

/// A digest of images, by theirs, and their labels.
fn with_labels(set: &dyn Dataset, images: &str) -> String {
    let labels: Vec<u8> =
        set.labels().iter().flat_map(|all| all.iter()).flat_map(|l| l.to_le_bytes()).collect();
    digest::of_bytes([images.as_bytes(), &labels])
}

/// Images and labels of every so many.
fn gather(set: &dyn Dataset, indices: &[u32]) -> Result<(Tensor, Vec<i64>)> {
    let batch = Batch::gather(set, indices.iter().copied())?;
    let labels = batch.labels.iter().flatten().map(|&label| i64::from(label)).collect();
    Ok((batch.to_images(Device::Cpu)?, labels))
}

fn train(set: &dyn Dataset, data: &str) -> Result<(Classifier, About)> {
    let shape = set.shape();
    if shape.height.max(shape.width) > MOST_SIDE {
        bail!(
            "{}: the classifier of fcd, kcd and cpr is for images of at most {MOST_SIDE}×{MOST_SIDE} pixels, these are \
             {shape}; measure fid with Inception's weights (`cm fetch inception`)",
            set.source()
        );
    }
    let every = set.len().div_ceil(MOST_IMAGES).max(1);
    let chosen: Vec<u32> = (0..set.len() as u32).step_by(every).collect();
    let (mut train, mut held_out) = (Vec::new(), Vec::new());
    for (place, index) in chosen.into_iter().enumerate() {
        if place % HELD_OUT == HELD_OUT - 1 { held_out.push(index) } else { train.push(index) }
    }
    if held_out.is_empty() {
        bail!("{}: {} images are too few to train a classifier on", set.source(), set.len());
    }
    let classes = set.num_classes() as i64;
    let task = if classes > 1 { "labels" } else { "rotations" };
    let views = if classes > 1 { 1 } else { 4 };
    let epochs = (SEEN / (views * train.len())).clamp(3, 20) as u32;
    eprintln!("training a classifier ({task}) on {} images, {epochs} passes", train.len());
    let spec = ClassifierSpec { epochs, ..ClassifierSpec::default() };
    let (images, labels) = gather(set, &train)?;
    let (test, truth) = gather(set, &held_out)?;
    let (classifier, accuracy) = match classes > 1 {
        true => {
            let classifier = Classifier::train(&images, &labels, classes, spec)?;
            let accuracy = classifier.accuracy(&test, &truth)?;
            (classifier, accuracy)
        }
        false => {
            let classifier = Classifier::train_on_rotations(&images, spec)
                .with_context(|| format!("{}: data without labels", set.source()))?;
            let accuracy = classifier.accuracy_on_rotations(&test)?;
            (classifier, accuracy)
        }
    };
    eprintln!("it is right about {:.1} % of the images that were held out", 100.0 * accuracy);
    let (data, task) = (data.to_owned(), task.to_owned());
    let about = About { data, task, train_images: train.len(), accuracy, version: VERSION };
    Ok((classifier, about))
}

/// The shape of images of a set as the classifier takes it.
pub fn shape_of(set: &dyn Dataset) -> [i64; 3] {
    dims(set.shape())
}
