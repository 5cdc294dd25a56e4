//! CIFAR, IDX, npy, npz, `dataset.json` and the config of a data section.

use std::io::{Cursor, Write};
use std::path::Path;

use cm_data::{Batch, InspectOptions, Shape, SourceKind, SourceSpec, arrays, inspect, npz};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::mutate::{assert_memory_bounded, assert_one_line, config, damaged, damaged_text, scratch};

/// Opens and reads everything. `Some(message)` on an error.
pub fn read_all(kind: SourceKind, path: &Path) -> Option<String> {
    let spec = SourceSpec::new(kind, Some(path.into()));
    let result = spec.open().and_then(|set| Batch::gather(&*set, 0..set.len().min(64) as u32));
    let fault = result.err().map(|error| error.to_string());
    fault.iter().for_each(|text| assert_one_line(text));
    assert_memory_bounded();
    fault
}

/// A folder with these files.
pub fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = scratch();
    files.iter().for_each(|(name, bytes)| std::fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn idx_images() -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 3];
    bytes.extend(0..60);
    bytes
}

fn idx_labels() -> Vec<u8> {
    vec![0, 0, 8, 1, 0, 0, 0, 5, 0, 1, 2, 3, 4]
}

/// A batch file of CIFAR-10.
fn records(count: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|i| std::iter::once(i as u8 % 10).chain((0..3072).map(move |p| (p + i) as u8)))
        .collect()
}

/// The archive with one file for each training batch; every header's checksum is right for what it says.
fn tar_of(headers: Vec<u8>) -> Vec<u8> {
    let mut tar = headers;
    for header in tar.chunks_exact_mut(512).filter(|block| block[257..].starts_with(b"ustar")) {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}

fn plain_tar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for i in 1..=5 {
        let mut header = tar::Header::new_ustar();
        header.set_size(3073);
        header.set_mode(0o644);
        header.set_cksum();
        let name = format!("cifar-10-batches-bin/data_batch_{i}.bin");
        tar.append_data(&mut header, name, records(1).as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

fn npy(descr: &str, shape: &str, data: usize) -> Vec<u8> {
    with_header(
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}\n").as_bytes(),
        data,
    )
}

/// An npy file whose header's length is right.
fn with_header(header: &[u8], data: usize) -> Vec<u8> {
    let length = (header.len() as u16).to_le_bytes();
    [b"\x93NUMPY\x01\x00", &length[..], header, &vec![3; data]].concat()
}

fn samples() -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    npz::write(&mut bytes, Shape::square(3, 2), &[5; 24], Some(&[0, 1])).unwrap();
    bytes.into_inner()
}

fn statistics(mu: &[u8], sigma: &[u8]) -> Vec<u8> {
    crate::archives::zip(&[("mu.npy", mu), ("sigma.npy", sigma)], true)
}

/// Reads the statistics of an archive.
fn read_arrays(bytes: &[u8]) -> Option<String> {
    let dir = folder(&[("a.npz", bytes)]);
    let path = dir.path().join("a.npz");
    let names = arrays::names(&path).and_then(|_| arrays::read(&path, &["mu", "sigma"]));
    let fault = names.err().map(|error| error.to_string());
    fault.iter().for_each(|text| assert_one_line(text));
    assert_memory_bounded();
    fault
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn cifar_files(bytes in damaged(vec![records(2)]), which in 1_usize..6) {
        let whole = bytes == records(2);
        let name = |i| format!("data_batch_{i}.bin");
        let (dir, other) = (scratch(), records(2));
        for i in 1..=5 {
            std::fs::write(dir.path().join(name(i)), if i == which { &bytes } else { &other }).unwrap();
        }
        let fault = read_all(SourceKind::Cifar10, dir.path());
        prop_assert!(!whole || fault.is_none(), "{fault:?}");
        prop_assert!(bytes.len() == 2 * 3073 || fault.is_some(), "{} bytes passed", bytes.len());
    }

    #[test]
    fn cifar_archives(tar in damaged(vec![plain_tar()]), mended: bool, packed in damaged(vec![gz(&plain_tar())])) {
        for bytes in [gz(&if mended { tar_of(tar) } else { tar }), packed] {
            let dir = folder(&[("cifar-10-binary.tar.gz", &bytes)]);
            read_all(SourceKind::Cifar10, dir.path());
        }
    }

    #[test]
    fn idx(images in damaged(vec![idx_images()]), labels in damaged(vec![idx_labels()]), packed: bool) {
        let pack = |bytes: &[u8]| if packed { gz(bytes) } else { bytes.to_vec() };
        let whole = images == idx_images() && labels == idx_labels();
        let files = [("a-images-idx3-ubyte", &pack(&images)[..]), ("a-labels-idx1-ubyte", &pack(&labels)[..])];
        let fault = read_all(SourceKind::Idx, folder(&files).path());
        prop_assert!(!whole || fault.is_none(), "{fault:?}");
    }

    #[test]
    fn idx_gz_stream(bytes in damaged(vec![gz(&idx_images())])) {
        let dir = folder(&[("a-images-idx3-ubyte.gz", &bytes)]);
        let fault = read_all(SourceKind::Idx, &dir.path().join("a-images-idx3-ubyte.gz"));
        let whole = gz(&idx_images());
        prop_assert!(bytes != whole || fault.is_none());
        prop_assert!(!whole.starts_with(&bytes) || bytes.len() == whole.len() || fault.is_some(), "a cut stream passed");
    }

    #[test]
    fn npy_files(
        bytes in damaged(vec![npy("|u1", "2, 3, 3, 3", 54), npy("|u1", "4, 2, 2", 16), npy("<i8", "2,", 16)]),
        header in damaged(vec![b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3, 3, 3), }".to_vec()]),
        dims in proptest::collection::vec(any::<u64>(), 0..5),
    ) {
        let dims = dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        for bytes in [bytes, with_header(&header, 54), npy("|u1", &dims, 54)] {
            read_all(SourceKind::Npz, &folder(&[("a.npy", &bytes)]).path().join("a.npy"));
        }
    }

    #[test]
    fn npz_files(bytes in damaged(vec![samples()]), inner in damaged(vec![npy("|u1", "2, 3, 3, 3", 54)])) {
        let read = |bytes: &[u8]| read_all(SourceKind::Npz, &folder(&[("a.npz", bytes)]).path().join("a.npz"));
        let fault = read(&bytes);
        prop_assert!(bytes != samples() || fault.is_none(), "{fault:?}");
        let cut = samples().starts_with(&bytes) && bytes.len() < samples().len();
        prop_assert!(!cut || fault.is_some(), "a cut archive passed");
        read(&crate::archives::zip(&[("arr_0.npy", &inner)], true));
    }

    #[test]
    fn npz_statistics(
        mu in damaged(vec![npy("<f8", "2,", 16), npy(">f4", "2,", 8), npy("<f2", "2,", 4), npy("|u1", "2,", 2)]),
        bytes in damaged(vec![statistics(&npy("<f8", "2,", 16), &npy("<f4", "2, 2", 16))]),
    ) {
        read_arrays(&statistics(&mu, &npy("<f4", "2, 2", 16)));
        read_arrays(&bytes);
    }

    #[test]
    fn dataset_json(text in damaged_text(&[
        r#"{"labels": [["a.png", 3], ["b/c.png", 1]]}"#,
        r#"{"labels": null}"#,
        r#"{"labels": [["a.png", [0.5, 1]], ["..\\a.png", -3]], "more": {"a": [[[[]]]]}}"#,
    ])) {
        let dir = folder(&[("a.png", &crate::images::png()), ("dataset.json", text.as_bytes())]);
        read_all(SourceKind::Folder, dir.path());
    }

    #[test]
    fn data_sections(text in damaged_text(&[
        "kind = 'digits'\nholdout = 10\nflip = true\nsplit = 'train'\nlabels = 'none'",
        "kind = 'folder'\npath = 'nowhere'\nresolution = 32\nchannels = 'rgb'\nfit = 'stretch'\nfilter = 'area'",
        "kind = 'emoji'\nresolution = 16\nfit = 'center_crop'\nholdout = 4\nnum_classes = 4",
    ])) {
        let Ok(spec) = toml::from_str::<SourceSpec>(&text) else { return Ok(()) };
        let fault = match spec.kind {
            SourceKind::Digits | SourceKind::Emoji => spec.open().map(drop),
            _ => spec.validate(),
        };
        fault.err().iter().for_each(|error| assert_one_line(&error.to_string()));
        assert_memory_bounded();
    }

    #[test]
    fn files_of_any_kind_are_inspected(bytes in damaged(vec![
        samples(), idx_images(), gz(&idx_images()), crate::images::png(), records(1), npy("|u1", "4, 2, 2", 16),
    ])) {
        let dir = folder(&[("file", &bytes)]);
        for place in [dir.path(), &dir.path().join("file")] {
            inspect(place, &InspectOptions::default()).err().iter().for_each(|e| assert_one_line(&e.to_string()));
        }
        assert_memory_bounded();
    }
}

#[test]
fn nesting_of_any_depth_is_an_error() {
    let dir = folder(&[("a.png", &crate::images::png()), ("dataset.json", "[".repeat(100_000).as_bytes())]);
    assert!(read_all(SourceKind::Folder, dir.path()).unwrap().contains("dataset.json"));
    let header = [b"{'descr': ".as_slice(), &b"[".repeat(9000)].concat();
    let dir = folder(&[("a.npy", &with_header(&header, 4))]);
    assert!(read_all(SourceKind::Npz, &dir.path().join("a.npy")).unwrap().contains("a.npy"));
}
