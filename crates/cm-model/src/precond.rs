use cm_schedule::{Boundary, Edm, Precond, SigmaRange, reference};
use cm_torch::{autocast::Autocast, fused::Packing, memory_format, recompute::Recompute, rng};
use tch::{Device, Kind, Tensor};

use crate::{Backbone, Cond, ConsistencyFn, Denoiser, ImageShape, Mode, Result, Sigma};

/// How a network computes, apart from what it computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compute {
    /// Autocast to this dtype inside the network (bfloat16, or half on CUDA); weights stay float32, and so do
    /// noise levels, preconditioning and loss. `None` computes in float32.
    pub autocast: Option<Kind>,
    /// Hand images to the network in channels-last memory order.
    pub channels_last: bool,
    /// In training, let the network compute its blocks again in the backward pass: less memory for more time. See
    /// [`cm_torch::recompute`].
    pub checkpoint_activations: bool,
    /// In sampling on a GPU, record the network's pass and do it again as one CUDA graph ([`crate::Graphed`]), for a model
    /// that is loaded from a file.
    pub graph: bool,
}

/// A network with its preconditioning,
/// `c_skip(σ)·x + c_out(σ)·F(c_in(σ)·x; c_noise(σ))` (Karras et al. 2022, eq. 7).
///
/// With [`Edm`] scalings it is a [`Denoiser`]; with [`Boundary`] scalings, for which `c_skip(σ_min) = 1` and
/// `c_out(σ_min) = 0`, it is a [`ConsistencyFn`].
#[derive(Debug)]
pub struct Preconditioned<N, P> {
    /// The raw network.
    pub net: N,
    /// The scalings.
    pub precond: P,
    /// The noise levels that the model is for.
    pub sigma_range: SigmaRange,
    /// Dtype and memory order of the network's work.
    pub compute: Compute,
}

impl<N: Backbone, P: Precond> Preconditioned<N, P> {
    /// A float32 model.
    pub fn new(net: N, precond: P, sigma_range: SigmaRange) -> Self {
        Self { net, precond, sigma_range, compute: Compute::default() }
    }

    /// Evaluates the model in the given mode; samplers go through [`Denoiser`] and [`ConsistencyFn`], which
    /// know no training mode.
    ///
    /// # Shapes
    /// `x` and the result: `[B, C, H, W]` float32.
    ///
    /// # Errors
    /// [`crate::Error`] if `x`, σ or the condition do not fit the network.
    pub fn evaluate(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond, mode: Mode) -> Result<Tensor> {
        let batch = self.net.shape().check("model input", x)?;
        sigma.check(batch)?;
        let device = x.device();
        let x = x.to_kind(Kind::Float);
        let scaled = |g: fn(cm_schedule::Scalings) -> f64| {
            sigma.broadcast(device, |sigma| g(self.precond.scalings(sigma)))
        };
        let c_noise = sigma.flat(device, |sigma| self.precond.scalings(sigma).c_noise).expand([batch], false);
        let mut input = &x * scaled(|s| s.c_in);
        if self.compute.channels_last {
            input = memory_format::channels_last(&input);
        }
        let train = match mode {
            Mode::Eval => false,
            Mode::Train { dropout_seed } => {
                rng::seed_dropout(dropout_seed);
                true
            }
        };
        let raw = {
            let _autocast = Autocast::enter(device, self.compute.autocast);
            let _recompute = (train && self.compute.checkpoint_activations).then(Recompute::enter);
            self.net.forward(&input, &c_noise, cond, train)?
        };
        Ok(&x * scaled(|s| s.c_skip) + raw.to_kind(Kind::Float) * scaled(|s| s.c_out))
    }

    /// The device that the weights are on.
    pub fn device(&self) -> Device {
        self.net.params().device()
    }

    fn sample_mode(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        // Samplers evaluate the same weights again and again.
        let _packing = Packing::enter(self.compute.autocast.unwrap_or(Kind::Float));
        self.evaluate(x, sigma, cond, Mode::Eval)
    }
}

macro_rules! implement {
    ($trait:ident, $method:ident, $($precond:ty),+) => {$(
        impl<N: Backbone> $trait for Preconditioned<N, $precond> {
            fn shape(&self) -> ImageShape {
                self.net.shape()
            }
            fn num_classes(&self) -> i64 {
                self.net.num_classes()
            }
            fn sigma_range(&self) -> SigmaRange {
                self.sigma_range
            }
            fn device(&self) -> Device {
                Preconditioned::device(self)
            }
            fn $method(&self, x: &Tensor, sigma: Sigma<'_>, cond: &Cond) -> Result<Tensor> {
                self.sample_mode(x, sigma, cond)
            }
        }
    )+};
}

implement!(Denoiser, denoise, Edm, reference::Vp, reference::Ve, reference::Iddpm);
implement!(ConsistencyFn, jump, Boundary);
