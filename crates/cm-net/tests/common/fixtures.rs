//! The committed files of published forms, and what they hold.
#![allow(dead_code)] // each test binary uses a part of it

use std::fs;
use std::path::{Path, PathBuf};

use cm_model::TensorMap;
use cm_net::import::Kind as ModelKind;
use flate2::read::GzDecoder;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

/// What the fixtures with code in them would make where a test runs.
pub const MARK: &str = "a-pickle-ran-code";

/// What the small networks in OpenAI's names do not say of themselves.
pub const TINY: &str = "openai:image_size=8,head_channels=32,role=consistency";

/// A kind that is there.
pub fn kind(text: &str) -> Option<ModelKind> {
    Some(text.parse().unwrap())
}

/// An error's text, which is one line.
pub fn one_line(error: cm_net::Error) -> String {
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

/// The tensors of two files are the same, bit for bit.
pub fn assert_same(got: &TensorMap, want: &TensorMap) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, tensor) in want {
        assert!(got[name].kind() == tensor.kind() && got[name].equal(tensor), "{name}");
    }
}

/// The committed file.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A folder with copies of a file or folder of the fixtures, whatever ends in `.gz` unpacked.
pub fn unpacked(name: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join(name);
    let packed = fixture(&format!("{name}.gz"));
    if packed.is_file() {
        fs::write(&target, gunzip(&packed)).unwrap();
    } else {
        copy(&fixture(name), &target);
    }
    (folder, target)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let from = entry.unwrap().path();
        let name = from.file_name().unwrap().to_str().unwrap();
        if from.is_dir() {
            copy(&from, &to.join(name));
        } else if let Some(name) = name.strip_suffix(".gz") {
            fs::write(to.join(name), gunzip(&from)).unwrap();
        } else {
            fs::copy(&from, to.join(name)).unwrap();
        }
    }
}

fn gunzip(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let packed = fs::File::open(path).unwrap();
    std::io::Read::read_to_end(&mut GzDecoder::new(packed), &mut bytes).unwrap();
    bytes
}

/// The weight that the fixtures have under `name`: `((89·j) mod 251 − 125)/512` with j = fnv1a(name) + i mod 251.
pub fn weight(name: &str, shape: &[i64], kind: Kind) -> Tensor {
    let hash =
        name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let count: i64 = shape.iter().product();
    let place = (Tensor::arange(count, (Kind::Int64, Device::Cpu)) + i64::from(hash)).remainder(251);
    let value = ((place * 89).remainder(251) - 125).to_kind(Kind::Float) / 512.0;
    value.to_kind(kind).view(shape)
}
