use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, View, serialize_to_file};
use tch::{Device, Kind, Tensor};

use crate::text::{short, short_to};
use crate::{Error, Result, TensorMap, files};

/// Name, shape and dtype (as safetensors writes it: `F32`, `BF16` …) of a tensor in a file.
pub type TensorInfo = (String, Vec<i64>, String);

/// Named tensors with text metadata: the content of one safetensors file.
#[derive(Debug, Default)]
pub struct Bundle {
    /// The tensors, by name.
    pub tensors: TensorMap,
    /// The file's metadata. Files with one key are byte-for-byte reproducible.
    pub metadata: BTreeMap<String, String>,
}

impl Bundle {
    /// Reads a file; its tensors are on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read; [`Error::File`] if it is not a whole safetensors file.
    pub fn read(path: &Path) -> Result<Self> {
        // One handle for head and tensors: another file may take this one's place meanwhile.
        let mut file = File::open(path).map_err(|e| Error::io(path, "reading", e))?;
        let (metadata, places) = Self::read_places(&mut file, path)?;
        // As many at a time as there are threads: the file is never in memory beside its tensors.
        let read = |bytes: &mut Vec<u8>, place: Place| {
            bytes.resize(place.length, 0);
            read_at(&file, bytes, place.begin).map_err(|e| Error::io(path, "reading", e))?;
            let tensor = tensor_of(path, &place.name, (&place.shape, place.dtype), bytes)?;
            Ok((place.name, tensor))
        };
        let tensors = places.into_par_iter().map_init(Vec::new, read).collect::<Result<TensorMap>>()?;
        Ok(Self { tensors, metadata })
    }

    /// Reads what a file holds out of memory; errors call it `path`.
    ///
    /// # Errors
    /// [`Error::File`] if it is not a whole safetensors file.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let broken = |e: safetensors::SafeTensorError| Error::File {
            path: path.into(),
            problem: format!(
                "not a whole safetensors file ({}; {} bytes); {AGAIN}",
                short_to(&e.to_string(), 200),
                bytes.len()
            ),
        };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        let views = SafeTensors::deserialize(bytes).map_err(broken)?;
        let mut tensors = TensorMap::new();
        for (name, view) in views.iter() {
            let tensor = tensor_of(path, name, (view.shape(), view.dtype()), view.data())?;
            tensors.insert(name.to_owned(), tensor);
        }
        Ok(Self { tensors, metadata })
    }

    /// Reads the metadata alone, without the tensors: names, dtypes and shapes of the tensors, and the text.
    ///
    /// # Errors
    /// As [`Bundle::read`].
    pub fn read_header(path: &Path) -> Result<(BTreeMap<String, String>, Vec<TensorInfo>)> {
        let mut file = File::open(path).map_err(|e| Error::io(path, "reading", e))?;
        let (metadata, places) = Self::read_places(&mut file, path)?;
        let info = |place: Place| {
            let shape = place.shape.iter().map(|&n| n as i64).collect();
            (place.name, shape, format!("{:?}", place.dtype))
        };
        let mut tensors: Vec<_> = places.into_iter().map(info).collect();
        tensors.sort();
        Ok((metadata, tensors))
    }

    /// The text of a file, and where its tensors lie: one behind the other, up to its end.
    fn read_places(file: &mut File, path: &Path) -> Result<(BTreeMap<String, String>, Vec<Place>)> {
        let problem = |problem: String| Error::File { path: path.into(), problem };
        let total = file.metadata().map_err(|e| Error::io(path, "reading", e))?.len();
        let mut length = [0u8; 8];
        file.read_exact(&mut length)
            .map_err(|_| problem(format!("not a whole safetensors file ({total} bytes)")))?;
        let length = u64::from_le_bytes(length);
        if length > total.saturating_sub(8) || length > 100_000_000 {
            return Err(problem(format!(
                "not a whole safetensors file (its head claims {length} bytes, the file has {total}); {AGAIN}"
            )));
        }
        let mut head = vec![0u8; length as usize];
        file.read_exact(&mut head).map_err(|e| Error::io(path, "reading", e))?;
        let header: safetensors::tensor::Metadata = serde_json::from_slice(&head).map_err(|e| {
            let e = short_to(&e.to_string(), 200);
            problem(format!("not a whole safetensors file ({e}); {AGAIN}"))
        })?;
        let mut found: Vec<_> = header.tensors().into_iter().collect();
        found.sort_by_key(|(_, info)| info.data_offsets);
        let mut places = Vec::with_capacity(found.len());
        let (begin, mut end) = (8 + length, 0);
        for (name, info) in found {
            let length = claimed_bytes(info).filter(|_| info.data_offsets.0 == end).ok_or_else(|| {
                problem(format!(
                    "tensor '{}' of shape {:?} is not at {:?}, behind the one before",
                    short(&name),
                    info.shape,
                    info.data_offsets
                ))
            })?;
            let begin = begin.saturating_add(end as u64);
            places.push(Place { name, shape: info.shape.clone(), dtype: info.dtype, begin, length });
            end += length;
        }
        let says = begin.saturating_add(end as u64);
        if total != says {
            return Err(problem(format!(
                "not a whole safetensors file: {total} bytes, its header says {says}; {AGAIN}"
            )));
        }
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok((metadata, places))
    }

    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] with the step that failed (a full disk, a folder that is read-only …).
    pub fn write(&self, path: &Path) -> Result<()> {
        write_tensors(path, self.tensors.iter().map(|(name, t)| (name.as_str(), t)), &self.metadata)
    }
}

/// Fills `bytes` from the byte at `begin` on.
#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], begin: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, begin)
}

#[cfg(windows)]
fn read_at(file: &File, mut bytes: &mut [u8], mut begin: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, begin)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => (bytes, begin) = (&mut bytes[read..], begin + read as u64),
        }
    }
    Ok(())
}

const AGAIN: &str = "if it was copied or downloaded, do so again";

/// Where a tensor lies in a file, in bytes.
struct Place {
    name: String,
    shape: Vec<usize>,
    dtype: Dtype,
    begin: u64,
    length: usize,
}

/// The bytes of a tensor, if its shape has as many as its place in the file.
fn claimed_bytes(info: &safetensors::tensor::TensorInfo) -> Option<usize> {
    let numel = info.shape.iter().try_fold(1usize, |product, &side| product.checked_mul(side))?;
    let bytes = numel.checked_mul(info.dtype.bitsize())?.div_ceil(8);
    let (start, end) = info.data_offsets;
    (end.checked_sub(start) == Some(bytes)).then_some(bytes)
}

/// Writes tensors without collecting them into a [`Bundle`] first; see [`Bundle::write`].
pub(crate) fn write_tensors<'a>(
    path: &Path,
    tensors: impl Iterator<Item = (&'a str, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "creating the folder", e))?;
    let temp = files::named_temp(folder, path)?;
    let views: Vec<(&str, TensorView<'_>)> =
        tensors.map(|(name, tensor)| Ok((name, TensorView::new(name, tensor)?))).collect::<Result<_>>()?;
    let metadata: HashMap<String, String> = metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    // An empty map beside no tensors makes safetensors write a head that it cannot read again.
    let metadata = (!metadata.is_empty()).then_some(metadata);
    serialize_to_file(views, metadata, temp.path()).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(e) => Error::io(path, "writing", e),
        e => Error::File { path: path.into(), problem: e.to_string() },
    })?;
    files::persist(temp, path)
}

struct TensorView<'a> {
    tensor: &'a Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl<'a> TensorView<'a> {
    fn new(name: &str, tensor: &'a Tensor) -> Result<Self> {
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| Error::Value {
            what: format!("dtype of tensor '{name}'"),
            expected: "one that safetensors can hold".into(),
            got: format!("{:?}", tensor.kind()),
        })?;
        Ok(Self { tensor, dtype, shape: tensor.size().iter().map(|&n| n as usize).collect() })
    }
}

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(tensor_bytes(self.tensor))
    }
    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// The values of a tensor one behind the other, as they lie in memory; of one on a GPU, copied from there.
#[must_use]
pub fn tensor_bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.detach().to_device(Device::Cpu).contiguous().view([-1]);
    let mut bytes = vec![0; flat.numel() * flat.kind().elt_size_in_bytes()];
    flat.copy_data_u8(&mut bytes, flat.numel());
    bytes
}

/// A tensor out of its bytes; errors name the file.
fn tensor_of(path: &Path, name: &str, (shape, dtype): (&[usize], Dtype), bytes: &[u8]) -> Result<Tensor> {
    let problem = |problem: String| Error::File { path: path.into(), problem };
    let kind = kind_of(dtype).ok_or_else(|| {
        problem(format!("tensor '{}' has dtype {dtype:?}, which is not supported", short(name)))
    })?;
    let size: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    tensor_from_bytes(bytes, &size, kind)
        .map_err(|e| problem(format!("tensor '{}' of shape {size:?} cannot be made: {e}", short(name))))
}

fn tensor_from_bytes(bytes: &[u8], size: &[i64], kind: Kind) -> Result<Tensor> {
    if size.contains(&0) {
        return Ok(Tensor::f_zeros(size, (kind, Device::Cpu))?);
    }
    Ok(Tensor::f_from_data_size(bytes, size, kind)?)
}

const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F32, Kind::Float),
    (Dtype::F64, Kind::Double),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.iter().find(|(d, _)| *d == dtype).map(|(_, kind)| *kind)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|(_, k)| *k == kind).map(|(dtype, _)| *dtype)
}
