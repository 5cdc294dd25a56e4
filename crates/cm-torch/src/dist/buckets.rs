use tch::Tensor;

use super::ProcessGroup;
use crate::Result;

/// Elements of a flat bucket: 25 MB of float32.
pub(super) const BUCKET: usize = 6 << 20;

impl ProcessGroup {
    /// [`all_reduce`](Self::all_reduce) of many tensors of one kind, which may lie in memory in any order: one exchange
    /// for many small ones.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_reduce_many(&self, what: &str, tensors: &[&Tensor]) -> Result<()> {
        self.in_buckets(tensors, |flat| self.all_reduce(what, flat))
    }

    /// [`broadcast`](Self::broadcast) of many tensors of one kind, which may lie in memory in any order: one exchange
    /// for many small ones.
    ///
    /// # Errors
    /// As [`broadcast`](Self::broadcast).
    pub fn broadcast_many(&self, what: &str, tensors: &[&Tensor], root: usize) -> Result<()> {
        self.in_buckets(tensors, |flat| self.broadcast(what, flat, root))
    }

    fn in_buckets(&self, tensors: &[&Tensor], exchange: impl Fn(&Tensor) -> Result<()>) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        let mut rest = tensors;
        while !rest.is_empty() {
            let (bucket, later) = rest.split_at(bucket_length(rest.iter().map(|tensor| tensor.numel())));
            let parts: std::result::Result<Vec<Tensor>, _> =
                bucket.iter().map(|tensor| tensor.f_detach()?.f_flatten(0, -1)).collect();
            let flat = Tensor::f_cat(&parts?, 0)?;
            exchange(&flat)?;
            let mut start = 0;
            for tensor in bucket {
                let length = tensor.numel() as i64;
                let part = flat.f_narrow(0, start, length)?.f_view_as(tensor)?;
                tensor.f_detach()?.f_copy_(&part)?;
                start += length;
            }
            rest = later;
        }
        Ok(())
    }
}

/// How many of the first tensors go together: as many as fit, and one at least.
fn bucket_length(sizes: impl Iterator<Item = usize>) -> usize {
    let mut sum = 0;
    let fitting = sizes.take_while(|size| {
        sum += size;
        sum <= BUCKET
    });
    fitting.count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_take_what_fits_and_never_nothing() {
        let length = |sizes: &[usize]| bucket_length(sizes.iter().copied());
        assert_eq!(length(&[1, 2, 3]), 3);
        assert_eq!(length(&[BUCKET - 1, 1, 1]), 2);
        assert_eq!(length(&[BUCKET + 1, 1]), 1);
        assert_eq!(length(&[1, BUCKET, 1]), 1);
    }
}
