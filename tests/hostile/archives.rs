//! Zips of images: their directory, their members, and the ways out of them.

use std::io::{Cursor, Write};

use cm_data::SourceKind;
use proptest::prelude::*;
use zip::write::SimpleFileOptions;

use crate::data::{folder, read_all};
use crate::images::png;
use crate::mutate::{config, damaged};

/// An archive of these files.
pub fn zip(files: &[(&str, &[u8])], deflate: bool) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let method = if deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    for (name, bytes) in files {
        archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

fn whole(deflate: bool) -> Vec<u8> {
    zip(&[("a.png", &png()), ("dataset.json", br#"{"labels": [["a.png", 3]]}"#)], deflate)
}

fn read(bytes: &[u8]) -> Option<String> {
    let dir = folder(&[("a.zip", bytes)]);
    let fault = read_all(SourceKind::Zip, &dir.path().join("a.zip"));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["a.zip"], "nothing is unpacked");
    fault
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn zips_of_images(bytes in damaged(vec![whole(false), whole(true)])) {
        let fault = read(&bytes);
        let unharmed = bytes == whole(false) || bytes == whole(true);
        prop_assert!(!unharmed || fault.is_none(), "{fault:?}");
    }

    #[test]
    fn names_of_members(names in proptest::collection::vec("[./\\\\:aC\n\u{1b}é]{1,6}", 1..4)) {
        let mut names: Vec<String> = names.into_iter().map(|name| name + ".png").collect();
        names.sort();
        names.dedup();
        let files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b"not a picture"[..])).collect();
        let climbs = |name: &String| {
            name.starts_with(['/', '\\']) || name.get(1..2) == Some(":") || name.split(['/', '\\']).any(|part| part == "..")
        };
        let fault = read(&zip(&files, false)).expect("there is no picture in it");
        prop_assert!(!names.iter().any(climbs) || fault.contains("refusing member"), "{names:?}: {fault}");
        prop_assert!(!fault.contains('\u{1b}'), "a name reaches the terminal as it is: {fault:?}");
    }
}

/// Found by [`names_of_members`]: names went to the terminal as they were.
#[test]
fn names_with_control_characters_are_refused_or_shown_as_such() {
    for name in ["\n.png", "a\u{1b}[2J.png", "a\r/dataset.json"] {
        let fault = read(&zip(&[("a.png", &png()), (name, &png())], false)).unwrap();
        assert!(fault.contains(&format!("refusing member {name:?}")), "{fault}");
    }
    // The icon of a folder of macOS.
    assert_eq!(read(&zip(&[("a.png", &png()), ("Icon\r", b"")], false)), None);
}

#[test]
fn links_in_archives_are_refused() {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    archive.start_file("a.png", SimpleFileOptions::default()).unwrap();
    archive.write_all(&png()).unwrap();
    archive.add_symlink("b.png", "../../elsewhere.png", SimpleFileOptions::default()).unwrap();
    let fault = read(&archive.finish().unwrap().into_inner()).unwrap();
    assert!(fault.contains("refusing member \"b.png\"") && fault.contains("link"), "{fault}");

    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Directory] {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(0);
        tar.append_link(&mut header, "cifar-10-batches-bin/data_batch_1.bin", "../../elsewhere").unwrap();
        let dir = folder(&[("cifar-10-binary.tar.gz", &crate::data::gz(&tar.into_inner().unwrap()))]);
        let fault = read_all(SourceKind::Cifar10, dir.path()).unwrap();
        assert!(fault.contains("refusing member") && fault.contains("data_batch_1.bin"), "{kind:?}: {fault}");
    }
}

/// The end of a zip says how many members its directory has.
#[test]
fn a_directory_that_claims_more_members_than_it_holds_is_refused() {
    let mut bytes = whole(false);
    let end = bytes.len() - 22;
    bytes[end + 8..end + 12].fill(0xff);
    assert!(read(&bytes).is_some());
}
