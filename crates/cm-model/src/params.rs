use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use cm_schedule::rng::{Purpose, Stream, name_id};
use cm_torch::memory_format;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::text::short;
use crate::{Error, Result, bundle};

/// Tensors by name, sorted.
pub type TensorMap = BTreeMap<String, Tensor>;

/// How a parameter starts. Fans are read off the shape as PyTorch does: `fan_in = shape[1]·∏shape[2..]`,
/// `fan_out = shape[0]·∏shape[2..]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// U(−bound, bound).
    Uniform {
        /// Half-width of the interval.
        bound: f64,
    },
    /// N(0, std²).
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// U(−b, b) with b = scale·√(6/(fan_in + fan_out)).
    XavierUniform {
        /// Factor on the bound.
        scale: f64,
    },
    /// U(−b, b) with b = scale·√(3/fan_in).
    KaimingUniform {
        /// Factor on the bound.
        scale: f64,
    },
    /// N(0, scale²/fan_in).
    KaimingNormal {
        /// Factor on the standard deviation.
        scale: f64,
    },
}

#[derive(Debug)]
struct Entry {
    tensor: Tensor,
    trainable: bool,
}

/// The weights and buffers of one network, sorted by name.
///
/// The layers of the network hold handles to the same storage, so that loading into `Params` changes what the
/// network computes.
#[derive(Debug)]
pub struct Params {
    entries: BTreeMap<String, Entry>,
    device: Device,
}

/// Collects the parameters of a network while it is built.
///
/// Each parameter's start is a function of (seed, its name), so that it does not depend on the order in which
/// layers are built.
#[derive(Debug)]
pub struct ParamsBuilder {
    entries: RefCell<BTreeMap<String, Entry>>,
    start: Start,
    device: Device,
}

/// What a builder's parameters hold before anything is loaded into them.
#[derive(Debug, Clone, Copy)]
enum Start {
    Seed(u64),
    Unset,
    Shapes,
}

/// A place in the tree of names under which layers register their parameters.
#[derive(Debug, Clone)]
pub struct ParamPath<'a> {
    builder: &'a ParamsBuilder,
    prefix: String,
}

impl ParamsBuilder {
    /// A builder whose parameters start from `seed` on `device`.
    pub fn new(seed: u64, device: Device) -> Self {
        Self { entries: RefCell::default(), start: Start::Seed(seed), device }
    }

    /// A builder whose parameters have shapes and no values yet: for a network that is loaded next. Memory is
    /// reserved, not written.
    pub fn unset(device: Device) -> Self {
        Self { entries: RefCell::default(), start: Start::Unset, device }
    }

    /// A builder whose parameters are shapes alone, without memory of their own: for a network whose parameters
    /// are counted, compared with a file, or [adopted](Params::adopt) from one, which alone gives them values.
    pub fn shapes() -> Self {
        Self { entries: RefCell::default(), start: Start::Shapes, device: Device::Cpu }
    }

    /// The root of the names.
    pub fn root(&self) -> ParamPath<'_> {
        ParamPath { builder: self, prefix: String::new() }
    }

    /// The finished parameters.
    pub fn finish(self) -> Params {
        Params { entries: self.entries.into_inner(), device: self.device }
    }
}

impl ParamPath<'_> {
    /// The place `name` below this one.
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self { builder: self.builder, prefix: self.full(name) }
    }

    /// The device that parameters are made on.
    pub fn device(&self) -> Device {
        self.builder.device
    }

    /// The full name of this place; empty for the root.
    pub fn name(&self) -> &str {
        &self.prefix
    }

    /// Registers a float32 weight that is trained.
    ///
    /// # Errors
    /// [`Error::DuplicateParameter`] if the name is taken.
    pub fn param(&self, name: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let full = self.full(name);
        let tensor = self.start(&full, shape, init)?;
        self.register(full, tensor.set_requires_grad(true), true)
    }

    /// Registers a tensor that belongs to the network and is not trained.
    ///
    /// # Errors
    /// [`Error::DuplicateParameter`] if the name is taken.
    pub fn buffer(&self, name: &str, value: &Tensor) -> Result<Tensor> {
        self.register(self.full(name), value.detach().to_device(self.builder.device).copy(), false)
    }

    /// Registers a buffer of standard normal values times `std`.
    ///
    /// # Errors
    /// [`Error::DuplicateParameter`] if the name is taken.
    pub fn normal_buffer(&self, name: &str, shape: &[i64], std: f64) -> Result<Tensor> {
        self.buffer(name, &self.start(&self.full(name), shape, Init::Normal { std })?)
    }

    fn start(&self, full: &str, shape: &[i64], init: Init) -> Result<Tensor> {
        let options = (Kind::Float, self.builder.device);
        Ok(match self.builder.start {
            Start::Seed(seed) => initial(seed, full, shape, init).to_device(self.builder.device),
            Start::Unset => Tensor::f_empty(shape, options)?,
            Start::Shapes => Tensor::zeros([1], options).f_expand(shape, false)?,
        })
    }

    fn full(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    fn register(&self, name: String, tensor: Tensor, trainable: bool) -> Result<Tensor> {
        let handle = tensor.shallow_clone();
        match self.builder.entries.borrow_mut().insert(name.clone(), Entry { tensor, trainable }) {
            None => Ok(handle),
            Some(_) => Err(Error::DuplicateParameter(name)),
        }
    }
}

/// Whether loading may change a tensor's dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cast {
    /// Dtypes must be equal.
    Never,
    /// Floating-point tensors may be converted (weights stored as half or bfloat16).
    Floats,
}

impl Params {
    /// The device that the parameters are on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// All parameters and buffers, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), &entry.tensor))
    }

    /// The trained parameters, sorted by name.
    pub fn trainable(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().filter(|(_, e)| e.trainable).map(|(name, entry)| (name.as_str(), &entry.tensor))
    }

    /// One parameter or buffer.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.entries.get(name).map(|entry| &entry.tensor)
    }

    /// Number of trained scalars.
    pub fn num_parameters(&self) -> i64 {
        self.trainable().map(|(_, tensor)| tensor.numel() as i64).sum()
    }

    /// Switches gradients of the trained parameters on or off (a teacher and a target network need none).
    pub fn set_requires_grad(&self, on: bool) {
        for (_, tensor) in self.trainable() {
            let _ = tensor.set_requires_grad(on);
        }
    }

    /// Stores convolution weights in channels-last memory order; values and names stay.
    pub fn to_channels_last(&self) {
        let _no_grad = tch::no_grad_guard();
        for (_, tensor) in self.iter().filter(|(_, t)| t.dim() == 4) {
            tensor.shallow_clone().set_data(&memory_format::channels_last(&tensor.detach()));
        }
    }

    /// A copy of every tensor that does not change when the parameters do.
    pub fn snapshot(&self) -> TensorMap {
        self.iter().map(|(name, tensor)| (name.to_owned(), tensor.detach().copy())).collect()
    }

    /// Loads every parameter and buffer from `tensors`, strictly in both directions: names, shapes and dtypes.
    ///
    /// # Errors
    /// [`Error::Weights`] with every difference; nothing is loaded then.
    pub fn load(&self, tensors: &TensorMap, cast: Cast) -> Result<()> {
        self.check(tensors, cast)?;
        let _no_grad = tch::no_grad_guard();
        for (name, tensor) in self.iter() {
            tensor.shallow_clone().f_copy_(&tensors[name])?;
        }
        Ok(())
    }

    /// [`load`](Self::load) of tensors that are not needed any longer: what is on the CPU in the right dtype, and the only
    /// use of its memory, is taken as it is, and the rest copied. The parameters may be shapes alone
    /// ([`ParamsBuilder::shapes`]).
    ///
    /// # Errors
    /// As [`load`](Self::load); [`Error::Value`] for parameters that are not on the CPU.
    pub fn adopt(&self, mut tensors: TensorMap, cast: Cast) -> Result<()> {
        if self.device != Device::Cpu {
            return Err(Error::Value {
                what: "device of parameters that adopt tensors".into(),
                expected: "Cpu".into(),
                got: format!("{:?}", self.device),
            });
        }
        self.check(&tensors, cast)?;
        let _no_grad = tch::no_grad_guard();
        for (name, tensor) in self.iter() {
            let Some(value) = tensors.remove(name) else { continue };
            let fits = value.device() == Device::Cpu && value.kind() == tensor.kind();
            let value = if fits && memory_format::is_alone(&value) {
                value.f_detach()?
            } else {
                let mut own = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
                own.f_copy_(&value)?;
                own
            };
            tensor.shallow_clone().f_set_data(&value)?;
        }
        Ok(())
    }

    /// Says whether [`Params::load`] would take `tensors`, and loads nothing.
    ///
    /// # Errors
    /// As [`Params::load`].
    pub fn check(&self, tensors: &TensorMap, cast: Cast) -> Result<()> {
        let differences = self.differences(tensors, cast);
        if differences.is_empty() { Ok(()) } else { Err(Error::Weights { differences }) }
    }

    /// Copies the values of another network of the same architecture.
    ///
    /// # Errors
    /// [`Error::Weights`] if the two do not have the same names and shapes.
    pub fn copy_from(&self, other: &Params) -> Result<()> {
        let tensors = other.iter().map(|(name, t)| (name.to_owned(), t.shallow_clone())).collect();
        self.load(&tensors, Cast::Never)
    }

    /// Writes the parameters as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        bundle::write_tensors(path, self.iter(), metadata)
    }

    fn differences(&self, tensors: &TensorMap, cast: Cast) -> Vec<String> {
        let mut found = Vec::new();
        for (name, want) in self.iter() {
            match tensors.get(name) {
                None => found.push(format!("'{name}' {:?} is missing", want.size())),
                Some(got) if got.size() != want.size() => {
                    found.push(format!("'{name}' has shape {:?}, expected {:?}", got.size(), want.size()));
                }
                Some(got) if got.kind() != want.kind() && !(cast == Cast::Floats && is_float(got)) => {
                    found.push(format!("'{name}' has dtype {:?}, expected {:?}", got.kind(), want.kind()));
                }
                Some(_) => {}
            }
        }
        let unknown = tensors.keys().filter(|name| !self.entries.contains_key(*name));
        found.extend(unknown.map(|name| format!("'{}' is not a part of the network", short(name))));
        found
    }
}

fn is_float(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

/// The start of the parameter `name`, float32 on the CPU.
fn initial(seed: u64, name: &str, shape: &[i64], init: Init) -> Tensor {
    let spatial: i64 = shape.iter().skip(2).product();
    let fan = |axis: usize| (shape.get(axis).copied().unwrap_or(1) * spatial).max(1) as f64;
    let numel = shape.iter().product::<i64>() as usize;
    let (fan_out, fan_in) = (fan(0), fan(1));
    let stream = Stream { seed, purpose: Purpose::Init, step: 0, sample: name_id(name) };
    let values = match init {
        Init::Zeros => vec![0.0; numel],
        Init::Ones => vec![1.0; numel],
        Init::Uniform { bound } => uniforms(&stream, numel, bound),
        Init::XavierUniform { scale } => uniforms(&stream, numel, scale * (6.0 / (fan_in + fan_out)).sqrt()),
        Init::KaimingUniform { scale } => uniforms(&stream, numel, scale * (3.0 / fan_in).sqrt()),
        Init::Normal { std } => normals(&stream, numel, std),
        Init::KaimingNormal { scale } => normals(&stream, numel, scale / fan_in.sqrt()),
    };
    // A view would hold the flat tensor for as long as it lives, whatever memory it is given later.
    Tensor::from_slice(&values).view(shape).copy()
}

/// Four values of 32 bits from each block, in parallel: a network of 500 M parameters starts in seconds.
fn uniforms(stream: &Stream, numel: usize, bound: f64) -> Vec<f32> {
    let mut values = vec![0f32; numel];
    values.par_chunks_mut(4).enumerate().for_each(|(block, chunk)| {
        for (value, bits) in chunk.iter_mut().zip(stream.block(block as u32)) {
            *value = (((f64::from(bits) + 0.5) / 4_294_967_296.0 * 2.0 - 1.0) * bound) as f32;
        }
    });
    values
}

fn normals(stream: &Stream, numel: usize, std: f64) -> Vec<f32> {
    let mut values = vec![0f32; numel];
    stream.fill_normals(&mut values);
    values.iter_mut().for_each(|value| *value = (f64::from(*value) * std) as f32);
    values
}
