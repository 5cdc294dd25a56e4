use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use cm_model::Bundle;
use cm_torch::tch::{Kind, Tensor};

/// Asserts that two checkpoint folders hold the same files, and those the same tensors and texts, bit by bit.
pub fn assert_same_checkpoint(one: &Path, other: &Path) {
    let files = tensor_files(one);
    assert_eq!(files, tensor_files(other), "{} and {}", one.display(), other.display());
    assert!(files.len() >= 3, "a checkpoint has weights, averages and moments: {files:?}");
    for file in &files {
        let [a, b] = [one, other].map(|folder| read(&folder.join(file)));
        assert_eq!(a.metadata, b.metadata, "metadata of {file}");
        let names = |bundle: &Bundle| bundle.tensors.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&a), names(&b), "{file}");
        for ((name, a), b) in a.tensors.iter().zip(b.tensors.values()) {
            assert_eq!((a.kind(), a.size()), (b.kind(), b.size()), "{file}: {name}");
            let differing = bytes(a).iter().zip(bytes(b)).filter(|(a, b)| *a != b).count();
            assert_eq!(differing, 0, "{file}: {name}: bytes that differ");
        }
    }
    let [one, other] = [one, other].map(|folder| state(&folder.join("state.json")));
    assert_eq!(one, other, "state.json");
}

/// The largest difference between weights of two files of one architecture.
pub fn largest_difference(one: &Path, other: &Path) -> f64 {
    let (a, b) = (read(one), read(other));
    assert_eq!(a.tensors.len(), b.tensors.len());
    let difference = |(name, a): (&String, &Tensor)| (a - &b.tensors[name]).abs().max().double_value(&[]);
    a.tensors.iter().map(difference).fold(0.0, f64::max)
}

/// The norm of the difference between the tensors of two files whose names `of` takes, by the norm of those of `one`.
pub fn relative_difference(one: &Path, other: &Path, of: impl Fn(&str) -> bool) -> f64 {
    let (a, b) = (read(one), read(other));
    assert!(a.tensors.keys().eq(b.tensors.keys()), "{} and {}", one.display(), other.display());
    let square = |tensor: &Tensor| tensor.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
    let (mut difference, mut norm) = (0.0, 0.0);
    for (name, tensor) in a.tensors.iter().filter(|(name, _)| of(name)) {
        difference += square(&(tensor.to_kind(Kind::Double) - &b.tensors[name].to_kind(Kind::Double)));
        norm += square(tensor);
    }
    assert!(norm > 0.0, "{}: nothing to compare", one.display());
    (difference / norm).sqrt()
}

fn tensor_files(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(".safetensors")).collect()
}

fn read(path: &Path) -> Bundle {
    Bundle::read(path).unwrap_or_else(|e| panic!("{e}"))
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    assert!(
        tensor.kind() != Kind::Float || tensor.isfinite().all().int64_value(&[]) == 1,
        "weights are finite"
    );
    cm_model::tensor_bytes(tensor)
}

/// Everything but the files' checksums: the order of keys in a file's head is free.
fn state(path: &Path) -> serde_json::Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut state: serde_json::Value = serde_json::from_str(&text).expect("state.json is JSON");
    let object = state.as_object_mut().expect("state.json is an object");
    object.remove("files").expect("state.json lists files");
    state
}
