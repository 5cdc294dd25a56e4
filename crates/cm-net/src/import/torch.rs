//! Files of `torch.save`, in the zip form and in the older form of pickles one after the other.
//!
//! Readers of this form in other crates know the zip form alone, trust lengths in the file, or pass over what they
//! do not know; this one reads both forms, holds every claim against the size of the file, and leaves nothing out
//! without a word.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use cm_model::{TensorMap, short};
use tch::{Kind, Tensor};

use super::architecture::Shapes;
use super::archive::{self, Entry};
use super::pickle::{self, Heap, Input, MAX_BYTES, Result, STORAGES, Storage, Value};
use super::{Watch, problem};

/// The first number of the older form.
const MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;
/// Version of the older form.
const LEGACY_PROTOCOL: i128 = 1001;
/// How deep a state dict may lie in other dicts.
const MAX_DEPTH: usize = 4;

/// Reads the tensors of a file of `torch.save`. Nothing of the file is executed.
///
/// The file may hold a state dict or one dict around it (`{"state_dict": …}`, `{"model": …}`, beside counters and
/// the like). Tensors that share a storage in the file share it here, and a tensor that is not contiguous in the
/// file is not here either.
///
/// # Errors
/// [`crate::Error::Import`] for a file that is truncated, damaged or no file of `torch.save`; that holds no state
/// dict or several; that was written on a big-endian machine; and for a pickle that names anything but tensors and
/// containers, with that name.
pub fn read_torch(path: &Path) -> crate::Result<TensorMap> {
    let file = TorchFile::open(path)?;
    file.tensors(&mut |_, _| {})
}

/// A file of `torch.save` whose pickle has been read and whose numbers have not.
pub(super) struct TorchFile {
    path: std::path::PathBuf,
    file: BufReader<File>,
    length: u64,
    /// `torch.save, zip form` or the older one.
    pub(super) form: &'static str,
    /// The keys of the dicts around the state dict, joined by dots.
    pub(super) inside: String,
    heap: Heap,
    /// Name and index of each tensor.
    names: BTreeMap<String, usize>,
    spans: HashMap<usize, Span>,
}

/// Where a storage's bytes are.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: u64,
    bytes: u64,
    crc: Option<u32>,
}

impl TorchFile {
    /// Reads the pickle and finds the storages.
    pub(super) fn open(path: &Path) -> crate::Result<Self> {
        let io = |source| cm_model::Error::Io { path: path.into(), action: "opening", source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::new(file);
        let read = match archive::read(&mut file, length, 0, 4.min(length)).as_deref() {
            Ok(b"PK\x03\x04") => read_zip(&mut file, length),
            Ok([0x80, ..]) => read_legacy(&mut file, length),
            Ok(_) => Err("it is no file of torch.save (neither a zip nor a pickle)".into()),
            Err(e) => Err(e.clone()),
        };
        let (form, heap, root, places) = read.map_err(|e| problem(path, e))?;
        let (inside, names) = state_dict(&heap, root).map_err(|e| problem(path, e))?;
        let needed: BTreeSet<usize> = names.values().map(|&id| heap.tensors[id].storage).collect();
        let spans =
            locate(&mut file, length, &heap.storages, &needed, &places).map_err(|e| problem(path, e))?;
        Ok(Self { path: path.into(), file, length, form, inside, heap, names, spans })
    }

    /// Names and shapes of the tensors.
    pub(super) fn shapes(&self) -> Shapes {
        let shape = |id: &usize| self.heap.tensors[*id].size.clone();
        self.names.iter().map(|(name, id)| (name.clone(), shape(id))).collect()
    }

    /// Their dtypes, as safetensors writes them.
    pub(super) fn dtypes(&self) -> BTreeSet<String> {
        let storages = self.names.values().map(|&id| &self.heap.storages[self.heap.tensors[id].storage]);
        let name = |kind| STORAGES.iter().find(|(_, k, _)| *k == kind).map_or("?", |(.., dtype)| *dtype);
        storages.map(|storage| name(storage.kind).to_owned()).collect()
    }

    /// Size of the file.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Number of elements of all tensors.
    pub(super) fn scalars(&self) -> i64 {
        let each = self.names.values().map(|&id| self.heap.tensors[id].numel());
        each.fold(0, i64::saturating_add)
    }

    /// Reads the storages that the tensors need, each once; shows `watch` how far it is.
    pub(super) fn tensors(mut self, watch: Watch<'_>) -> crate::Result<TensorMap> {
        let total: u64 = self.spans.values().map(|span| span.bytes).sum();
        let mut order: Vec<_> = self.spans.iter().map(|(&id, &span)| (span.start, id, span)).collect();
        order.sort_unstable_by_key(|(start, id, _)| (*start, *id));
        let (mut done, mut flat) = (0, HashMap::new());
        for (_, id, span) in order {
            let storage = &self.heap.storages[id];
            let bytes = archive::read(&mut self.file, self.length, span.start, span.bytes)
                .map_err(|e| problem(&self.path, e))?;
            if let Some(crc) = span.crc {
                intact(&bytes, crc, || format!("storage '{}'", short(&storage.key)))
                    .map_err(|e| problem(&self.path, e))?;
            }
            flat.insert(id, numbers(&bytes, storage)?);
            done += span.bytes;
            watch(done, total);
        }
        let mut tensors = TensorMap::new();
        for (name, id) in self.names {
            let tensor = &self.heap.tensors[id];
            let view = match tensor.numel() {
                0 => Tensor::f_zeros(&tensor.size, (self.heap.storages[tensor.storage].kind, CPU)),
                _ => flat[&tensor.storage].f_as_strided(&tensor.size, &tensor.stride, tensor.offset),
            };
            tensors.insert(name, view.map_err(cm_model::Error::from)?);
        }
        Ok(tensors)
    }
}

/// Holds bytes against the checksum that the zip has for them.
fn intact(bytes: &[u8], crc: u32, what: impl Fn() -> String) -> Result<()> {
    match crc32fast::hash(bytes) == crc {
        true => Ok(()),
        false => Err(format!(
            "{} has another checksum than the zip says: the file is damaged; copy or download it again",
            what()
        )),
    }
}

const CPU: tch::Device = tch::Device::Cpu;

fn numbers(bytes: &[u8], storage: &Storage) -> crate::Result<Tensor> {
    let size = [storage.numel as i64];
    if storage.numel == 0 {
        return Ok(Tensor::zeros(size, (storage.kind, CPU)));
    }
    // A byte that is neither 0 nor 1 is no truth value that libtorch may be given.
    let raw = if storage.kind == Kind::Bool { Kind::Uint8 } else { storage.kind };
    let flat = Tensor::f_from_data_size(bytes, &size, raw).map_err(cm_model::Error::from)?;
    Ok(flat.f_to_kind(storage.kind).map_err(cm_model::Error::from)?)
}

/// Where storages are looked for.
enum Places {
    Zip { prefix: String, entries: HashMap<String, Entry> },
    Legacy { keys: Vec<String>, start: u64 },
}

type Opened = (&'static str, Heap, Value, Places);

fn read_zip(file: &mut BufReader<File>, length: u64) -> Result<Opened> {
    let mut entries = HashMap::new();
    for entry in archive::entries(file, length)? {
        if let Some(twice) = entries.insert(entry.name.clone(), entry) {
            return Err(format!("'{}' is in the zip twice", short(&twice.name)));
        }
    }
    let names: Vec<&String> = entries.keys().collect();
    if names.iter().any(|name| name.ends_with("/constants.pkl")) {
        return Err(
            "a program of torch.jit.save, expected a state dict (torch.save(model.state_dict(), …))".into()
        );
    }
    let mut pickles = names.iter().filter_map(|name| name.strip_suffix("data.pkl"));
    let (prefix, None) = (pickles.next(), pickles.next()) else {
        return Err("a zip with several files data.pkl; torch.save writes one".into());
    };
    let prefix = prefix.ok_or("a zip without data.pkl, so not one of torch.save")?.to_owned();
    if let Some(entry) = entries.get(&format!("{prefix}byteorder")) {
        let start = archive::start(file, length, entry)?;
        let order = archive::read(file, length, start, entry.size.min(16))?;
        if order != b"little" {
            let order = String::from_utf8_lossy(&order);
            return Err(format!(
                "its numbers are in the byte order '{}', only little-endian is read; save it again elsewhere",
                short(&order)
            ));
        }
    }
    let entry = &entries[&format!("{prefix}data.pkl")];
    let start = archive::start(file, length, entry)?;
    if entry.size > MAX_BYTES {
        return Err(format!("data.pkl of {} bytes, at most {MAX_BYTES} are read", entry.size));
    }
    let bytes = archive::read(file, length, start, entry.size)?;
    let loaded = pickle::load(&mut Input::new(bytes.as_slice(), entry.size));
    intact(&bytes, entry.crc, || "data.pkl".to_owned())?;
    let (heap, root) = loaded?;
    Ok(("torch.save, zip form", heap, root, Places::Zip { prefix, entries }))
}

/// Magic number, version, a dict about the machine, the object, the storages' keys; then the storages.
fn read_legacy(file: &mut BufReader<File>, length: u64) -> Result<Opened> {
    file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
    let mut next = || {
        let at = file.stream_position().map_err(|e| e.to_string())?;
        pickle::load(&mut Input::new(&mut *file, length.saturating_sub(at)))
    };
    let (_, magic) = next()?;
    if magic != Value::Int(MAGIC) {
        return Err(format!(
            "a pickle that is not one of torch.save (it holds {}); EDM's and ECT's .pkl are converted by \
             scripts/convert_edm.py",
            magic.what()
        ));
    }
    let (_, version) = next()?;
    if version != Value::Int(LEGACY_PROTOCOL) {
        return Err("a file of torch.save of an unknown version".into());
    }
    let (heap, machine) = next()?;
    let entries = match machine {
        Value::Dict(id) => heap.dicts[id].as_slice(),
        _ => &[],
    };
    let little = entries.iter().find(|(key, _)| heap.text(*key) == Some("little_endian"));
    if little.is_none_or(|(_, value)| *value != Value::Bool(true)) {
        return Err("it was not saved on a little-endian machine; only those files are read".into());
    }
    let (heap, root) = next()?;
    let (texts, keys) = next()?;
    let Value::List(keys) = keys else { return Err("the list of storages is missing".into()) };
    let keys = texts.sequences[keys].iter().map(|key| texts.text(*key).map(str::to_owned));
    let keys = keys.collect::<Option<Vec<_>>>().ok_or("the list of storages holds what are not texts")?;
    let start = file.stream_position().map_err(|e| e.to_string())?;
    Ok(("torch.save, form before 1.6", heap, root, Places::Legacy { keys, start }))
}

/// The bytes of each storage that is needed; together they are no longer than the file.
fn locate(
    file: &mut (impl Read + Seek),
    length: u64,
    storages: &[Storage],
    needed: &BTreeSet<usize>,
    places: &Places,
) -> Result<HashMap<usize, Span>> {
    let mut spans = HashMap::new();
    match places {
        Places::Zip { prefix, entries } => {
            for &id in needed {
                let Storage { key, .. } = &storages[id];
                let entry = entries.get(&format!("{prefix}data/{key}"));
                let entry = entry.ok_or_else(|| format!("storage '{}' is not in the zip", short(key)))?;
                let bytes = claim(&storages[id], entry.size)?;
                if bytes != entry.size {
                    let size = entry.size;
                    return Err(format!(
                        "storage '{}' claims {bytes} bytes, and the zip has {size} for it",
                        short(key)
                    ));
                }
                let start = archive::start(file, length, entry)?;
                spans.insert(id, Span { start, bytes, crc: Some(entry.crc) });
            }
        }
        Places::Legacy { keys, start } => {
            let by_key: HashMap<&str, usize> =
                storages.iter().enumerate().map(|(id, storage)| (storage.key.as_str(), id)).collect();
            let mut at = *start;
            for key in keys {
                let id = by_key.get(key.as_str());
                let &id = id.ok_or_else(|| format!("storage '{}' belongs to no tensor", short(key)))?;
                let head = archive::read(file, length, at, 8)?;
                let numel = head.try_into().map(u64::from_le_bytes).unwrap_or_default();
                if numel != storages[id].numel {
                    return Err(format!(
                        "storage '{}' has {numel} numbers, {} were announced",
                        short(key),
                        storages[id].numel
                    ));
                }
                let bytes = claim(&storages[id], length - at - 8)?;
                spans.insert(id, Span { start: at + 8, bytes, crc: None });
                at += 8 + bytes;
            }
            spans.retain(|id, _| needed.contains(id));
            if let Some(id) = needed.iter().find(|id| !spans.contains_key(id)) {
                return Err(format!("storage '{}' is not in the file", short(&storages[*id].key)));
            }
        }
    }
    let total = spans.values().try_fold(0u64, |sum, span| sum.checked_add(span.bytes));
    match total {
        Some(total) if total <= length => Ok(spans),
        _ => Err(format!("its storages claim more bytes than the file has ({length})")),
    }
}

/// The bytes of a storage, of which the file has `present`: exactly in a zip, at least in the older form.
fn claim(storage: &Storage, present: u64) -> Result<u64> {
    let each = storage.kind.elt_size_in_bytes() as u64;
    match storage.numel.checked_mul(each) {
        Some(bytes) if bytes <= present => Ok(bytes),
        bytes => Err(format!(
            "storage '{}' claims {} bytes, and the file has {present} for it: truncated or damaged",
            short(&storage.key),
            bytes.map_or_else(|| "2^64 or more".to_owned(), |bytes| bytes.to_string())
        )),
    }
}

/// The one dict of tensors under `root`: the keys that lead to it, and its tensors.
fn state_dict(heap: &Heap, root: Value) -> Result<(String, BTreeMap<String, usize>)> {
    let Value::Dict(root) = root else {
        return Err(format!("it holds {}, expected a dict of tensors", root.what()));
    };
    let (mut found, mut seen) = (Vec::new(), BTreeSet::from([root]));
    let mut queue = VecDeque::from([(Vec::<&str>::new(), root)]);
    while let Some((path, id)) = queue.pop_front() {
        let items = &heap.dicts[id];
        let is_tensor =
            |(key, value): &(Value, Value)| matches!(value, Value::Tensor(_)) && heap.text(*key).is_some();
        if !items.is_empty() && items.iter().all(is_tensor) {
            found.push((path, id));
            continue;
        }
        for (key, value) in items {
            if let (Some(key), Value::Dict(inner)) = (heap.text(*key), value)
                && path.len() < MAX_DEPTH
                && seen.insert(*inner)
            {
                queue.push_back((path.iter().copied().chain([key]).collect(), *inner));
            }
        }
    }
    match found.as_slice() {
        [(path, id)] => {
            let mut names = BTreeMap::new();
            for (key, value) in &heap.dicts[*id] {
                let (Some(name), Value::Tensor(tensor)) = (heap.text(*key), value) else { continue };
                if names.insert(name.to_owned(), *tensor).is_some() {
                    return Err(format!("'{}' is there twice", short(name)));
                }
            }
            Ok((path.join("."), names))
        }
        [] => Err(no_state_dict(heap, root)),
        several => {
            let paths: Vec<_> = several.iter().take(8).map(|(path, _)| short(&path.join("."))).collect();
            Err(format!(
                "it holds {} dicts of tensors ({}); save the one you mean on its own: \
                 torch.save(torch.load(FILE)['{}'], …)",
                several.len(),
                paths.join(", "),
                short(several[0].0.first().copied().unwrap_or_default())
            ))
        }
    }
}

/// Why nothing under the dict is a state dict.
fn no_state_dict(heap: &Heap, root: usize) -> String {
    let items = heap.dicts[root].iter();
    let others = items.filter(|(_, value)| !matches!(value, Value::Tensor(_))).take(8).map(|(key, value)| {
        let key = heap.text(*key).map_or_else(|| key.what().to_owned(), |key| format!("'{}'", short(key)));
        format!("{key}: {}", value.what())
    });
    let others: Vec<_> = others.collect();
    format!(
        "it holds no dict of tensors alone, but a dict with {{{}}}; save the tensors alone: \
         torch.save({{k: v for k, v in torch.load(FILE).items() if torch.is_tensor(v)}}, …)",
        others.join(", ")
    )
}

/// The name of a storage in a pickle, where it has one.
pub(super) fn storage_name(kind: Kind) -> Option<&'static str> {
    STORAGES.iter().find(|(_, k, _)| *k == kind).map(|(name, ..)| *name)
}
