//! Files of `torch.save`: zip and pickle. Programs of the pickle machine are in crates/cm-net/tests/import_torch.rs.

use std::path::PathBuf;

use cm_net::import::{describe, read_torch};
use proptest::prelude::*;
use tch::Kind;

use crate::data::folder;
use crate::mutate::{assert_memory_bounded, assert_one_line, config, damaged};

fn fixture(name: &str) -> Vec<u8> {
    let path: PathBuf = cm_tests::root().join("crates/cm-net/tests/fixtures").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn originals() -> Vec<Vec<u8>> {
    ["dtypes.pt", "views.pt", "views_legacy.pt", "training.pt", "dtypes_protocol5.pt"].map(fixture).into()
}

/// Bytes of all tensors that have memory of their own; `None` where the file is refused.
fn read(bytes: &[u8]) -> Option<usize> {
    let dir = folder(&[("damaged.pt", bytes)]);
    let path = dir.path().join("damaged.pt");
    describe(&path).err().iter().for_each(|error| assert_one_line(&error.to_string()));
    let tensors = read_torch(&path).map_err(|error| assert_one_line(&error.to_string())).ok();
    assert_memory_bounded();
    let mut storages = std::collections::BTreeMap::new();
    for tensor in tensors?.values() {
        // Every element can be read.
        let _ = tensor.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
        let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
        let largest = storages.entry(tensor.data_ptr() as usize).or_insert(0);
        *largest = size.max(*largest);
    }
    Some(storages.values().sum())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn files(bytes in damaged(originals())) {
        let size = read(&bytes);
        prop_assert!(size.is_none_or(|size| size <= bytes.len()), "{size:?} bytes out of {}", bytes.len());
        prop_assert!(size.is_some() || !originals().contains(&bytes));
    }
}

/// A zip of stored entries by hand: `(name, bytes)`, and further names for the bytes of the last one.
fn zip(entries: &[(&str, &[u8])], aliases: &[String]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    let fields = |bytes: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        let size = (bytes.len() as u32).to_le_bytes();
        [&crc.sum().to_le_bytes()[..], &size, &size].concat()
    };
    let mut last = (0, Vec::new());
    let mut count = 0_u16;
    let entry = |name: &str, fields: &[u8], at: u32| {
        let head =
            [b"PK\x01\x02", &[0; 12][..], fields, &(name.len() as u16).to_le_bytes(), &[0; 12]].concat();
        [&head, &at.to_le_bytes()[..], name.as_bytes()].concat()
    };
    for (name, bytes) in entries {
        last = (file.len() as u32, fields(bytes));
        file.extend(
            [b"PK\x03\x04", &[0; 10][..], &last.1, &(name.len() as u16).to_le_bytes(), &[0; 2]].concat(),
        );
        file.extend(name.as_bytes());
        file.extend(*bytes);
        directory.extend(entry(name, &last.1, last.0));
        count += 1;
    }
    for name in aliases {
        directory.extend(entry(name, &last.1, last.0));
        count += 1;
    }
    let at = (file.len() as u32).to_le_bytes();
    let size = (directory.len() as u32).to_le_bytes();
    let count = count.to_le_bytes();
    [&file, &directory, &b"PK\x05\x06\0\0\0\0"[..], &count, &count, &size, &at, &[0; 2]].concat()
}

/// A state dict of `count` tensors of 1000 floats, each of a storage of its own.
fn pickle(count: usize) -> Vec<u8> {
    let mut pickle = b"\x80\x02}(".to_vec();
    for i in 0..count {
        let key = format!("{i:04}");
        let text = |text: &str| [b"U", &[text.len() as u8][..], text.as_bytes()].concat();
        pickle.extend(text(&key));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle.extend(text("storage"));
        pickle.extend(b"ctorch\nFloatStorage\n");
        pickle.extend([text(&key), text("cpu")].concat());
        pickle.extend(b"M\xe8\x03tQK\x00M\xe8\x03\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR");
    }
    pickle.extend(b"u.");
    pickle
}

/// Names of a zip's directory that all mean the same bytes would multiply what is read.
#[test]
fn storages_that_overlap_are_refused() {
    let data = vec![0; 4000];
    let entries = |count| [("a/data.pkl", pickle(count)), ("a/data/0000", data.clone())];
    let whole = entries(1);
    let whole: Vec<_> = whole.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    assert_eq!(read(&zip(&whole, &[])), Some(4000));
    let many = entries(500);
    let many: Vec<_> = many.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
    let aliases: Vec<String> = (1..500).map(|i| format!("a/data/{i:04}")).collect();
    let bytes = zip(&many, &aliases);
    assert!(bytes.len() < 200_000);
    let dir = folder(&[("bomb.pt", &bytes)]);
    let error = read_torch(&dir.path().join("bomb.pt")).unwrap_err().to_string();
    assert!(error.contains("bomb.pt") && error.contains("claim more bytes than the file has"), "{error}");
}
