use cm_model::{Cond, Mode, Sigma};
use tch::Tensor;

use crate::{Distance, Error, Pairs, Result, Trainable};

/// The network that a consistency loss compares the student with. It gets no gradient.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// The student's own weights, as they are now (iCT, ECT, and CD or CT with μ = 0).
    Live,
    /// Another network, whose weights are an average of the student's (θ⁻ of CM's Algorithms 2 and 3).
    Network(&'a dyn Trainable),
}

/// What a loss is computed on.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Clean images `[B, C, H, W]` in [-1, 1].
    pub images: &'a Tensor,
    /// Standard normal noise of the same shape.
    pub noise: &'a Tensor,
    /// The noise levels of each image.
    pub pairs: &'a Pairs,
    /// Labels and augmentation of each image.
    pub cond: &'a Cond,
}

/// Losses of a batch, and what they were made of.
#[derive(Debug)]
pub struct Losses {
    /// Weighted losses `[B]` with their graph; the batch's loss is their mean.
    pub per_sample: Tensor,
    /// Distances `[B]` before weighting, without a graph.
    pub distance: Tensor,
    /// The student's images with their graph, for whoever measures them in another way.
    pub student: Tensor,
    /// The images that they were compared with, without a graph.
    pub target: Tensor,
}

/// The loss of consistency training, `w · d(f_θ(x + σz, σ), f_θ⁻(x + σ′z, σ′))`: both points lie on the ray from
/// the image `x` along one noise `z`.
///
/// Where σ′ = 0 the target is the image itself. Student and target are evaluated in the same `mode`, so that with
/// dropout they share the mask. Noise levels and weights come in f64 and are applied in float32, whatever the
/// network computes in.
///
/// # Source
/// Song et al. 2023, Algorithm 3; with [`Target::Live`] it is the loss of iCT (arXiv 2310.14189) and ECT
/// (arXiv 2406.14548).
///
/// # Errors
/// [`Error::Input`] or [`cm_model::Error`] if the parts of the example do not fit each other or the network.
pub fn consistency_loss(
    student: &dyn Trainable,
    target: Target<'_>,
    example: &Example<'_>,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    let pairs = example.check(student)?;
    let (x, z) = (example.images, example.noise);
    // Each number is rounded once, from f64, and shaped [B, 1, 1, 1].
    let column = |values: &[f64]| Sigma::Each(values).broadcast(x.device(), |value| value);
    // Algorithm 3, line 5: x + t_{n+1} z and x + t_n z.
    let noisy = x + z * column(&pairs.sigma);
    let nearer = x + z * column(&pairs.next);
    matching_loss(student, target, example, &noisy, &nearer, distance, mode)
}

/// The distance between the student at `noisy` (σ) and the target at `nearer` (σ′), whatever brought `nearer`
/// about: the same noise in consistency training, a solver step of a teacher in distillation.
fn matching_loss(
    student: &dyn Trainable,
    target: Target<'_>,
    example: &Example<'_>,
    noisy: &Tensor,
    nearer: &Tensor,
    distance: &Distance,
    mode: Mode,
) -> Result<Losses> {
    let Example { images, pairs, cond, .. } = example;
    let target = match target {
        Target::Live => student,
        Target::Network(network) => network,
    };
    // The target goes first: its activations are gone before the student's graph is built.
    let wanted = {
        let _no_grad = tch::no_grad_guard();
        let at_image: Vec<bool> = pairs.next.iter().map(|&next| next == 0.0).collect();
        if at_image.iter().all(|&at| at) {
            images.shallow_clone()
        } else {
            // No network knows σ = 0. Those images go along at their own σ, so that the batch, and with it the
            // dropout mask, is the student's; their result is thrown away.
            let known: Vec<f64> = std::iter::zip(&pairs.next, &pairs.sigma)
                .map(|(&next, &sigma)| if next == 0.0 { sigma } else { next })
                .collect();
            let estimate = target.evaluate(nearer, Sigma::Each(&known), cond, mode)?;
            let at_image = Tensor::from_slice(&at_image).to_device(images.device()).view([-1, 1, 1, 1]);
            images.where_self(&at_image, &estimate)
        }
    };
    let estimate = student.evaluate(noisy, Sigma::Each(&pairs.sigma), cond, mode)?;
    let distances = distance.between(&estimate, &wanted);
    let weights = Sigma::Each(&pairs.weight).flat(images.device(), |weight| weight);
    let per_sample = &distances * weights;
    Ok(Losses { per_sample, distance: distances.detach(), student: estimate, target: wanted })
}

impl<'a> Example<'a> {
    fn check(&self, student: &dyn Trainable) -> Result<&'a Pairs> {
        let batch = student.shape().check("training images", self.images)?;
        student.shape().check("training noise", self.noise)?;
        let Pairs { sigma, next, weight } = self.pairs;
        let lengths = [self.noise.size()[0], sigma.len() as i64, next.len() as i64, weight.len() as i64];
        if lengths.iter().any(|&n| n != batch) {
            return Err(Error::Input {
                what: "noise, sigma, next and weight of a batch",
                expected: format!("{batch} of each, as there are images"),
                got: format!("{lengths:?}"),
            });
        }
        if let Some(i) = (0..sigma.len()).find(|&i| !(0.0 <= next[i] && next[i] < sigma[i])) {
            return Err(Error::Input {
                what: "pair of noise levels",
                expected: "0 ≤ next < sigma".into(),
                got: format!("next = {}, sigma = {} for image {i}", next[i], sigma[i]),
            });
        }
        Ok(self.pairs)
    }
}
