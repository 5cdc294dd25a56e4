//! Archives that say the truth about gigabytes of nothing: an error before any memory is reserved.
//!
//! Alone in its binary, since it watches the address space of the whole process.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::path::Path;

use cm_data::{arrays, npz};

/// An archive of `bytes` zeros under an array's header that says so: everything in it is true.
fn blank_npz(path: &Path, array: &str, header: &str, bytes: u64) {
    let mut archive = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated)
        .compression_level(Some(1));
    archive.start_file(array, options).unwrap();
    let length = (header.len() as u16).to_le_bytes();
    archive.write_all(&[b"\x93NUMPY\x01\x00".as_slice(), &length, header.as_bytes()].concat()).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(bytes), &mut archive).unwrap();
    archive.finish().unwrap();
}

/// The most address space that this process ever had, in KiB.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse().unwrap()
}

#[test]
fn what_unpacks_to_gigabytes_of_nothing_is_refused() {
    const BYTES: u64 = 1 << 30;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    let header = |descr: &str, shape: &str| {
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}\n")
    };
    blank_npz(&path, "arr_0.npy", &header("|u1", "16777216, 8, 8"), BYTES);
    assert!(path.metadata().unwrap().len() < 16 << 20);
    let before = peak_memory();
    let error = npz::read(&path, true, None).err().unwrap().to_string();
    assert!(error.contains("arr_0: claims 1073741") && error.contains("bytes unpacked"), "{error}");
    assert!(peak_memory() - before < 16 << 10);

    // Blank images of a usual size are images, and statistics are held to the same.
    blank_npz(&path, "arr_0.npy", &header("|u1", "16384, 8, 8"), 1 << 20);
    assert!(npz::read(&path, true, None).is_ok());
    blank_npz(&path, "mu.npy", &header("<f8", "67108864,"), BYTES / 2);
    let before = peak_memory();
    let error = arrays::read(&path, &["mu"]).unwrap_err().to_string();
    assert!(error.contains("mu: claims") && error.contains("bytes unpacked"), "{error}");
    assert!(peak_memory() - before < 16 << 10);
}
