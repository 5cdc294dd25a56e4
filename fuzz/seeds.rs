//! A few whole files for every target, for the fuzzer to begin with.

use std::fs;
use std::io::Write;
use std::path::Path;

use cm_data::{Shape, npz};

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("memory takes what is written");
    encoder.finish().expect("memory takes what is written")
}

fn png() -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    let image = image::RgbImage::from_fn(6, 6, |x, y| image::Rgb([x as u8 * 40, y as u8 * 40, 9]));
    image.write_to(&mut bytes, image::ImageFormat::Png).expect("memory takes what is written");
    bytes.into_inner()
}

fn zip() -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in [("a.png", png()), ("dataset.json", br#"{"labels": [["a.png", 3]]}"#.to_vec())] {
        let options = zip::write::SimpleFileOptions::default();
        archive.start_file(name, options).expect("a name");
        archive.write_all(&bytes).expect("memory takes what is written");
    }
    archive.finish().expect("memory takes what is written").into_inner()
}

fn cifar() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for i in 1..=5 {
        let mut header = tar::Header::new_ustar();
        header.set_size(3073);
        header.set_cksum();
        let name = format!("cifar-10-batches-bin/data_batch_{i}.bin");
        tar.append_data(&mut header, name, [1; 3073].as_slice()).expect("memory takes what is written");
    }
    gz(&tar.into_inner().expect("memory takes what is written"))
}

fn idx() -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 3];
    bytes.extend(0..60);
    bytes
}

/// Writes the files of `target` into the folder that `CM_FUZZ_CORPUS` names, if it names one.
///
/// The fuzzer calls it before it reads that folder; a program of its own would compile libtorch's bindings once more.
pub fn write(target: &str) {
    let Some(folder) = std::env::var_os("CM_FUZZ_CORPUS") else { return };
    let write = |name: &str, bytes: &[u8]| {
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(Path::new(&folder).join(name), bytes).expect("a file");
    };
    match target {
        "npz" => {
            let mut samples = std::io::Cursor::new(Vec::new());
            let written = npz::write(&mut samples, Shape::square(3, 2), &[5; 24], Some(&[0, 1]));
            written.expect("memory takes what is written");
            write("samples", samples.get_ref());
        }
        "cifar" => write("archive", &cifar()),
        "idx" => {
            write("plain", &idx());
            write("packed", &gz(&idx()));
        }
        "zip" => write("images", &zip()),
        "config" => {
            for name in ["digits-ct", "digits-ect", "digits-pd", "cifar10-cd"] {
                let place = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
                write(name, &fs::read(place).expect("an experiment"));
            }
        }
        "arguments" => {
            let texts = [
                "0-63",
                "1,5,9-12",
                "cuda:1",
                "train.lr=1e-4",
                "train.metric={kind='pseudo_huber', c=0.01}",
                "network.channel_mult=[1, 2]",
                "train.lr=1e-3,5e-4",
                "train.metric=l2,{kind='huber', c=0.01}",
            ];
            texts.iter().enumerate().for_each(|(i, text)| write(&i.to_string(), text.as_bytes()));
        }
        "lmdb" => write("images", include_bytes!("../crates/cm-data/tests/fixtures/images.mdb")),
        "image" => write("png", &png()),
        "safetensors" => {
            let head = br#"{"__metadata__":{"consistency-rs":"{\"format\":1}"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
            write("small", &[&(head.len() as u64).to_le_bytes(), head.as_slice(), &[0; 8]].concat());
        }
        _ => {
            let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cm-net/tests/fixtures");
            for entry in fs::read_dir(fixtures).expect("the fixtures").flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.ends_with(".pt") && entry.metadata().is_ok_and(|file| file.len() < 16_000) {
                    write(&name, &fs::read(entry.path()).expect("a fixture"));
                }
            }
        }
    }
}
