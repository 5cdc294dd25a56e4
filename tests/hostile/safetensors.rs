//! Safetensors files, and what ours say about themselves in their metadata.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use cm_model::schedule::NoiseCond;
use cm_model::{Bundle, LpipsNet, LpipsReading, LpipsSpec};
use cm_net::import::{describe, load_any};
use cm_net::{Inception, Lpips, ModelFile, ModelSpec, PrecondSpec, Role, SongUnetSpec, inspect};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::data::folder;
use crate::mutate::{assert_memory_bounded, assert_one_line, config, damaged, damaged_text};

/// A small network.
pub fn net() -> SongUnetSpec {
    SongUnetSpec {
        image_channels: 1,
        num_classes: 3,
        model_channels: 4,
        channel_mult_emb: 1,
        ..crate::common::song()
    }
}

pub fn precond() -> PrecondSpec {
    PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    }
}

fn spec() -> ModelSpec {
    let mut spec = ModelSpec::new(Role::Consistency, net().into(), precond());
    spec.about.insert("step".into(), "30".into());
    spec
}

/// A whole file of that network.
static MODEL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let built = cm_net::build(&net().into(), 1, Device::Cpu).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    built.params().write(&path, &spec().metadata()).unwrap();
    std::fs::read(path).unwrap()
});

/// A file of three tensors.
static SMALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let tensor = |size: &[i64], kind| Tensor::ones(size, (kind, Device::Cpu));
    let tensors = [
        ("a.weight".to_owned(), tensor(&[2, 3], Kind::Float)),
        ("b".to_owned(), tensor(&[4], Kind::BFloat16)),
        ("c".to_owned(), tensor(&[0, 3], Kind::Int64)),
    ];
    let metadata = BTreeMap::from([("note".to_owned(), "none".to_owned())]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.safetensors");
    Bundle { tensors: tensors.into(), metadata }.write(&path).unwrap();
    std::fs::read(path).unwrap()
});

/// The head and what is behind it.
fn parts(file: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    file[8..].split_at(length)
}

/// A file whose head's length is right.
fn framed(head: &[u8], data: &[u8]) -> Vec<u8> {
    [&(head.len() as u64).to_le_bytes(), head, data].concat()
}

/// A file with this description of its model.
fn described(json: &str, tensors: &[u8]) -> Vec<u8> {
    let (head, data) = parts(tensors);
    let mut head: serde_json::Value = serde_json::from_slice(head).unwrap();
    head["__metadata__"] = serde_json::json!({"consistency-rs": json});
    framed(head.to_string().as_bytes(), data)
}

fn refused<T, E: std::fmt::Display>(result: Result<T, E>) -> bool {
    let fault = result.err().map(|error| error.to_string());
    fault.iter().for_each(|text| assert_one_line(text));
    assert_memory_bounded();
    fault.is_some()
}

/// Every reader of such a file; whether the reader of tensors refuses it.
fn read_all(bytes: &[u8]) -> bool {
    let dir = folder(&[("a.safetensors", bytes)]);
    let path: &Path = &dir.path().join("a.safetensors");
    refused(Bundle::read_header(path));
    refused(describe(path));
    refused(inspect(path));
    refused(load_any(path, None));
    refused(ModelFile::read(path).and_then(|file| file.model(Device::Cpu, cm_model::Compute::default())));
    refused(Lpips::load(
        path,
        LpipsSpec { net: LpipsNet::Squeeze, reading: LpipsReading::Package },
        Device::Cpu,
    ));
    refused(Inception::load(path, Device::Cpu));
    refused(Bundle::read(path))
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn files(bytes in damaged(vec![SMALL.clone()]), head in damaged(vec![parts(&SMALL).0.to_vec()])) {
        let whole = bytes == *SMALL;
        prop_assert!(!read_all(&bytes) || !whole);
        read_all(&framed(&head, parts(&SMALL).1));
    }

    #[test]
    fn descriptions(json in damaged_text(&[
        &spec().metadata()["consistency-rs"],
        r#"{"format":1,"kind":"lpips","net":"squeeze","version":"0.1"}"#,
        r#"{"format":1,"kind":"inception","version":"2015-12-05"}"#,
    ])) {
        read_all(&described(&json, &SMALL));
    }

    #[test]
    fn heads_of_models(head in damaged(vec![parts(&MODEL).0.to_vec()])) {
        read_all(&framed(&head, parts(&MODEL).1));
    }
}

/// Found by [`descriptions`]: what a file calls itself went to the terminal as it was.
#[test]
fn what_a_file_calls_itself_is_shown_on_one_line() {
    for json in [
        r#"{"format":1,"kind":"\nception","version":"2015-12-05"}"#,
        r#"{"format":1,"kind":"lpips","net":"squeeze","version":"\u001b[2J"}"#,
    ] {
        assert!(!read_all(&described(json, &SMALL)), "the tensors themselves are whole");
    }
}

/// Descriptions of networks that a file of a kilobyte cannot hold: the weights are looked at before memory is taken.
#[test]
fn a_network_that_is_not_in_the_file_takes_no_memory() {
    let large = SongUnetSpec { model_channels: 1 << 15, ..net() };
    let json = ModelSpec::new(Role::Denoiser, large.into(), precond()).metadata()["consistency-rs"].clone();
    let dir = folder(&[("a.safetensors", &described(&json, &SMALL))]);
    let read = ModelFile::read(&dir.path().join("a.safetensors")).unwrap();
    let line = read.backbone(Device::Cpu).err().unwrap().to_string();
    assert_one_line(&line);
    assert!(line.contains("a.safetensors") && line.contains("is missing"), "{line}");
    // The weights of that network are 400 GB.
    assert_memory_bounded();
}

/// The head alone is enough to say that its sizes are not those of its tensors.
#[test]
fn a_head_whose_shapes_are_not_its_sizes_is_refused() {
    let (head, data) = (String::from_utf8(parts(&SMALL).0.to_vec()).unwrap(), parts(&SMALL).1.to_vec());
    let large = head.replace("[2,3]", "[1099511627776,3]");
    assert_ne!(large, head);
    let wrapping = head.replace("[0,24]", "[0,18446744073709551615]");
    assert_ne!(wrapping, head);
    for head in [large, wrapping] {
        let dir = folder(&[("a.safetensors", &framed(head.as_bytes(), &data))]);
        for fault in [
            Bundle::read_header(&dir.path().join("a.safetensors")).unwrap_err().to_string(),
            describe(&dir.path().join("a.safetensors")).unwrap_err().to_string(),
        ] {
            assert_one_line(&fault);
            assert!(fault.contains("a.safetensors"), "{fault}");
        }
    }
}
