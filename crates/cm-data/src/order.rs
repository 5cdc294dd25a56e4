//! Which image stands where: the endless sequence of draws that training reads, as a function of its position.
//!
//! The images of epoch e are a permutation of the set that depends on (seed, e); the epochs follow one another
//! without a gap, and batch k is the draws k·B .. (k+1)·B of that sequence. So no image is dropped at an epoch's end,
//! a batch may straddle two epochs, and the data of a step is known without what came before it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cm_schedule::rng::{Purpose, Stream, permutation};

use crate::error::{Error, Result};

/// One place in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// The position in the sequence: it tells every draw of a run from every other.
    pub id: u64,
    /// How many times the set was read through before.
    pub epoch: u64,
    /// The image.
    pub index: u32,
    /// Whether it is mirrored.
    pub flip: bool,
}

/// The sequence of draws from a set of `len` images.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    len: u32,
    flip: bool,
    /// The permutations that were asked for last; a batch needs one, or two where it straddles.
    recent: Mutex<VecDeque<(u64, Arc<Vec<u32>>)>>,
}

impl Order {
    /// The sequence for `len` images under `seed`; `flip` mirrors each draw with probability ½.
    ///
    /// # Errors
    /// [`Error::Argument`] if `len` is 0 or does not fit 32 bits.
    pub fn new(len: usize, seed: u64, flip: bool) -> Result<Self> {
        let count = u32::try_from(len).ok().filter(|&n| n > 0);
        let Some(len) = count else {
            let expected = format!("1 to {}", u32::MAX);
            return Err(Error::Argument { what: "number of images", expected, got: len.to_string() });
        };
        Ok(Self { seed, len, flip, recent: Mutex::default() })
    }

    /// The draws at `positions`.
    pub fn draws(&self, positions: Range<u64>) -> Vec<Draw> {
        let len = u64::from(self.len);
        let mut draws = Vec::with_capacity((positions.end.saturating_sub(positions.start)) as usize);
        let mut current: Option<(u64, Arc<Vec<u32>>)> = None;
        for id in positions {
            let (epoch, place) = (id / len, (id % len) as usize);
            let order = match &current {
                Some((e, order)) if *e == epoch => order.clone(),
                _ => self.epoch(epoch),
            };
            let index = order[place];
            current = Some((epoch, order));
            draws.push(Draw { id, epoch, index, flip: self.flip && self.is_flipped(epoch, index) });
        }
        draws
    }

    /// One bit of the stream (seed, flip, epoch, image): independent of the batch size and of the order.
    fn is_flipped(&self, epoch: u64, index: u32) -> bool {
        let sample = (epoch >> 32 & 0xff_ffff) << 32 | u64::from(index);
        Stream { seed: self.seed, purpose: Purpose::Flip, step: epoch as u32, sample }.bits(0) & 1 == 1
    }

    fn epoch(&self, epoch: u64) -> Arc<Vec<u32>> {
        // A panic elsewhere leaves at worst an older list behind, which is as good.
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = recent.iter().find(|(e, _)| *e == epoch) {
            return order.clone();
        }
        let order = Arc::new(permutation(self.seed, epoch, self.len));
        if recent.len() == 2 {
            recent.pop_front();
        }
        recent.push_back((epoch, order.clone()));
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_epoch_draws_every_image_once_and_epochs_differ() {
        let order = Order::new(97, 5, false).unwrap();
        let epochs: Vec<Vec<u32>> =
            (0..3).map(|e| order.draws(e * 97..(e + 1) * 97).iter().map(|d| d.index).collect()).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort();
            assert_eq!(sorted, (0..97).collect::<Vec<_>>());
        }
        assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        let other = Order::new(97, 6, false).unwrap().draws(0..97);
        assert_ne!(epochs[0], other.iter().map(|d| d.index).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn a_draw_depends_on_its_position_alone(len in 1_usize..50, seed: u64, at in 0_u64..10_000, n in 0_u64..200) {
            // Read as one stretch, one by one from the back, and by a fresh object.
            let order = Order::new(len, seed, true).unwrap();
            let stretch = order.draws(at..at + n);
            let mut single: Vec<Draw> = (at..at + n).rev().flat_map(|p| order.draws(p..p + 1)).collect();
            single.reverse();
            prop_assert_eq!(&stretch, &single);
            prop_assert_eq!(&stretch, &Order::new(len, seed, true).unwrap().draws(at..at + n));
            for (draw, id) in stretch.iter().zip(at..) {
                prop_assert_eq!((draw.id, draw.epoch), (id, id / len as u64));
            }
        }
    }

    #[test]
    fn half_of_the_draws_are_flipped_and_not_always_the_same() {
        let order = Order::new(1000, 1, true).unwrap();
        let flipped = |e: u64| -> Vec<u32> {
            let mut all: Vec<u32> =
                order.draws(e * 1000..(e + 1) * 1000).iter().filter(|d| d.flip).map(|d| d.index).collect();
            all.sort();
            all
        };
        let (one, two) = (flipped(0), flipped(1));
        // Binomial(1000, ½) has a standard deviation of 15.8; 5 of them.
        assert!(one.len().abs_diff(500) < 80 && two.len().abs_diff(500) < 80, "{} {}", one.len(), two.len());
        let both = one.iter().filter(|i| two.contains(i)).count();
        assert!(both.abs_diff(250) < 70, "{both} of 1000 flipped in both epochs");
        assert!(Order::new(1000, 1, false).unwrap().draws(0..1000).iter().all(|d| !d.flip));
    }

    #[test]
    fn a_set_needs_a_size_that_fits() {
        assert!(Order::new(0, 0, false).is_err());
        assert!(Order::new(1 << 33, 0, false).is_err());
    }
}
