//! A network on a GPU whose passes are recorded.

use std::cell::RefCell;

use cm_torch::autocast;
use cm_torch::cuda::{Graph, check_graphs};
use tch::{Device, Kind, Tensor};

use crate::{Backbone, Cond, ImageShape, Params, Result};

/// Passes of so many sorts are recorded; each holds memory of its own.
const MOST: usize = 8;

/// A network on a GPU that records its pass once for each shape and dtype of its inputs, and does it again as one CUDA graph:
/// the host starts one piece of work instead of hundreds. See [`cm_torch::cuda::Graph`].
///
/// It is for sampling: training, inputs with gradients and augmented ones go through the network itself. Its weights
/// must stay where they are.
#[derive(Debug)]
pub struct Graphed<B> {
    net: B,
    device: Device,
    passes: RefCell<Vec<Pass>>,
}

/// A recorded pass with its inputs and its result.
#[derive(Debug)]
struct Pass {
    sort: Sort,
    x: Tensor,
    c_noise: Tensor,
    cond: Cond,
    answer: Tensor,
    graph: Graph,
}

/// What one recorded pass can take.
#[derive(Debug, PartialEq, Eq)]
struct Sort {
    kind: Kind,
    size: Vec<i64>,
    stride: Vec<i64>,
    /// Mixed precision, which a graph does not choose anew.
    autocast: Option<Kind>,
    labels: Option<(Kind, Vec<i64>)>,
}

impl<B: Backbone> Graphed<B> {
    /// Has the network record its passes.
    ///
    /// # Errors
    /// [`crate::Error::Backend`] if it is not on a GPU, or without the object that records.
    pub fn new(net: B) -> Result<Self> {
        let device = net.params().device();
        check_graphs(device)?;
        Ok(Self { net, device, passes: RefCell::default() })
    }

    fn record(&self, sort: Sort, x: &Tensor, c_noise: &Tensor, cond: &Cond) -> Result<Pass> {
        let (x, c_noise) = (x.copy(), c_noise.contiguous().copy());
        let labels = cond.labels.as_ref().map(|labels| labels.to_device(self.device).copy());
        let cond = Cond { labels, augment: None };
        let work = || self.net.forward(&x, &c_noise, &cond, false);
        let (graph, answer) = Graph::record(self.device, work)?;
        Ok(Pass { sort, x, c_noise, cond, answer, graph })
    }
}

impl Pass {
    fn again(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond) -> Result<Tensor> {
        self.x.shallow_clone().f_copy_(x)?;
        self.c_noise.shallow_clone().f_copy_(c_noise)?;
        if let (Some(own), Some(labels)) = (&self.cond.labels, &cond.labels) {
            own.shallow_clone().f_copy_(labels)?;
        }
        self.graph.replay()?;
        // The next pass writes over it.
        Ok(self.answer.copy())
    }
}

impl<B: Backbone> Backbone for Graphed<B> {
    fn shape(&self) -> ImageShape {
        self.net.shape()
    }
    fn num_classes(&self) -> i64 {
        self.net.num_classes()
    }
    fn params(&self) -> &Params {
        self.net.params()
    }

    fn forward(&self, x: &Tensor, c_noise: &Tensor, cond: &Cond, train: bool) -> Result<Tensor> {
        if train || cond.augment.is_some() || x.requires_grad() {
            return self.net.forward(x, c_noise, cond, train);
        }
        let labels = cond.labels.as_ref().map(|labels| (labels.kind(), labels.size()));
        let autocast = autocast::current(self.device);
        let sort = Sort { kind: x.kind(), size: x.size(), stride: x.stride(), autocast, labels };
        let mut passes = self.passes.borrow_mut();
        let known = passes.iter().position(|pass| pass.sort == sort);
        let pass = match known {
            Some(at) => passes.get(at),
            None if passes.len() < MOST => {
                passes.push(self.record(sort, x, c_noise, cond)?);
                passes.last()
            }
            None => None,
        };
        match pass {
            Some(pass) => pass.again(x, c_noise, cond),
            None => self.net.forward(x, c_noise, cond, train),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ParamsBuilder;

    #[derive(Debug)]
    struct Net(Params);

    impl Backbone for Net {
        fn shape(&self) -> ImageShape {
            ImageShape::square(1, 2)
        }
        fn num_classes(&self) -> i64 {
            0
        }
        fn params(&self) -> &Params {
            &self.0
        }
        fn forward(&self, x: &Tensor, _: &Tensor, _: &Cond, _: bool) -> Result<Tensor> {
            Ok(x.shallow_clone())
        }
    }

    #[test]
    fn a_network_on_the_cpu_is_refused_in_one_line() {
        let net = Net(ParamsBuilder::unset(Device::Cpu).finish());
        let error = Graphed::new(net).unwrap_err().to_string();
        assert_eq!(error, "a CUDA graph: expected a CUDA device, got Cpu");
    }
}
