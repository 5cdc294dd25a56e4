use cm_model::torch::philox::{NormalSpec, normals};
use cm_schedule::rng::Purpose;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

fn standard_normal(count: usize, numel: usize, seed: u64) -> Result<Tensor> {
    let samples: Vec<u64> = (0..count as u64).collect();
    let spec = NormalSpec { seed, purpose: Purpose::Sample, step: 0, samples: &samples, per_sample: numel };
    Ok(normals(&spec, Device::Cpu)?)
}

/// `count` draws from the Gaussian that has the mean and covariance of `images` `[N, C, H, W]`, clamped to
/// [-1, 1]: the best that a model without structure beyond second moments can do.
///
/// # Errors
/// [`Error::Input`] for fewer than two images.
pub fn gaussian_fit(images: &Tensor, count: usize, seed: u64) -> Result<Tensor> {
    let size = images.size();
    if size.len() != 4 || size[0] < 2 {
        let got = format!("{size:?}");
        return Err(Error::Input { what: "images", expected: "[N ≥ 2, C, H, W]".into(), got });
    }
    let flat = images.view([size[0], -1]).to_kind(Kind::Double);
    let mean = flat.mean_dim([0i64].as_slice(), true, Kind::Double);
    let centred = &flat - &mean;
    let covariance = centred.tr().matmul(&centred) / (size[0] - 1) as f64;
    // Pixels that never change make the covariance singular: take its symmetric root, not a Cholesky factor.
    let (values, vectors) = covariance.f_linalg_eigh("L")?;
    let root = vectors * values.clamp_min(0.0).sqrt();
    let z = standard_normal(count, flat.size()[1] as usize, seed)?.to_kind(Kind::Double);
    let draws = z.matmul(&root.tr()) + mean;
    Ok(draws.clamp(-1.0, 1.0).to_kind(Kind::Float).view([count as i64, size[1], size[2], size[3]]))
}

/// `count` images of standard normal noise shaped like `images`, clamped to [-1, 1].
///
/// # Errors
/// [`Error::Backend`] if the noise cannot be made.
pub fn noise(images: &Tensor, count: usize, seed: u64) -> Result<Tensor> {
    let size = images.size();
    let numel = size[1..].iter().product::<i64>() as usize;
    let z = standard_normal(count, numel, seed)?;
    Ok(z.clamp(-1.0, 1.0).view([count as i64, size[1], size[2], size[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_has_the_moments_of_its_data() {
        let z = standard_normal(4000, 4, 3).unwrap();
        let mix = Tensor::from_slice(&[
            0.2f32, 0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1, 0.0, 0.15, 0.0, 0.0, 0.0, 0.0, 0.0,
        ]);
        let data = (z.matmul(&mix.view([4, 4])) + 0.1).view([4000, 1, 2, 2]);
        let fit = gaussian_fit(&data, 20_000, 5).unwrap();
        let moments = |x: &Tensor| {
            let x = x.view([x.size()[0], 4]);
            let mean = x.mean_dim([0i64].as_slice(), true, Kind::Float);
            let c = &x - &mean;
            (mean, c.tr().matmul(&c) / (x.size()[0] - 1) as f64)
        };
        let ((m0, c0), (m1, c1)) = (moments(&data), moments(&fit));
        assert!((m0 - m1).abs().max().double_value(&[]) < 0.006);
        assert!((c0 - c1).abs().max().double_value(&[]) < 0.003);
    }

    #[test]
    fn one_image_has_no_covariance() {
        let one = Tensor::zeros([1, 1, 2, 2], (Kind::Float, Device::Cpu));
        assert!(matches!(gaussian_fit(&one, 3, 0), Err(Error::Input { .. })));
    }
}
