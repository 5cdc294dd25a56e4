//! Precision and recall of generated images, by neighbourhoods in the space of features.

use tch::{Kind, Tensor};

use crate::features::{rows, same_columns};
use crate::{Error, Result};

/// Rows whose distances to a whole set are in memory at a time.
const CHUNK: i64 = 128;

/// How generated images cover real ones and the other way round.
#[derive(Debug)]
pub struct PrecisionRecall {
    /// The share of generated images that lie in the manifold of the real ones: quality.
    pub precision: f64,
    /// The share of real images that lie in the manifold of the generated ones: diversity.
    pub recall: f64,
    /// The radius around each real image, `[N]` float64.
    pub radii_real: Tensor,
    /// The radius around each generated image.
    pub radii_generated: Tensor,
    /// Whether each generated image lies in the manifold of the real ones, `[M]` bool.
    pub generated_covered: Tensor,
    /// Whether each real image lies in the manifold of the generated ones.
    pub real_covered: Tensor,
}

/// Precision and recall with manifolds made of balls: around each image one that reaches to its `k`-th nearest *other*
/// image. A point on the surface lies inside. k = 3 is usual.
///
/// Every image is compared with every other, in float64 and exactly: the work grows with the square of their number.
///
/// # Shapes
/// Features `[N, D]` each; the work is done on the device where they lie.
///
/// # Errors
/// [`Error::Input`] for features that are not finite or of different dimensions, and unless each set has more than k ≥ 1
/// images.
///
/// # Source
/// Kynkäänniemi et al. 2019 (arXiv 1904.06991).
pub fn precision_recall(real: &Tensor, generated: &Tensor, k: i64) -> Result<PrecisionRecall> {
    if k < 1 {
        let expected = "at least 1".into();
        return Err(Error::Input { what: "k of precision and recall", expected, got: k.to_string() });
    }
    let least = k.saturating_add(1);
    let (real, generated) =
        (rows("real features", real, least)?, rows("generated features", generated, least)?);
    same_columns("generated features", real.size()[1], generated.size()[1])?;
    let (radii_real, radii_generated) = (radii(&real, k)?, radii(&generated, k)?);
    let (mut of_generated, mut of_real) = (Vec::new(), None::<Tensor>);
    for (start, chunk) in chunks(&generated)? {
        let distances = distances(&chunk, &real)?;
        let radii = radii_generated.f_narrow(0, start, chunk.size()[0])?;
        of_generated.push(distances.f_le_tensor(&radii_real)?.f_any_dim(1, false)?);
        let covers = distances.f_le_tensor(&radii.f_unsqueeze(1)?)?.f_any_dim(0, false)?;
        of_real = Some(match of_real {
            None => covers,
            Some(before) => before.f_logical_or(&covers)?,
        });
    }
    let generated_covered = Tensor::f_cat(&of_generated, 0)?;
    let real_covered = of_real.unwrap_or_else(|| generated_covered.shallow_clone());
    let share = |covered: &Tensor| -> Result<f64> {
        Ok(covered.f_to_kind(Kind::Double)?.f_mean(Kind::Double)?.f_double_value(&[])?)
    };
    Ok(PrecisionRecall {
        precision: share(&generated_covered)?,
        recall: share(&real_covered)?,
        radii_real,
        radii_generated,
        generated_covered,
        real_covered,
    })
}

/// The distance of each row to its `k`-th nearest other row.
fn radii(features: &Tensor, k: i64) -> Result<Tensor> {
    let radius = |(_, chunk): (i64, Tensor)| -> Result<Tensor> {
        // The nearest of all is the row itself, at distance 0.
        Ok(distances(&chunk, features)?.f_kthvalue(k + 1, 1, false)?.0)
    };
    let all: Vec<Tensor> = chunks(features)?.into_iter().map(radius).collect::<Result<_>>()?;
    Ok(Tensor::f_cat(&all, 0)?)
}

/// The rows in chunks, each behind the number of its first row.
fn chunks(features: &Tensor) -> Result<Vec<(i64, Tensor)>> {
    let count = features.size()[0];
    let chunk = |start: i64| Ok((start, features.f_narrow(0, start, CHUNK.min(count - start))?));
    (0..count).step_by(CHUNK as usize).map(chunk).collect()
}

/// Euclidean distances, by differences rather than by products: those cancel for images that are alike, and a copy would
/// fall out of a ball of radius 0.
fn distances(one: &Tensor, other: &Tensor) -> Result<Tensor> {
    const BY_DIFFERENCES: i64 = 2;
    Ok(Tensor::f_cdist(one, other, 2.0, BY_DIFFERENCES)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    fn points(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).view([-1, 1])
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn balls_reach_to_the_kth_other_point_and_hold_their_surface() {
        // The balls with k = 1 cover [-1, 5] and [3, 15].
        let real = points(&[0.0, 1.0, 3.0, 9.0]);
        let generated = points(&[-1.0, -1.1, 15.0, 15.1]);
        let found = precision_recall(&real, &generated, 1).unwrap();
        assert_eq!(values(&found.radii_real), [1.0, 1.0, 2.0, 6.0]);
        assert_eq!(values(&found.generated_covered), [1.0, 0.0, 1.0, 0.0]);
        assert_eq!(found.precision, 0.5);
        // The generated balls have radius 0.1.
        assert_eq!((found.recall, values(&found.real_covered)), (0.0, vec![0.0; 4]));
        let second = precision_recall(&real, &generated, 2).unwrap();
        assert_eq!(values(&second.radii_real), [3.0, 2.0, 3.0, 8.0]);
    }

    #[test]
    fn a_set_covers_itself_and_copies_cover_each_other() {
        let x = normals(300, 16, 1);
        let same = precision_recall(&x, &x.copy(), 3).unwrap();
        assert_eq!((same.precision, same.recall), (1.0, 1.0));
        // All radii are 0.
        let copies = normals(1, 16, 2).expand([200, 16], false) * 1e3;
        let same = precision_recall(&copies, &copies, 3).unwrap();
        assert_eq!((same.precision, same.recall, same.radii_real.max().double_value(&[])), (1.0, 1.0, 0.0));
    }

    #[test]
    fn precision_is_for_quality_and_recall_for_diversity() {
        let real = normals(500, 4, 3);
        let narrow = precision_recall(&real, &(normals(500, 4, 4) * 0.1), 3).unwrap();
        assert!(narrow.precision > 0.99 && narrow.recall < 0.2, "{narrow:?}");
        let wide = precision_recall(&real, &(normals(500, 4, 5) * 4.0), 3).unwrap();
        assert!(wide.precision < 0.2 && wide.recall > 0.9, "{wide:?}");
    }

    #[test]
    fn sets_without_a_kth_neighbour_are_refused() {
        let x = normals(10, 2, 6);
        assert!(precision_recall(&x, &x.narrow(0, 0, 3), 3).is_err());
        assert!(precision_recall(&x, &x, 0).is_err() && precision_recall(&x, &x, i64::MAX).is_err());
        assert!(precision_recall(&x, &x.narrow(1, 0, 1), 1).is_err());
    }
}
