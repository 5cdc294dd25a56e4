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
