//! Sets as a config opens them, and every wrong input with its one line.

use std::io::{Cursor, Write};
use std::path::Path;

use cm_data::shards::{self, Packing};
use cm_data::{
    Batch, Channels, Error, Fit, LabelRule, Loader, LoaderSpec, Shape, SourceKind, SourceSpec, Split,
};
use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A square RGB image of one colour.
fn flat(side: u32, value: u8) -> Vec<u8> {
    png(RgbImage::from_pixel(side, side, Rgb([value, value / 2, 255 - value])))
}

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| write(dir.path(), name, bytes));
    dir
}

fn zip(files: &[(&str, Vec<u8>)], deflate: bool) -> tempfile::NamedTempFile {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let method = if deflate { zip::CompressionMethod::Deflated } else { zip::CompressionMethod::Stored };
    for (name, bytes) in files {
        archive.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(bytes).unwrap();
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&archive.finish().unwrap().into_inner()).unwrap();
    file
}

fn spec(kind: SourceKind, path: &Path) -> SourceSpec {
    SourceSpec::new(kind, Some(path.into()))
}

/// The one-line message of an error.
fn message<T>(result: Result<T, Error>) -> String {
    let text = result.err().expect("an error").to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    text
}

fn edm_layout() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        (
            "dataset.json",
            br#"{"labels": [["00000/a.png", 1], ["00001/b.png", 6], ["00001/c.png", 1]]}"#.to_vec(),
        ),
        ("00001/b.png", flat(4, 20)),
        ("00000/a.png", flat(4, 10)),
        ("00001/c.png", flat(4, 30)),
        ("readme.txt", b"hello".to_vec()),
        (".hidden.png", b"no image".to_vec()),
        ("__MACOSX/00000/._a.png", b"no image".to_vec()),
    ]
}

#[test]
fn a_folder_and_its_zips_are_the_same_set() {
    let dir = folder(&edm_layout());
    let want = spec(SourceKind::Folder, dir.path()).open().unwrap();
    assert_eq!((want.len(), want.shape(), want.num_classes()), (3, Shape::square(3, 4), 7));
    assert_eq!(want.labels(), Some(&[1, 6, 1][..]));
    // Sorted by name: a, b, c, whose red planes are 10, 20, 30.
    assert_eq!([0, 1, 2].map(|i| want.get(i).unwrap().pixels[0]), [10, 20, 30]);
    assert_eq!([0, 16, 32].map(|i| want.get(1).unwrap().pixels[i]), [20, 10, 235]);
    for deflate in [false, true] {
        let file = zip(&edm_layout(), deflate);
        let got = spec(SourceKind::Zip, file.path()).open().unwrap();
        assert_eq!((got.len(), got.labels()), (3, want.labels()));
        for i in 0..3 {
            assert_eq!(got.get(i).unwrap(), want.get(i).unwrap());
        }
    }
}

#[test]
fn a_zip_around_a_folder_finds_its_dataset_json() {
    let inner: Vec<(String, Vec<u8>)> =
        edm_layout().into_iter().map(|(n, b)| (format!("outer/{n}"), b)).collect();
    let borrowed: Vec<(&str, Vec<u8>)> = inner.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    let file = zip(&borrowed, true);
    assert_eq!(spec(SourceKind::Zip, file.path()).open().unwrap().labels(), Some(&[1, 6, 1][..]));
}

#[test]
fn class_prefixes_are_labels() {
    let dir = folder(&[
        ("dog_000.png", flat(4, 1)),
        ("cat_000.png", flat(4, 2)),
        ("dog_001.png", flat(4, 3)),
        ("cat_001.png", flat(4, 4)),
    ]);
    let set = spec(SourceKind::Folder, dir.path()).open().unwrap();
    assert_eq!(set.labels(), Some(&[0, 0, 1, 1][..]));
    assert_eq!(set.class_names().unwrap(), ["cat", "dog"]);
    let none = SourceSpec { labels: LabelRule::None, ..spec(SourceKind::Folder, dir.path()) };
    assert_eq!((none.open().unwrap().labels(), none.open().unwrap().num_classes()), (None, 0));
}

#[test]
fn images_are_brought_to_one_size_and_colour() {
    let dir = folder(&[
        ("a.png", png(GrayImage::from_pixel(8, 4, Luma([100])))),
        ("b.png", flat(16, 60)),
        ("c.png", png(image::RgbaImage::from_pixel(4, 4, image::Rgba([0, 0, 0, 0])))),
    ]);
    let wanted = SourceSpec {
        resolution: Some(4),
        channels: Some(Channels::Rgb),
        fit: Fit::CenterCrop,
        ..spec(SourceKind::Folder, dir.path())
    };
    let set = wanted.open().unwrap();
    assert_eq!(set.get(0).unwrap().pixels, [100; 48]);
    assert_eq!([0, 16, 32].map(|i| set.get(1).unwrap().pixels[i]), [60, 30, 195]);
    assert_eq!(set.get(2).unwrap().pixels, [255; 48]);
    let grey = SourceSpec { channels: Some(Channels::Grey), ..wanted };
    // 0.2126·60 + 0.7152·30 + 0.0722·195 = 48.3
    assert_eq!(grey.open().unwrap().get(1).unwrap().pixels, [48; 16]);
}

#[test]
fn bundled_sets_need_no_path_and_scale_like_any_other() {
    let digits = SourceSpec {
        resolution: Some(16),
        fit: Fit::Stretch,
        channels: Some(Channels::Rgb),
        ..SourceSpec::new(SourceKind::Digits, None)
    };
    let set = digits.open().unwrap();
    assert_eq!((set.len(), set.shape(), set.num_classes()), (1797, Shape::square(3, 16), 10));
    let emoji = SourceSpec::new(SourceKind::Emoji, None).open().unwrap();
    assert_eq!((emoji.len(), emoji.shape(), emoji.labels()), (1906, Shape::square(3, 32), None));
}

#[test]
fn holding_out_splits_a_set_into_two_that_share_no_image() {
    let open =
        |split| SourceSpec { split, holdout: Some(10), ..SourceSpec::new(SourceKind::Digits, None) }.open();
    let all = SourceSpec::new(SourceKind::Digits, None).open().unwrap();
    let (train, test) = (open(Split::Train).unwrap(), open(Split::Test).unwrap());
    assert_eq!((train.len(), test.len()), (1618, 179));
    assert_eq!(test.get(0).unwrap(), all.get(9).unwrap());
    assert_eq!(train.get(9).unwrap(), all.get(10).unwrap());
}

#[test]
fn a_spec_survives_toml_and_refuses_unknown_keys() {
    let text = "kind = 'folder'\npath = 'd'\nresolution = 64\nchannels = 'rgb'\nfit = 'center_crop'\nfilter = 'area'\n\
                flip = true\nlabels = 'prefix'\nnum_classes = 10\nsplit = 'test'\nholdout = 5\n";
    let spec: SourceSpec = toml::from_str(text).unwrap();
    spec.validate().unwrap();
    assert_eq!(toml::from_str::<SourceSpec>(&toml::to_string(&spec).unwrap()).unwrap(), spec);
    let error = toml::from_str::<SourceSpec>("kind = 'digits'\nflipp = true").unwrap_err().to_string();
    assert!(error.contains("flipp"), "{error}");
    assert!(toml::from_str::<SourceSpec>("kind = 'cifar100'").is_err());
}

#[test]
fn keys_that_contradict_each_other_are_named() {
    let digits = || SourceSpec::new(SourceKind::Digits, None);
    let files = || spec(SourceKind::Folder, Path::new("x"));
    for (spec, says) in [
        (SourceSpec { path: Some("x".into()), ..digits() }, "data: path = x: digits is bundled"),
        (SourceSpec::new(SourceKind::Folder, None), "data: path = unset"),
        (SourceSpec::new(SourceKind::Cifar10, None), "cifar-10-binary.tar.gz"),
        (SourceSpec { resolution: Some(0), ..files() }, "data: resolution = 0: expected 1 to"),
        (SourceSpec { fit: Fit::Stretch, ..files() }, "data: resolution = unset"),
        (SourceSpec { filter: Some(cm_data::Filter::Area), ..files() }, "data: filter = area"),
        (SourceSpec { holdout: Some(1), ..files() }, "data: holdout = 1: expected at least 2"),
        (SourceSpec { holdout: Some(5), ..spec(SourceKind::Cifar10, Path::new("x")) }, "data: holdout"),
        (SourceSpec { labels: LabelRule::Prefix, ..digits() }, "data: labels = prefix"),
        (SourceSpec { num_classes: Some(0), ..digits() }, "data: num_classes = 0"),
        (SourceSpec { num_classes: Some(3), labels: LabelRule::None, ..digits() }, "data: num_classes = 3"),
        (SourceSpec { num_classes: Some(9), ..digits() }, "label 9 is outside 0..=8"),
        (
            SourceSpec { num_classes: Some(3), ..SourceSpec::new(SourceKind::Emoji, None) },
            "bundled emoji has no labels",
        ),
        (SourceSpec { split: Split::Test, ..digits() }, "set holdout = k"),
        (SourceSpec { split: Split::All, holdout: Some(5), ..digits() }, "holds nothing out"),
        (SourceSpec { resolution: Some(32), ..digits() }, "bundled digits: expected 32x32 pixels, got 8x8"),
    ] {
        let text = message(spec.open());
        assert!(text.contains(says), "{text} lacks {says}");
    }
}

#[test]
fn missing_data_says_what_was_expected_and_found() {
    let nowhere = Path::new("/nowhere/at/all");
    for kind in [SourceKind::Folder, SourceKind::Zip, SourceKind::Idx, SourceKind::Npz, SourceKind::Cifar10] {
        let text = message(spec(kind, nowhere).open());
        assert!(text.contains("/nowhere/at/all"), "{text}");
    }
    let empty = tempfile::tempdir().unwrap();
    let text = message(spec(SourceKind::Folder, empty.path()).open());
    assert!(
        text.contains("no images: expected files ending in png") && text.contains("an empty folder"),
        "{text}"
    );
    let text = message(spec(SourceKind::Zip, empty.path()).open());
    assert!(text.contains("expected a file; found a folder; set kind = \"folder\""), "{text}");
}

#[test]
fn a_wrong_resolution_names_the_file_when_it_is_read() {
    let dir = folder(&[("a.png", flat(4, 1)), ("b.png", flat(5, 1))]);
    let set = spec(SourceKind::Folder, dir.path()).open().unwrap();
    assert!(set.get(0).is_ok());
    let text = message(set.get(1));
    assert!(text.contains("b.png: expected 4x4 pixels, got 5x5") && text.contains("center_crop"), "{text}");
    let wanted = SourceSpec { resolution: Some(32), ..spec(SourceKind::Folder, dir.path()) };
    assert!(message(wanted.open().unwrap().get(0)).contains("a.png: expected 32x32 pixels, got 4x4"));
}

#[test]
fn a_corrupt_png_travels_from_the_loaders_thread_with_its_name() {
    let mut files: Vec<(String, Vec<u8>)> = (0..20).map(|i| (format!("{i:02}.png"), flat(4, i))).collect();
    let cut = files[13].1.len() / 2;
    files[13].1.truncate(cut);
    let borrowed: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    let dir = folder(&borrowed);
    let archive = zip(&borrowed, false);
    for spec in [spec(SourceKind::Folder, dir.path()), spec(SourceKind::Zip, archive.path())] {
        let loader = Loader::new(spec.open().unwrap(), LoaderSpec::new(4, 0, false)).unwrap();
        let last = loader.stream(0..5).last().unwrap();
        let text = message(last);
        assert!(text.contains("13.png: cannot decode"), "{text}");
    }
}

#[test]
fn a_label_outside_the_classes_is_named() {
    let dir = folder(&edm_layout());
    let wanted = SourceSpec { num_classes: Some(5), ..spec(SourceKind::Folder, dir.path()) };
    let text = message(wanted.open());
    assert!(text.contains("dataset.json: 00001/b.png: image 1: label 6 is outside 0..=4"), "{text}");
}

#[test]
fn members_that_lead_out_of_a_zip_are_refused() {
    for name in ["../evil.png", "a/../../evil.png", "/etc/evil.png", "..\\evil.png", "C:/evil.png"] {
        // The writer refuses such names, so one of the same length is replaced in the bytes.
        let harmless = "x".repeat(name.len());
        let file = zip(&[(harmless.as_str(), flat(4, 1))], false);
        let mut bytes = std::fs::read(file.path()).unwrap();
        let places: Vec<usize> =
            (0..bytes.len() - name.len()).filter(|&i| bytes[i..].starts_with(harmless.as_bytes())).collect();
        assert_eq!(places.len(), 2, "local header and directory");
        places.iter().for_each(|&at| bytes[at..at + name.len()].copy_from_slice(name.as_bytes()));
        std::fs::write(file.path(), bytes).unwrap();
        let text = message(spec(SourceKind::Zip, file.path()).open());
        assert!(text.contains("refusing member"), "{text}");
    }
}

#[test]
fn a_damaged_zip_is_an_error_that_names_the_member() {
    let file = zip(&[("a.png", flat(4, 1)), ("b.png", flat(4, 2))], false);
    let bytes = std::fs::read(file.path()).unwrap();
    std::fs::write(file.path(), &bytes[..bytes.len() / 2]).unwrap();
    assert!(message(spec(SourceKind::Zip, file.path()).open()).contains("as a zip"));
    // One flipped byte behind the first member's PNG header: the zip's checksum notices.
    let mut flipped = bytes.clone();
    let start = flipped.windows(4).position(|w| w == b"IDAT").unwrap();
    flipped[start + 6] ^= 1;
    std::fs::write(file.path(), &flipped).unwrap();
    assert!(message(spec(SourceKind::Zip, file.path()).open()).contains("a.png"));
}

#[test]
fn a_zip_bomb_is_refused_by_its_claim() {
    let file = zip(&[("a.png", vec![0; 300 << 20])], true);
    let text = message(spec(SourceKind::Zip, file.path()).open());
    assert!(text.contains("a.png: claims 314572800 bytes"), "{text}");
}

#[test]
fn a_ring_of_links_ends() {
    let dir = folder(&[("sub/a.png", flat(4, 1))]);
    #[cfg(unix)]
    std::os::unix::fs::symlink(dir.path(), dir.path().join("sub/ring")).unwrap();
    assert_eq!(spec(SourceKind::Folder, dir.path()).open().unwrap().len(), 1);
}

#[test]
fn decoding_in_many_threads_gives_what_one_gives() {
    let files: Vec<(String, Vec<u8>)> = (0..64).map(|i| (format!("{i:02}.png"), flat(4, i))).collect();
    let borrowed: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
    let archive = zip(&borrowed, true);
    let set = spec(SourceKind::Zip, archive.path()).open().unwrap();
    let want = Batch::gather(&*set, 0..64).unwrap();
    for workers in [1, 4] {
        let loader =
            Loader::new(set.clone(), LoaderSpec { workers, ..LoaderSpec::new(64, 1, false) }).unwrap();
        let batch = loader.batch_at(3).unwrap();
        for (row, &index) in batch.indices.iter().enumerate() {
            let at = index as usize * 48;
            assert_eq!(batch.pixels[row * 48..row * 48 + 48], want.pixels[at..at + 48]);
        }
    }
}

/// 160 WebP images in an LMDB database: plain colours of 8×8 pixels, and noise of 32×32.
fn lmdb() -> TempDir {
    folder(&[("data.mdb", include_bytes!("fixtures/images.mdb").to_vec())])
}

#[test]
fn an_lmdb_database_is_a_set_of_its_values() {
    let dir = lmdb();
    for path in [dir.path().to_path_buf(), dir.path().join("data.mdb")] {
        let wanted = SourceSpec { resolution: Some(8), fit: Fit::Stretch, ..spec(SourceKind::Lmdb, &path) };
        let set = wanted.open().unwrap();
        assert_eq!((set.len(), set.shape(), set.labels()), (160, Shape::square(3, 8), None));
        assert_eq!(
            set.get(0).unwrap().pixels.iter().copied().step_by(64).collect::<Vec<_>>(),
            [127, 254, 125]
        );
        (0..160).for_each(|index| drop(set.get(index).unwrap()));
        assert_eq!(cm_data::inspect::detect(&path).unwrap(), SourceKind::Lmdb);
    }
    let message = message(
        SourceSpec { resolution: None, ..spec(SourceKind::Lmdb, dir.path()) }
            .open()
            .and_then(|set| (0..160).try_for_each(|index| set.get(index).map(drop)).map(|()| set)),
    );
    assert!(
        message.contains("data.mdb: ") && message.contains("expected 8x8 pixels, got 32x32"),
        "{message}"
    );
    let inspection = cm_data::inspect(dir.path(), &cm_data::InspectOptions::default()).unwrap();
    assert_eq!((inspection.report.count, inspection.report.sizes.len()), (160, 2));
}

/// Ten images, of which those with the given numbers do not decode.
fn with_corrupt(broken: &[usize]) -> TempDir {
    let files: Vec<(String, Vec<u8>)> = (0..10)
        .map(|i| {
            let bytes = if broken.contains(&i) { b"no image".to_vec() } else { flat(4, 10 * i as u8) };
            (format!("{i}.png"), bytes)
        })
        .collect();
    folder(&files.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect::<Vec<_>>())
}

fn loader(dir: &TempDir, max_corrupt: usize) -> Loader {
    let wanted = SourceSpec {
        resolution: Some(4),
        channels: Some(Channels::Rgb),
        ..spec(SourceKind::Folder, dir.path())
    };
    Loader::new(wanted.open().unwrap(), LoaderSpec { max_corrupt, ..LoaderSpec::new(10, 0, false) }).unwrap()
}

#[test]
fn corrupt_images_are_passed_over_named_and_counted_up_to_a_limit() {
    let dir = with_corrupt(&[3, 4, 9]);
    let passing = loader(&dir, 3);
    let batch = passing.batch_at(0).unwrap();
    let mut seen = batch.indices.clone();
    seen.sort_unstable();
    // The next one that decodes stands in, behind the last the first.
    assert_eq!(seen, [0, 0, 1, 2, 5, 5, 5, 6, 7, 8]);
    assert!(batch.pixels.chunks_exact(48).zip(&batch.indices).all(|(image, &i)| image[0] == 10 * i as u8));
    assert_eq!(passing.batch_at(0).unwrap(), loader(&dir, 5).batch_at(0).unwrap(), "nothing else decides");
    let mut news = passing.corrupt();
    news.sort();
    assert_eq!(news.len(), 3);
    assert!(news[0].contains("3.png: cannot decode") && news[2].contains("9.png"), "{news:?}");
    assert!(passing.corrupt().is_empty(), "each is told once");
    assert_eq!(passing.corrupt_so_far(), 3, "and counted for good");

    let error = message(loader(&dir, 2).batch_at(0));
    assert!(error.contains("3 images do not decode, and max_corrupt = 2"), "{error}");
    assert!(message(loader(&dir, 0).batch_at(0)).contains(".png: cannot decode"));
    let all: Vec<usize> = (0..10).collect();
    assert!(message(loader(&with_corrupt(&all), 10).batch_at(0)).contains("10 images do not decode"));
}

#[test]
fn shards_take_no_changes_and_leave_out_what_does_not_decode() {
    let dir = with_corrupt(&[0, 7]);
    let wanted = SourceSpec {
        resolution: Some(4),
        channels: Some(Channels::Rgb),
        ..spec(SourceKind::Folder, dir.path())
    };
    let set = wanted.open().unwrap();
    let out = dir.path().join("packed");
    let packing = |max_corrupt| Packing { per_shard: 3, max_corrupt };
    assert!(message(shards::pack(&*set, &out, packing(0), &mut |_| true)).contains("0.png: cannot decode"));
    assert!(message(shards::pack(&*set, &out, packing(1), &mut |_| true)).contains("max_corrupt = 1"));
    assert!(!out.exists());
    let left_out = shards::pack(&*set, &out, packing(2), &mut |_| true).unwrap().unwrap();
    assert!(left_out.len() == 2 && left_out[1].contains("7.png"), "{left_out:?}");
    let packed = spec(SourceKind::Shards, &out);
    let back = packed.open().unwrap();
    let values: Vec<u8> = (0..back.len()).map(|i| back.get(i).unwrap().pixels[0]).collect();
    assert_eq!(values, [10, 20, 30, 40, 50, 60, 80, 90]);
    assert_eq!(cm_data::inspect::detect(&out).unwrap(), SourceKind::Shards);
    assert!(SourceSpec { resolution: Some(4), ..packed.clone() }.open().is_ok());
    for (changed, words) in [
        (SourceSpec { resolution: Some(8), ..packed.clone() }, "data: resolution = 8: the shards hold"),
        (SourceSpec { channels: Some(Channels::Grey), ..packed.clone() }, "data: channels = grey"),
        (SourceSpec { max_corrupt: 1, ..packed.clone() }, "data: max_corrupt = 1"),
    ] {
        assert!(message(changed.open()).starts_with(words), "{words}");
    }
}
