//! A consistency function of one's own, with none of this project's networks compiled in.

use cm_sampler::model::{GaussianOracle, ImageShape};
use cm_sampler::schedule::SigmaRange;
use cm_sampler::{Request, one_step};

fn main() -> cm_sampler::Result<()> {
    let shape = ImageShape::square(3, 8);
    let f = GaussianOracle { data_std: 0.5, shape, sigma_range: SigmaRange::EDM };
    let images = one_step(&f, &Request::new(&[1, 2, 3]))?;
    assert_eq!(images.size(), shape.batch(3));
    println!("{} images of {shape} without networks", images.size()[0]);
    Ok(())
}
