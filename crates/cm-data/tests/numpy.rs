//! Statistics and images in NumPy's archives, from there to here and back. The two `statistics-numpy*.npz` were written by NumPy
//! 2.4.6 (`savez`, `savez_compressed`), as were the two `images-numpy*.npz` by `scripts/check_npz.py write`.
//! `statistics-ours.npz` and `images-ours.npz` were written here and read by the same NumPy, array by array.

use std::path::{Path, PathBuf};

use cm_data::arrays::{self, Array};
use cm_data::{Dataset, Shape, npz};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn mu() -> Array {
    Array::list(vec![0.5, -1.25, 3.0])
}

fn sigma() -> Array {
    Array { shape: vec![3, 3], values: vec![2.0, 0.1, 0.0, 0.1, 1.0, -0.3, 0.0, -0.3, 0.7] }
}

#[test]
fn arrays_of_numpy_are_read() {
    let path = fixture("statistics-numpy.npz");
    assert_eq!(arrays::names(&path).unwrap(), ["count", "mu", "mu_s", "sigma", "sigma_s"]);
    let found = arrays::read(&path, &["mu", "sigma", "mu_s", "sigma_s", "count"]).unwrap();
    assert_eq!((&found["mu"], &found["sigma"]), (&mu(), &sigma()));
    // Big-endian float32, and float32 column by column.
    assert_eq!(found["mu_s"], mu());
    assert_eq!(found["sigma_s"].values, (0..9).map(f64::from).collect::<Vec<_>>());
    assert_eq!(found["count"], Array { shape: vec![], values: vec![50_000.0] });

    let found = arrays::read(&fixture("statistics-numpy-compressed.npz"), &["mu", "sigma"]).unwrap();
    assert_eq!((&found["mu"], &found["sigma"]), (&mu(), &sigma()));
}

#[test]
fn what_is_written_is_what_numpy_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("statistics.npz");
    let count = Array { shape: vec![], values: vec![50_000.0] };
    arrays::save(&path, &[("mu", &mu()), ("sigma", &sigma()), ("count", &count)]).unwrap();
    let [written, read] = [path, fixture("statistics-ours.npz")].map(|path| std::fs::read(path).unwrap());
    assert_eq!(written, read);
}

/// `statistics-edm2.pkl` was written by NumPy in the form of EDM2's files. Where everything must be tested, python3 must
/// be there.
#[test]
#[allow(clippy::print_stdout)] // why a test was skipped
fn the_script_converts_pickled_statistics_and_refuses_others() {
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "python3 is needed to test scripts/convert_stats.py");
        println!("skipped: no python3 here");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/convert_stats.py");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("statistics.npz");
    let run = |file: &Path, key: &str| {
        let mut command = std::process::Command::new("python3");
        let output = command.arg(&script).arg(file).args(["--key", key, "-o"]).arg(&out).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let pickle = fixture("statistics-edm2.pkl");
    // The second is float32 and float64 column by column.
    for key in ["fid", "fd_dinov2"] {
        assert_eq!(run(&pickle, key), (true, String::new()));
        let found = arrays::read(&out, &["mu", "sigma"]).unwrap();
        assert_eq!((&found["mu"], &found["sigma"]), (&mu(), &sigma()), "{key}");
    }
    std::fs::remove_file(&out).unwrap();
    let bad = folder.path().join("bad.pkl");
    let bytes = std::fs::read(&pickle).unwrap();
    for (content, says) in [
        // posix.system("true"), as a hostile pickle has it.
        (&b"cposix\nsystem\n(S'true'\ntR."[..], "names posix.system"),
        (&bytes[..bytes.len() / 2], "no whole pickle"),
        (&b"(dp0\n."[..], "no statistics under --key fid"),
    ] {
        std::fs::write(&bad, content).unwrap();
        let (done, error) = run(&bad, "fid");
        assert!(!done && error.contains(says) && error.trim_end().lines().count() == 1, "{error}");
        assert!(!out.exists());
    }
}

const LABELS: [i64; 5] = [3, 0, 9, 1, 3];

/// The pixel at a place of `[5, 4, 3, 3]`, as `scripts/check_npz.py` has it.
fn pixel(image: usize, y: usize, x: usize, channel: usize) -> u8 {
    ((((image * 4 + y) * 3 + x) * 3 + channel) * 37 + 11) as u8
}

/// All images, channel by channel.
fn pixels(channels: usize) -> Vec<u8> {
    let of_channel =
        |image, channel| (0..12).map(move |place: usize| pixel(image, place / 3, place % 3, channel));
    (0..5).flat_map(|image| (0..channels).flat_map(move |channel| of_channel(image, channel))).collect()
}

#[test]
fn images_of_numpy_are_read() {
    for (file, channels, labels) in
        [("images-numpy.npz", 3, Some(&[3, 0, 9, 1, 3][..])), ("images-numpy-grey.npz", 1, None)]
    {
        let set = npz::read(&fixture(file), true, None).unwrap();
        assert_eq!((set.len(), set.shape()), (5, Shape { channels, height: 4, width: 3 }), "{file}");
        assert_eq!(set.labels(), labels);
        let found: Vec<u8> = (0..5).flat_map(|i| set.get(i).unwrap().pixels).collect();
        assert_eq!(found, pixels(channels), "{file}");
    }
}

/// Where there is a Python with NumPy, as `cargo xtask setup --python` makes one, it reads what is written here anew.
#[test]
#[allow(clippy::print_stdout)] // why a part was skipped
fn written_images_are_what_numpy_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.npz");
    let shape = Shape { channels: 3, height: 4, width: 3 };
    npz::save(&path, shape, &pixels(3), Some(&LABELS)).unwrap();
    let [written, read] = [&path, &fixture("images-ours.npz")].map(|path| std::fs::read(path).unwrap());
    assert_eq!(written, read);

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let pythons = [root.join(".libtorch/python/bin/python3"), "python3".into()];
    let numpy = |python: &&PathBuf| {
        let found = std::process::Command::new(python).args(["-c", "import numpy"]).output();
        found.is_ok_and(|output| output.status.success())
    };
    let Some(python) = pythons.iter().find(numpy) else {
        println!("skipped: no Python with NumPy here");
        return;
    };
    let script = root.join("scripts/check_npz.py");
    let run =
        |path: &Path| std::process::Command::new(python).arg(&script).arg("read").arg(path).output().unwrap();
    let done = run(&path);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    npz::save(&path, shape, &[0; 180], Some(&LABELS)).unwrap();
    let done = run(&path);
    assert!(!done.status.success() && String::from_utf8_lossy(&done.stderr).contains("other numbers"));
}
