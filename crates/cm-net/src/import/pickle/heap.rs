//! What a pickle makes.

use std::collections::HashMap;

use cm_model::short;
use tch::Kind;

use super::Result;

/// Most axes of a tensor.
pub(super) const MAX_AXES: usize = 16;

/// Storages by their names, with the dtype of their numbers and its name in safetensors.
pub(in crate::import) const STORAGES: [(&str, Kind, &str); 10] = [
    ("DoubleStorage", Kind::Double, "F64"),
    ("FloatStorage", Kind::Float, "F32"),
    ("HalfStorage", Kind::Half, "F16"),
    ("BFloat16Storage", Kind::BFloat16, "BF16"),
    ("LongStorage", Kind::Int64, "I64"),
    ("IntStorage", Kind::Int, "I32"),
    ("ShortStorage", Kind::Int16, "I16"),
    ("CharStorage", Kind::Int8, "I8"),
    ("ByteStorage", Kind::Uint8, "U8"),
    ("BoolStorage", Kind::Bool, "BOOL"),
];

/// A value; containers and texts by their index in the [`Heap`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::import) enum Value {
    None,
    Bool(bool),
    Int(i128),
    Float,
    Bytes,
    Text(usize),
    Tuple(usize),
    List(usize),
    Dict(usize),
    Callable(Callable),
    Storage(usize),
    Tensor(usize),
}

/// The names that a pickle may use.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::import) enum Callable {
    OrderedDict,
    Size,
    /// `_rebuild_tensor_v2`, or the older form without its last arguments.
    Tensor {
        arguments: [usize; 2],
    },
    Parameter,
    Storage(Kind),
}

/// Numbers of one dtype that lie elsewhere in the file.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::import) struct Storage {
    pub(in crate::import) key: String,
    pub(in crate::import) kind: Kind,
    pub(in crate::import) numel: u64,
}

/// A view of a storage; its extent has been checked.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::import) struct TensorRef {
    pub(in crate::import) storage: usize,
    pub(in crate::import) offset: i64,
    pub(in crate::import) size: Vec<i64>,
    pub(in crate::import) stride: Vec<i64>,
}

/// Everything that a pickle made.
#[derive(Debug, Default)]
pub(in crate::import) struct Heap {
    pub(in crate::import) texts: Vec<String>,
    pub(in crate::import) sequences: Vec<Vec<Value>>,
    pub(in crate::import) dicts: Vec<Vec<(Value, Value)>>,
    pub(in crate::import) storages: Vec<Storage>,
    pub(in crate::import) tensors: Vec<TensorRef>,
    by_key: HashMap<String, usize>,
}

impl Value {
    /// What it is, for people.
    pub(in crate::import) fn what(self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a truth value",
            Value::Int(_) => "an integer",
            Value::Float => "a float",
            Value::Bytes => "bytes",
            Value::Text(_) => "a text",
            Value::Tuple(_) => "a tuple",
            Value::List(_) => "a list",
            Value::Dict(_) => "a dict",
            Value::Callable(_) => "a function",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

impl Heap {
    /// The text, if it is one.
    pub(in crate::import) fn text(&self, value: Value) -> Option<&str> {
        match value {
            Value::Text(id) => Some(&self.texts[id]),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, value: Value, what: &str) -> Result<&[Value]> {
        match value {
            Value::Tuple(id) => Ok(&self.sequences[id]),
            other => Err(format!("{what}: expected a tuple, got {}", other.what())),
        }
    }

    fn integers(&self, value: Value, what: &str) -> Result<Vec<i64>> {
        let items = match value {
            Value::Tuple(id) | Value::List(id) if self.sequences[id].len() <= MAX_AXES => &self.sequences[id],
            Value::Tuple(_) | Value::List(_) => return Err(format!("{what}: more than {MAX_AXES} axes")),
            other => return Err(format!("{what}: expected a tuple, got {}", other.what())),
        };
        items.iter().map(|item| integer(*item, what)).collect()
    }

    /// A storage from what the file calls it: `('storage', torch.FloatStorage, key, device, numel)`, in the older
    /// form with None behind.
    pub(super) fn storage(&mut self, value: Value) -> Result<usize> {
        let items = self.tuple(value, "a persistent id")?;
        let &[tag, Value::Callable(Callable::Storage(kind)), key, _, numel, ref view @ ..] = items else {
            return Err("a persistent id that is not a storage".into());
        };
        if self.text(tag) != Some("storage") || !matches!(view, [] | [Value::None]) {
            return Err("a persistent id that is not a whole storage".into());
        }
        let key = self.text(key).ok_or("a storage whose key is not a text")?.to_owned();
        let numel = integer(numel, "a storage's length")?;
        let numel =
            u64::try_from(numel).map_err(|_| format!("storage '{}' has length {numel}", short(&key)))?;
        let storage = Storage { key: key.clone(), kind, numel };
        match self.by_key.get(&key) {
            Some(&id) if self.storages[id] == storage => Ok(id),
            Some(_) => Err(format!("storage '{}' is there with two lengths or dtypes", short(&key))),
            None => {
                self.storages.push(storage);
                self.by_key.insert(key, self.storages.len() - 1);
                Ok(self.storages.len() - 1)
            }
        }
    }

    pub(super) fn tensor(&mut self, arguments: &[Value]) -> Result<Value> {
        let &[Value::Storage(storage), offset, size, stride, ..] = arguments else {
            return Err("a tensor that is not made of a storage".into());
        };
        let tensor = TensorRef {
            storage,
            offset: integer(offset, "a tensor's offset")?,
            size: self.integers(size, "a tensor's shape")?,
            stride: self.integers(stride, "a tensor's strides")?,
        };
        tensor.check(&self.storages[storage])?;
        self.tensors.push(tensor);
        Ok(Value::Tensor(self.tensors.len() - 1))
    }
}

impl TensorRef {
    /// Number of elements; [`TensorRef::check`] has made sure that it is one.
    pub(in crate::import) fn numel(&self) -> i64 {
        self.size.iter().product()
    }

    /// Every element lies in the storage, and there are no more elements than the storage has.
    fn check(&self, storage: &Storage) -> Result<()> {
        let Self { offset, size, stride, .. } = self;
        let problem = || {
            let Storage { key, numel, .. } = storage;
            format!(
                "a tensor of shape {size:?}, strides {stride:?} and offset {offset} does not fit storage '{}' of {numel}",
                short(key)
            )
        };
        let nonnegative = |values: &[i64]| values.iter().all(|v| *v >= 0);
        if size.len() != stride.len() || !nonnegative(size) || !nonnegative(stride) || *offset < 0 {
            return Err(problem());
        }
        // Also where a side is 0: libtorch multiplies the others.
        let product =
            size.iter().try_fold(1i64, |n, &side| n.checked_mul(side.max(1))).ok_or_else(problem)?;
        let numel = if size.contains(&0) { 0 } else { product };
        let last = size
            .iter()
            .zip(stride)
            .try_fold(*offset, |at, (side, stride)| at.checked_add((side - 1).max(0).checked_mul(*stride)?));
        let inside = last.is_some_and(|last| numel == 0 || (last as u64) < storage.numel);
        if inside && numel as u64 <= storage.numel && *offset as u64 <= storage.numel {
            Ok(())
        } else {
            Err(problem())
        }
    }
}

fn integer(value: Value, what: &str) -> Result<i64> {
    match value {
        Value::Int(value) => i64::try_from(value).map_err(|_| format!("{what}: {value} is too large")),
        other => Err(format!("{what}: expected an integer, got {}", other.what())),
    }
}

/// The few names that a state dict uses.
pub(super) fn callable(module: &str, name: &str) -> Result<Callable> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Callable::OrderedDict,
        ("torch", "Size") => Callable::Size,
        ("torch._utils", "_rebuild_tensor") => Callable::Tensor { arguments: [4, 4] },
        ("torch._utils", "_rebuild_tensor_v2") => Callable::Tensor { arguments: [6, 7] },
        ("torch._utils", "_rebuild_parameter") => Callable::Parameter,
        ("torch" | "torch.storage", "UntypedStorage") => Callable::Storage(Kind::Uint8),
        ("torch", storage) => match STORAGES.iter().find(|(name, ..)| *name == storage) {
            Some((_, kind, _)) => Callable::Storage(*kind),
            None => return Err(refusal(module, name)),
        },
        _ => return Err(refusal(module, name)),
    })
}

pub(super) fn refusal(module: &str, name: &str) -> String {
    let advice = match module.split('.').next() {
        Some("torch_utils" | "dnnlib") => "scripts/convert_edm.py converts EDM's and ECT's .pkl",
        _ => "save the state dict alone (torch.save(model.state_dict(), …))",
    };
    format!(
        "its pickle names '{}.{}', which is no tensor and no container: refused, and nothing of it was run; {advice}",
        short(module),
        short(name)
    )
}
