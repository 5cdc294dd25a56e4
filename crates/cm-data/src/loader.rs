//! Batches for training: any step's batch on demand, or a stream of them that is decoded ahead.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use rayon::prelude::*;

use crate::corrupt::Corrupt;
use crate::dataset::{Dataset, Shape};
use crate::error::{Error, Result};
use crate::order::{Draw, Order};
use crate::transform::flip_rows;

/// How a set is cut into batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderSpec {
    /// Images in a batch.
    pub batch: usize,
    /// The run's seed: order and flips depend on it.
    pub seed: u64,
    /// Whether each draw is mirrored with probability ½.
    pub flip: bool,
    /// Threads that decode; 0 for one per core, at most 8. A set in memory is copied by one.
    pub workers: usize,
    /// Finished batches that a stream holds ready, at least 1.
    pub prefetch: usize,
    /// So many images that do not decode are passed over, each for the next one that does; see [`Loader::corrupt`].
    pub max_corrupt: usize,
}

impl LoaderSpec {
    /// A spec with as many workers as there are cores and two batches held ready.
    pub const fn new(batch: usize, seed: u64, flip: bool) -> Self {
        Self { batch, seed, flip, workers: 0, prefetch: 2, max_corrupt: 0 }
    }
}

/// Images on their way to a network, as uint8; [`Batch::to_images`] makes the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The shape of one image.
    pub shape: Shape,
    /// Values, NCHW.
    pub pixels: Vec<u8>,
    /// One class per image, if the set is labelled.
    pub labels: Option<Vec<u32>>,
    /// Each image's position in the sequence of draws (see [`order`](crate::order)). No two images of a run share
    /// one, so it is the sample id for whatever noise belongs to the image.
    pub ids: Vec<u64>,
    /// Each image's index in the set.
    pub indices: Vec<u32>,
}

impl Batch {
    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The images of `set` at `indices`, as they are and in that order; their ids are the indices.
    ///
    /// # Errors
    /// As [`Dataset::read`], for the first image in the list that fails.
    pub fn gather(set: &dyn Dataset, indices: impl IntoIterator<Item = u32>) -> Result<Batch> {
        let draws: Vec<Draw> = indices
            .into_iter()
            .map(|index| Draw { id: index.into(), epoch: 0, index, flip: false })
            .collect();
        fill(set, &draws, &Corrupt::default(), !set.is_resident())
    }
}

/// Reads draws; in parallel on the current rayon pool where that pays.
fn fill(set: &dyn Dataset, draws: &[Draw], corrupt: &Corrupt, parallel: bool) -> Result<Batch> {
    let shape = set.shape();
    let values = shape.values();
    let mut pixels = vec![0; draws.len() * values];
    let read = |(out, draw): (&mut [u8], &Draw)| -> Result<u32> {
        let index = corrupt.read(set, draw.index, out)?;
        if draw.flip {
            flip_rows(out, shape.width);
        }
        Ok(index)
    };
    let indices: Vec<u32> = if parallel {
        let results: Vec<Result<u32>> = pixels.par_chunks_exact_mut(values).zip(draws).map(read).collect();
        // The first in the batch rather than the first in time, so that a fault reads the same on every run.
        results.into_iter().collect::<Result<_>>()?
    } else {
        pixels.chunks_exact_mut(values).zip(draws).map(read).collect::<Result<_>>()?
    };
    let labels = set.labels().map(|all| indices.iter().map(|&index| all[index as usize]).collect());
    Ok(Batch { shape, pixels, labels, ids: draws.iter().map(|d| d.id).collect(), indices })
}

/// Batches of a set, each a function of (seed, step) alone: a resumed run needs no state of its loader.
///
/// ```
/// use cm_data::{Loader, LoaderSpec, SourceKind, SourceSpec};
/// let set = SourceSpec::new(SourceKind::Digits, None).open().unwrap();
/// let loader = Loader::new(set, LoaderSpec::new(512, 0, false)).unwrap();
/// let mut stream = loader.stream(3..5);
/// assert_eq!(stream.next().unwrap().unwrap(), loader.batch_at(3).unwrap());
/// ```
#[derive(Clone)]
pub struct Loader {
    inner: Arc<Inner>,
}

struct Inner {
    set: Arc<dyn Dataset>,
    spec: LoaderSpec,
    order: Order,
    corrupt: Corrupt,
    /// None for a set in memory.
    pool: Option<rayon::ThreadPool>,
}

impl Loader {
    /// A loader over `set`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the batch is empty; [`Error::Worker`] if the system starts no thread.
    pub fn new(set: Arc<dyn Dataset>, spec: LoaderSpec) -> Result<Self> {
        if spec.batch == 0 {
            let expected = "at least 1".into();
            return Err(Error::Argument { what: "batch size", expected, got: "0".into() });
        }
        let order = Order::new(set.len(), spec.seed, spec.flip)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = if spec.workers == 0 { cores.min(8) } else { spec.workers };
        let pool = match set.is_resident() {
            true => None,
            false => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(workers)
                    .thread_name(|i| format!("decode-{i}"))
                    .build()
                    .map_err(|e| Error::Worker { step: 0, message: e.to_string() })?,
            ),
        };
        let corrupt = Corrupt::new(spec.max_corrupt);
        Ok(Self { inner: Arc::new(Inner { set, spec, order, corrupt, pool }) })
    }

    /// The set that is read.
    pub fn dataset(&self) -> &Arc<dyn Dataset> {
        &self.inner.set
    }

    /// How it is read.
    pub fn spec(&self) -> &LoaderSpec {
        &self.inner.spec
    }

    /// The images that were found not to decode since this was last asked, one line for each: the caller should say so
    /// loudly. There are none where [`LoaderSpec::max_corrupt`] is 0, since the first is an error then.
    pub fn corrupt(&self) -> Vec<String> {
        self.inner.corrupt.news()
    }

    /// How many images this loader has found not to decode, those that were read ahead among them.
    pub fn corrupt_so_far(&self) -> usize {
        self.inner.corrupt.count()
    }

    /// The batch of `step`.
    ///
    /// # Errors
    /// Whatever hinders reading one of its images, naming the file; the first in the batch if several fail.
    pub fn batch_at(&self, step: u64) -> Result<Batch> {
        self.rows_at(step, 0..self.inner.spec.batch)
    }

    /// The images `rows` of the batch of `step`: a micro-batch, or one process' share.
    ///
    /// # Errors
    /// As [`batch_at`](Self::batch_at); [`Error::Argument`] if `rows` lie outside the batch.
    pub fn rows_at(&self, step: u64, rows: Range<usize>) -> Result<Batch> {
        self.inner.rows_at(step, rows)
    }

    /// The batches of `steps` in order, read ahead on a thread of their own.
    ///
    /// At most `prefetch` finished batches wait; the thread ends with the stream.
    pub fn stream(&self, steps: Range<u64>) -> Batches {
        self.stream_rows(steps, 0..self.inner.spec.batch)
    }

    /// The images `rows` of the batches of `steps`, as [`stream`](Self::stream) and [`rows_at`](Self::rows_at).
    pub fn stream_rows(&self, steps: Range<u64>, rows: Range<usize>) -> Batches {
        let (sender, receiver) = sync_channel(self.inner.spec.prefetch.max(1));
        let inner = self.inner.clone();
        let due = steps.clone();
        let spawned = std::thread::Builder::new().name("loader".into()).spawn(move || {
            for step in steps {
                let batch = inner.rows_at(step, rows.clone());
                let failed = batch.is_err();
                if sender.send(batch).is_err() || failed {
                    break;
                }
            }
        });
        let (thread, refused) = match spawned {
            Ok(thread) => (Some(thread), None),
            Err(e) => (None, Some(e.to_string())),
        };
        Batches { receiver: Some(receiver), thread, refused, due }
    }
}

impl Inner {
    fn rows_at(&self, step: u64, rows: Range<usize>) -> Result<Batch> {
        let batch = self.spec.batch as u64;
        if rows.start > rows.end || rows.end > self.spec.batch {
            let expected = format!("a range within 0..{batch}");
            return Err(Error::Argument { what: "rows of a batch", expected, got: format!("{rows:?}") });
        }
        // 2⁵⁶ is what a sample id may take in the counter of the noise.
        let last = step.checked_add(1).and_then(|s| s.checked_mul(batch)).filter(|&p| p <= 1 << 56);
        let Some(last) = last else {
            let expected = format!("below 2^56 / {batch}");
            return Err(Error::Argument { what: "step", expected, got: step.to_string() });
        };
        let first = last - batch;
        let draws = self.order.draws(first + rows.start as u64..first + rows.end as u64);
        match &self.pool {
            None => fill(&*self.set, &draws, &self.corrupt, false),
            Some(pool) => pool.install(|| fill(&*self.set, &draws, &self.corrupt, true)),
        }
    }
}

/// The batches of a range of steps, from [`Loader::stream`]. It ends after its last step or its first error.
pub struct Batches {
    receiver: Option<Receiver<Result<Batch>>>,
    thread: Option<JoinHandle<()>>,
    refused: Option<String>,
    due: Range<u64>,
}

impl Iterator for Batches {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.due.next()?;
        let received = self.receiver.as_ref()?.recv();
        let item = received.unwrap_or_else(|_| {
            let message = self.refused.take().or_else(|| Some(panic_text(self.thread.take()?.join().err()?)));
            Err(Error::Worker { step, message: message.unwrap_or_else(|| "it ended early".into()) })
        });
        if item.is_err() {
            self.receiver = None;
        }
        Some(item)
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        // Without a receiver the next send fails, which ends the thread.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // A panic in it was reported by `next`, or came after the last batch that anybody wanted.
            let _ = thread.join();
        }
    }
}

fn panic_text(payload: Box<dyn std::any::Any + Send>) -> String {
    let text = payload.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a text".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::{Labels, MemorySet};
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn set(count: usize) -> Arc<dyn Dataset> {
        let labels = (0..count as i64).collect::<Vec<_>>();
        let labels = Labels::new("t", &labels, None).unwrap();
        // Image i is [i, i+100].
        let pixels = (0..count).flat_map(|i| [i as u8, i as u8 + 100]).collect();
        Arc::new(
            MemorySet::new("t", Shape { channels: 1, height: 1, width: 2 }, pixels, Some(labels)).unwrap(),
        )
    }

    fn loader(count: usize, batch: usize, flip: bool) -> Loader {
        Loader::new(set(count), LoaderSpec::new(batch, 3, flip)).unwrap()
    }

    #[test]
    fn batches_follow_one_another_through_the_epochs_without_a_gap() {
        // 10 images in batches of 4: 5 batches are 2 epochs, and the third batch straddles them.
        let loader = loader(10, 4, false);
        let all: Vec<u32> = (0..5).flat_map(|s| loader.batch_at(s).unwrap().indices).collect();
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        let ids: Vec<u64> = (0..5).flat_map(|s| loader.batch_at(s).unwrap().ids).collect();
        assert_eq!(ids, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn pixels_labels_and_indices_belong_together_and_flips_mirror() {
        let batch = loader(10, 200, true).batch_at(7).unwrap();
        let mut flipped = 0;
        for (i, &index) in batch.indices.iter().enumerate() {
            let (value, image) = (index as u8, &batch.pixels[2 * i..2 * i + 2]);
            assert_eq!(batch.labels.as_ref().unwrap()[i], index);
            assert!(image == [value, value + 100] || image == [value + 100, value]);
            flipped += usize::from(image[0] == value + 100);
        }
        assert!((50..150).contains(&flipped), "{flipped} of 200 flipped");
    }

    #[test]
    fn a_stream_from_any_step_equals_the_batches_of_those_steps() {
        let loader = loader(7, 3, true);
        for start in [0, 5, 100] {
            let stream: Vec<Batch> = loader.stream(start..start + 6).map(Result::unwrap).collect();
            let single: Vec<Batch> = (start..start + 6).map(|s| loader.batch_at(s).unwrap()).collect();
            assert_eq!(stream, single);
        }
        assert_eq!(loader.stream(4..4).count(), 0);
    }

    #[test]
    fn rows_are_slices_of_the_batch() {
        let loader = loader(9, 5, true);
        let whole = loader.batch_at(2).unwrap();
        let (one, two) = (loader.rows_at(2, 0..3).unwrap(), loader.rows_at(2, 3..5).unwrap());
        assert_eq!([one.pixels, two.pixels].concat(), whole.pixels);
        assert_eq!([one.ids, two.ids].concat(), whole.ids);
        let stream: Vec<Batch> = loader.stream_rows(2..4, 3..5).map(Result::unwrap).collect();
        assert_eq!(stream, [loader.rows_at(2, 3..5).unwrap(), loader.rows_at(3, 3..5).unwrap()]);
        assert!(loader.rows_at(2, 3..6).is_err());
        assert!(loader.batch_at(u64::MAX).is_err() && loader.batch_at(1 << 55).is_err());
    }

    /// Fails or panics at one image, and counts reads.
    struct Faulty {
        bad: usize,
        panics: bool,
        reads: Arc<AtomicUsize>,
    }

    impl Dataset for Faulty {
        fn source(&self) -> &str {
            "faulty"
        }
        fn len(&self) -> usize {
            4
        }
        fn shape(&self) -> Shape {
            Shape::square(1, 1)
        }
        fn num_classes(&self) -> usize {
            0
        }
        fn labels(&self) -> Option<&[u32]> {
            None
        }
        fn name(&self, index: usize) -> String {
            format!("{index}.png")
        }
        fn read(&self, index: usize, _: &mut [u8]) -> Result<()> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            match index == self.bad {
                false => Ok(()),
                true if self.panics => panic!("decoder bug"),
                true => Err(Error::corrupt(self.name(index), "bad")),
            }
        }
    }

    #[test]
    fn errors_and_panics_of_the_thread_reach_the_consumer_and_end_the_stream() {
        for panics in [false, true] {
            let set = Faulty { bad: 2, panics, reads: Arc::default() };
            let loader = Loader::new(Arc::new(set), LoaderSpec::new(2, 0, false)).unwrap();
            let items: Vec<Result<Batch>> = loader.stream(0..100).collect();
            let last = items.last().unwrap().as_ref().unwrap_err().to_string();
            let want = if panics { "decoder bug" } else { "2.png: cannot decode: bad" };
            assert!(last.contains(want), "{last}");
            assert!(items.len() <= 2 && items[..items.len() - 1].iter().all(Result::is_ok));
        }
    }

    #[test]
    fn reading_ahead_is_bounded_and_ends_with_the_stream() {
        let reads = Arc::new(AtomicUsize::new(0));
        let set = Faulty { bad: 9, panics: false, reads: reads.clone() };
        let spec = LoaderSpec { prefetch: 3, ..LoaderSpec::new(2, 0, false) };
        let loader = Loader::new(Arc::new(set), spec).unwrap();
        let mut stream = loader.stream(0..1_000_000);
        stream.next().unwrap().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        // One taken, three waiting, one in the hand of the thread: 5 batches of 2.
        assert!(reads.load(Ordering::SeqCst) <= 10, "{} reads", reads.load(Ordering::SeqCst));
        drop(stream);
    }

    #[test]
    fn gather_takes_what_is_asked_for() {
        let batch = Batch::gather(&*set(5), [4, 0, 4]).unwrap();
        assert_eq!((batch.pixels, batch.labels), (vec![4, 104, 0, 100, 4, 104], Some(vec![4, 0, 4])));
        assert!(Batch::gather(&*set(5), [5]).is_err());
    }
}
