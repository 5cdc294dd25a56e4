//! Gaussian noise that depends on where it is used and on nothing else: not on the batch around an image, not on
//! what was drawn before, not on the device.
//!
//! The numbers are those of [`cm_schedule::rng::Stream::fill_normals`]: Philox4x32-10 words, Box–Muller in f64,
//! rounded to f32. The CPU computes them directly, image by image in parallel; other devices compute the same
//! integers with int64 tensor operations and the same real numbers up to the last bits of their own logarithm and
//! sine (≤ 1e-6).

use cm_schedule::rng::{Purpose, Stream};
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Which normal numbers: one row of `per_sample` numbers for each of `samples`.
#[derive(Debug, Clone, Copy)]
pub struct NormalSpec<'a> {
    /// The run's seed, or the user's.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// Optimisation step or sampler step.
    pub step: u32,
    /// One id per row, each at most [`Stream::MAX_SAMPLE`].
    pub samples: &'a [u64],
    /// How many numbers each row has, at most 2^34.
    pub per_sample: usize,
}

impl NormalSpec<'_> {
    fn stream(&self, sample: u64) -> Stream {
        Stream { seed: self.seed, purpose: self.purpose, step: self.step, sample }
    }

    fn check(&self) -> Result<()> {
        if let Some(&sample) = self.samples.iter().find(|&&id| id > Stream::MAX_SAMPLE) {
            return Err(Error::value("sample id of a noise stream", "at most 2^56 - 1", sample));
        }
        // Blocks of four are numbered with 32 bits.
        if self.per_sample as u64 > 4 << 32 {
            return Err(Error::value("numbers per noise stream", "at most 2^34", self.per_sample));
        }
        Ok(())
    }
}

/// Standard normal numbers as a tensor.
///
/// Element (b, i) is normal number i of the stream (seed, purpose, step, samples\[b\]), so a row does not depend on
/// the other rows.
///
/// # Shapes
/// [samples.len(), per_sample], Float, on `device`.
///
/// # Source
/// Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011 (Philox); Box and Muller 1958.
pub fn normals(spec: &NormalSpec, device: Device) -> Result<Tensor> {
    spec.check()?;
    match device {
        Device::Cpu => on_cpu(spec),
        _ => by_tensor_ops(spec, device),
    }
}

fn on_cpu(spec: &NormalSpec) -> Result<Tensor> {
    let mut values = vec![0.0f32; spec.samples.len() * spec.per_sample];
    if !values.is_empty() {
        values
            .par_chunks_mut(spec.per_sample)
            .zip(spec.samples)
            .for_each(|(row, &sample)| spec.stream(sample).fill_normals(row));
    }
    let shape = [spec.samples.len() as i64, spec.per_sample as i64];
    Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
}

/// The words of a counter or of a block, as int64 tensors with values in 0..2^32.
type Words = [Tensor; 4];

const MASK: i64 = 0xFFFF_FFFF;

/// High and low word of `factor` · `word`.
///
/// The product of two 32-bit words can reach 2^64, past int64, where libtorch wraps around on every device. The low
/// word is unharmed by that, and so is the high one once the sign bits that an arithmetic shift drags in are masked.
fn mul_words(word: &Tensor, factor: i64) -> Result<(Tensor, Tensor)> {
    let product = word.f_mul_scalar(factor)?;
    let high = product.f_bitwise_right_shift_tensor_scalar(32)?.f_bitwise_and(MASK)?;
    Ok((high, product.f_bitwise_and(MASK)?))
}

/// [`cm_schedule::rng::philox4x32_10`] on tensors.
fn philox_words(counter: Words, key: [u32; 2]) -> Result<Words> {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for round in 0..10 {
        if round > 0 {
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        let (high0, low0) = mul_words(&c0, 0xD251_1F53)?;
        let (high1, low1) = mul_words(&c2, 0xCD9E_8D57)?;
        c0 = high1.f_bitwise_xor_tensor(&c1)?.f_bitwise_xor(i64::from(k0))?;
        c2 = high0.f_bitwise_xor_tensor(&c3)?.f_bitwise_xor(i64::from(k1))?;
        (c1, c3) = (low1, low0);
    }
    Ok([c0, c1, c2, c3])
}

/// √(−2 ln u₁) cos 2πu₂ and √(−2 ln u₁) sin 2πu₂ of two words.
fn box_muller(a: &Tensor, b: &Tensor) -> Result<[Tensor; 2]> {
    const UNIT: f64 = 1.0 / (1u64 << 32) as f64;
    let open_unit = |word: &Tensor| word.f_to_kind(Kind::Double)?.f_add_scalar(0.5)?.f_mul_scalar(UNIT);
    let radius = open_unit(a)?.f_log()?.f_mul_scalar(-2.0)?.f_sqrt()?;
    let angle = open_unit(b)?.f_mul_scalar(std::f64::consts::TAU)?;
    Ok([radius.f_mul(&angle.f_cos()?)?, radius.f_mul(&angle.f_sin()?)?])
}

fn by_tensor_ops(spec: &NormalSpec, device: Device) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let rows = spec.samples.len() as i64;
    let blocks = spec.per_sample.div_ceil(4) as i64;
    let column = |word: usize| -> Result<Tensor> {
        let values: Vec<i64> =
            spec.samples.iter().map(|&s| i64::from(spec.stream(s).counter(0)[word])).collect();
        Ok(Tensor::f_from_slice(&values)?
            .f_to_device(device)?
            .f_view([rows, 1])?
            .f_expand([rows, blocks], false)?)
    };
    let block = Tensor::f_arange(blocks, (Kind::Int64, device))?.f_view([1, blocks])?;
    let block = block.f_expand([rows, blocks], false)?;
    let [x0, x1, x2, x3] = philox_words([block, column(1)?, column(2)?, column(3)?], spec.stream(0).key())?;
    let [z0, z1] = box_muller(&x0, &x1)?;
    let [z2, z3] = box_muller(&x2, &x3)?;
    let all = Tensor::f_stack(&[z0, z1, z2, z3], 2)?.f_view([rows, 4 * blocks])?;
    Ok(all.f_narrow(1, 0, spec.per_sample as i64)?.f_to_kind(Kind::Float)?.f_contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cm_schedule::rng::philox4x32_10;

    fn spec<'a>(samples: &'a [u64], per_sample: usize) -> NormalSpec<'a> {
        NormalSpec { seed: 0x0123_4567_89AB_CDEF, purpose: Purpose::Noise, step: 3, samples, per_sample }
    }

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!((a.size(), a.kind()), (b.size(), b.kind()));
        (a - b).abs().max().double_value(&[])
    }

    fn tensor_block(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        let words = counter.map(|w| Tensor::from_slice(&[i64::from(w)]));
        philox_words(words, key).unwrap().map(|w| u32::try_from(w.int64_value(&[0])).unwrap())
    }

    /// The vectors that Random123 ships for philox4x32 with ten rounds (file `kat_vectors`), through both paths.
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32_10(counter, key), want);
            assert_eq!(tensor_block(counter, key), want);
        }
    }

    /// Every word is exact, not only close: an error in a high bit would be a different number altogether.
    #[test]
    fn words_of_both_paths_are_equal() {
        for i in 0..500u32 {
            let counter = [i, i.wrapping_mul(0x9E37_79B9), !i, i.rotate_left(13) ^ 0xF0F0_F0F0];
            let key = [i.wrapping_mul(77), u32::MAX - i];
            assert_eq!(tensor_block(counter, key), philox4x32_10(counter, key), "{counter:?}");
        }
    }

    #[test]
    fn tensor_operations_give_the_native_numbers() {
        let samples = [0, 1, 63, u64::from(u32::MAX), 1 << 32, (1 << 40) + 12_345, Stream::MAX_SAMPLE];
        for per_sample in [1, 3, 4, 192, 1021] {
            for step in [0, 1, 800_000, u32::MAX] {
                for seed in [0, 42, u64::MAX] {
                    let spec = NormalSpec { seed, step, ..spec(&samples, per_sample) };
                    let error = worst(
                        &normals(&spec, Device::Cpu).unwrap(),
                        &by_tensor_ops(&spec, Device::Cpu).unwrap(),
                    );
                    assert!(error <= 1e-6, "{spec:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_row_is_its_stream() {
        let all = normals(&spec(&[5, 9, 2], 77), Device::Cpu).unwrap();
        let mut row = vec![0.0f32; 77];
        Stream { seed: 0x0123_4567_89AB_CDEF, purpose: Purpose::Noise, step: 3, sample: 9 }
            .fill_normals(&mut row);
        assert!(all.get(1).equal(&Tensor::from_slice(&row)));
    }

    #[test]
    fn rows_do_not_depend_on_their_batch() {
        let all = normals(&spec(&[4, 5, 6, 7], 192), Device::Cpu).unwrap();
        for (i, id) in (0..).zip([4, 5, 6, 7]) {
            assert!(normals(&spec(&[id], 192), Device::Cpu).unwrap().get(0).equal(&all.get(i)));
        }
        // A shorter row is the beginning of a longer one.
        assert!(normals(&spec(&[6], 100), Device::Cpu).unwrap().get(0).equal(&all.get(2).narrow(0, 0, 100)));
    }

    #[test]
    fn empty_requests_are_empty() {
        assert_eq!(normals(&spec(&[], 8), Device::Cpu).unwrap().size(), [0, 8]);
        assert_eq!(normals(&spec(&[1, 2], 0), Device::Cpu).unwrap().size(), [2, 0]);
        assert_eq!(by_tensor_ops(&spec(&[], 8), Device::Cpu).unwrap().size(), [0, 8]);
        assert_eq!(by_tensor_ops(&spec(&[1, 2], 0), Device::Cpu).unwrap().size(), [2, 0]);
    }

    #[test]
    fn ids_that_would_share_a_stream_are_refused() {
        let error = normals(&spec(&[1 << 56], 4), Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("2^56"), "{error}");
    }
}
