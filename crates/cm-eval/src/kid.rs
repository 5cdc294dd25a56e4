//! The kernel distance between two sets of features.

use cm_schedule::rng::{mix, name_id, permutation};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::features::{rows, same_columns};
use crate::{Error, Result};

/// Which rows of two sets a subset of the kernel distance compares; as many of one as of the other, at least 2.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subset {
    /// Rows of the real features.
    pub real: Vec<i64>,
    /// Rows of the generated features.
    pub generated: Vec<i64>,
}

/// A kernel distance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kid {
    /// Mean over the subsets: the estimate.
    pub mean: f64,
    /// Standard deviation over the subsets (population): how much one subset of that size says.
    pub std: f64,
}

/// Draws `count` subsets without replacement from sets of `real` and `generated` rows, each of `size` rows or, where a
/// set has fewer, of as many as the smaller one has. They are a function of the arguments alone.
///
/// The field's usual choice is 100 subsets of 1000.
#[must_use]
pub fn kid_subsets(real: u32, generated: u32, count: u32, size: u32, seed: u64) -> Vec<Subset> {
    let size = size.min(real).min(generated) as usize;
    let draw = |name: &str, subset: u32, rows: u32| {
        let order = permutation(mix(&[seed, name_id(name)]), subset.into(), rows);
        order.into_iter().take(size).map(i64::from).collect()
    };
    (0..count)
        .map(|subset| Subset {
            real: draw("kid.real", subset, real),
            generated: draw("kid.generated", subset, generated),
        })
        .collect()
}

/// The kernel distance (KID): the squared maximum mean discrepancy under the kernel `(x·y/D + 1)³`, without bias, as the
/// mean over subsets.
///
/// Unlike the Fréchet distance it does not shrink with the number of images, on average, and may be negative.
///
/// # Shapes
/// Features `[N, D]` each; they are computed with in float64, on the device where they lie.
///
/// # Errors
/// [`Error::Input`] for features that are not finite or that do not fit together, and for a subset that is empty, uneven
/// or names rows that are not there.
///
/// # Source
/// Bińkowski et al. 2018 (arXiv 1801.01401).
pub fn kid(real: &Tensor, generated: &Tensor, subsets: &[Subset]) -> Result<Kid> {
    let (real, generated) = (rows("real features", real, 2)?, rows("generated features", generated, 2)?);
    same_columns("generated features", real.size()[1], generated.size()[1])?;
    if subsets.is_empty() {
        let expected = "at least 1".into();
        return Err(Error::Input { what: "number of subsets", expected, got: "0".into() });
    }
    let mut distances = Vec::with_capacity(subsets.len());
    for subset in subsets {
        subset.check(real.size()[0], generated.size()[0])?;
        let take = |features: &Tensor, rows: &[i64]| {
            features.f_index_select(0, &Tensor::f_from_slice(rows)?.f_to_device(features.device())?)
        };
        distances.push(discrepancy(&take(&generated, &subset.generated)?, &take(&real, &subset.real)?)?);
    }
    let mean = distances.iter().sum::<f64>() / distances.len() as f64;
    let variance = distances.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / distances.len() as f64;
    Ok(Kid { mean, std: variance.sqrt() })
}

impl Subset {
    fn check(&self, real: i64, generated: i64) -> Result<()> {
        let size = self.real.len();
        let inside = |rows: &[i64], count| rows.iter().all(|row| (0..count).contains(row));
        if size >= 2
            && size == self.generated.len()
            && inside(&self.real, real)
            && inside(&self.generated, generated)
        {
            return Ok(());
        }
        Err(Error::Input {
            what: "subset",
            expected: format!("2 or more rows of {real} real and as many of {generated} generated ones"),
            got: format!("{size} and {}", self.generated.len()),
        })
    }
}

/// The squared discrepancy of two sets of equal size.
fn discrepancy(x: &Tensor, y: &Tensor) -> Result<f64> {
    let (m, dim) = (x.size()[0] as f64, x.size()[1] as f64);
    let kernel = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
        Ok((a.f_matmul(&b.f_tr()?)? / dim + 1.0).f_pow_tensor_scalar(3)?)
    };
    let sum = |matrix: &Tensor| -> Result<f64> { Ok(matrix.f_sum(Kind::Double)?.f_double_value(&[])?) };
    let within = kernel(x, x)? + kernel(y, y)?;
    // A row is not compared with itself.
    let others = sum(&within)? - sum(&within.f_trace()?)?;
    Ok((others / (m - 1.0) - 2.0 * sum(&kernel(x, y)?)? / m) / m)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    #[test]
    fn subsets_are_rows_without_repetition_and_depend_on_the_seed_alone() {
        let subsets = kid_subsets(50, 30, 4, 20, 7);
        assert_eq!(subsets, kid_subsets(50, 30, 4, 20, 7));
        assert_ne!(subsets, kid_subsets(50, 30, 4, 20, 8));
        for Subset { real, generated } in &subsets {
            for (rows, count) in [(real, 50), (generated, 30)] {
                let mut sorted = rows.clone();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), 20);
                assert!(sorted[0] >= 0 && sorted[19] < count);
            }
        }
        assert_ne!(subsets[0], subsets[1]);
        // A set that is smaller than a subset gives all of its rows.
        assert_eq!(kid_subsets(50, 30, 1, 1000, 0)[0].real.len(), 30);
    }

    /// On one number a row, (xy + 1)³ has the expectation Σ C(3,k)·E[xᵏ]·E[yᵏ]: the distance of N(0, 1) and N(a, 1) is
    /// 3a² + 3(m₂ − 1)² + (m₃)² with m₂ = 1 + a², m₃ = 3a + a³.
    #[test]
    fn the_estimate_has_the_right_mean_at_any_size() {
        let a = 0.7f64;
        let want = 3.0 * a.powi(2) + 3.0 * a.powi(4) + (3.0 * a + a.powi(3)).powi(2);
        let (real, generated) = (normals(60_000, 1, 1), normals(60_000, 1, 2) + a);
        for size in [4, 60] {
            let count = 60_000 / size;
            let part = |subset: u32| (subset * size..(subset + 1) * size).map(i64::from).collect::<Vec<_>>();
            let subsets: Vec<_> = (0..count).map(|s| Subset { real: part(s), generated: part(s) }).collect();
            let found = kid(&real, &generated, &subsets).unwrap();
            let error = found.std / f64::from(count).sqrt();
            assert!((found.mean - want).abs() < 4.0 * error && error < 0.1 * want, "{found:?}, want {want}");
            let same = kid(&real, &normals(60_000, 1, 3), &subsets).unwrap();
            assert!(same.mean.abs() < 4.0 * same.std / f64::from(count).sqrt(), "{same:?}");
        }
    }

    #[test]
    fn subsets_that_do_not_fit_are_refused() {
        let x = normals(5, 3, 1);
        let of = |real: &[i64], generated: &[i64]| {
            kid(&x, &x, &[Subset { real: real.into(), generated: generated.into() }])
        };
        assert!(of(&[0, 1], &[2, 3]).is_ok());
        for (real, generated) in
            [(&[0, 5][..], &[0, 1][..]), (&[0, 1], &[-1, 0]), (&[0], &[0]), (&[0, 1, 2], &[0, 1])]
        {
            assert!(matches!(of(real, generated), Err(Error::Input { what: "subset", .. })));
        }
        assert!(kid(&x, &x, &[]).is_err());
        assert!(kid(&x, &x.narrow(1, 0, 2), &kid_subsets(5, 5, 1, 5, 0)).is_err());
        assert!(kid(&(&x * f64::NAN), &x, &kid_subsets(5, 5, 1, 5, 0)).is_err());
    }
}
