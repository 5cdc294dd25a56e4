use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::ProcessGroup;
use super::buckets::BUCKET;
use crate::{Error, Result};

/// Float tensors as one row of numbers, in the order in which they lie in memory.
///
/// It holds handles: what is written into the row is written into the tensors. A row is what ranks share out:
/// [`share_of`] says which of its numbers a rank holds.
#[derive(Debug)]
pub struct Row {
    tensors: Vec<Tensor>,
    ends: Vec<usize>,
}

/// Neighbouring numbers of a [`Row`] that belong to one of its tensors.
#[derive(Debug)]
pub struct Piece {
    /// Which tensor of the row.
    pub tensor: usize,
    /// How many numbers of that tensor come before it.
    pub start: i64,
    /// A handle on the numbers, with one dimension.
    pub numbers: Tensor,
}

/// The numbers that `rank` holds of a row that is shared out: as many on each rank, but for the last ones, which may
/// have fewer or none.
#[must_use]
pub fn share_of(numbers: usize, rank: usize, ranks: usize) -> Range<usize> {
    let share = numbers.div_ceil(ranks.max(1));
    let bound = |rank: usize| (rank * share).min(numbers);
    bound(rank)..bound(rank + 1)
}

impl Row {
    /// The row of these tensors.
    ///
    /// # Errors
    /// [`Error::Value`] for a tensor that is not of float32 or has gaps in memory.
    pub fn of<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<Self> {
        let tensors = tensors.into_iter().map(in_a_row).collect::<Result<Vec<_>>>()?;
        let mut end = 0;
        let ends = tensors.iter().map(|tensor| {
            end += tensor.numel();
            end
        });
        Ok(Self { ends: ends.collect(), tensors })
    }

    /// How many numbers it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn device(&self) -> Device {
        self.tensors.first().map_or(Device::Cpu, Tensor::device)
    }

    /// The tensors, or pieces of them, that `range` is made of.
    ///
    /// # Errors
    /// What libtorch refuses.
    pub fn pieces(&self, range: Range<usize>) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for (index, (tensor, &end)) in self.tensors.iter().zip(&self.ends).enumerate() {
            let (from, to) = (range.start.max(start), range.end.min(end));
            if from < to {
                let (before, length) = ((from - start) as i64, (to - from) as i64);
                let numbers = tensor.f_narrow(0, before, length)?;
                pieces.push(Piece { tensor: index, start: before, numbers });
            }
            start = end;
        }
        Ok(pieces)
    }

    fn read(&self, range: Range<usize>, into: &Tensor) -> Result<()> {
        self.beside(range, into, |piece, mut place| Ok(place.f_copy_(piece)?))
    }

    fn write(&self, range: Range<usize>, from: &Tensor) -> Result<()> {
        self.beside(range, from, |piece, place| Ok(piece.shallow_clone().f_copy_(&place)?))
    }

    /// Hands each piece of `range` to `work`, beside as many numbers of `flat`.
    fn beside(
        &self,
        range: Range<usize>,
        flat: &Tensor,
        work: impl Fn(&Tensor, Tensor) -> Result<()>,
    ) -> Result<()> {
        let mut at = 0;
        for Piece { numbers, .. } in self.pieces(range)? {
            let length = numbers.numel() as i64;
            work(&numbers, flat.f_narrow(0, at, length)?)?;
            at += length;
        }
        Ok(())
    }
}

impl ProcessGroup {
    /// Every rank has its share of `row` right, and afterwards all of it.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce).
    pub fn all_gather_row(&self, what: &str, row: &Row) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.in_parts(row.len(), row.device(), |place, own, all| {
            row.read(place(self.rank()), own)?;
            self.exchange(what, own, |group| group.all_gather(own, all))?;
            let mut others = (0..self.size()).filter(|&rank| rank != self.rank());
            others.try_for_each(|rank| row.write(place(rank), &part_of(all, rank, self.size())?))
        })
    }

    /// Collects `own` of every rank, its share of a row of `numbers` numbers, in `whole`, which rank `root` alone hands
    /// over.
    ///
    /// # Errors
    /// As [`all_reduce`](Self::all_reduce); [`Error::Value`] if `own` or `whole` has another length.
    pub fn gather_row(
        &self,
        what: &str,
        numbers: usize,
        own: &Row,
        whole: Option<&Row>,
        root: usize,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let start = self.check_rows(what, numbers, own, whole, root)?;
        // Rare, and large on one rank: by way of the CPU, wherever the rows lie.
        self.in_parts(numbers, Device::Cpu, |place, flat, all| {
            own.read(relative(place(self.rank()), start), flat)?;
            self.exchange(what, flat, |group| group.gather(flat, whole.map(|_| all), root))?;
            let Some(whole) = whole else { return Ok(()) };
            (0..self.size()).try_for_each(|rank| whole.write(place(rank), &part_of(all, rank, self.size())?))
        })
    }

    /// Hands every rank its share of `whole`, a row of `numbers` numbers that rank `root` alone hands over.
    ///
    /// # Errors
    /// As [`gather_row`](Self::gather_row).
    pub fn scatter_row(
        &self,
        what: &str,
        numbers: usize,
        own: &Row,
        whole: Option<&Row>,
        root: usize,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let start = self.check_rows(what, numbers, own, whole, root)?;
        self.in_parts(numbers, Device::Cpu, |place, flat, all| {
            if let Some(whole) = whole {
                for rank in 0..self.size() {
                    whole.read(place(rank), &part_of(all, rank, self.size())?)?;
                }
            }
            self.exchange(what, flat, |group| group.scatter(flat, whole.map(|_| all), root))?;
            own.write(relative(place(self.rank()), start), flat)
        })
    }

    /// Calls `work` for one part of all shares after another, so that what is exchanged at a time fits into a bucket.
    /// It is told which numbers of the row the part of a rank's share are, and given room on `device` for its own part
    /// and, rank by rank, for those of all.
    fn in_parts(
        &self,
        numbers: usize,
        device: Device,
        work: impl Fn(&dyn Fn(usize) -> Range<usize>, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let (share, ranks) = (numbers.div_ceil(self.size()), self.size());
        let most = (BUCKET / ranks).max(1);
        for start in (0..share).step_by(most) {
            let end = (start + most).min(share);
            let place = |rank: usize| {
                let share = share_of(numbers, rank, ranks);
                let bound = |offset: usize| (share.start + offset).min(share.end);
                bound(start)..bound(end)
            };
            // Where a share ends early, zeros stand behind it.
            let zeros = |length: usize| Tensor::f_zeros([length as i64], (Kind::Float, device));
            work(&place, &zeros(end - start)?, &zeros(ranks * (end - start))?)?;
        }
        Ok(())
    }

    /// Where this rank's share begins.
    fn check_rows(
        &self,
        what: &str,
        numbers: usize,
        own: &Row,
        whole: Option<&Row>,
        root: usize,
    ) -> Result<usize> {
        let share = share_of(numbers, self.rank(), self.size());
        if own.len() != share.len() {
            return Err(Error::value(what, format!("{} numbers, this rank's share", share.len()), own.len()));
        }
        let wanted = (self.rank() == root).then_some(numbers);
        match whole.map(Row::len) {
            got if got == wanted => Ok(share.start),
            got => Err(Error::value(
                what,
                format!("a whole row of {numbers} numbers on rank {root} alone"),
                format!("{got:?} on rank {}", self.rank()),
            )),
        }
    }
}

fn relative(range: Range<usize>, start: usize) -> Range<usize> {
    range.start.saturating_sub(start)..range.end.saturating_sub(start)
}

fn part_of(all: &Tensor, rank: usize, ranks: usize) -> Result<Tensor> {
    let length = all.numel() / ranks.max(1);
    Ok(all.f_narrow(0, (rank * length) as i64, length as i64)?)
}

/// A handle on the tensor's numbers as they lie in memory.
fn in_a_row(tensor: &Tensor) -> Result<Tensor> {
    let mut dims: Vec<(i64, i64)> =
        std::iter::zip(tensor.stride(), tensor.size()).filter(|&(_, size)| size != 1).collect();
    dims.sort_unstable();
    let mut next = 1;
    let dense = dims.iter().all(|&(stride, size)| {
        let fits = stride == next;
        next *= size;
        fits
    });
    if tensor.kind() != Kind::Float || !(dense || tensor.numel() == 0) {
        let got = format!("{:?} {:?} in steps of {:?}", tensor.kind(), tensor.size(), tensor.stride());
        return Err(Error::value("numbers in a row", "a Float tensor without gaps", got));
    }
    Ok(tensor.f_detach()?.f_as_strided([tensor.numel() as i64], [1], None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_a_row_is_in_one_share() {
        for numbers in [0, 1, 7, 8, 1000] {
            for ranks in 1..=9 {
                let shares: Vec<Range<usize>> =
                    (0..ranks).map(|rank| share_of(numbers, rank, ranks)).collect();
                assert!(shares.iter().cloned().flatten().eq(0..numbers), "{shares:?}");
                assert!(shares.iter().all(|share| share.len() <= numbers.div_ceil(ranks)));
            }
        }
    }

    #[test]
    fn a_row_is_in_memory_order_and_writes_into_its_tensors() {
        let image = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([1, 2, 3, 4]);
        let image = crate::memory_format::channels_last(&image);
        let (scalar, none) = (Tensor::from(7.0f32), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu)));
        let row = Row::of([&image, &none, &scalar]).unwrap();
        let pieces = row.pieces(22..25).unwrap();
        assert_eq!(
            pieces.iter().map(|piece| (piece.tensor, piece.start)).collect::<Vec<_>>(),
            [(0, 22), (2, 0)]
        );
        // The last pixel: its two channels lie side by side.
        assert_eq!(Vec::<f32>::try_from(&pieces[0].numbers).unwrap(), [11.0, 23.0]);
        row.write(22..25, &Tensor::from_slice(&[1.0f32, 2.0, 3.0])).unwrap();
        assert_eq!((image.double_value(&[0, 1, 2, 3]), scalar.double_value(&[])), (2.0, 3.0));
        for gaps in [image.narrow(1, 0, 1), image.to_kind(Kind::Double)] {
            assert!(Row::of([&gaps]).unwrap_err().to_string().contains("without gaps"));
        }
    }
}
