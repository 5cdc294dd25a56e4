use tch::Tensor;

use crate::{Result, shim};

/// √(Σ x²) over all elements of all tensors, with one wait for the device.
///
/// On the CPU sums run in f64 in a fixed order, so the result does not depend on the number of threads.
pub fn norm(tensors: &[&Tensor]) -> Result<f64> {
    shim::norm(&shim::pointers(tensors.iter().copied()), false, false)
}

/// The norm of all gradients together; weights without one count as 0.
///
/// It is NaN or infinite exactly where some gradient is, unless squares overflow; [`first_non_finite_grad`] then
/// tells which.
pub fn grad_norm(params: &[(&str, &Tensor)]) -> Result<f64> {
    shim::norm(&shim::pointers(params.iter().map(|(_, w)| *w)), true, false)
}

/// The name of the first tensor that holds NaN or an infinity.
///
/// It waits for the device once per tensor: ask when something is wrong.
pub fn first_non_finite<'a>(tensors: &[(&'a str, &Tensor)]) -> Result<Option<&'a str>> {
    find(tensors, false)
}

/// The name of the first weight whose gradient holds NaN or an infinity.
pub fn first_non_finite_grad<'a>(params: &[(&'a str, &Tensor)]) -> Result<Option<&'a str>> {
    find(params, true)
}

fn find<'a>(tensors: &[(&'a str, &Tensor)], grads: bool) -> Result<Option<&'a str>> {
    let pointers = shim::pointers(tensors.iter().map(|(_, t)| *t));
    Ok(shim::first_non_finite(&pointers, grads)?.map(|i| tensors[i].0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn tensor(n: i64, phase: f64) -> Tensor {
        ((Tensor::arange(n, (Kind::Double, Device::Cpu)) + phase).sin() * 3.0).to_kind(Kind::Float)
    }

    fn reference(tensors: &[&Tensor]) -> f64 {
        tensors
            .iter()
            .map(|t| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]))
            .sum::<f64>()
            .sqrt()
    }

    #[test]
    fn norm_of_many_tensors() {
        assert_eq!(norm(&[&Tensor::from_slice(&[3.0f32]), &Tensor::from_slice(&[4.0f32])]).unwrap(), 5.0);
        let tensors = [tensor(7, 0.0), tensor(100_003, 1.0), tensor(1, 2.0), tensor(0, 0.0)];
        let refs: Vec<&Tensor> = tensors.iter().collect();
        let want = reference(&refs);
        let got = norm(&refs).unwrap();
        assert!((got - want).abs() <= 1e-12 * want, "{got} {want}");
        // The kernels of other devices sum in f32.
        let lists = shim::norm(&shim::pointers(refs.iter().copied()), false, true).unwrap();
        assert!((lists - want).abs() <= 1e-5 * want, "{lists} {want}");
        assert_eq!(norm(&[]).unwrap(), 0.0);
    }

    #[test]
    fn other_kinds_and_layouts_have_norms_too() {
        let t = tensor(60, 0.5).view([3, 20]);
        let want = reference(&[&t]);
        for variant in [t.to_kind(Kind::Double), t.transpose(0, 1), t.expand([3, 20], false)] {
            assert!((norm(&[&variant]).unwrap() - want).abs() < 1e-5);
        }
        let every_other = t.slice(1, 0, 20, 2);
        assert!((norm(&[&every_other]).unwrap() - reference(&[&every_other])).abs() < 1e-5);
    }

    #[test]
    fn the_culprit_is_named() {
        let weights = [tensor(5, 0.0), tensor(3000, 1.0), tensor(4, 2.0)].map(|t| t.set_requires_grad(true));
        let named: Vec<(&str, &Tensor)> = ["first", "second", "third"].into_iter().zip(&weights).collect();
        assert_eq!(grad_norm(&named).unwrap(), 0.0, "no gradients yet");
        let mut loss = weights[0].sum(Kind::Float) + weights[1].sum(Kind::Float);
        loss.backward();
        assert_eq!(grad_norm(&named).unwrap(), 3005f64.sqrt());
        assert_eq!(first_non_finite_grad(&named).unwrap(), None);

        loss = (&weights[1] * f64::INFINITY).sum(Kind::Float);
        loss.backward();
        assert!(!grad_norm(&named).unwrap().is_finite());
        assert_eq!(first_non_finite_grad(&named).unwrap(), Some("second"));
        assert_eq!(first_non_finite(&named).unwrap(), None);
        let _ = tch::no_grad(|| weights[2].get(3).fill_(f64::NAN));
        assert_eq!(first_non_finite(&named).unwrap(), Some("third"));
    }
}
