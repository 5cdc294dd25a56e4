//! A network of one's own in the samplers of this crate, without a model file and without this project's networks.
//!
//! ```text
//! cargo run --release -p cm-sampler --example own_network
//! ```
//!
//! There are two ways in. A *raw network* implements [`Backbone`], and [`Preconditioned`] makes a denoiser or a
//! consistency function of it, with the scalings of the papers. Whatever already *is* a consistency function
//! implements [`ConsistencyFn`], as the exact one of a data set of three colours does here.
#![allow(clippy::print_stdout)] // a program's output

use cm_sampler::model::{
    Backbone, Cond, ConsistencyFn, ImageShape, Init, Params, ParamsBuilder, Preconditioned, Result, Sigma,
};
use cm_sampler::schedule::{Boundary, Edm, NoiseCond, SigmaRange, solver::Churn};
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{Hooks, Method, Request, Solver, Times, multistep, one_step, sample};

/// One convolution, with the noise level as a channel beside the image.
struct OneConvolution {
    params: Params,
    weight: Tensor,
    shape: ImageShape,
}

impl OneConvolution {
    fn new(shape: ImageShape) -> Result<Self> {
        let params = ParamsBuilder::new(0, Device::Cpu);
        let size = [shape.channels, shape.channels + 1, 3, 3];
        let weight = params.root().param("conv.weight", &size, Init::KaimingNormal { scale: 1.0 })?;
        Ok(Self { params: params.finish(), weight, shape })
    }
}

impl Backbone for OneConvolution {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, _: &Cond, _train: bool) -> Result<Tensor> {
        let level = c_noise.view([-1, 1, 1, 1]).expand([x.size()[0], 1, x.size()[2], x.size()[3]], false);
        let input = Tensor::f_cat(&[x, &level], 1)?;
        Ok(input.f_conv2d(&self.weight, None::<&Tensor>, [1, 1], [1, 1], [1, 1], 1)?)
    }
}

/// The consistency function of data that are one of three plain colours, as far as the flow's end is concerned: the
/// colour that is nearest to the mean of the image, with what noise is left at σ_min.
struct ThreeColours {
    shape: ImageShape,
}

impl ConsistencyFn for ThreeColours {
    fn shape(&self) -> ImageShape {
        self.shape
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn sigma_range(&self) -> SigmaRange {
        SigmaRange::EDM
    }
    fn device(&self) -> Device {
        Device::Cpu
    }
    fn jump(&self, x: &Tensor, sigma: Sigma<'_>, _: &Cond) -> Result<Tensor> {
        let batch = self.shape.check("input", x)?;
        sigma.check(batch)?;
        // [3, 3, 1, 1]: a colour in each row.
        let colours = (Tensor::eye(3, (Kind::Float, Device::Cpu)) * 1.6 - 0.8).view([3, 3, 1, 1]);
        let means = x.mean_dim([2i64, 3].as_slice(), true, Kind::Float);
        let nearest = (means.unsqueeze(1) - &colours)
            .square()
            .sum_dim_intlist([2i64, 3, 4].as_slice(), false, Kind::Float)
            .argmin(1, false);
        let colour = colours.index_select(0, &nearest);
        let noise = x - &colour;
        // At σ_min this is x itself, as it must be.
        let left = sigma.broadcast(x.device(), |sigma| SigmaRange::EDM.min() / sigma);
        Ok(colour + noise * left)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let shape = ImageShape::square(3, 16);
    let request = Request::new(&[1, 2, 3, 4]);

    // A raw network, first as a consistency function, then as a denoiser. Untrained, it makes no pictures.
    let scalings = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog)?;
    let f = Preconditioned::new(OneConvolution::new(shape)?, scalings, SigmaRange::EDM);
    println!("a convolution, one step:  {:?}", one_step(&f, &request)?.size());

    let scalings = Edm::new(0.5, NoiseCond::QuarterLog)?;
    let d = Preconditioned::new(OneConvolution::new(shape)?, scalings, SigmaRange::EDM);
    let heun = Method::solver(&d, Solver::Heun { churn: Churn::NONE }, &[80.0, 10.0, 1.0, 0.1, 0.0])?;
    println!("a convolution, Heun:      {:?}", sample(&heun, &request, Hooks::default())?.size());
    // `one_step(&d, …)` does not compile: a denoiser is no consistency function.

    // A function in closed form, in one step and in two.
    let f = ThreeColours { shape };
    for (how, images) in [
        ("one step", one_step(&f, &request)?),
        ("two steps", multistep(&f, &Times::Sigmas(vec![80.0, 2.0]), &request)?),
    ] {
        let colours = images.mean_dim([2i64, 3].as_slice(), false, Kind::Float).argmax(1, false);
        println!("three colours, {how}: colour {:?} for each seed", Vec::<i64>::try_from(colours)?);
    }
    Ok(())
}
