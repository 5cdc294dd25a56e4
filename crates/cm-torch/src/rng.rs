//! Dropout that can be repeated.
//!
//! libtorch draws dropout masks from one generator per device, whose state tch can neither read nor restore. So
//! nothing is saved: the generators are seeded from (run seed, step, purpose) right before a forward pass, and two
//! passes that start from the same seed and make the same calls on equal shapes get the same masks.
//!
//! Where a batch is spread over processes, each draws the masks of the whole batch and takes its [`Rows`] of them, so
//! that an image gets the mask that it would get in one process.

use std::cell::Cell;
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

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

thread_local! {
    static WINDOW: Cell<Option<Window>> = const { Cell::new(None) };
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    of: i64,
    start: i64,
}

/// While it lives, the batches on this thread are rows of a larger one, to [`dropout`] and [`uniform_rows`].
///
/// ```
/// use cm_torch::rng::{Rows, dropout, seed_dropout};
/// use cm_torch::tch::{Device, Kind, Tensor};
/// let ones = |rows: i64| Tensor::ones([rows, 3], (Kind::Float, Device::Cpu));
/// seed_dropout(1);
/// let whole = dropout(&ones(4), 0.5, true);
/// let _rows = Rows::enter(4, 1);
/// seed_dropout(1);
/// assert!(dropout(&ones(2), 0.5, true).equal(&whole.narrow(0, 1, 2)));
/// ```
#[derive(Debug)]
#[must_use = "the rows are those of a larger batch only as long as this value lives"]
pub struct Rows {
    before: Option<Window>,
    /// It belongs to the thread that made it.
    _thread: PhantomData<*const ()>,
}

impl Rows {
    /// Row 0 of a batch is row `start` of `of`.
    pub fn enter(of: i64, start: i64) -> Self {
        Self::again(Some(Window { of, start }))
    }

    /// The window that there was when [`window_now`] was called.
    pub(crate) fn again(window: Option<Window>) -> Self {
        Self { before: WINDOW.replace(window), _thread: PhantomData }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        WINDOW.set(self.before);
    }
}

/// The window of this thread, whether or not it is one.
pub(crate) fn window_now() -> Option<Window> {
    WINDOW.get()
}

/// The window that `rows` rows are less than the whole of.
fn window(rows: i64) -> Option<Window> {
    WINDOW.get().filter(|window| rows < window.of && window.start + rows <= window.of)
}

/// libtorch's dropout, whose mask is that of the image in the whole batch; see [`Rows`]. The first dimension of `x`
/// counts images.
pub fn dropout(x: &Tensor, p: f64, train: bool) -> Tensor {
    let size = x.size();
    let window = size.first().and_then(|&rows| window(rows));
    let (Some(Window { of, start }), true) = (window, train && p > 0.0 && p < 1.0) else {
        return x.dropout(p, train);
    };
    let mask = {
        let _no_grad = tch::no_grad_guard();
        let whole: Vec<i64> = std::iter::once(of).chain(size.iter().skip(1).copied()).collect();
        // In the memory order of `x`, in which the first dimension is the outermost one.
        let mut whole = Tensor::empty_strided(&whole, x.stride(), (x.kind(), x.device()));
        let _ = whole.bernoulli_float_(1.0 - p);
        whole.narrow(0, start, size[0]) / (1.0 - p)
    };
    x * mask
}

/// Uniform numbers in [0, 1), one for each of `rows` images, as a column `[rows, 1]`; see [`Rows`].
pub fn uniform_rows(rows: i64, device: Device) -> Tensor {
    let draw = |rows: i64| Tensor::rand([rows, 1], (Kind::Float, device));
    match window(rows) {
        Some(Window { of, start }) => draw(of).narrow(0, start, rows),
        None => draw(rows),
    }
}
