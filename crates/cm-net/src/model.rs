//! Files of models: weights and their description in one safetensors file.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use cm_model::schedule::{Boundary, Edm, KarrasGrid, NoiseCond, SigmaRange};
use cm_model::{
    Backbone, Bundle, Cast, Compute, ConsistencyFn, Denoiser, Graphed, Params, ParamsBuilder, Preconditioned,
    TensorMap, short, short_to,
};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::{Error, NetSpec, Result, import};

/// The metadata key that holds a [`ModelSpec`] as JSON. It is the only one, since safetensors writes several keys
/// in no fixed order and files shall be reproducible byte for byte.
pub(crate) const KEY: &str = "consistency-rs";

/// The form of the description that this version writes and reads.
pub(crate) const FORMAT: u32 = 1;

/// What a model's function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `D(x; σ) ≈ E[x₀ | x]`.
    Denoiser,
    /// `f(x, σ)` with `f(x, σ_min) = x`.
    Consistency,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Denoiser => "denoiser",
            Role::Consistency => "consistency function",
        })
    }
}

/// The numbers of the preconditioning, and the noise levels that go with it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecondSpec {
    /// Standard deviation of the data.
    pub sigma_data: f64,
    /// What the network is told about σ.
    pub noise_cond: NoiseCond,
    /// The lowest noise level; a consistency function is the identity there.
    pub sigma_min: f64,
    /// The highest noise level, where sampling starts.
    pub sigma_max: f64,
    /// Curvature of the grid of noise levels.
    pub rho: f64,
}

impl PrecondSpec {
    /// σ_min to σ_max.
    ///
    /// # Errors
    /// Unless 0 < σ_min < σ_max.
    pub fn sigma_range(&self) -> Result<SigmaRange> {
        Ok(SigmaRange::new(self.sigma_min, self.sigma_max)?)
    }

    /// The grid of noise levels.
    ///
    /// # Errors
    /// As [`PrecondSpec::sigma_range`], and unless ρ is positive.
    pub fn grid(&self) -> Result<KarrasGrid> {
        Ok(KarrasGrid::new(self.sigma_range()?, self.rho)?)
    }

    /// The numbers that are not those of `wanted`.
    pub(crate) fn differences(&self, wanted: &Self) -> Vec<String> {
        let mut found: Vec<String> = [
            ("sigma_data", self.sigma_data, wanted.sigma_data),
            ("sigma_min", self.sigma_min, wanted.sigma_min),
            ("sigma_max", self.sigma_max, wanted.sigma_max),
            ("rho", self.rho, wanted.rho),
        ]
        .into_iter()
        .filter(|(_, got, wanted)| got != wanted)
        .map(|(key, got, wanted)| format!("{key} {got}, expected {wanted}"))
        .collect();
        if self.noise_cond != wanted.noise_cond {
            found.push(format!("noise_cond {:?}, expected {:?}", self.noise_cond, wanted.noise_cond));
        }
        found
    }

    /// The scalings of a denoiser.
    ///
    /// # Errors
    /// Unless σ_data is positive.
    pub fn edm(&self) -> Result<Edm> {
        Ok(Edm::new(self.sigma_data, self.noise_cond)?)
    }

    /// The scalings of a consistency function.
    ///
    /// # Errors
    /// Unless σ_data and σ_min are positive.
    pub fn boundary(&self) -> Result<Boundary> {
        Ok(Boundary::new(self.sigma_data, self.sigma_min, self.noise_cond)?)
    }
}

/// Everything that a file of weights must say about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Version of this description.
    format: u32,
    /// What the model's function is.
    pub role: Role,
    /// The network.
    pub net: NetSpec,
    /// Its preconditioning.
    pub precond: PrecondSpec,
    /// Where it comes from, for people: step, EMA rate, the training config …
    pub about: BTreeMap<String, String>,
}

impl ModelSpec {
    /// A description in the present format.
    #[must_use]
    pub fn new(role: Role, net: NetSpec, precond: PrecondSpec) -> Self {
        Self { format: FORMAT, role, net, precond, about: BTreeMap::new() }
    }

    /// The description as the metadata of a safetensors file: one key with JSON.
    #[must_use]
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let json = serde_json::to_string(self).expect("plain data has a JSON form");
        BTreeMap::from([(KEY.to_owned(), json)])
    }

    /// Whether a safetensors file's metadata hold a description.
    pub(crate) fn describes(metadata: &BTreeMap<String, String>) -> bool {
        metadata.contains_key(KEY)
    }

    pub(crate) fn from_metadata(path: &Path, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let not_a_model = |problem: String| Error::NotAModel { path: path.into(), problem };
        let json = metadata.get(KEY).ok_or_else(|| {
            not_a_model(format!(
                "a safetensors file without a description of its model (metadata key '{KEY}'); `cm model import` \
                 adds one to published weights"
            ))
        })?;
        #[derive(Deserialize)]
        struct Format {
            format: u32,
            kind: Option<String>,
        }
        let unreadable = |e: serde_json::Error| {
            not_a_model(format!("its description cannot be read: {}", short_to(&e.to_string(), 300)))
        };
        let Format { format, kind } = serde_json::from_str(json).map_err(unreadable)?;
        if let Some(kind) = kind {
            return Err(not_a_model(format!("it holds weights of {}, which makes no images", short(&kind))));
        }
        match format {
            FORMAT => serde_json::from_str(json).map_err(unreadable),
            other => Err(not_a_model(format!(
                "its description has format {other}, this version reads format {FORMAT}; use the version that wrote it"
            ))),
        }
    }

    /// A network with weights as the model that is described.
    fn model(&self, mut net: Box<dyn Backbone + Send>, compute: Compute) -> Result<Model> {
        // On CPUs weights are put into the order of the kernels in any case.
        if compute.channels_last && net.params().device().is_cuda() {
            net.params().to_channels_last();
        }
        if compute.graph {
            net = Box::new(Graphed::new(net)?);
        }
        let sigma_range = self.precond.sigma_range()?;
        Ok(match self.role {
            Role::Denoiser => {
                let precond = self.precond.edm()?;
                Model::Denoiser(Box::new(Preconditioned { net, precond, sigma_range, compute }))
            }
            Role::Consistency => {
                let precond = self.precond.boundary()?;
                Model::Consistency(Box::new(Preconditioned { net, precond, sigma_range, compute }))
            }
        })
    }
}

/// Writes weights and buffers with their description, whole or not at all.
///
/// # Errors
/// [`cm_model::Error::Io`] if the file cannot be written.
pub fn save_model(path: &Path, params: &Params, spec: &ModelSpec) -> Result<()> {
    Ok(params.write(path, &spec.metadata())?)
}

/// [`save_model`] for weights that are not in a network, such as an average of them.
///
/// # Errors
/// As [`save_model`].
pub fn save_tensors(path: &Path, tensors: TensorMap, spec: &ModelSpec) -> Result<()> {
    Ok(Bundle { tensors, metadata: spec.metadata() }.write(path)?)
}

/// A file of weights, read into memory and not yet made into a network.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    /// What it says about itself.
    pub spec: ModelSpec,
    /// Its weights and buffers, on the CPU.
    pub tensors: TensorMap,
}

impl ModelFile {
    /// A file as it came from another form.
    pub(crate) fn new(path: &Path, spec: ModelSpec, tensors: TensorMap) -> Self {
        Self { path: path.into(), spec, tensors }
    }

    /// The file that it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a file that [`save_model`] or [`save_tensors`] wrote.
    ///
    /// # Errors
    /// [`Error::NotAModel`] for another kind of safetensors file; [`cm_model::Error`] for a file that is missing,
    /// truncated or no safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        not_of_torch(path)?;
        let Bundle { tensors, metadata } = Bundle::read(path)?;
        Ok(Self { path: path.into(), spec: ModelSpec::from_metadata(path, &metadata)?, tensors })
    }

    /// The raw network, with gradients off (switch them on to train it further).
    ///
    /// Weights that are stored in half precision or bfloat16 become float32.
    ///
    /// # Errors
    /// [`Error::NotAModel`] for a description of a network that cannot be; [`Error::Weights`] with every difference
    /// between the file and the network that it describes.
    pub fn backbone(&self, device: Device) -> Result<Box<dyn Backbone + Send>> {
        let misfit = |source| Error::Weights { path: self.path.clone(), source };
        // Before any memory is taken: a small file can describe a network that no machine holds.
        let shapes = built(&self.path, &self.spec.net, ParamsBuilder::shapes())?;
        shapes.params().check(&self.tensors, Cast::Floats).map_err(misfit)?;
        let net = built(&self.path, &self.spec.net, ParamsBuilder::unset(device))?;
        net.params().set_requires_grad(false);
        net.params().load(&self.tensors, Cast::Floats).map_err(misfit)?;
        Ok(net)
    }

    /// The model, computing as `compute` says.
    ///
    /// # Errors
    /// As [`ModelFile::backbone`]; [`Error::Model`] if graphs are wanted and cannot be had.
    pub fn model(&self, device: Device, compute: Compute) -> Result<Model> {
        self.spec.model(self.backbone(device)?, compute)
    }

    /// [`model`](Self::model) of a file that is not needed any longer, and what it says about itself: on a CPU the
    /// weights are in memory once.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn into_model(self, device: Device, compute: Compute) -> Result<(ModelSpec, Model)> {
        if device != Device::Cpu {
            let model = self.model(device, compute)?;
            return Ok((self.spec, model));
        }
        let Self { path, spec, tensors } = self;
        let net = built(&path, &spec.net, ParamsBuilder::shapes())?;
        net.params().set_requires_grad(false);
        net.params().adopt(tensors, Cast::Floats).map_err(|source| Error::Weights { path, source })?;
        let model = spec.model(net, compute)?;
        Ok((spec, model))
    }
}

/// A model of either kind, as it comes out of a file.
///
/// It can be sent to another thread, and not be shared by two at a time (it is `Send` and not `Sync`, as tensors
/// are): a service has a model for each of its threads, or one thread with the model and a channel to it.
pub enum Model {
    /// For the ODE solvers.
    Denoiser(Box<dyn Denoiser + Send>),
    /// For one-step and multistep sampling.
    Consistency(Box<dyn ConsistencyFn + Send>),
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Model::{:?}", self.role())
    }
}

impl Model {
    /// Which kind it is.
    #[must_use]
    pub fn role(&self) -> Role {
        match self {
            Model::Denoiser(_) => Role::Denoiser,
            Model::Consistency(_) => Role::Consistency,
        }
    }

    /// The denoiser.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if it is a consistency function.
    pub fn denoiser(&self) -> Result<&dyn Denoiser> {
        match self {
            Model::Denoiser(model) => Ok(&**model),
            Model::Consistency(_) => Err(self.is_no(Role::Denoiser)),
        }
    }

    /// The consistency function.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if it is a denoiser.
    pub fn consistency(&self) -> Result<&dyn ConsistencyFn> {
        match self {
            Model::Consistency(model) => Ok(&**model),
            Model::Denoiser(_) => Err(self.is_no(Role::Consistency)),
        }
    }

    /// [`Model::denoiser`], to be kept.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if it is a consistency function.
    pub fn into_denoiser(self) -> Result<Box<dyn Denoiser + Send>> {
        match self {
            Model::Denoiser(model) => Ok(model),
            Model::Consistency(_) => Err(self.is_no(Role::Denoiser)),
        }
    }

    /// [`Model::consistency`], to be kept.
    ///
    /// # Errors
    /// [`Error::WrongRole`] if it is a denoiser.
    pub fn into_consistency(self) -> Result<Box<dyn ConsistencyFn + Send>> {
        match self {
            Model::Consistency(model) => Ok(model),
            Model::Denoiser(_) => Err(self.is_no(Role::Consistency)),
        }
    }

    fn is_no(&self, wanted: Role) -> Error {
        let advice = match wanted {
            Role::Denoiser => "sample it in one step or in several (multistep), not with an ODE solver",
            Role::Consistency => {
                "sample it with an ODE solver such as Heun's, or distil it into a consistency model"
            }
        };
        Error::WrongRole { what: "the model".into(), got: self.role(), wanted, advice }
    }
}

/// Loads a model to compute in float32. [`ModelFile`] has the other ways to use a file.
///
/// # Errors
/// As [`ModelFile::read`] and [`ModelFile::backbone`].
pub fn load(path: &Path, device: Device) -> Result<Model> {
    Ok(ModelFile::read(path)?.into_model(device, Compute::default())?.1)
}

/// The network that a file describes; errors name the file.
pub(crate) fn built(path: &Path, net: &NetSpec, builder: ParamsBuilder) -> Result<Box<dyn Backbone + Send>> {
    net.build_with(builder).map_err(|e| Error::NotAModel { path: path.into(), problem: e.to_string() })
}

fn not_of_torch(path: &Path) -> Result<()> {
    if import::is_torch(path)? {
        let problem = "a file of PyTorch, not a model file; `cm model import` makes one of it".to_owned();
        return Err(Error::NotAModel { path: path.into(), problem });
    }
    Ok(())
}

/// What a file of weights holds.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// What it says about itself.
    pub spec: ModelSpec,
    /// Number of trained scalars.
    pub num_parameters: i64,
    /// The dtypes of its tensors, as safetensors writes them (`F32`, `BF16` …).
    pub dtypes: BTreeSet<String>,
    /// Size of the file.
    pub bytes: u64,
}

/// Reads the head of a file of weights, without the weights, and checks that it fits the network that it
/// describes.
///
/// # Errors
/// As [`ModelFile::read`] and [`ModelFile::backbone`].
pub fn inspect(path: &Path) -> Result<ModelInfo> {
    not_of_torch(path)?;
    let (metadata, tensors) = Bundle::read_header(path)?;
    let spec = ModelSpec::from_metadata(path, &metadata)?;
    let net = built(path, &spec.net, ParamsBuilder::shapes())?;
    let mut expected: BTreeMap<&str, Vec<i64>> = net.params().iter().map(|(n, t)| (n, t.size())).collect();
    let mut differences = Vec::new();
    for (name, shape, _) in &tensors {
        match expected.remove(name.as_str()) {
            Some(want) if want == *shape => {}
            Some(want) => differences.push(format!("'{name}' has shape {shape:?}, expected {want:?}")),
            None => differences.push(format!("'{}' is not a part of the network", short(name))),
        }
    }
    differences.extend(expected.iter().map(|(name, shape)| format!("'{name}' {shape:?} is missing")));
    if !differences.is_empty() {
        let source = cm_model::Error::Weights { differences };
        return Err(Error::Weights { path: path.into(), source });
    }
    let size = std::fs::metadata(path);
    let bytes =
        size.map_err(|source| cm_model::Error::Io { path: path.into(), action: "reading", source })?.len();
    Ok(ModelInfo {
        spec,
        num_parameters: net.params().num_parameters(),
        dtypes: tensors.into_iter().map(|(_, _, dtype)| dtype).collect(),
        bytes,
    })
}
