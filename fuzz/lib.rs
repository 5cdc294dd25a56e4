//! What each target does with the bytes that the fuzzer makes. An error is an answer; a panic is a finding, and so is
//! memory beyond the fuzzer's limit.

pub mod seeds;

use std::path::PathBuf;
use std::sync::LazyLock;

use cm_data::{Batch, SourceKind, SourceSpec};

/// The folder for the files of the target: `CM_FUZZ_FILES`, or one of this process.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let own = || std::env::temp_dir().join(format!("cm-fuzz-{}", std::process::id()));
    let folder = std::env::var_os("CM_FUZZ_FILES").map_or_else(own, PathBuf::from);
    std::fs::create_dir_all(&folder).expect("a folder for the fuzzer");
    folder
});

/// Writes the bytes as `name` into a folder in which nothing else lies.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.join(name);
    std::fs::write(&path, bytes).expect("a file for the fuzzer");
    path
}

fn one_line(error: impl std::fmt::Display) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control), "more than one line: {text:?}");
}

fn read_set(kind: SourceKind, path: PathBuf) {
    let set = SourceSpec::new(kind, Some(path)).open();
    let read = set.and_then(|set| Batch::gather(&*set, 0..set.len().min(16) as u32));
    read.err().into_iter().for_each(one_line);
}

/// CIFAR-10's archive.
pub fn cifar(bytes: &[u8]) {
    read_set(SourceKind::Cifar10, file("cifar-10-binary.tar.gz", bytes));
}

/// IDX images, plain or compressed.
pub fn idx(bytes: &[u8]) {
    read_set(SourceKind::Idx, file("a-images-idx3-ubyte", bytes));
}

/// An npy or npz file.
pub fn npz(bytes: &[u8]) {
    let path = file("a.npz", bytes);
    cm_data::arrays::read(&path, &["mu", "sigma"]).err().into_iter().for_each(one_line);
    read_set(SourceKind::Npz, path);
}

/// A zip of images, with its `dataset.json`.
pub fn zip(bytes: &[u8]) {
    read_set(SourceKind::Zip, file("a.zip", bytes));
}

/// An LMDB database of images.
pub fn lmdb(bytes: &[u8]) {
    read_set(SourceKind::Lmdb, file("data.mdb", bytes));
}

/// A picture or mask.
pub fn image(bytes: &[u8]) {
    cm_data::transform::decode(bytes, "a picture").err().into_iter().for_each(one_line);
}

/// A safetensors file, ours or published.
pub fn safetensors(bytes: &[u8]) {
    let path = file("a.safetensors", bytes);
    cm_model::Bundle::read_header(&path).err().into_iter().for_each(one_line);
    cm_net::inspect(&path).err().into_iter().for_each(one_line);
    cm_net::import::load_any(&path, None).err().into_iter().for_each(one_line);
}

/// A file of `torch.save`.
pub fn torch(bytes: &[u8]) {
    cm_net::import::read_torch(&file("a.pt", bytes)).err().into_iter().for_each(one_line);
}

/// An experiment in TOML.
pub fn config(bytes: &[u8]) {
    cm_cli::outside::experiment(file("x.toml", bytes)).into_iter().for_each(one_line);
}

/// Arguments of the command that have a grammar.
pub fn arguments(bytes: &[u8]) {
    cm_cli::outside::arguments(&String::from_utf8_lossy(bytes)).into_iter().for_each(one_line);
}
