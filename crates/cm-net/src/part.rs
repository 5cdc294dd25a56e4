use std::sync::{Arc, Mutex, PoisonError};

use cm_model::torch::recompute;
use tch::Tensor;

/// What a [`Part`] is made of: layers that read features and an embedding.
pub(crate) trait Block {
    /// The features that come out; `train` turns dropout on.
    fn forward(&self, x: &Tensor, emb: &Tensor, train: bool) -> Tensor;
}

/// A part of a network that the backward pass can compute again ([`recompute`]), when whoever asked for the forward pass
/// may be gone: it shares its layers with the graph. They belong to one thread at a time, hence the lock, which is
/// always free.
#[derive(Debug)]
pub(crate) struct Part<B>(Arc<Mutex<B>>);

impl<B: Block + Send + 'static> Part<B> {
    pub(crate) fn new(block: B) -> Self {
        Self(Arc::new(Mutex::new(block)))
    }

    /// The block of `x`, or of the channels of `x` and `skip`.
    pub(crate) fn forward(&self, x: Tensor, skip: Option<Tensor>, emb: &Tensor, train: bool) -> Tensor {
        let (block, emb) = (self.0.clone(), emb.shallow_clone());
        let block = move |x: &Tensor, emb: &Tensor| {
            block.lock().unwrap_or_else(PoisonError::into_inner).forward(x, emb, train)
        };
        match skip {
            None => recompute::part([x, emb], move |[x, emb]| block(&x, &emb)),
            Some(skip) => recompute::part([x, skip, emb], move |[x, skip, emb]| {
                let both = Tensor::cat(&[x, skip], 1);
                block(&both, &emb)
            }),
        }
    }
}
