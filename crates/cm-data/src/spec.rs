//! The data section of a config, and how it becomes a set.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::dataset::{Dataset, Labels, MemorySet, Shape, Subset};
use crate::error::{Error, Result};
use crate::formats::files::{FileOptions, ImageFiles};
use crate::formats::labels::LabelRule;
use crate::formats::shards::Shards;
use crate::formats::{bundled, cifar, idx, npz};
use crate::limits::{MAX_CLASSES, MAX_SIDE};
use crate::resize::{Filter, Fit, fit};
use crate::transform::{Channels, Plain};

/// The form of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// The bundled 8×8 digits.
    Digits,
    /// The bundled 32×32 emoji.
    Emoji,
    /// CIFAR-10's binary version, unpacked or as its archive.
    Cifar10,
    /// IDX files: MNIST, Fashion-MNIST and the like.
    Idx,
    /// A folder of images.
    Folder,
    /// A zip of images.
    Zip,
    /// An LMDB database of images, as LSUN publishes its scenes.
    Lmdb,
    /// NumPy arrays of decoded images, read in place: what `cm data pack` makes.
    Shards,
    /// A NumPy archive or array of images.
    Npz,
}

impl SourceKind {
    /// The word for it in a config.
    pub const fn name(self) -> &'static str {
        match self {
            SourceKind::Digits => "digits",
            SourceKind::Emoji => "emoji",
            SourceKind::Cifar10 => "cifar10",
            SourceKind::Idx => "idx",
            SourceKind::Folder => "folder",
            SourceKind::Zip => "zip",
            SourceKind::Lmdb => "lmdb",
            SourceKind::Shards => "shards",
            SourceKind::Npz => "npz",
        }
    }

    const fn is_bundled(self) -> bool {
        matches!(self, SourceKind::Digits | SourceKind::Emoji)
    }

    const fn is_files(self) -> bool {
        matches!(self, SourceKind::Folder | SourceKind::Zip)
    }

    /// Whether images are decoded when they are drawn.
    const fn is_decoded(self) -> bool {
        matches!(self, SourceKind::Folder | SourceKind::Zip | SourceKind::Lmdb)
    }
}

/// The part of a set that is used.
///
/// CIFAR-10 and IDX files that are split bring their own parts. Of any other set `holdout = k` makes every k-th
/// image a test image; without it, the training part is the whole set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// The training images.
    #[default]
    Train,
    /// The test images.
    Test,
    /// Both, training images first where the files are split.
    All,
}

impl Split {
    /// The word for it in a config.
    pub const fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
            Split::All => "all",
        }
    }
}

/// What a config says about its data.
///
/// ```
/// let spec: cm_data::SourceSpec = toml::from_str("kind = 'digits'\nholdout = 10").unwrap();
/// let train = spec.open().unwrap();
/// assert_eq!((train.len(), train.shape().height), (1618, 8));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// The form of the data.
    pub kind: SourceKind,
    /// Where it lies; not for the bundled sets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Side of the square images in pixels; the data's own size if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolution: Option<usize>,
    /// Colour; the data's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<Channels>,
    /// What is done with images of another size; `exact` if absent.
    #[serde(default)]
    pub fit: Fit,
    /// The kernel for that; `lanczos` if absent. Not with `fit = "exact"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// Whether each image is mirrored with probability ½ when it is drawn for training.
    #[serde(default)]
    pub flip: bool,
    /// Where labels come from; `auto` if absent.
    #[serde(default)]
    pub labels: LabelRule,
    /// So many images that do not decode are passed over, each named in a warning, before the run ends; 0 if absent.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub max_corrupt: usize,
    /// Number of classes, against which every label is checked; found from the data if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_classes: Option<u32>,
    /// The part of the set; `train` if absent.
    #[serde(default)]
    pub split: Split,
    /// Every `holdout`-th image is a test image, for sets whose files are not split.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holdout: Option<usize>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl SourceSpec {
    /// The whole set at `path`, as it is.
    pub fn new(kind: SourceKind, path: Option<PathBuf>) -> Self {
        Self {
            kind,
            path,
            resolution: None,
            channels: None,
            fit: Fit::default(),
            filter: None,
            flip: false,
            labels: LabelRule::default(),
            max_corrupt: 0,
            num_classes: None,
            split: Split::default(),
            holdout: None,
        }
    }

    /// Checks what can be checked without the data.
    ///
    /// # Errors
    /// [`Error::Spec`] that names the key, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let kind = self.kind.name();
        let fault = |key, value: String, reason: String| Err(Error::Spec { key, value, reason });
        match &self.path {
            Some(path) if self.kind.is_bundled() => {
                return fault("path", path.display().to_string(), format!("{kind} is bundled: remove path"));
            }
            None if self.kind == SourceKind::Cifar10 => {
                let reason = format!(
                    "set path to {} (from {}) or to a folder with it, or run `cargo xtask demo`, which needs no download",
                    cifar::ARCHIVE,
                    cifar::URL
                );
                return fault("path", "unset".into(), reason);
            }
            None if !self.kind.is_bundled() => {
                return fault(
                    "path",
                    "unset".into(),
                    format!("kind = \"{kind}\" needs the path of its data"),
                );
            }
            _ => {}
        }
        if let Some(side) = self.resolution.filter(|r| !(1..=MAX_SIDE as usize).contains(r)) {
            return fault("resolution", side.to_string(), format!("expected 1 to {MAX_SIDE} pixels"));
        }
        if self.fit != Fit::Exact && self.resolution.is_none() {
            return fault("resolution", "unset".into(), "fit needs a resolution to scale to".into());
        }
        if let Some(filter) = self.filter.filter(|_| self.fit == Fit::Exact) {
            let reason = "nothing is scaled with fit = \"exact\": remove filter or set fit".into();
            return fault("filter", format!("{filter:?}").to_lowercase(), reason);
        }
        if let Some(k) = self.holdout.filter(|&k| k < 2) {
            return fault(
                "holdout",
                k.to_string(),
                "expected at least 2: every k-th image is held out".into(),
            );
        }
        if self.max_corrupt > 0 && !self.kind.is_decoded() {
            let reason = format!("images of kind = \"{kind}\" are not decoded: remove it");
            return fault("max_corrupt", self.max_corrupt.to_string(), reason);
        }
        if self.holdout.is_some() && self.kind == SourceKind::Cifar10 {
            return fault(
                "holdout",
                "set".into(),
                "CIFAR-10 brings its own test images: remove holdout".into(),
            );
        }
        self.validate_labels()
    }

    fn validate_labels(&self) -> Result<()> {
        let fault = |key, value: String, reason: String| Err(Error::Spec { key, value, reason });
        let by_file = matches!(self.labels, LabelRule::DatasetJson | LabelRule::Prefix | LabelRule::Folder);
        if by_file && !self.kind.is_files() {
            let reason = format!("expected auto or none for kind = \"{}\"", self.kind.name());
            return fault("labels", format!("{:?}", self.labels).to_lowercase(), reason);
        }
        let Some(classes) = self.num_classes else { return Ok(()) };
        if !(1..=MAX_CLASSES).contains(&classes) {
            return fault("num_classes", classes.to_string(), format!("expected 1 to {MAX_CLASSES}"));
        }
        if self.labels == LabelRule::None {
            return fault(
                "num_classes",
                classes.to_string(),
                "labels = \"none\" has no classes: remove one".into(),
            );
        }
        Ok(())
    }

    /// Opens the set. Small forms are read into memory; files are listed and decoded later.
    ///
    /// # Errors
    /// [`Error::Spec`] as [`validate`](Self::validate); otherwise what is wrong with the data, naming the file.
    pub fn open(&self) -> Result<Arc<dyn Dataset>> {
        self.validate()?;
        let labelled = self.labels != LabelRule::None;
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let mut split_by_files = false;
        let set: Arc<dyn Dataset> = match self.kind {
            SourceKind::Digits => self.prepare(bundled::digits()?)?,
            SourceKind::Emoji => self.prepare(bundled::emoji()?)?,
            SourceKind::Cifar10 => {
                split_by_files = true;
                self.prepare(cifar::read(path, self.split, labelled)?)?
            }
            SourceKind::Idx => {
                let read = idx::read(path, self.split, labelled, self.num_classes)?;
                split_by_files = read.split_by_files;
                self.prepare(read.set)?
            }
            SourceKind::Npz => self.prepare(npz::read(path, labelled, self.num_classes)?)?,
            SourceKind::Folder | SourceKind::Zip => self.open_files(path)?,
            SourceKind::Lmdb => Arc::new(ImageFiles::open_lmdb(path, self.file_options())?),
            SourceKind::Shards => self.open_shards(path, labelled)?,
        };
        if self.num_classes.is_some() && set.labels().is_none() {
            let value = self.num_classes.unwrap_or(0).to_string();
            let reason = format!("{} has no labels", set.source());
            return Err(Error::Spec { key: "num_classes", value, reason });
        }
        if split_by_files { self.reject_holdout(set) } else { self.hold_out(set) }
    }

    fn open_files(&self, path: &Path) -> Result<Arc<dyn Dataset>> {
        let (want_folder, is_folder) = (self.kind == SourceKind::Folder, path.is_dir());
        if path.exists() && want_folder != is_folder {
            return Err(Error::Missing {
                what: if want_folder { "folder of images" } else { "zip of images" },
                path: path.into(),
                expected: if want_folder { "a folder".into() } else { "a file".into() },
                found: if is_folder { "a folder".into() } else { "a file".into() },
                remedy: format!("set kind = \"{}\"", if is_folder { "folder" } else { "zip" }),
            });
        }
        Ok(Arc::new(ImageFiles::open(path, self.file_options())?))
    }

    fn file_options(&self) -> FileOptions {
        FileOptions {
            resolution: self.resolution,
            channels: self.channels,
            fit: self.fit,
            filter: self.filter.unwrap_or_default(),
            labels: self.labels,
            classes: self.num_classes,
            max_corrupt: self.max_corrupt,
        }
    }

    /// Shards hold images as they are to be trained on: what would change each one as it is read is refused.
    fn open_shards(&self, path: &Path, labelled: bool) -> Result<Arc<dyn Dataset>> {
        let set = Shards::open(path, labelled, self.num_classes)?;
        let shape = set.shape();
        let wanted = self.resolution.filter(|&side| (side, side) != (shape.height, shape.width));
        let fault = |key, value: String| {
            let reason = format!("the shards hold images of {shape}: pack them anew with it, or remove it");
            Err(Error::Spec { key, value, reason })
        };
        if let Some(side) = wanted {
            return fault("resolution", side.to_string());
        }
        if let Some(channels) = self.channels.filter(|channels| channels.count() != shape.channels) {
            return fault("channels", format!("{channels:?}").to_lowercase());
        }
        Ok(Arc::new(set))
    }

    /// Brings a set in memory to the resolution, colour and labels that are asked for.
    fn prepare(&self, set: MemorySet) -> Result<Arc<dyn Dataset>> {
        let have = set.shape();
        let channels = self.channels.map_or(have.channels, Channels::count);
        let (height, width) = self.resolution.map_or((have.height, have.width), |r| (r, r));
        let want = Shape { channels, height, width };
        let labels = self.relabel(&set)?;
        if want == have && labels.as_ref() == set.label_set() {
            return Ok(Arc::new(set));
        }
        let color = if channels == 1 { Channels::Grey } else { Channels::Rgb };
        let filter = self.filter.unwrap_or_default();
        let mut pixels = vec![0; set.len() * want.values()];
        for (index, out) in pixels.chunks_exact_mut(want.values()).enumerate() {
            if want == have {
                out.copy_from_slice(set.image(index));
                continue;
            }
            let shape_fault = || Error::Shape { what: set.name(index), expected: want, got: have };
            let image = Plain::from_chw(have, set.image(index)).ok_or_else(shape_fault)?.into_channels(color);
            // Every image has the same size, so a wrong one is the set's fault rather than the first image's.
            fit(image, height, width, self.fit, filter, set.source())?.write_chw(out);
        }
        Ok(Arc::new(MemorySet::new(set.source(), want, pixels, labels)?))
    }

    /// The labels of a set in memory under this spec.
    fn relabel(&self, set: &MemorySet) -> Result<Option<Labels>> {
        let Some(labels) = set.label_set().filter(|_| self.labels != LabelRule::None) else {
            return Ok(None);
        };
        match self.num_classes {
            Some(classes) if classes != labels.classes => {
                let values: Vec<i64> = labels.values.iter().map(|&l| l.into()).collect();
                Labels::new(set.source(), &values, Some(classes)).map(Some)
            }
            _ => Ok(Some(labels.clone())),
        }
    }

    fn reject_holdout(&self, set: Arc<dyn Dataset>) -> Result<Arc<dyn Dataset>> {
        match self.holdout {
            None => Ok(set),
            Some(k) => Err(Error::Spec {
                key: "holdout",
                value: k.to_string(),
                reason: format!("{} is split by its files: remove holdout", set.source()),
            }),
        }
    }

    fn hold_out(&self, set: Arc<dyn Dataset>) -> Result<Arc<dyn Dataset>> {
        let count = set.len() as u32;
        let is_test = |i: &u32, k: usize| (*i as usize + 1).is_multiple_of(k);
        match (self.split, self.holdout) {
            (Split::All, None) | (Split::Train, None) => Ok(set),
            (Split::All, Some(k)) => Err(Error::Spec {
                key: "holdout",
                value: k.to_string(),
                reason: "split = \"all\" holds nothing out: remove one".into(),
            }),
            (Split::Test, None) => Err(Error::Spec {
                key: "split",
                value: "\"test\"".into(),
                reason: format!("{} has no test images of its own: set holdout = k", set.source()),
            }),
            (Split::Train, Some(k)) => {
                let indices = (0..count).filter(|i| !is_test(i, k)).collect();
                Ok(Arc::new(Subset::new(set, &format!("without every {k}th"), indices)?))
            }
            (Split::Test, Some(k)) => {
                let indices = (0..count).filter(|i| is_test(i, k)).collect();
                Ok(Arc::new(Subset::new(set, &format!("every {k}th"), indices)?))
            }
        }
    }
}
