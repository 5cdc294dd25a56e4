//! What the tests share.

use cm_schedule::rng::{Purpose, Stream};
use tch::Tensor;

/// Independent standard normal numbers `[count, dim]` in float64.
pub(crate) fn normals(count: i64, dim: i64, seed: u64) -> Tensor {
    let mut values = vec![0f32; (count * dim) as usize];
    Stream { seed, purpose: Purpose::Synthetic, step: 0, sample: 0 }.fill_normals(&mut values);
    Tensor::from_slice(&values).view([count, dim]).to_kind(tch::Kind::Double)
}
