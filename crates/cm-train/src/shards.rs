//! Averages and moments in shares: where `train.shard_state` is set, each of several ranks holds and moves its share of
//! them alone, and sends the others the weights that it made.
//!
//! A share is a stretch of all weights in a row, so that its numbers are as many on each rank. The rules that move
//! weights, moments and averages go element by element: a run has the same bits with and without.

use std::collections::BTreeMap;
use std::rc::Rc;

use cm_torch::dist::{ProcessGroup, Row, share_of};
use cm_torch::optim::{Optimizer, set_grad};
use tch::Tensor;

use crate::trainer::named;
use crate::{Result, Trainable, Trainer};

/// What one rank holds of averages and moments.
pub(crate) struct Shard {
    group: Rc<ProcessGroup>,
    /// All weights.
    row: Row,
    /// Those of this rank's share, or what of a weight belongs to it.
    pub(crate) pieces: Vec<(String, Tensor)>,
    /// Of each piece: which weight it is of, and how many of the weight's numbers come before it.
    places: Vec<(usize, i64)>,
    /// The averages as a whole, on rank 0 while it uses them.
    whole: Vec<Vec<Tensor>>,
}

/// The two moments, as the optimiser names them.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

impl Shard {
    /// This rank's share of these weights.
    fn new(weights: &[(String, Tensor)], group: Rc<ProcessGroup>) -> Result<Self> {
        let row = Row::of(weights.iter().map(|(_, weight)| weight))?;
        let pieces = row.pieces(share_of(row.len(), group.rank(), group.size()))?;
        let places = pieces.iter().map(|piece| (piece.tensor, piece.start)).collect();
        let name = |tensor: usize| weights.get(tensor).map_or_else(String::new, |(name, _)| name.clone());
        let pieces = pieces.into_iter().map(|piece| (name(piece.tensor), piece.numbers)).collect();
        Ok(Self { group, row, pieces, places, whole: Vec::new() })
    }

    /// Makes the share of the gradients that of the pieces, and frees all gradients but for it.
    pub(crate) fn take_gradients(&self, weights: &[(String, Tensor)]) -> Result<()> {
        for ((_, piece), &(index, start)) in self.pieces.iter().zip(&self.places) {
            let Some((_, weight)) = weights.get(index) else { continue };
            let grad = weight.grad();
            if !grad.defined() {
                set_grad(piece, None)?;
                continue;
            }
            let flat = Row::of([&in_order_of(weight, &grad)?])?;
            let (start, length) = (start as usize, piece.numel());
            for part in flat.pieces(start..start + length)? {
                set_grad(piece, Some(&part.numbers))?;
            }
        }
        Ok(weights.iter().try_for_each(|(_, weight)| set_grad(weight, None))?)
    }

    /// Sends the weights that this rank moved to all others.
    pub(crate) fn share_weights(&self, step: u64) -> Result<()> {
        Ok(self.group.all_gather_row(&format!("the weights of step {step}"), &self.row)?)
    }

    /// Puts what all ranks hold of some state together on rank 0, one tensor for each weight; nothing comes out
    /// elsewhere.
    fn gather(
        &self,
        what: &str,
        own: &[Tensor],
        weights: &[(String, Tensor)],
    ) -> Result<Option<Vec<Tensor>>> {
        let whole = match self.group.is_first() {
            false => None,
            true => {
                let like = weights.iter().map(|(_, weight)| Ok(weight.f_detach()?.f_empty_like()?));
                Some(like.collect::<Result<Vec<_>>>()?)
            }
        };
        let row = whole.as_ref().map(Row::of).transpose()?;
        self.group.gather_row(what, self.row.len(), &Row::of(own)?, row.as_ref(), 0)?;
        Ok(whole)
    }

    /// Hands all ranks their shares of what rank 0 has as a whole, into `own`.
    fn scatter(
        &self,
        what: &str,
        own: &[Tensor],
        whole: Option<&[Tensor]>,
        weights: &[(String, Tensor)],
    ) -> Result<()> {
        let ordered = |whole: &[Tensor]| -> Result<Row> {
            let tensors = weights.iter().zip(whole).map(|((_, weight), tensor)| in_order_of(weight, tensor));
            Ok(Row::of(&tensors.collect::<Result<Vec<_>>>()?)?)
        };
        let row = whole.filter(|_| self.group.is_first()).map(ordered).transpose()?;
        Ok(self.group.scatter_row(what, self.row.len(), &Row::of(own)?, row.as_ref(), 0)?)
    }
}

/// What moves: this rank's share of the weights, or all.
pub(crate) fn owned<'a>(shard: Option<&'a Shard>, weights: &'a [(String, Tensor)]) -> &'a [(String, Tensor)] {
    shard.map_or(weights, |shard| &shard.pieces)
}

impl<M: Trainable> Trainer<M> {
    /// Whether this process holds a share of averages and moments alone. What then is done with the whole is done by
    /// all ranks together: [`Trainer::save`] and [`Trainer::gather_averages`].
    pub fn is_sharded(&self) -> bool {
        self.shard.is_some()
    }

    /// Puts the averages together on rank 0, for [`Trainer::with_ema`], until [`Trainer::drop_averages`]; nothing is to
    /// be done where they are whole.
    ///
    /// # Errors
    /// [`cm_torch::Error::Rank`] if another rank is to blame.
    pub fn gather_averages(&mut self) -> Result<()> {
        let Some(shard) = &self.shard else { return Ok(()) };
        let gather = |ema: &crate::trainer::Ema| {
            shard.gather(&format!("the average {}", ema.name), &ema.tensors, &self.weights)
        };
        let whole = self.emas.iter().map(gather).collect::<Result<Vec<_>>>()?;
        let whole = whole.into_iter().flatten().collect();
        if let Some(shard) = &mut self.shard {
            shard.whole = whole;
        }
        Ok(())
    }

    /// Frees what [`Trainer::gather_averages`] put together.
    pub fn drop_averages(&mut self) {
        if let Some(shard) = &mut self.shard {
            shard.whole = Vec::new();
        }
    }

    /// The tensors of the average at `index`, one for each weight, where they are whole.
    pub(crate) fn whole_average(&self, index: usize) -> Option<&[Tensor]> {
        match &self.shard {
            None => self.emas.get(index).map(|ema| ema.tensors.as_slice()),
            Some(shard) => shard.whole.get(index).map(Vec::as_slice),
        }
    }

    /// The averages, by name, one after the other, as all ranks put them together on rank 0.
    pub(crate) fn each_average(&self, mut work: impl FnMut(&str, &[Tensor]) -> Result<()>) -> Result<()> {
        for ema in &self.emas {
            match &self.shard {
                None => work(&ema.name, &ema.tensors)?,
                Some(shard) => {
                    let what = format!("the average {}", ema.name);
                    if let Some(whole) = shard.gather(&what, &ema.tensors, &self.weights)? {
                        work(&ema.name, &whole)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The optimiser's state, as all ranks put it together on rank 0; nothing comes out elsewhere.
    pub(crate) fn whole_moments(&self) -> Result<Option<BTreeMap<String, Tensor>>> {
        let own = self.moments()?;
        let Some(shard) = &self.shard else { return Ok(Some(own)) };
        let mut all: BTreeMap<String, Tensor> = own
            .iter()
            .filter(|(_, tensor)| !tensor.is_floating_point())
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect();
        for moment in MOMENTS {
            let own = of_moment(moment, &shard.pieces, &own);
            let whole = shard.gather("the optimiser's moments", &own, &self.weights)?;
            let names = self.weights.iter().map(|(name, _)| format!("{moment}.{name}"));
            all.extend(names.zip(whole.into_iter().flatten()));
        }
        Ok(shard.group.is_first().then_some(all))
    }

    /// The optimiser's state here.
    pub(crate) fn moments(&self) -> Result<BTreeMap<String, Tensor>> {
        match self.has_state {
            true => Ok(self.optimizer.export()),
            false => Ok(Optimizer::new(self.spec().optimizer, &named(&self.weights))?.export()),
        }
    }

    /// Makes averages and moments where a trainer that was meant to share them out has none yet, since it trains alone
    /// or takes over a checkpoint.
    pub(crate) fn make_state(&mut self) -> Result<()> {
        if self.has_state {
            return Ok(());
        }
        for ema in &mut self.emas {
            ema.tensors = copies(&self.weights);
        }
        self.optimizer = Optimizer::new(self.spec().optimizer, &named(&self.weights))?;
        self.has_state = true;
        Ok(())
    }

    /// Takes this rank's share of averages and moments, out of those of rank 0 if that has begun to train.
    pub(crate) fn take_share(&mut self, group: Rc<ProcessGroup>) -> Result<()> {
        let shard = Shard::new(&self.weights, group)?;
        let counts = Tensor::from_slice(&[i64::from(self.has_state), self.optimizer.steps_done() as i64]);
        shard.group.broadcast("whether rank 0 has begun", &counts, 0)?;
        let begun = counts.f_int64_value(&[0])? != 0;
        let whole = self.has_state.then(|| self.optimizer.export());
        let mut optimizer = Optimizer::new(self.spec().optimizer, &named(&shard.pieces))?;
        let averages: Vec<Vec<Tensor>> = self.emas.iter().map(|_| copies(&shard.pieces)).collect();
        if begun {
            for (ema, own) in self.emas.iter().zip(&averages) {
                let what = format!("the average {}", ema.name);
                shard.scatter(&what, own, Some(&ema.tensors), &self.weights)?;
            }
            let mut state = optimizer.export();
            for moment in MOMENTS {
                let own = of_moment(moment, &shard.pieces, &state);
                let whole = whole.as_ref().map(|whole| of_moment(moment, &self.weights, whole));
                shard.scatter("the optimiser's moments", &own, whole.as_deref(), &self.weights)?;
            }
            // The moments are handles; the step is a copy.
            let steps = counts.f_int64_value(&[1])?;
            state
                .values_mut()
                .filter(|t| !t.is_floating_point())
                .for_each(|step| *step = Tensor::from(steps));
            optimizer.import(&state)?;
        }
        for (ema, own) in self.emas.iter_mut().zip(averages) {
            ema.tensors = own;
        }
        (self.optimizer, self.has_state, self.shard) = (optimizer, true, Some(shard));
        Ok(())
    }
}

/// The moments of one kind, in the order of these weights.
fn of_moment(moment: &str, weights: &[(String, Tensor)], state: &BTreeMap<String, Tensor>) -> Vec<Tensor> {
    let tensor = |(name, _): &(String, Tensor)| state.get(&format!("{moment}.{name}"));
    weights.iter().filter_map(tensor).map(Tensor::shallow_clone).collect()
}

pub(crate) fn copies(weights: &[(String, Tensor)]) -> Vec<Tensor> {
    weights.iter().map(|(_, weight)| weight.detach().copy()).collect()
}

/// `tensor`, or a copy of it that lies in memory as `like` does.
fn in_order_of(like: &Tensor, tensor: &Tensor) -> Result<Tensor> {
    if like.stride() == tensor.stride() {
        return Ok(tensor.shallow_clone());
    }
    let _no_grad = tch::no_grad_guard();
    let mut copy = like.f_detach()?.f_empty_like()?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}
