//! Models in the forms that people hold them in, and back.
//!
//! | form | names | what it does not say |
//! | --- | --- | --- |
//! | OpenAI's `.pt` (EDM, CD and CT for ImageNet-64 and LSUN-256) | OpenAI's | image size, head size, role |
//! | EDM's networks as safetensors or `.pt` | EDM's, with or without `model.` | role |
//! | folders of diffusers with a `UNet2DModel` | diffusers' | role, without a scheduler of consistency models |
//! | files of this program | as published | nothing |
//!
//! [`load_any`] makes a [`ModelFile`] of any of them; a [`Kind`] says what the weights do not. Names, shapes and
//! dtypes are held against the network that they describe, in both directions. [`describe`] says what a file holds
//! where that is not known yet. [`export_openai`] and [`export_diffusers`] write the published forms.
//!
//! No pickle is executed: [`read_torch`] takes tensors and containers, and refuses anything else by name.

mod architecture;
mod archive;
mod diffusers;
mod export;
mod kind;
mod pickle;
mod torch;

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use cm_model::{Bundle, Cast, ParamsBuilder, TensorMap, short};

pub use architecture::{Architecture, OpenaiParts};
use architecture::{Family, edm_of, family, openai_of, shapes};
pub use export::{export_diffusers, export_openai};
pub use kind::{Kind, OWN_KINDS};
use torch::TorchFile;
pub use torch::read_torch;

use crate::model::built;
use crate::{Error, ModelFile, ModelSpec, NetSpec, Result};

/// Is told, while a file is read, how many of how many bytes have been.
pub type Watch<'a> = &'a mut dyn FnMut(u64, u64);

/// The key under which a model's description says how many points its training's grid had.
pub const NUM_SCALES: &str = "num_scales";

/// Reads a model in any form; `kind` says what the file does not.
///
/// # Errors
/// [`Error::Import`] for a file that cannot be read, whose network is not known here, that needs a kind, or that
/// contradicts itself or the kind given; [`Error::NotAModel`] for a description that is not one of this version;
/// [`Error::Weights`] with every difference between the weights and the network that
/// they are to be.
pub fn load_any(path: &Path, kind: Option<Kind>) -> Result<ModelFile> {
    load_any_watched(path, kind, &mut |_, _| {})
}

/// [`load_any`] that shows its progress.
///
/// # Errors
/// As [`load_any`].
pub fn load_any_watched(path: &Path, kind: Option<Kind>, watch: Watch<'_>) -> Result<ModelFile> {
    match form_of(path)? {
        Form::Diffusers(folder) => diffusers::load(&folder, kind, watch),
        Form::Torch => {
            let file = TorchFile::open(path)?;
            let shapes = file.shapes();
            if kind.is_none() && family(shapes.keys().map(String::as_str)) == Some(Family::Openai) {
                // Known without reading gigabytes.
                return Err(kind_is_missing(path, openai_of(&shapes)));
            }
            from_published(path, file.tensors(watch)?, kind)
        }
        Form::Safetensors => {
            let Bundle { tensors, metadata } = read_safetensors(path, watch)?;
            if !ModelSpec::describes(&metadata) {
                return from_published(path, tensors, kind);
            }
            let spec = ModelSpec::from_metadata(path, &metadata)?;
            check(path, &spec.net, &tensors)?;
            let file = ModelFile::new(path, spec, tensors);
            match kind {
                Some(kind) => agreeing(path, file, &kind),
                None => Ok(file),
            }
        }
    }
}

/// One read: progress is nothing or all.
fn read_safetensors(path: &Path, watch: Watch<'_>) -> Result<Bundle> {
    let total = std::fs::metadata(path).map_or(0, |file| file.len());
    watch(0, total);
    let bundle = Bundle::read(path)?;
    watch(total, total);
    Ok(bundle)
}

/// What a file holds, as far as it says.
#[derive(Debug, Clone)]
pub struct Description {
    /// The form of the file, in words.
    pub form: String,
    /// Number of tensors.
    pub num_tensors: usize,
    /// Number of their elements.
    pub num_scalars: i64,
    /// Their dtypes, as safetensors writes them.
    pub dtypes: BTreeSet<String>,
    /// Size of the file of weights.
    pub bytes: u64,
    /// Whether it is a model file of this program.
    pub own: bool,
    /// What it says of itself without a kind: all of it in a model file, and in a folder of diffusers with the
    /// scheduler of consistency models.
    pub spec: Option<ModelSpec>,
    /// The network; why it is not known where it is not.
    pub architecture: Result<Architecture, String>,
    /// The published kinds that weights like these can be of.
    pub kinds: Vec<Kind>,
}

/// Says what a file in a published form holds, also where the kind of model is missing.
///
/// # Errors
/// [`Error::Import`] or [`cm_model::Error`] for a file that cannot be read.
pub fn describe(path: &Path) -> Result<Description> {
    let (form, weights, folder) = match form_of(path)? {
        Form::Diffusers(folder) => {
            let (weights, net, spec) = diffusers::description(&folder)?;
            (Some("a folder of diffusers"), weights, Some((Architecture::of_net(&net.into()), spec)))
        }
        Form::Torch | Form::Safetensors => (None, path.to_owned(), None),
    };
    let contents = Contents::of(&weights)?;
    let own = folder.is_none() && contents.spec.is_some();
    let (architecture, spec) = match (folder, contents.spec.clone()) {
        (Some((known, spec)), _) => (Ok(known), spec),
        (None, Some(spec)) => {
            built(&weights, &spec.net, ParamsBuilder::shapes())?;
            (Ok(Architecture::of_net(&spec.net)), Some(spec))
        }
        (None, None) => (contents.architecture(&weights)?, None),
    };
    let fitting = |kind: &Kind| architecture.as_ref().is_ok_and(|found| found.fits(kind));
    Ok(Description {
        form: form.map_or(contents.form, str::to_owned),
        num_tensors: contents.shapes.len(),
        num_scalars: contents.num_scalars,
        dtypes: contents.dtypes,
        bytes: contents.bytes,
        own,
        spec,
        kinds: Kind::named().into_iter().filter(fitting).collect(),
        architecture,
    })
}

/// What the head of a file of weights says.
struct Contents {
    form: String,
    shapes: architecture::Shapes,
    num_scalars: i64,
    dtypes: BTreeSet<String>,
    bytes: u64,
    spec: Option<ModelSpec>,
}

impl Contents {
    fn of(path: &Path) -> Result<Self> {
        if is_torch(path)? {
            let file = TorchFile::open(path)?;
            let inside = if file.inside.is_empty() {
                String::new()
            } else {
                format!(", in '{}'", short(&file.inside))
            };
            return Ok(Self {
                form: format!("{}{inside}", file.form),
                shapes: file.shapes(),
                num_scalars: file.scalars(),
                dtypes: file.dtypes(),
                bytes: file.length(),
                spec: None,
            });
        }
        let (metadata, tensors) = Bundle::read_header(path)?;
        let size = std::fs::metadata(path);
        let io = |source| cm_model::Error::Io { path: path.into(), action: "reading", source };
        Ok(Self {
            form: "safetensors".to_owned(),
            num_scalars: tensors
                .iter()
                .map(|(_, shape, _)| shape.iter().fold(1, |n: i64, side| n.saturating_mul(*side)))
                .fold(0, i64::saturating_add),
            dtypes: tensors.iter().map(|(_, _, dtype)| dtype.clone()).collect(),
            shapes: tensors.into_iter().map(|(name, shape, _)| (name, shape)).collect(),
            bytes: size.map_err(io)?.len(),
            spec: match ModelSpec::describes(&metadata) {
                true => Some(ModelSpec::from_metadata(path, &metadata)?),
                false => None,
            },
        })
    }

    /// The network; the resampling filters of EDM's are in its tensors.
    fn architecture(&self, path: &Path) -> Result<Result<Architecture, String>> {
        Ok(match family(self.shapes.keys().map(String::as_str)) {
            Some(Family::Openai) => openai_of(&self.shapes),
            Some(Family::Edm) if is_torch(path)? => edm_of(&read_torch(path)?),
            Some(Family::Edm) => edm_of(&Bundle::read(path)?.tensors),
            Some(Family::Diffusers) => Err(WITHOUT_CONFIG.to_owned()),
            None => Err(unknown_names(self.shapes.keys())),
        })
    }
}

const WITHOUT_CONFIG: &str =
    "weights of diffusers without their config.json; give the folder that holds both";

fn unknown_names<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.take(4).map(|name| format!("'{}'", short(name))).collect();
    format!("its tensors ({}, …) are not those of a network that is known here", names.join(", "))
}

/// How a file is read.
#[derive(Debug, Clone, PartialEq)]
enum Form {
    Safetensors,
    Torch,
    /// The folder with `config.json`.
    Diffusers(PathBuf),
}

fn form_of(path: &Path) -> Result<Form> {
    if path.is_dir() {
        return Ok(Form::Diffusers(diffusers::unet_folder(path)?));
    }
    if diffusers::is_weights(path) {
        return Ok(Form::Diffusers(path.parent().unwrap_or(Path::new("")).to_owned()));
    }
    if is_torch(path)? {
        return Ok(Form::Torch);
    }
    if path.extension().is_some_and(|extension| extension == "json") {
        let text = "a description, not weights; give the folder of diffusers that holds both, or the file of weights";
        return Err(problem(path, text.to_owned()));
    }
    Ok(Form::Safetensors)
}

/// Whether a file begins as `torch.save`'s do: a zip, or a pickle (and not the length of a safetensors file's head,
/// with that head behind it).
pub(crate) fn is_torch(path: &Path) -> Result<bool> {
    let io = |source| cm_model::Error::Io { path: path.into(), action: "opening", source };
    let mut head = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(9).read_to_end(&mut head).map_err(io)?;
    Ok(match head.as_slice() {
        [_, _, _, _, _, _, _, _, b'{'] => false,
        [b'P', b'K', 3, 4, ..] | [0x80, 0..=5, ..] => true,
        _ => false,
    })
}

/// Whether a folder is one of diffusers.
#[must_use]
pub fn is_diffusers_folder(path: &Path) -> bool {
    path.is_dir() && diffusers::unet_folder(path).is_ok()
}

/// A model of a state dict in OpenAI's or EDM's names.
fn from_published(path: &Path, tensors: TensorMap, kind: Option<Kind>) -> Result<ModelFile> {
    let family = family(tensors.keys().map(String::as_str));
    let found = match family {
        Some(Family::Openai) => openai_of(&shapes(&tensors)),
        Some(Family::Edm) => edm_of(&tensors),
        Some(Family::Diffusers) => return Err(problem(path, WITHOUT_CONFIG.to_owned())),
        None => return Err(problem(path, unknown_names(tensors.keys()))),
    };
    let Some(kind) = kind else { return Err(kind_is_missing(path, found)) };
    let net = match (found, &kind.net) {
        (Ok(found), _) => found.spec(&kind).map_err(|e| problem(path, e))?,
        // Names and shapes that make no network of their own: the differences to the wanted one say why.
        (Err(_), Some(net)) => net.clone(),
        (Err(e), None) => return Err(problem(path, e)),
    };
    let count = tensors.len();
    let tensors = net.names_from_published(tensors);
    if tensors.len() != count {
        return Err(problem(path, "some tensors are there twice, with and without 'model.'".to_owned()));
    }
    check(path, &net, &tensors)?;
    let mut spec = ModelSpec::new(kind.role(), net, kind.precond());
    spec.about.insert("kind".into(), kind.name().to_owned());
    if let Some(scales) = kind.num_scales() {
        spec.about.insert(NUM_SCALES.into(), scales.to_string());
    }
    Ok(ModelFile::new(path, with_source(path, spec), tensors))
}

/// A file of this program that was given with a kind: the two must agree in everything.
fn agreeing(path: &Path, file: ModelFile, kind: &Kind) -> Result<ModelFile> {
    let ModelSpec { role, net, precond, .. } = &file.spec;
    let mut differences = Vec::new();
    if *role != kind.role() {
        differences.push(format!("it is a {role}, expected a {}", kind.role()));
    }
    differences.extend(precond.differences(&kind.precond()));
    differences.extend(kind.contradictions(net));
    match differences.is_empty() {
        true => Ok(file),
        false => {
            let text = format!(
                "it says of itself that it is not {kind}: {}; leave --as out",
                differences.join("; ")
            );
            Err(problem(path, text))
        }
    }
}

fn with_source(path: &Path, mut spec: ModelSpec) -> ModelSpec {
    if let Some(name) = path.file_name() {
        spec.about.insert("source".into(), name.to_string_lossy().into_owned());
    }
    spec
}

/// Holds tensors against a network, in both directions.
fn check(path: &Path, net: &NetSpec, tensors: &TensorMap) -> Result<()> {
    let net = net.build_with(ParamsBuilder::shapes()).map_err(|e| problem(path, e.to_string()))?;
    let checked = net.params().check(tensors, Cast::Floats);
    checked.map_err(|source| Error::Weights { path: path.into(), source })
}

/// Why a state dict alone is not enough.
fn kind_is_missing(path: &Path, found: Result<Architecture, String>) -> Error {
    let found = match found {
        Ok(found) => found,
        Err(e) => return problem(path, e),
    };
    let open = match found {
        Architecture::Openai(_) => {
            "image size, head size, and whether it is a denoiser or a consistency function"
        }
        Architecture::Edm(_) => "whether it is a denoiser or a consistency function",
    };
    problem(path, format!("{found}; its weights do not say {open}. {}", choices(&found)))
}

/// What to do where a file does not say enough.
fn choices(found: &Architecture) -> String {
    let fitting: Vec<_> = Kind::named().into_iter().filter(|kind| found.fits(kind)).collect();
    let choices = match fitting.as_slice() {
        [] => format!("none of {} fits; spell it out: {OWN_KINDS}", Kind::names()),
        kinds => {
            format!(
                "these fit: {}; or spell it out: {OWN_KINDS}",
                kinds.iter().map(Kind::name).collect::<Vec<_>>().join(", ")
            )
        }
    };
    format!("Say it with --as KIND (in code, load_as): {choices}")
}

pub(crate) fn problem(path: &Path, problem: String) -> Error {
    Error::Import { path: path.into(), problem }
}
