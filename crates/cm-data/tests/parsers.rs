//! Damaged files: whatever the bytes, a reader returns a set or a one-line error.

use std::io::{Cursor, Write};
use std::path::Path;

use cm_data::{Batch, Shape, SourceKind, SourceSpec, npz};
use proptest::collection::vec;
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

/// Opens and reads everything. `Some(message)` on an error.
fn read_all(kind: SourceKind, path: &Path) -> Option<String> {
    let spec = SourceSpec::new(kind, Some(path.into()));
    let result = spec.open().and_then(|set| Batch::gather(&*set, 0..set.len().min(64) as u32));
    let text = result.err()?.to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    assert!(text.len() < 2000, "{text}");
    Some(text)
}

/// Bytes with some overwritten, then cut.
fn damaged(whole: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = whole.len();
    // Headers stand in front (or, in a zip, at the end), so most edits go there.
    let place = prop_oneof![0..len.min(200), len.saturating_sub(200)..len, 0..len];
    (vec((place, any::<u8>()), 0..6), prop_oneof![3 => Just(len), 1 => 0..=len]).prop_map(
        move |(edits, keep)| {
            let mut bytes = whole.clone();
            edits.into_iter().for_each(|(at, value)| bytes[at] = value);
            bytes.truncate(keep);
            bytes
        },
    )
}

fn gz(bytes: &[u8]) -> Vec<u8> {
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

fn png() -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let image = image::RgbImage::from_fn(6, 6, |x, y| image::Rgb([x as u8, y as u8, 9]));
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn image_zip() -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in [("a.png", png()), ("dataset.json", br#"{"labels": [["a.png", 3]]}"#.to_vec())] {
        archive.start_file(name, SimpleFileOptions::default()).unwrap();
        archive.write_all(&bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn samples() -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    npz::write(&mut bytes, Shape::square(3, 2), &[5; 24], Some(&[0, 1])).unwrap();
    bytes.into_inner()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn idx(images in damaged(idx_images()), labels in damaged(idx_labels()), packed: bool) {
        let dir = tempfile::tempdir().unwrap();
        let pack = |bytes: Vec<u8>| if packed { gz(&bytes) } else { bytes };
        let whole = images == idx_images() && labels == idx_labels();
        std::fs::write(dir.path().join("a-images-idx3-ubyte"), pack(images)).unwrap();
        std::fs::write(dir.path().join("a-labels-idx1-ubyte"), pack(labels)).unwrap();
        let fault = read_all(SourceKind::Idx, dir.path());
        prop_assert!(!whole || fault.is_none(), "{fault:?}");
    }

    #[test]
    fn idx_gz_stream(bytes in damaged(gz(&idx_images()))) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a-images-idx3-ubyte.gz");
        std::fs::write(&path, &bytes).unwrap();
        let fault = read_all(SourceKind::Idx, &path);
        prop_assert!(bytes != gz(&idx_images()) || fault.is_none());
        prop_assert!(bytes.len() == gz(&idx_images()).len() || fault.is_some(), "a cut stream passed");
    }

    #[test]
    fn cifar_records(count in 0_usize..4, extra in 0_usize..3, label: u8, first: u8) {
        let mut bytes = vec![first; count * 3073];
        if let Some(record) = bytes.get_mut(0) {
            *record = label;
        }
        (1..count).for_each(|i| bytes[i * 3073] = 0);
        bytes.extend(vec![0; extra]);
        let dir = tempfile::tempdir().unwrap();
        for i in 1..=5 {
            std::fs::write(dir.path().join(format!("data_batch_{i}.bin")), &bytes).unwrap();
        }
        let fault = read_all(SourceKind::Cifar10, dir.path());
        prop_assert_eq!(fault.is_none(), count > 0 && extra == 0 && label < 10, "{:?}", fault);
    }

    #[test]
    fn npz_archive(bytes in damaged(samples())) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("samples.npz");
        std::fs::write(&path, &bytes).unwrap();
        let fault = read_all(SourceKind::Npz, &path);
        prop_assert!(bytes != samples() || fault.is_none(), "{fault:?}");
        prop_assert!(bytes.len() == samples().len() || fault.is_some(), "a cut archive passed");
    }

    #[test]
    fn npy_header(header in "[{}()\\[\\]':, a-z0-9<|]{0,80}", shape in vec(any::<u64>(), 0..5)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npy");
        let dims = shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        for text in [header, format!("{{'descr': '|u1', 'fortran_order': False, 'shape': ({dims}), }}")] {
            let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
            bytes.extend((text.len() as u16).to_le_bytes());
            bytes.extend(text.as_bytes());
            bytes.extend([0; 100]);
            std::fs::write(&path, bytes).unwrap();
            // A hundred bytes are no images of such sides.
            prop_assert!(read_all(SourceKind::Npz, &path).is_some());
        }
    }

    #[test]
    fn image_in_a_folder(bytes in damaged(png())) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), bytes).unwrap();
        read_all(SourceKind::Folder, dir.path());
    }

    #[test]
    fn zip_of_images(bytes in damaged(image_zip())) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.zip");
        std::fs::write(&path, &bytes).unwrap();
        let fault = read_all(SourceKind::Zip, &path);
        prop_assert!(bytes != image_zip() || fault.is_none(), "{fault:?}");
    }

    #[test]
    fn dataset_json(text in r#"[{}\[\]":,labeps.ng0-9 \-]{0,60}"#, name in "[a.png/\\\\]{1,8}", label: i64) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), png()).unwrap();
        let entry = serde_json::json!({"labels": [[name, label]]}).to_string();
        for json in [text, entry, "[".repeat(100_000)] {
            std::fs::write(dir.path().join("dataset.json"), json).unwrap();
            read_all(SourceKind::Folder, dir.path());
        }
    }
}
