//! How many images of 256×256 does one core read a second, out of files as data sets have them?
//!
//! Below the img/s of a training step times the threads that decode, `cm data pack` is worth its disk: `shards` reads the
//! same images with nothing to decode. The picture is drawn, not photographed, with edges and noise, and lossy as WebP
//! (LSUN's form); PNG and JPEG are made of it.
//!
//! ```text
//! RAYON_NUM_THREADS=1 cargo bench -p cm-data --bench decode
//! ```

use std::hint::black_box;
use std::path::Path;

use cm_data::grid::encode_png;
use cm_data::shards::{Packing, pack};
use cm_data::{Shape, SourceKind, SourceSpec};
use criterion::{Criterion, Throughput};
use image::codecs::jpeg::JpegEncoder;

const SCENE: &[u8] = include_bytes!("scene.webp");
/// Files of a set.
const IMAGES: usize = 32;
const JPEG_QUALITY: u8 = 90;

/// The bytes of the picture in each format.
fn formats() -> [(&'static str, Vec<u8>); 3] {
    let scene = image::load_from_memory(SCENE).expect("a picture").to_rgb8();
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, JPEG_QUALITY).encode_image(&scene).expect("a JPEG");
    let shape = Shape { channels: 3, height: scene.height() as usize, width: scene.width() as usize };
    let plane = |channel: usize| scene.pixels().map(move |pixel| pixel.0[channel]);
    let planes: Vec<u8> = (0..3).flat_map(plane).collect();
    [("png", encode_png(&planes, shape).expect("a PNG")), ("jpg", jpeg), ("webp", SCENE.to_vec())]
}

/// Reads the images of a set in turn.
fn read(c: &mut Criterion, name: &str, kind: SourceKind, path: &Path) {
    let set = SourceSpec::new(kind, Some(path.to_owned())).open().expect("what was just made");
    assert_eq!(set.shape(), Shape::square(3, 256));
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    let mut index = 0;
    group.bench_function(format!("{name}_256"), |b| {
        b.iter(|| {
            index = (index + 1) % set.len();
            black_box(set.get(index).expect("an image"))
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in formats() {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).expect("a folder");
        for i in 0..IMAGES {
            std::fs::write(folder.join(format!("{i:03}.{name}")), &bytes).expect("room for a file");
        }
        read(&mut criterion, name, SourceKind::Folder, &folder);
    }
    let png = SourceSpec::new(SourceKind::Folder, Some(dir.path().join("png"))).open().expect("images");
    let shards = dir.path().join("shards");
    let packing = Packing { per_shard: IMAGES / 2, max_corrupt: 0 };
    pack(&*png, &shards, packing, &mut |_| true).expect("room for shards");
    read(&mut criterion, "shards", SourceKind::Shards, &shards);
    criterion.final_summary();
}
