//! Dropout that can be repeated.
//!
//! libtorch draws dropout masks from one generator per device, whose state tch can neither read nor restore. So
//! nothing is saved: the generators are seeded from (run seed, step, purpose) right before a forward pass, and two
//! passes that start from the same seed and make the same calls on equal shapes get the same masks.

/// Seeds libtorch's generators on every device: the CPU's, and those of CUDA where it is open.
///
/// The masks of student and target in one training step agree if both passes start with the same seed and apply
/// dropout to equal shapes in the same order (consistency training needs this: Song et al. 2023, appendix C).
///
/// libtorch looks for CUDA in this call, for good: open a CUDA device with [`crate::device::resolve`] first.
pub fn seed_dropout(seed: u64) {
    // The bits are what counts; libtorch reads them as unsigned again.
    tch::manual_seed(seed as i64);
}
