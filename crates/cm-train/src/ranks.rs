//! One run on several processes: what each of them computes, and how they stay one run.
//!
//! The batch of a step is that of the settings, whatever the number of ranks, and so is everything that is drawn for
//! it: each rank takes [`rows_of_rank`] of both. Gradients are added up; from then on all ranks do the same sums, and
//! hold the same bits.

use std::ops::Range;
use std::rc::Rc;

use cm_torch::dist::ProcessGroup;
use serde::Serialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::spec::differences;
use crate::trainer::SampleLoss;
use crate::{Error, Metric, Result, Trainable, Trainer};

/// Steps between comparisons of the states of all ranks.
const COMPARE_EVERY: u64 = 100;

/// The rows of a batch that `rank` of `ranks` computes: neighbours, and as many as the others have or one more.
#[must_use]
pub fn rows_of_rank(batch: usize, rank: usize, ranks: usize) -> Range<usize> {
    let bound = |rank: usize| batch * rank / ranks.max(1);
    bound(rank)..bound(rank + 1)
}

/// Checks that all ranks were given the same settings.
///
/// # Errors
/// [`cm_torch::Error::Rank`] on every rank, with the first rank whose settings are not those of rank 0, and every key
/// in which they differ.
pub fn agree(group: &ProcessGroup, settings: &impl Serialize) -> Result<()> {
    // Settings are plain data: writing them as JSON cannot fail.
    let own = serde_json::to_vec(settings).unwrap_or_default();
    let all = group.all_gather("the settings", &own)?;
    let value = |bytes: &Vec<u8>| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
    let Some(first) = all.first() else { return Ok(()) };
    match all.iter().enumerate().find(|(_, settings)| *settings != first) {
        None => Ok(()),
        Some((rank, other)) => {
            let list = differences(&value(first), &value(other)).join("; ");
            let cause = format!("its settings are not those of rank 0, all ranks need the same: {list}");
            Err(cm_torch::Error::Rank { rank, cause }.into())
        }
    }
}

impl<M: Trainable> Trainer<M> {
    /// Makes this trainer one rank of a group that trains together. All ranks take over the state of rank 0, the one
    /// that need be resumed from a checkpoint; from then on [`Trainer::step`] takes this rank's rows of a batch. With
    /// [`crate::TrainSpec::shard_state`], of averages and moments each rank takes over its share alone.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are more ranks than images in a batch; [`cm_torch::Error::Rank`] if another rank has
    /// other settings or another network, and what [`ProcessGroup::use_cuda`] may return where the network is on a GPU.
    pub fn join(&mut self, group: Rc<ProcessGroup>) -> Result<()> {
        if group.is_alone() {
            return Ok(());
        }
        if self.spec().batch < group.size() {
            let expected = format!("at least 1 image for each of {} ranks", group.size());
            let advice = "it is the batch of all ranks together";
            return Err(Error::setting("train.batch", self.spec().batch, expected, advice));
        }
        let mut settings = self.spec().clone();
        if let Metric::Lpips { weights, .. } = &mut settings.metric {
            // Where they lie may differ.
            *weights = None;
        }
        let device = self.device();
        agree(&group, &serde_json::json!({ "train": settings, "on_gpu": device.is_cuda() }))?;
        if device.is_cuda() {
            group.use_cuda(device)?;
        }
        let state = self.state_tensors();
        let form: Vec<_> = state
            .iter()
            .map(|(name, tensor)| (name, tensor.size(), format!("{:?}", tensor.kind())))
            .collect();
        agree(&group, &serde_json::json!({ "state": form }))?;
        // The optimiser's step is on the CPU, wherever the network is.
        let sort = |tensor: &Tensor| (tensor.kind(), tensor.device());
        let mut sorts: Vec<(Kind, Device)> = Vec::new();
        for (_, tensor) in &state {
            if !sorts.contains(&sort(tensor)) {
                sorts.push(sort(tensor));
            }
        }
        for wanted in sorts {
            let of_sort: Vec<&Tensor> =
                state.iter().map(|(_, tensor)| tensor).filter(|tensor| sort(tensor) == wanted).collect();
            group.broadcast_many("the state of rank 0", &of_sort, 0)?;
        }
        if !self.spec().shard_state {
            // What the optimiser exports are handles on its moments, but its step is a copy.
            self.optimizer.import(&optimizer_state(&state))?;
        }
        let counts = Tensor::from_slice(&[self.step as i64, self.images as i64]);
        group.broadcast("the step of rank 0", &counts, 0)?;
        let counts = Vec::<i64>::try_from(&counts)?;
        (self.step, self.images) = (counts[0] as u64, counts[1] as u64);
        if self.spec().shard_state {
            self.take_share(group.clone())?;
        }
        self.group = Some(group);
        self.compare()
    }

    /// Whether this is the one process that writes: the only one, or rank 0.
    pub fn writes(&self) -> bool {
        self.group.as_ref().is_none_or(|group| group.is_first())
    }

    /// The processes that train together, where there are several.
    pub fn group(&self) -> Option<&ProcessGroup> {
        self.group.as_deref()
    }

    /// The rows of a batch that [`Trainer::step`] takes here: all of them, where there is one process.
    pub fn rows(&self) -> Range<usize> {
        let batch = self.spec().batch;
        self.group.as_ref().map_or(0..batch, |group| rows_of_rank(batch, group.rank(), group.size()))
    }

    /// Checks that the state of all ranks has the same bits.
    ///
    /// # Errors
    /// [`cm_torch::Error::Rank`] on every rank, with the first rank that differs from rank 0, and in what.
    pub fn compare(&self) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        let sums: Vec<(String, u32)> =
            self.state_tensors().iter().map(|(name, tensor)| (name.clone(), checksum(tensor))).collect();
        let own: Vec<u8> = sums.iter().flat_map(|(_, sum)| sum.to_le_bytes()).collect();
        let all = group.all_gather("checksums of the state", &own)?;
        let Some(first) = all.first() else { return Ok(()) };
        let Some((rank, other)) = all.iter().enumerate().find(|(_, sums)| *sums != first) else {
            return Ok(());
        };
        let at = first.iter().zip(other).position(|(a, b)| a != b).unwrap_or(0) / 4;
        let name = sums.get(at).map_or("state", |(name, _)| name);
        let cause = format!(
            "after step {} its {name} is not that of rank 0; ranks need machines of one kind and one build, and \
             memory without faults",
            self.step
        );
        Err(cm_torch::Error::Rank { rank, cause }.into())
    }

    /// [`Trainer::compare`], every so many steps.
    pub(crate) fn compare_when_due(&self) -> Result<()> {
        if self.step.is_multiple_of(COMPARE_EVERY) { self.compare() } else { Ok(()) }
    }

    /// Whether any rank wants to stop: one that is asked to must not leave the others waiting.
    pub(crate) fn any_wants_to_stop(&self, here: bool) -> Result<bool> {
        let Some(group) = &self.group else { return Ok(here) };
        let wishes = Tensor::from_slice(&[i64::from(here)]);
        group.all_reduce(&format!("whether to go on behind step {}", self.step), &wishes)?;
        Ok(wishes.int64_value(&[0]) > 0)
    }

    /// Adds up the gradients of all ranks.
    pub(crate) fn reduce_gradients(&self) -> Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        let grads: Vec<Tensor> =
            self.weights.iter().map(|(_, weight)| weight.grad()).filter(Tensor::defined).collect();
        let handles: Vec<&Tensor> = grads.iter().collect();
        Ok(group.all_reduce_many(&format!("the gradients of step {}", self.step + 1), &handles)?)
    }

    /// What every rank found for its images, in the order of the batch, so that all sum up the same.
    pub(crate) fn gather(&self, own: Vec<(SampleLoss, f64)>) -> Result<Vec<(SampleLoss, f64)>> {
        let Some(group) = &self.group else { return Ok(own) };
        let (rows, batch) = (self.rows(), self.spec().batch);
        let mut all = vec![0.0f64; 3 * batch];
        let places = all.chunks_exact_mut(3).skip(rows.start);
        for (place, (sample, distance)) in places.zip(own) {
            place.copy_from_slice(&[sample.sigma, sample.loss, distance]);
        }
        let sum = Tensor::f_from_slice(&all)?;
        group.all_reduce(&format!("the losses of step {}", self.step + 1), &sum)?;
        let all = Vec::<f64>::try_from(&sum)?;
        Ok(all.chunks_exact(3).map(|x| (SampleLoss { sigma: x[0], loss: x[1] }, x[2])).collect())
    }

    /// The norm as rank 0 has it: a sum may depend on the number of threads, and clipping goes by it.
    pub(crate) fn agree_on_norm(&self, norm: f64) -> Result<f64> {
        let Some(group) = &self.group else { return Ok(norm) };
        let norm = Tensor::from_slice(&[norm]);
        group.broadcast(&format!("the gradient's norm of step {}", self.step + 1), &norm, 0)?;
        Ok(norm.double_value(&[0]))
    }

    /// Everything that is state and that all ranks have, under names that tell a reader what it is.
    fn state_tensors(&self) -> Vec<(String, Tensor)> {
        let mut state = Vec::new();
        let mut add = |what: &str, name: &str, tensor: &Tensor| {
            state.push((format!("{what} '{name}'"), tensor.detach()));
        };
        for (name, tensor) in self.student().params().iter() {
            add("weight", name, tensor);
        }
        for (name, tensor) in self.target().iter().flat_map(|target| target.params().iter()) {
            add("target's weight", name, tensor);
        }
        if !self.spec().shard_state {
            for ema in &self.emas {
                for ((name, _), tensor) in self.weights.iter().zip(&ema.tensors) {
                    add(&format!("average {} of", ema.name), name, tensor);
                }
            }
            for (name, tensor) in self.optimizer.export() {
                add(MOMENT, &name, &tensor);
            }
        }
        state
    }
}

const MOMENT: &str = "optimiser's";

fn optimizer_state(state: &[(String, Tensor)]) -> std::collections::BTreeMap<String, Tensor> {
    let name =
        |text: &str| Some(text.strip_prefix(MOMENT)?.strip_prefix(" '")?.strip_suffix('\'')?.to_owned());
    state.iter().filter_map(|(text, tensor)| Some((name(text)?, tensor.shallow_clone()))).collect()
}

/// CRC-32 of a tensor's bytes.
fn checksum(tensor: &Tensor) -> u32 {
    crc32fast::hash(&cm_model::tensor_bytes(tensor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_a_batch_has_one_rank() {
        for batch in [1, 7, 8, 512] {
            for ranks in (1..=8).filter(|ranks| *ranks <= batch) {
                let shares: Vec<Range<usize>> =
                    (0..ranks).map(|rank| rows_of_rank(batch, rank, ranks)).collect();
                assert!(shares.iter().cloned().flatten().eq(0..batch));
                let sizes = shares.iter().map(ExactSizeIterator::len);
                let (least, most) = (sizes.clone().min().unwrap(), sizes.max().unwrap());
                assert!(least >= 1 && most - least <= 1, "{shares:?}");
            }
        }
    }
}
