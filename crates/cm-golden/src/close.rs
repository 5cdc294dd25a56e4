//! Comparing two tensors under a tolerance.

use tch::{Kind, Tensor};

/// How near a value must be to the recorded one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// Equal, bit for bit in value.
    Exact,
    /// max|a − b| ≤ t·max|b|, the default meaning of "rel" in the golden files.
    Rel(f64),
    /// max|a − b| ≤ t.
    Abs(f64),
    /// |a − b| ≤ max(rel·|b|, abs) for every element: stricter than [`Tolerance::Rel`] where b spans decades.
    Each {
        /// Share of the recorded value.
        rel: f64,
        /// What is allowed for values near zero.
        abs: f64,
    },
}

impl Tolerance {
    /// The number to print beside an error.
    pub fn limit(&self) -> f64 {
        match *self {
            Tolerance::Exact => 0.0,
            Tolerance::Rel(t) | Tolerance::Abs(t) => t,
            Tolerance::Each { rel, .. } => rel,
        }
    }

    /// One word for the kind of error.
    pub fn word(&self) -> &'static str {
        match self {
            Tolerance::Exact => "exact",
            Tolerance::Rel(_) => "rel",
            Tolerance::Abs(_) => "abs",
            Tolerance::Each { .. } => "rel each",
        }
    }
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// The error, in the unit of [`Tolerance::limit`]; infinite where shapes differ or a value is not finite.
    pub error: f64,
    /// Where and what, in words.
    pub detail: String,
}

/// Compares `got` with the recorded `want`.
///
/// The error is infinite where the shapes differ and where either side is not finite: a NaN is never near
/// anything.
pub fn compare(got: &Tensor, want: &Tensor, tolerance: Tolerance) -> Difference {
    if got.size() != want.size() {
        let detail = format!("shape {:?}, recorded {:?}", got.size(), want.size());
        return Difference { error: f64::INFINITY, detail };
    }
    let (got, want) = (values(got), values(want));
    let scale = want.iter().fold(0f64, |m, b| m.max(b.abs()));
    let error_at = |a: f64, b: f64| {
        let gap = (a - b).abs();
        if !a.is_finite() || !b.is_finite() {
            return f64::INFINITY;
        }
        match tolerance {
            Tolerance::Exact | Tolerance::Abs(_) => gap,
            Tolerance::Rel(_) => ratio(gap, scale),
            // In units of `rel`, so that an error of exactly the limit prints as the limit.
            Tolerance::Each { rel, abs } => ratio(gap, b.abs().max(abs / rel)),
        }
    };
    let mut worst = (0.0, 0);
    for (index, (&a, &b)) in got.iter().zip(&want).enumerate() {
        let error = error_at(a, b);
        if error > worst.0 {
            worst = (error, index);
        }
    }
    let detail = match got.get(worst.1) {
        Some(a) => format!("at element {} of {}: {a:e}, recorded {:e}", worst.1, got.len(), want[worst.1]),
        None => "no elements".into(),
    };
    Difference { error: worst.0, detail }
}

fn ratio(gap: f64, scale: f64) -> f64 {
    if gap == 0.0 { 0.0 } else { gap / scale }
}

/// All elements as f64, row-major.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double).contiguous().view([-1]);
    let mut values = vec![0f64; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(got: &[f64], want: &[f64], tolerance: Tolerance) -> f64 {
        compare(&Tensor::from_slice(got), &Tensor::from_slice(want), tolerance).error
    }

    #[test]
    fn each_tolerance_measures_its_own_error() {
        let (got, want) = ([1.0, 2.1, 0.001], [1.0, 2.0, 0.002]);
        assert!((error(&got, &want, Tolerance::Abs(0.0)) - 0.1).abs() < 1e-12);
        assert!((error(&got, &want, Tolerance::Rel(0.0)) - 0.05).abs() < 1e-12);
        assert!((error(&got, &want, Tolerance::Each { rel: 1e-3, abs: 0.0 }) - 0.5).abs() < 1e-12);
        let floor = Tolerance::Each { rel: 1e-3, abs: 1e-3 };
        assert!((error(&got, &want, floor) - 0.05).abs() < 1e-12, "0.001 is within the floor");
    }

    #[test]
    fn zero_matches_zero_and_nothing_else() {
        for tolerance in [Tolerance::Exact, Tolerance::Rel(1.0), Tolerance::Each { rel: 1.0, abs: 0.0 }] {
            assert_eq!(error(&[0.0], &[0.0], tolerance), 0.0);
            assert!(error(&[1e-30], &[0.0], tolerance) > tolerance.limit(), "{tolerance:?}");
        }
    }

    #[test]
    fn nan_and_other_shapes_are_infinitely_far() {
        assert_eq!(error(&[f64::NAN], &[1.0], Tolerance::Abs(1e9)), f64::INFINITY);
        assert_eq!(error(&[1.0], &[f64::NAN], Tolerance::Abs(1e9)), f64::INFINITY);
        assert_eq!(error(&[1.0, 1.0], &[1.0], Tolerance::Abs(1e9)), f64::INFINITY);
    }
}
