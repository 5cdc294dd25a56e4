//! The Fréchet distance between Gaussians that have the moments of two sets of features.

use std::cell::OnceCell;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::features::{rows, same_columns};
use crate::{Error, Result};

/// Rows that are taken into the moments at a time. The chunks lie where they would lie if all rows came at once, so that
/// the moments do not depend on the batches in which the rows come.
const CHUNK: i64 = 256;
/// Below so many images for each number of a feature, the distance is visibly too large: its bias falls as 1/n. For
/// Inception's 2048 numbers that is about the 10,000 images below which its authors advise against it.
const ENOUGH_PER_DIMENSION: u64 = 5;
/// A stored covariance may miss symmetry, and may have eigenvalues below 0, by this share of its largest value: the
/// rounding of float32.
const STORED_ROUNDING: f64 = 1e-5;

/// What the squared deviations are divided by to make a covariance of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Divisor {
    /// n − 1, the unbiased estimate: pytorch-fid, EDM and OpenAI's evaluator.
    #[default]
    CountLessOne,
    /// n: the evaluation of StyleGAN and of ECT.
    Count,
}

/// Whether a covariance rests on enough images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SampleSize {
    /// No more images than numbers in a feature: the covariance has directions without any spread, of which nothing is
    /// known.
    Singular,
    /// Fewer than five images for each number of a feature: the distance is visibly larger than that of more images.
    Biased,
    /// More than that.
    Enough,
    /// The number of images was not stored with the moments.
    Unknown,
}

impl SampleSize {
    /// Of so many images, of which each has `features` numbers.
    #[must_use]
    pub fn of(images: u64, features: u64) -> Self {
        match images {
            few if few <= features => SampleSize::Singular,
            some if some < ENOUGH_PER_DIMENSION * features => SampleSize::Biased,
            _ => SampleSize::Enough,
        }
    }
}

/// Mean and covariance of a set of features, float64 on the CPU.
#[derive(Debug)]
pub struct Moments {
    count: Option<u64>,
    mean: Tensor,
    covariance: Tensor,
    root: OnceCell<Tensor>,
}

/// [`Moments`] in the making, from rows that come in batches of any sizes.
///
/// Memory is two matrices `[D, D]`, whatever the number of rows. The sums are of deviations from running means (Chan,
/// Golub and LeVeque 1983), so that nothing cancels where a mean is large beside the spread.
///
/// ```
/// use cm_eval::{Divisor, MomentsStream, frechet_distance};
/// use tch::Tensor;
/// let features = Tensor::from_slice(&[0.0, 1.0, 2.0, 5.0, 3.0, 1.0]).view([3, 2]);
/// let mut stream = MomentsStream::default();
/// for row in 0..3 {
///     stream.add(&features.narrow(0, row, 1))?;
/// }
/// let moments = stream.finish(Divisor::CountLessOne)?;
/// assert!(frechet_distance(&moments, &moments)? < 1e-6);
/// # Ok::<(), cm_eval::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct MomentsStream {
    /// Fewer than [`CHUNK`] rows that have not been taken in yet.
    waiting: Option<Tensor>,
    sums: Option<Sums>,
}

/// Number, mean and squared deviations (a matrix) of the rows taken in so far.
#[derive(Debug)]
struct Sums {
    count: i64,
    mean: Tensor,
    scatter: Tensor,
}

impl MomentsStream {
    /// Takes features `[N ≥ 1, D]` in.
    ///
    /// # Errors
    /// [`Error::Input`] for features that are not finite or of another dimension than those before; the stream is then
    /// what it was.
    pub fn add(&mut self, features: &Tensor) -> Result<()> {
        let new = rows("features", features, 1)?.f_to_device(Device::Cpu)?;
        if let Some(dim) = self.dim() {
            same_columns("features", dim, new.size()[1])?;
        }
        let mut all = match self.waiting.take() {
            Some(waiting) => Tensor::f_cat(&[waiting, new], 0)?,
            None => new,
        };
        while all.size()[0] >= CHUNK {
            // A copy, since sums may depend on where in memory the rows begin.
            self.take_in(&all.f_narrow(0, 0, CHUNK)?.copy())?;
            all = all.f_narrow(0, CHUNK, all.size()[0] - CHUNK)?;
        }
        // A copy, lest a view keep all that was handed over.
        self.waiting = Some(all.copy());
        Ok(())
    }

    /// Number of rows so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        let waiting = self.waiting.as_ref().map_or(0, |rows| rows.size()[0]);
        (waiting + self.sums.as_ref().map_or(0, |sums| sums.count)) as u64
    }

    /// The moments of all rows.
    ///
    /// # Errors
    /// [`Error::Input`] for fewer than two rows, which have no covariance, and for features so large that their squares
    /// are not finite.
    pub fn finish(mut self, divisor: Divisor) -> Result<Moments> {
        let count = self.count();
        if let Some(rest) = self.waiting.take().filter(|rows| rows.size()[0] > 0) {
            self.take_in(&rest)?;
        }
        let Some(Sums { mean, scatter, .. }) = self.sums.filter(|_| count > 1) else {
            let expected = "at least 2, of which alone there is a covariance".into();
            return Err(Error::Input { what: "number of images", expected, got: count.to_string() });
        };
        let covariance = scatter / (count - 1) as f64;
        let moments = Moments { count: Some(count), mean, covariance, root: OnceCell::new() };
        if !bool::try_from(moments.covariance.f_isfinite()?.f_all()?)? {
            let expected = "numbers whose squares are finite".into();
            return Err(Error::Input { what: "features", expected, got: "larger ones".into() });
        }
        match divisor {
            Divisor::CountLessOne => Ok(moments),
            Divisor::Count => moments.with_divisor_count(),
        }
    }

    fn dim(&self) -> Option<i64> {
        let waiting = self.waiting.as_ref().map(|rows| rows.size()[1]);
        waiting.or_else(|| self.sums.as_ref().map(|sums| sums.mean.size()[0]))
    }

    fn take_in(&mut self, rows: &Tensor) -> Result<()> {
        let new = rows.size()[0];
        let mean = rows.f_mean_dim([0i64].as_slice(), false, Kind::Double)?;
        let deviations = rows.f_sub(&mean)?;
        let scatter = deviations.f_tr()?.f_matmul(&deviations)?;
        self.sums = Some(match self.sums.take() {
            None => Sums { count: new, mean, scatter },
            Some(old) => {
                let (before, count) = (old.count as f64, old.count + new);
                let gap = mean.f_sub(&old.mean)?;
                let between = gap.f_outer(&gap)? * (before * new as f64 / count as f64);
                Sums {
                    count,
                    mean: old.mean + gap * (new as f64 / count as f64),
                    scatter: old.scatter + scatter + between,
                }
            }
        });
        Ok(())
    }
}

impl Moments {
    /// The moments of features `[N ≥ 2, D]`, with divisor n − 1.
    ///
    /// # Errors
    /// As [`MomentsStream::add`] and [`MomentsStream::finish`].
    pub fn of(features: &Tensor) -> Result<Self> {
        let mut stream = MomentsStream::default();
        stream.add(features)?;
        stream.finish(Divisor::CountLessOne)
    }

    /// Moments that were stored: `mean` `[D]`, `covariance` `[D, D]` and, where it is known, the number of images.
    ///
    /// # Errors
    /// [`Error::Input`] unless the shapes fit, all numbers are finite, and the matrix is one that a covariance can be:
    /// symmetric, without negative eigenvalues (but for rounding) and not 0 throughout.
    pub fn from_parts(mean: &Tensor, covariance: &Tensor, count: Option<u64>) -> Result<Self> {
        let size = mean.size();
        if size.len() != 1 || size[0] < 1 || covariance.size() != [size[0], size[0]] {
            let expected = "[D] and [D, D]".into();
            let got = format!("{size:?} and {:?}", covariance.size());
            return Err(Error::Input { what: "mean and covariance", expected, got });
        }
        let mean = rows("mean", &mean.f_view([1, -1])?, 1)?.f_view([-1])?.f_to_device(Device::Cpu)?;
        let covariance = rows("covariance", covariance, 1)?.f_to_device(Device::Cpu)?;
        let refuse = |got: String| {
            let expected = "a symmetric matrix without negative eigenvalues, not 0 throughout".into();
            Err(Error::Input { what: "covariance", expected, got })
        };
        let (largest, transposed) = (largest(&covariance)?, covariance.f_tr()?);
        if largest == 0.0 {
            return refuse("zeros: all images have the same features".into());
        }
        let skew = self::largest(&covariance.f_sub(&transposed)?)?;
        if skew > STORED_ROUNDING * largest {
            return refuse(format!("one that differs from its transpose by {skew:.1e}"));
        }
        let covariance = (covariance + transposed) / 2.0;
        let (values, vectors) = covariance.f_linalg_eigh("L")?;
        let least = values.f_min()?.f_double_value(&[])?;
        if least < -STORED_ROUNDING * values.f_max()?.f_double_value(&[])? {
            return refuse(format!("one with the eigenvalue {least:.1e}"));
        }
        let root = OnceCell::from(root_of(&values, &vectors)?);
        Ok(Self { count, mean, covariance, root })
    }

    /// The covariance with divisor n in place of n − 1.
    fn with_divisor_count(self) -> Result<Self> {
        let count = self.count.unwrap_or(u64::MAX) as f64;
        Ok(Self { covariance: self.covariance * ((count - 1.0) / count), root: OnceCell::new(), ..self })
    }

    /// Number of images, if it is known.
    #[must_use]
    pub fn count(&self) -> Option<u64> {
        self.count
    }

    /// Numbers in a feature, D.
    #[must_use]
    pub fn dim(&self) -> i64 {
        self.mean.size()[0]
    }

    /// The mean, `[D]` float64.
    pub fn mean(&self) -> &Tensor {
        &self.mean
    }

    /// The covariance, `[D, D]` float64.
    pub fn covariance(&self) -> &Tensor {
        &self.covariance
    }

    /// tr Σ: the squared distance of an image's features to their mean, on average.
    #[must_use]
    pub fn trace(&self) -> f64 {
        self.covariance.trace().double_value(&[])
    }

    /// The number of directions in which the features spread.
    ///
    /// # Errors
    /// [`Error::Torch`] if the eigenvalues cannot be found.
    pub fn rank(&self) -> Result<i64> {
        Ok(self.root()?.size()[1])
    }

    /// Whether the covariance rests on enough images.
    #[must_use]
    pub fn sample_size(&self) -> SampleSize {
        self.count.map_or(SampleSize::Unknown, |count| SampleSize::of(count, self.dim() as u64))
    }

    /// Whether the images are so few that the Fréchet distance is biased or worse.
    #[must_use]
    pub fn too_few(&self) -> bool {
        matches!(self.sample_size(), SampleSize::Singular | SampleSize::Biased)
    }

    fn root(&self) -> Result<&Tensor> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let (values, vectors) = self.covariance.f_linalg_eigh("L")?;
        let root = root_of(&values, &vectors)?;
        Ok(self.root.get_or_init(|| root))
    }
}

/// A matrix `A` `[D, rank]` with `A·Aᵀ = Σ`: eigenvectors times the square roots of their eigenvalues. Eigenvalues that
/// are nothing but rounding are left out.
fn root_of(values: &Tensor, vectors: &Tensor) -> Result<Tensor> {
    let floor = values.f_max()?.f_double_value(&[])?.max(0.0) * values.size()[0] as f64 * f64::EPSILON;
    let kept = values.f_gt(floor)?.f_nonzero()?.f_view([-1])?;
    let roots = values.f_index_select(0, &kept)?.f_sqrt()?;
    Ok(vectors.f_index_select(1, &kept)?.f_mul(&roots)?)
}

fn largest(matrix: &Tensor) -> Result<f64> {
    Ok(matrix.f_abs()?.f_max()?.f_double_value(&[])?)
}

/// The Fréchet distance of two Gaussians, squared as everywhere in the field:
/// `|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁Σ₂)`.
///
/// With `Σ = A·Aᵀ`, the trace of the root is the sum of the singular values of `A₁ᵀA₂`: their squares are the
/// eigenvalues of Σ₁Σ₂. So no root is taken of an eigenvalue that is 0 but for rounding, which for covariances of few
/// images would cost half the digits.
///
/// # Errors
/// [`Error::Input`] for features of different dimensions.
///
/// # Source
/// Dowson and Landau 1982; as a figure of images (FID) Heusel et al. 2017 (arXiv 1706.08500).
pub fn frechet_distance(a: &Moments, b: &Moments) -> Result<f64> {
    same_columns("moments", a.dim(), b.dim())?;
    let gap = a.mean.f_sub(&b.mean)?.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?;
    let shared = a.root()?.f_tr()?.f_matmul(b.root()?)?;
    let trace_of_root = match shared.numel() {
        0 => 0.0,
        _ => shared.f_svd(true, false)?.1.f_sum(Kind::Double)?.f_double_value(&[])?,
    };
    // A distance: what is below 0 is rounding.
    Ok((gap + a.trace() + b.trace() - 2.0 * trace_of_root).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    fn value(tensor: &Tensor) -> f64 {
        tensor.double_value(&[])
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().expect("an error").to_string()
    }

    /// Correlated features: a random mixture of columns, and a mean that is large beside the spread.
    fn features(count: i64, dim: i64, seed: u64) -> Tensor {
        let mix = normals(dim, dim, seed + 1000) / (dim as f64).sqrt();
        normals(count, dim, seed).matmul(&mix) + 1000.0
    }

    #[test]
    fn moments_do_not_depend_on_the_batches_to_the_last_bit() {
        let x = features(1000, 24, 1);
        let whole = Moments::of(&x).unwrap();
        let centred = &x - x.mean_dim([0i64].as_slice(), true, Kind::Double);
        let direct = centred.tr().matmul(&centred) / 999.0;
        assert!(value(&(whole.covariance() - direct).abs().max()) < 1e-11);
        for batch in [1, 7, 64, 255, 256, 257, 999] {
            let mut stream = MomentsStream::default();
            for start in (0..1000).step_by(batch) {
                stream.add(&x.narrow(0, start, (batch as i64).min(1000 - start))).unwrap();
            }
            assert_eq!(stream.count(), 1000);
            let streamed = stream.finish(Divisor::CountLessOne).unwrap();
            assert!(streamed.mean().equal(whole.mean()), "mean in batches of {batch}");
            assert!(streamed.covariance().equal(whole.covariance()), "covariance in batches of {batch}");
        }
    }

    /// With σ/μ = 10⁻⁷ the naive E[x²] − E[x]² has no correct digit left.
    #[test]
    fn a_large_mean_does_not_cancel() {
        let x = normals(2000, 3, 5) + 1e7;
        let spread = Moments::of(&x).unwrap();
        let plain = Moments::of(&normals(2000, 3, 5)).unwrap();
        assert!(value(&(spread.covariance() - plain.covariance()).abs().max()) < 1e-6);
    }

    #[test]
    fn a_set_is_at_distance_0_of_itself() {
        let full = Moments::of(&features(500, 64, 2)).unwrap();
        assert_eq!(full.rank().unwrap(), 64);
        assert!(frechet_distance(&full, &full).unwrap() <= 1e-6);
        let again = Moments::of(&features(500, 64, 2)).unwrap();
        assert!(frechet_distance(&full, &again).unwrap() <= 1e-6);

        let deficient = Moments::of(&features(40, 300, 2)).unwrap();
        assert_eq!(deficient.rank().unwrap(), 39);
        let distance = frechet_distance(&deficient, &deficient).unwrap();
        assert!(distance <= 1e-6 * deficient.trace(), "{distance}");
    }

    /// Diagonal covariances commute: Σ (μ₁ − μ₂)² + (√λ₁ − √λ₂)². A rotation of both changes nothing.
    #[test]
    fn commuting_gaussians_have_their_closed_form() {
        let (dim, mut want) = (12i64, 0.0);
        let (mut l1, mut l2, mut m1, mut m2) = (vec![], vec![], vec![], vec![]);
        for i in 0..dim {
            let t = i as f64;
            // The last ones of the first are 0, and those of the second span ten decades.
            let (a, b) = (if i < 9 { 1.0 + t } else { 0.0 }, 10f64.powf(2.0 - t));
            let (p, q) = (t.sin(), 2.0 * t.cos());
            want += (p - q).powi(2) + (a.sqrt() - b.sqrt()).powi(2);
            l1.push(a);
            l2.push(b);
            m1.push(p);
            m2.push(q);
        }
        let (_, rotation) = {
            let m = normals(dim, dim, 9);
            (&m + m.tr()).linalg_eigh("L")
        };
        let moments = |mean: &[f64], values: &[f64]| {
            let diagonal = Tensor::from_slice(values).diag(0);
            let covariance = rotation.matmul(&diagonal).matmul(&rotation.tr());
            Moments::from_parts(&rotation.mv(&Tensor::from_slice(mean)), &covariance, None).unwrap()
        };
        let (one, other) = (moments(&m1, &l1), moments(&m2, &l2));
        for got in [frechet_distance(&one, &other), frechet_distance(&other, &one)] {
            assert!((got.unwrap() - want).abs() < 1e-9 * want, "{want}");
        }
    }

    /// Covariances that do not commute, in two dimensions: tr √M = √(tr M + 2√det M).
    #[test]
    fn other_gaussians_have_their_closed_form() {
        let matrix = |v: [f64; 4]| Tensor::from_slice(&v).view([2, 2]);
        let (a, b) = (matrix([2.0, 0.6, 0.6, 1.0]), matrix([0.5, -0.3, -0.3, 3.0]));
        let zero = Tensor::zeros([2], (Kind::Double, Device::Cpu));
        let moments = |covariance: &Tensor| Moments::from_parts(&zero, covariance, None).unwrap();
        let product = a.matmul(&b);
        let determinant = (2.0f64 - 0.36) * (1.5 - 0.09);
        let want = 3.0 + 3.5 - 2.0 * (value(&product.trace()) + 2.0 * determinant.sqrt()).sqrt();
        assert!((frechet_distance(&moments(&a), &moments(&b)).unwrap() - want).abs() < 1e-12);
    }

    #[test]
    fn the_divisor_is_a_choice() {
        let x = features(50, 4, 3);
        let stream = || {
            let mut stream = MomentsStream::default();
            stream.add(&x).unwrap();
            stream
        };
        let [less, count] =
            [Divisor::CountLessOne, Divisor::Count].map(|d| stream().finish(d).unwrap().trace());
        assert!((count / less - 49.0 / 50.0).abs() < 1e-12);
    }

    #[test]
    fn too_few_images_are_told() {
        let size = |count| Moments::of(&features(count, 8, 4)).unwrap().sample_size();
        assert_eq!([2, 8, 9, 39, 40].map(size), {
            use SampleSize::{Biased, Enough, Singular};
            [Singular, Singular, Biased, Biased, Enough]
        });
        assert!(Moments::of(&features(8, 8, 4)).unwrap().too_few());
    }

    #[test]
    fn what_has_no_moments_is_refused_in_one_line() {
        let x = features(10, 4, 6);
        let bad = x.copy();
        let _ = bad.get(3).narrow(0, 1, 1).fill_(f64::NAN);
        assert_eq!(
            message(Moments::of(&bad)),
            "features: expected finite numbers, got NaN or infinity in row 3"
        );
        let _ = bad.get(3).fill_(f64::INFINITY);
        assert!(message(Moments::of(&bad)).contains("row 3"));
        let _ = bad.get(3).fill_(1e200);
        assert!(message(Moments::of(&bad)).contains("squares are finite"));
        let one = message(Moments::of(&x.narrow(0, 0, 1)));
        assert!(one.contains("expected at least 2") && one.ends_with("got 1"), "{one}");
        assert!(MomentsStream::default().finish(Divisor::Count).is_err());
        assert!(Moments::of(&x.view([10, 2, 2])).is_err());
        let mut stream = MomentsStream::default();
        stream.add(&x).unwrap();
        let mixed = message(stream.add(&x.narrow(1, 0, 3)));
        assert!(mixed.contains("4 numbers an image, got 3 numbers"), "{mixed}");
        assert_eq!(stream.count(), 10, "a refused batch changes nothing");
        let other = Moments::of(&x.narrow(1, 0, 3)).unwrap();
        assert!(frechet_distance(&Moments::of(&x).unwrap(), &other).is_err());
    }

    #[test]
    fn stored_moments_are_checked() {
        let moments = Moments::of(&features(30, 5, 7)).unwrap();
        let (mean, covariance) = (moments.mean(), moments.covariance());
        let refused = |covariance: &Tensor| message(Moments::from_parts(mean, covariance, Some(30)));
        let loaded = Moments::from_parts(mean, &covariance.to_kind(Kind::Float), None).unwrap();
        assert!(frechet_distance(&loaded, &moments).unwrap() < 1e-5);
        assert!(refused(&(covariance * 0.0)).contains("zeros"));
        assert!(refused(&(covariance - 1e3)).contains("eigenvalue"));
        assert!(refused(&covariance.tril(0)).contains("transpose"));
        assert!(refused(&(covariance * f64::NAN)).contains("finite"));
        assert!(refused(&covariance.narrow(0, 0, 4)).contains("[4, 5]"));
    }
}
