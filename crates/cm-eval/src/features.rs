//! Checks that everything which takes features shares.

use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Rows of features `[N ≥ least, D ≥ 1]` in float64, on the device where they lie.
pub(crate) fn rows(what: &'static str, features: &Tensor, least: i64) -> Result<Tensor> {
    let size = features.size();
    let [count, dim] = size[..] else {
        return Err(Error::Input { what, expected: "[N, D]".into(), got: format!("{size:?}") });
    };
    if count < least || dim < 1 {
        let expected = format!("[N ≥ {least}, D ≥ 1]");
        return Err(Error::Input { what, expected, got: format!("{size:?}") });
    }
    let features = features.detach().f_to_kind(Kind::Double)?;
    let whole = features.f_isfinite()?.f_all_dim(1, false)?;
    if !bool::try_from(whole.f_all()?)? {
        let first = i64::try_from(whole.f_to_kind(Kind::Int64)?.f_argmin(0, false)?)?;
        let got = format!("NaN or infinity in row {first}");
        return Err(Error::Input { what, expected: "finite numbers".into(), got });
    }
    Ok(features)
}

/// Checks that two sets of features have the same number of columns.
pub(crate) fn same_columns(what: &'static str, one: i64, other: i64) -> Result<()> {
    if one == other {
        return Ok(());
    }
    let expected = format!("features of one kind, {one} numbers an image");
    Err(Error::Input { what, expected, got: format!("{other} numbers an image") })
}
