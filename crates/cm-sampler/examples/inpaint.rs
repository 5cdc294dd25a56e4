//! The middle of a picture, made anew three times: zero-shot inpainting (Song et al. 2023, Algorithm 4).
//!
//! ```text
//! cargo run --release -p cm-sampler --example inpaint [-- MODEL [PICTURE]]
//! ```
//!
//! Without MODEL the consistency function is the exact one of Gaussian data, which knows no pictures and fills the
//! hole with noise of the right spread; without PICTURE a gradient is drawn.
#![allow(clippy::print_stdout)] // a program's output

#[path = "shared/picture.rs"]
mod picture;

use std::error::Error;
use std::path::{Path, PathBuf};

use cm_sampler::edit::{Inpaint, default_times};
use cm_sampler::model::{ConsistencyFn, GaussianOracle, ImageShape};
use cm_sampler::schedule::SigmaRange;
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{Hooks, Request, edit, load};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let f: Box<dyn ConsistencyFn> = match args.next() {
        Some(model) => load(model, Device::Cpu)?.into_consistency()?,
        None => {
            let shape = ImageShape::square(3, 32);
            Box::new(GaussianOracle { data_std: 0.5, shape, sigma_range: SigmaRange::EDM })
        }
    };
    let shape = f.shape();
    let picture = match args.next() {
        Some(path) => picture::read(&path, shape)?,
        None => gradient(shape),
    };
    // 1 where the picture is made anew: the middle quarter.
    let anew = Tensor::zeros([1, 1, shape.height, shape.width], (Kind::Float, Device::Cpu));
    let middle = anew.narrow(2, shape.height / 4, shape.height / 2);
    let _ = middle.narrow(3, shape.width / 4, shape.width / 2).fill_(1.0);

    let seeds = [1, 2, 3];
    let labels = (f.num_classes() > 0).then_some([0; 3].as_slice());
    let request = Request { labels, ..Request::new(&seeds) };
    let inpaint = Inpaint::new(&picture, &anew)?;
    let results = edit(f.as_ref(), &inpaint, &default_times(shape, 7.0), &request, Hooks::default())?;

    let kept: Tensor = (&results - &picture) * (1.0 - &anew);
    println!("what was known differs by {:.1e} at most", kept.abs().max().double_value(&[]));
    let row = Tensor::cat(&[&picture, &(&picture * (1.0 - &anew)), &results], 0);
    let out = Path::new("inpaint.png");
    picture::save(&picture::sheet(&row, 5), out)?;
    println!("picture, what is known of it, and {} results: {}", seeds.len(), out.display());
    Ok(())
}

/// A channel that rises to the right, one that rises downwards, one that falls.
fn gradient(shape: ImageShape) -> Tensor {
    let ramp = |side: i64| Tensor::linspace(-0.8, 0.8, side, (Kind::Float, Device::Cpu));
    let right = ramp(shape.width).view([1, -1]).expand([shape.height, shape.width], false);
    let down = ramp(shape.height).view([-1, 1]).expand([shape.height, shape.width], false);
    let channels = [right.shallow_clone(), down, -right];
    Tensor::stack(&channels[..shape.channels.min(3) as usize], 0).unsqueeze(0)
}
