//! Headers that claim sizes which their files cannot hold: an error before any memory is reserved.
//!
//! Alone in its binary, since it watches the address space of the whole process.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::path::Path;

use cm_data::{SourceKind, SourceSpec, cifar};
use proptest::prelude::*;

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tar_gz(claimed: u64) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(format!("{}/data_batch_1.bin", cifar::FOLDER)).unwrap();
    header.set_size(claimed);
    header.set_cksum();
    gz(&[header.as_bytes().as_slice(), &[0; 4096]].concat())
}

fn open(kind: SourceKind, path: &Path) -> Option<String> {
    SourceSpec::new(kind, Some(path.into())).open().err().map(|e| e.to_string())
}

/// The most address space that this process ever had, in KiB; memory counts once it is reserved, touched or not.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn claims_take_no_memory(log in proptest::collection::vec(0.0_f64..13.0, 4), tar in 20.0_f64..33.0) {
        // The product of the sides lies between 1 and 2^52, most often within what a set may take.
        let dims: Vec<u32> = log.iter().map(|l| l.exp2() as u32 + 9).collect();
        let dir = tempfile::tempdir().unwrap();
        let idx: Vec<u8> =
            [0x803, dims[0], dims[1], dims[2]].iter().flat_map(|v| v.to_be_bytes()).chain([0; 50]).collect();
        let shape = dims.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let text = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({shape}), }}");
        let npy = [b"\x93NUMPY\x01\x00".as_slice(), &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat();
        for (kind, name, bytes) in [
            (SourceKind::Idx, "a-images-idx3-ubyte", idx.clone()),
            (SourceKind::Idx, "b-images-idx3-ubyte.gz", gz(&idx)),
            (SourceKind::Npz, "a.npy", npy),
            (SourceKind::Cifar10, "c.tar.gz", tar_gz(tar.exp2() as u64)),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let before = peak_memory();
            prop_assert!(open(kind, &path).is_some(), "{name}");
            // Room for what an allocator or a library may map on first use.
            let grown = peak_memory() - before;
            prop_assert!(grown < 16 << 10, "{name} of {dims:?}: the address space grew by {grown} KiB");
        }
    }
}
