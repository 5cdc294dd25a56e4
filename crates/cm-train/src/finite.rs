//! What is done about numbers that are not finite: the step is not taken, or the state not saved, and the error says
//! where the first of them is and what to lower.

use cm_torch::optim;
use tch::Tensor;

use crate::shards::owned;
use crate::trainer::named;
use crate::{Batch, Error, Result, Trainable, Trainer};

impl<M: Trainable> Trainer<M> {
    /// The norm of the gradient, or which number is not finite.
    pub(crate) fn check_finite(&self, loss: f64, batch: &Batch) -> Result<f64> {
        let not_finite = |what, advice| Err(Error::NonFinite { step: self.step + 1, what, advice });
        let params = named(&self.weights);
        if !loss.is_finite() {
            // From the cause to the effect: a NaN in an image is in every gradient too, on all ranks.
            let image = first_non_finite_image(&batch.images)?.map(|row| self.rows().start as i64 + row);
            let found = image.map(|image| format!("image {image} of the batch")).unwrap_or_default();
            if let Some(image) = self.first_of_any("whether all images are finite", found)? {
                let what = format!("{image} is not finite and the loss ({loss})");
                return not_finite(what, "mend the data".to_owned());
            }
            if let Some(name) = optim::first_non_finite(&params)? {
                let what = format!("weight '{name}' is not finite and the loss ({loss})");
                return not_finite(what, self.advice());
            }
            let what = match optim::first_non_finite_grad(&params)? {
                Some(name) => format!("the gradient of '{name}' is not finite and the loss ({loss})"),
                None => format!("the loss ({loss})"),
            };
            return not_finite(what, self.advice());
        }
        let norm = self.agree_on_norm(optim::grad_norm(&params)?)?;
        if norm.is_finite() || self.spec().replace_non_finite.is_some() {
            return Ok(norm);
        }
        let what = match optim::first_non_finite_grad(&params)? {
            Some(name) => format!("the gradient of '{name}'"),
            None => "the square of the gradient's norm".to_owned(),
        };
        not_finite(what, self.advice())
    }

    /// Whether everything that a checkpoint holds is finite: what is saved is what a run goes on from.
    ///
    /// Where averages and moments are shared out, all ranks look at their own, and find what any of them found.
    pub(crate) fn check_state(&self) -> Result<()> {
        let mut found = self.first_spoilt()?;
        if self.is_sharded() {
            found = self.first_of_any("whether all is finite", found.unwrap_or_default())?;
        }
        match found {
            None => Ok(()),
            Some(what) => Err(Error::Spoilt { step: self.step, what, advice: self.advice() }),
        }
    }

    /// What the first of all ranks found that found anything, where an empty text is nothing. All ranks ask.
    fn first_of_any(&self, what: &str, found: String) -> Result<Option<String>> {
        let all = match self.group() {
            Some(group) => group.all_gather(what, found.as_bytes())?,
            None => vec![found.into_bytes()],
        };
        let first = all.into_iter().find(|text| !text.is_empty());
        Ok(first.map(|text| String::from_utf8_lossy(&text).into_owned()))
    }

    /// The first of what this process holds that is not finite.
    fn first_spoilt(&self) -> Result<Option<String>> {
        let weights = named(&self.weights);
        let moments = self.moments()?;
        let moments: Vec<(&str, &Tensor)> =
            moments.iter().filter(|(_, t)| t.is_floating_point()).map(|(n, t)| (n.as_str(), t)).collect();
        // One wait for the device tells that all is well; which tensor is not is asked only then.
        let averages = self.emas.iter().flat_map(|ema| &ema.tensors);
        let all: Vec<&Tensor> =
            weights.iter().chain(&moments).map(|(_, tensor)| *tensor).chain(averages).collect();
        if optim::norm(&all)?.is_finite() {
            return Ok(None);
        }
        if let Some(name) = optim::first_non_finite(&weights)? {
            return Ok(Some(format!("weight '{name}'")));
        }
        let own = owned(self.shard.as_ref(), &self.weights);
        for ema in &self.emas {
            let averages: Vec<(&str, &Tensor)> =
                own.iter().map(|(name, _)| name.as_str()).zip(&ema.tensors).collect();
            if let Some(name) = optim::first_non_finite(&averages)? {
                return Ok(Some(format!("weight '{name}' of the average {}", ema.name)));
            }
        }
        Ok(optim::first_non_finite(&moments)?.map(|name| format!("the optimiser's '{name}'")))
    }

    /// What to lower.
    fn advice(&self) -> String {
        let clip = match self.spec().grad_clip {
            Some(most) => format!("lower train.grad_clip ({most})"),
            None => "set train.grad_clip (none is set)".to_owned(),
        };
        match self.step {
            0 => format!("begin with other weights, lower train.lr ({}), or {clip}", self.spec().lr),
            _ => format!("lower train.lr ({}), or {clip}", self.spec().lr),
        }
    }
}

fn first_non_finite_image(images: &Tensor) -> Result<Option<i64>> {
    let spoilt = images.f_isfinite()?.f_flatten(1, -1)?.f_all_dim(1, false)?.f_logical_not()?;
    let first = spoilt.f_nonzero()?;
    Ok((first.size().first() > Some(&0)).then(|| first.int64_value(&[0, 0])))
}
