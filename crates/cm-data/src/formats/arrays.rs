//! Arrays of numbers in NumPy archives by name: the form in which statistics of images are exchanged (`mu`, `sigma`).

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use cm_model::files::FailsOnce;
use half::f16;
use zip::ZipArchive;
use zip::write::SimpleFileOptions;

use crate::error::{Error, Result};
use crate::formats::npy::{self, Header, IntArray, IntType};
use crate::formats::npz;
use crate::grid::write_whole;
use crate::limits::Bounded;

/// Most bytes of an array that is read: a covariance of 8192 numbers an image takes half of it.
const MOST_BYTES: u64 = 1 << 30;

/// An array of numbers in C order.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// The array's dimensions; none for a single number.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub values: Vec<f64>,
}

impl Array {
    /// A list.
    #[must_use]
    pub fn list(values: Vec<f64>) -> Self {
        Self { shape: vec![values.len()], values }
    }

    fn check(&self) -> std::io::Result<()> {
        if self.shape.iter().product::<usize>() == self.values.len() {
            return Ok(());
        }
        let text = format!("{} numbers for the shape {:?}", self.values.len(), self.shape);
        Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text))
    }
}

/// The names of the arrays in an `.npz`, without their ending, sorted.
///
/// # Errors
/// [`Error::Io`] or [`Error::Corrupt`] for a file that is no zip.
pub fn names(path: &Path) -> Result<Vec<String>> {
    let (archive, _) = open(path)?;
    let mut names: Vec<String> =
        archive.file_names().filter_map(|name| name.strip_suffix(".npy").map(str::to_owned)).collect();
    names.sort();
    Ok(names)
}

/// Reads those of the arrays `wanted` that are in an `.npz`, whatever kind of numbers they hold.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Format`] or [`Error::Length`] for a file that is damaged or holds something else than
/// numbers; [`Error::TooLarge`] for an array that no statistics need.
pub fn read(path: &Path, wanted: &[&str]) -> Result<BTreeMap<String, Array>> {
    let (mut archive, stored) = open(path)?;
    let mut found = BTreeMap::new();
    for name in wanted {
        let Some(index) = archive.index_for_name(&format!("{name}.npy")) else { continue };
        let file = format!("{}: {name}", path.display());
        let entry = archive.by_index(index).map_err(|e| Error::unpacking(path, &file, &e))?;
        let capacity = npz::capacity(&entry, stored, &file)?;
        found.insert((*name).to_owned(), read_one(&mut Bounded { reader: entry, capacity, file })?);
    }
    Ok(found)
}

fn open(path: &Path) -> Result<(ZipArchive<std::io::BufReader<File>>, u64)> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let stored = file.metadata().map_err(Error::io("read", path))?.len();
    let archive = ZipArchive::new(std::io::BufReader::new(file));
    Ok((archive.map_err(|e| Error::unpacking(path, path.display().to_string(), &e))?, stored))
}

fn read_one<R: std::io::Read>(input: &mut Bounded<R>) -> Result<Array> {
    let header = npy::read_header(input)?;
    let file = input.file.clone();
    let width = match header.descr.get(1..) {
        Some("f2") => 2,
        Some("f4") => 4,
        Some("f8") => 8,
        _ => 0,
    };
    let dims: Vec<u64> = header.shape.iter().copied().chain([8]).collect();
    let claimed = dims.iter().try_fold(1u64, |product, &d| product.checked_mul(d)).unwrap_or(u64::MAX);
    if claimed > MOST_BYTES {
        return Err(Error::TooLarge { file, what: "bytes of numbers", claimed, limit: MOST_BYTES });
    }
    let shape: Vec<usize> = header.shape.iter().map(|&d| d as usize).collect();
    let values = match width {
        0 => integers(input, &header)?,
        width => {
            let size = claimed / 8 * width as u64;
            let what = format!("of {} array {:?}", header.descr, header.shape);
            let bytes = input.take(size, &what)?;
            input.finish(&what, size)?;
            bytes.chunks_exact(width).map(|b| float(b, header.descr.starts_with('>'))).collect()
        }
    };
    match (header.fortran_order, &shape[..]) {
        (true, &[rows, columns]) => Ok(Array { values: transposed(&values, rows, columns), shape }),
        (true, many) if many.len() > 2 => {
            let expected = "C order (save numpy.ascontiguousarray(a))";
            Err(Error::format(&file, expected, "Fortran order"))
        }
        _ => Ok(Array { shape, values }),
    }
}

fn integers<R: std::io::Read>(input: &mut Bounded<R>, header: &Header) -> Result<Vec<f64>> {
    if IntType::parse(&header.descr).is_none() {
        let expected = "numbers (float16, float32, float64 or integers)";
        return Err(Error::format(&input.file, expected, format!("dtype {}", header.descr)));
    }
    // The order of a matrix is the caller's concern.
    let flat = Header { fortran_order: false, ..header.clone() };
    Ok(IntArray::read_body(input, flat)?.to_i64().into_iter().map(|n| n as f64).collect())
}

/// A number of 2, 4 or 8 bytes.
fn float(bytes: &[u8], big_endian: bool) -> f64 {
    let mut little = [0u8; 8];
    for (i, &byte) in bytes.iter().enumerate() {
        little[if big_endian { bytes.len() - 1 - i } else { i }] = byte;
    }
    let [a, b, c, d, ..] = little;
    match bytes.len() {
        2 => f16::from_le_bytes([a, b]).to_f64(),
        4 => f32::from_le_bytes([a, b, c, d]).into(),
        _ => f64::from_le_bytes(little),
    }
}

/// The matrix whose columns lie one behind the other, row by row.
fn transposed(values: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let at = |row: usize, column: usize| values.get(column * rows + row).copied().unwrap_or(f64::NAN);
    (0..rows).flat_map(|row| (0..columns).map(move |column| at(row, column))).collect()
}

/// Writes arrays as float64, uncompressed, as `numpy.savez` does: whole or not at all.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn save(path: &Path, arrays: &[(&str, &Array)]) -> Result<()> {
    write_whole(path, |out| {
        let mut archive = zip::ZipWriter::new(FailsOnce::new(out));
        for (name, array) in arrays {
            array.check()?;
            let options = SimpleFileOptions::default()
                .compression_method(zip::CompressionMethod::Stored)
                .large_file(array.values.len() >= 1 << 28);
            archive.start_file(format!("{name}.npy"), options).map_err(npz::cause)?;
            let bytes: Vec<u8> = array.values.iter().flat_map(|v| v.to_le_bytes()).collect();
            npy::write_as(&mut archive, "<f8", &array.shape, &bytes)?;
        }
        archive.finish().map(drop).map_err(npz::cause)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn array(shape: &[usize], first: f64) -> Array {
        let count: usize = shape.iter().product();
        Array { shape: shape.into(), values: (0..count).map(|i| first + i as f64 / 3.0).collect() }
    }

    #[test]
    fn written_arrays_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stats.npz");
        let (mu, sigma, one) = (array(&[3], 1.0), array(&[3, 3], -2.0), array(&[], 7.0));
        save(&path, &[("mu", &mu), ("sigma", &sigma), ("count", &one)]).unwrap();
        assert_eq!(names(&path).unwrap(), ["count", "mu", "sigma"]);
        let found = read(&path, &["mu", "sigma", "count", "other"]).unwrap();
        assert_eq!((&found["mu"], &found["sigma"], &found["count"]), (&mu, &sigma, &one));
        assert_eq!(found.len(), 3);
        let wrong = Array { shape: vec![2], values: vec![0.0] };
        assert!(save(&path, &[("mu", &wrong)]).is_err());
        assert_eq!(names(&path).unwrap().len(), 3, "the old file stays");
    }

    fn member(header: &str, data: &[u8], method: zip::CompressionMethod) -> tempfile::NamedTempFile {
        let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        archive.start_file("a.npy", SimpleFileOptions::default().compression_method(method)).unwrap();
        archive.write_all(b"\x93NUMPY\x01\x00").unwrap();
        archive.write_all(&(header.len() as u16).to_le_bytes()).unwrap();
        archive.write_all(header.as_bytes()).unwrap();
        archive.write_all(data).unwrap();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&archive.finish().unwrap().into_inner()).unwrap();
        file
    }

    fn header(descr: &str, fortran: &str, shape: &str) -> String {
        format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({shape}), }}")
    }

    #[test]
    fn every_kind_of_number_and_order_is_read() {
        let stored = zip::CompressionMethod::Stored;
        for (descr, data, want) in [
            ("<f8", 1.5f64.to_le_bytes().to_vec(), 1.5),
            (">f8", 1.5f64.to_be_bytes().to_vec(), 1.5),
            ("<f4", (-0.25f32).to_le_bytes().to_vec(), -0.25),
            ("<f2", f16::from_f64(0.5).to_le_bytes().to_vec(), 0.5),
            ("<i4", (-3i32).to_le_bytes().to_vec(), -3.0),
            ("|u1", vec![200], 200.0),
        ] {
            let file = member(&header(descr, "False", "1,"), &data, stored);
            assert_eq!(read(file.path(), &["a"]).unwrap()["a"], Array::list(vec![want]), "{descr}");
        }
        let columns: Vec<u8> =
            [1.0f64, 2.0, 3.0, 4.0, 5.0, 6.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let file = member(&header("<f8", "True", "2, 3"), &columns, stored);
        let want = Array { shape: vec![2, 3], values: vec![1.0, 3.0, 5.0, 2.0, 4.0, 6.0] };
        assert_eq!(read(file.path(), &["a"]).unwrap()["a"], want);
    }

    #[test]
    fn bad_files_end_in_one_line_that_names_them() {
        let stored = zip::CompressionMethod::Stored;
        for (header, data, says) in [
            (header("<f8", "False", "4,"), vec![0; 31], "expected 32 bytes"),
            (header("<f8", "False", "4,"), vec![0; 33], "longer than its form allows"),
            (header("|O", "False", "1,"), vec![0; 8], "dtype |O"),
            (header("<c16", "False", "1,"), vec![0; 16], "dtype <c16"),
            (header("<f8", "False", "100000, 100000"), vec![], "claims"),
            (header("<f8", "False", "18446744073709551615, 18446744073709551615"), vec![], "claims"),
            (header("<f8", "True", "1, 1, 1"), vec![0; 8], "Fortran"),
        ] {
            let file = member(&header, &data, stored);
            let error = read(file.path(), &["a"]).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(": a") && !error.contains('\n'), "{error}");
        }
        // Zeros that deflate to a thousandth: more of them than the header says, and a header that says them all.
        let deflated = zip::CompressionMethod::Deflated;
        let bomb = member(&header("<f8", "False", "2,"), &vec![0; 50 << 20], deflated);
        assert!(bomb.path().metadata().unwrap().len() < 100_000);
        assert!(read(bomb.path(), &["a"]).unwrap_err().to_string().contains("longer"));
        let bomb = member(&header("<f8", "False", "200000000,"), &vec![0; 50 << 20], deflated);
        assert!(read(bomb.path(), &["a"]).unwrap_err().to_string().contains("claims"));
    }

    #[test]
    fn a_cut_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stats.npz");
        save(&path, &[("mu", &array(&[50], 0.0))]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        for keep in [0, 3, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = read(&path, &["mu"]).unwrap_err().to_string();
            assert!(error.contains("stats.npz") && !error.contains('\n'), "{error}");
        }
    }
}
