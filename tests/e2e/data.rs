//! Training from every kind of data, and looking at it.

use std::io::Write;

use cm_data::{Shape, npz};
use cm_tests::{Done, Sandbox};

const CIFAR_RECORD: usize = 1 + 3 * 32 * 32;

/// Makes CIFAR-10's five training files and its test file, `count` images each.
fn cifar_files(count: usize) -> Vec<(String, Vec<u8>)> {
    let names = (1..=5).map(|i| format!("data_batch_{i}.bin")).chain(["test_batch.bin".to_owned()]);
    let record = |image: usize| {
        let pixels = (1..CIFAR_RECORD).map(move |at| (at * (image + 1) % 251) as u8);
        std::iter::once((image % 10) as u8).chain(pixels)
    };
    names.map(|name| (name, (0..count).flat_map(record).collect())).collect()
}

/// CIFAR-10's archive, as small as can be.
fn cifar_archive() -> Vec<u8> {
    let mut archive =
        tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (name, bytes) in cifar_files(4) {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        archive.append_data(&mut header, format!("cifar-10-batches-bin/{name}"), bytes.as_slice()).unwrap();
    }
    archive.into_inner().unwrap().finish().unwrap()
}

/// A network for 32×32 colour images that is as small as can be, and two steps of two images.
const SMALL: &[&str] = &[
    "network.model_channels=8",
    "network.channel_mult=[1, 1]",
    "network.num_blocks=1",
    "network.attn_resolutions=[]",
    "train.metric=l2",
    "train.total_steps=2",
    "train.batch=2",
];

#[test]
fn the_main_job_trains_from_an_archive_or_a_folder() {
    let sandbox = Sandbox::new();
    sandbox.write("packed/cifar-10-binary.tar.gz", cifar_archive());
    for (name, bytes) in cifar_files(4) {
        sandbox.write(&format!("plain/cifar-10-batches-bin/{name}"), bytes);
    }
    for (data, out) in [("packed", "a"), ("packed/cifar-10-binary.tar.gz", "b"), ("plain", "c")] {
        let line = format!("train-cifar10 --data {data} --device cpu --out {out}");
        let done = sandbox.cm(&line).set(SMALL).run().ok();
        assert!(done.stderr.contains("20 images of 3x32x32"), "{data}: {done:#?}");
        assert_eq!(sandbox.list(&format!("{out}/checkpoints")), ["step-00000002"]);
    }
    assert_eq!(log(&sandbox, "a"), log(&sandbox, "b"));
    assert_eq!(log(&sandbox, "a"), log(&sandbox, "c"), "the same images in the same order");
    sandbox.cm("sample a --seeds 0-1 --device cpu --out samples").run().ok();
    assert!(sandbox.list("samples").contains(&"samples_2x32x32x3.npz".to_owned()));
}

/// The losses that a run logged.
fn log(sandbox: &Sandbox, out: &str) -> Vec<String> {
    let rows = sandbox.read(&format!("{out}/progress.csv"));
    rows.lines().map(|row| row.split(',').take(4).collect::<Vec<_>>().join(",")).collect()
}

/// Writes `count` grey 8×8 images of two classes as PNGs and as an npz.
fn pictures(sandbox: &Sandbox, count: u32) {
    let pixel = |image: u32, at: u32| (image * 29 + at * 3) as u8;
    for i in 0..count {
        let path = sandbox.write(&format!("pictures/{}_{i}.png", ["cat", "dog"][i as usize % 2]), "");
        image::GrayImage::from_fn(8, 8, |x, y| image::Luma([pixel(i, y * 8 + x)])).save(path).unwrap();
    }
    // Files are taken in the order of their names: all cats, then all dogs.
    let order: Vec<u32> = (0..count).step_by(2).chain((1..count).step_by(2)).collect();
    let pixels: Vec<u8> = order.iter().flat_map(|&i| (0..64).map(move |at| pixel(i, at))).collect();
    let labels: Vec<i64> = order.iter().map(|&i| i64::from(i) % 2).collect();
    npz::save(&sandbox.path("pictures.npz"), Shape::square(1, 8), &pixels, Some(&labels)).unwrap();
}

#[test]
fn a_folder_and_an_archive_of_the_same_images_train_alike() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, 8);
    let run = |data: &str, more: &[&str]| -> Done {
        let kind = format!("data={{{data}, labels='auto'}}");
        let sets = [kind.as_str(), "network.num_classes=2", "train.total_steps=3"];
        sandbox.cm("train --config tiny.toml --device cpu").set(&sets).set(more).run().ok()
    };
    run("kind='folder', path='pictures'", &["name=a"]);
    run("kind='npz', path='pictures.npz'", &["name=b"]);
    assert_eq!(log(&sandbox, "out/runs/a"), log(&sandbox, "out/runs/b"));
    // Images that have the size already are left as they are.
    run("kind='folder', path='pictures', fit='center_crop', resolution=8", &["name=c"]);
    assert_eq!(log(&sandbox, "out/runs/a"), log(&sandbox, "out/runs/c"));
}

#[test]
fn packed_images_train_as_their_files_and_corrupt_ones_are_named() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, 8);
    let train = |data: &str, name: &str| {
        let sets = [format!("data={{{data}}}"), "train.total_steps=3".to_owned(), format!("name={name}")];
        let sets = sets.each_ref().map(String::as_str);
        sandbox.cm("train --config tiny.toml --device cpu").set(&sets).run()
    };
    let pack = sandbox.cm("data pack pictures --out packed --per-shard 3").run().ok();
    assert!(pack.stdout.contains("--set data.kind=shards"), "{pack:#?}");
    let files = ["images-00000.npy", "images-00001.npy", "images-00002.npy", "labels.npy"];
    assert_eq!(sandbox.list("packed"), files);
    train("kind='folder', path='pictures'", "a").ok();
    train("kind='shards', path='packed'", "b").ok();
    assert_eq!(log(&sandbox, "out/runs/a"), log(&sandbox, "out/runs/b"));

    sandbox.write("pictures/dog_1.png", "no image");
    train("kind='folder', path='pictures'", "c").fails(1, &["dog_1.png", "cannot decode"]);
    let done = train("kind='folder', path='pictures', max_corrupt=1", "d").ok();
    assert_eq!(done.stderr.matches("WARNING: passed over: ").count(), 1, "{done:#?}");
    assert!(done.stderr.contains("pictures/dog_1.png: cannot decode"), "{done:#?}");
    assert!(done.stderr.contains("1 images do not decode and were passed over"), "{done:#?}");
    let stats = std::fs::read_to_string(sandbox.path("out/runs/d/stats.jsonl")).unwrap();
    assert!(stats.lines().last().unwrap().contains("\"passed_over\":1"), "{stats}");
    let less = sandbox.cm("data pack pictures --out less --max-corrupt 1 --labels none").run().ok();
    assert!(less.stderr.contains("WARNING: left out: ") && less.stderr.contains("dog_1.png"), "{less:#?}");
    assert_eq!(sandbox.list("less"), ["images-00000.npy"]);
    sandbox.cm("data pack pictures --out none").run().fails(2, &["dog_1.png", "cannot decode"]);
    assert!(sandbox.list("none").is_empty());
    sandbox.cm("data pack pictures --out no --fit cut").run().fails(2, &["--fit", "cut"]);
}

#[test]
fn inspect_says_what_it_found_and_draws_it() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, 8);
    sandbox.write("cifar.tar.gz", cifar_archive());
    for (data, words) in [
        ("pictures", &["folder", "8 images", "8x8 grey: 8", "2 classes", "cat: 4", "dog: 4"][..]),
        ("pictures.npz", &["npz", "8 images", "8x8 grey: 8", "2 classes"]),
        ("cifar.tar.gz", &["CIFAR-10", "24 images", "32x32 RGB: 24", "10 classes", "airplane"]),
        ("digits", &["1797 images", "8x8 grey: 1797", "10 classes"]),
    ] {
        let done = sandbox.cm(&format!("data inspect {data} --sheet {data}-sheet.png")).run().ok();
        for word in words {
            assert!(done.stdout.contains(word), "{data}: '{word}' is missing in:\n{}", done.stdout);
        }
        let sheet = image::open(sandbox.path(format!("{data}-sheet.png"))).unwrap();
        assert!(sheet.width() > 8 && sheet.height() > 8, "{data}");
    }
}

#[test]
fn inspect_names_what_is_wrong_with_a_folder() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, 4);
    image::GrayImage::new(16, 16).save(sandbox.path("pictures/cat_9.png")).unwrap();
    std::fs::File::create(sandbox.path("pictures/notes.txt")).unwrap().write_all(b"not an image").unwrap();
    let report = sandbox.cm("data inspect pictures").run().ok().stdout;
    for word in ["5 images", "8x8 grey: 4", "16x16 grey: 1"] {
        assert!(report.contains(word), "'{word}' is missing in:\n{report}");
    }
    assert_eq!(sandbox.list("out"), ["contact-sheet.png"], "the default place of the sheet");
}
