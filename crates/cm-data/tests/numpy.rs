//! Statistics in NumPy's archives, from there to here and back. The two `statistics-numpy*.npz` were written by NumPy
//! 2.4.6 (`savez`, `savez_compressed`); `statistics-ours.npz` was written here and read by the same NumPy, array by array.

use std::path::{Path, PathBuf};

use cm_data::arrays::{self, Array};

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
