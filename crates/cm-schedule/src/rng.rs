//! Counter-based randomness: a draw is a function of where it is used, not of what was drawn before.
//!
//! A [`Stream`] names one place of use by (seed, purpose, step, sample). Nothing is stored between draws, so a
//! resumed run needs no generator state, and an image depends on its seed alone, never on the batch around it.
//!
//! The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, *Parallel random numbers: as easy as 1, 2, 3*,
//! SC 2011). Layout, which is part of the file format of this project and never changes:
//!
//! | word | content |
//! | --- | --- |
//! | key 0, key 1 | seed: low 32 bits, high 32 bits |
//! | counter 0 | block: position inside the stream |
//! | counter 1 | step: optimisation step, sampler step or epoch |
//! | counter 2 | sample: low 32 bits |
//! | counter 3 | sample: next 24 bits, and the [`Purpose`] in the top 8 |

/// What the random numbers of a [`Stream`] are for. Streams of different purposes never share a number.
///
/// The values are part of the random layout: new ones go to the end, old ones keep their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Initial network weights; `sample` is [`name_id`] of the parameter's name.
    Init = 0,
    /// The Gaussian noise that training adds to an image; `sample` is the position in the run's batch.
    Noise = 1,
    /// Which noise level, or which pair of levels, a training image gets.
    Index = 2,
    /// Whether a training image is mirrored.
    Flip = 3,
    /// The order of a data set; see [`permutation`].
    Order = 4,
    /// Seeds of dropout masks.
    Dropout = 5,
    /// Noise of sampling: `sample` is the image's seed, `step` the sampler's step.
    Sample = 6,
    /// Class labels drawn for sampling.
    Label = 7,
    /// Augmentation other than mirroring.
    Augment = 8,
    /// Synthetic data, such as the pixels of a dry run.
    Synthetic = 9,
}

const PHILOX_M0: u32 = 0xD251_1F53;
const PHILOX_M1: u32 = 0xCD9E_8D57;
const PHILOX_W0: u32 = 0x9E37_79B9;
const PHILOX_W1: u32 = 0xBB67_AE85;

/// Philox with four 32-bit words and ten rounds: a bijection of the counter, chosen by the key.
///
/// # Source
/// Salmon et al., SC 2011; constants as in their Random123 library.
///
/// ```
/// use cm_schedule::rng::philox4x32_10;
/// assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
/// ```
#[inline]
#[must_use]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(PHILOX_W0), k[1].wrapping_add(PHILOX_W1)];
        }
        let p0 = u64::from(PHILOX_M0) * u64::from(c[0]);
        let p1 = u64::from(PHILOX_M1) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
    }
    c
}

/// The random numbers of one place of use. Copying it is free, and drawing changes nothing.
///
/// One stream serves one kind of draw: [`uniform`](Self::uniform), [`below`](Self::below) and
/// [`normal`](Self::normal) read the same blocks in their own way, so their values on one stream are dependent.
///
/// ```
/// use cm_schedule::rng::{Purpose, Stream};
/// let image_7 = Stream { seed: 1, purpose: Purpose::Noise, step: 0, sample: 7 };
/// assert_eq!(image_7.normal(3), image_7.normal(3));
/// assert_ne!(image_7.normal(3), Stream { step: 1, ..image_7 }.normal(3));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream {
    /// The run's seed, or the user's.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// Optimisation step, sampler step or epoch.
    pub step: u32,
    /// Which image, parameter or other item; below 2^56 ([`Stream::MAX_SAMPLE`]), higher bits are dropped.
    pub sample: u64,
}

impl Stream {
    /// The largest sample number that has a stream of its own: 2^56 − 1.
    pub const MAX_SAMPLE: u64 = (1 << 56) - 1;

    /// The counter of block `i`, as in the table at the head of this module.
    #[inline]
    #[must_use]
    pub fn counter(&self, i: u32) -> [u32; 4] {
        let high = (self.sample >> 32) as u32 & 0x00FF_FFFF;
        [i, self.step, self.sample as u32, high | (self.purpose as u32) << 24]
    }

    /// The key: the seed, low word first.
    #[inline]
    #[must_use]
    pub fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Block `i`: 128 random bits.
    #[inline]
    #[must_use]
    pub fn block(&self, i: u32) -> [u32; 4] {
        philox4x32_10(self.counter(i), self.key())
    }

    /// 64 random bits: the first two words of block `i`, low word first.
    #[inline]
    #[must_use]
    pub fn bits(&self, i: u32) -> u64 {
        let [low, high, ..] = self.block(i);
        u64::from(low) | u64::from(high) << 32
    }

    /// Uniform in [0, 1) with 53 bits, from block `i`.
    #[inline]
    #[must_use]
    pub fn uniform(&self, i: u32) -> f64 {
        (self.bits(i) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in 0..n, from block `i`: the high word of bits · n.
    ///
    /// One block is one draw, so nothing is rejected, and a value's probability differs from 1/n by less than
    /// 2^-64. There is no number below 0: `n = 0` gives 0.
    #[inline]
    #[must_use]
    pub fn below(&self, i: u32, n: u64) -> u64 {
        ((u128::from(self.bits(i)) * u128::from(n)) >> 64) as u64
    }

    /// The `i`-th standard normal number; four come from one block (see [`fill_normals`](Self::fill_normals)).
    #[inline]
    #[must_use]
    pub fn normal(&self, i: u32) -> f64 {
        normals_of(self.block(i / 4))[i as usize % 4]
    }

    /// Standard normal numbers in single precision: element i is [`normal`](Self::normal)(i), rounded.
    ///
    /// Box–Muller in f64 on pairs of words: u₁ = (x₀ + ½)·2⁻³², u₂ = (x₁ + ½)·2⁻³², z₀ = √(−2 ln u₁) cos 2πu₂,
    /// z₁ = √(−2 ln u₁) sin 2πu₂; the words x₂, x₃ give z₂, z₃ alike. The largest magnitude is √(66 ln 2) ≈ 6.76.
    /// Logarithm, sine and cosine come from the `libm` crate, so that every platform makes the same bits.
    pub fn fill_normals(&self, out: &mut [f32]) {
        for (i, chunk) in (0..).zip(out.chunks_mut(4)) {
            for (slot, z) in chunk.iter_mut().zip(normals_of(self.block(i))) {
                *slot = z as f32;
            }
        }
    }
}

/// The four normal numbers of a block.
#[inline]
fn normals_of(x: [u32; 4]) -> [f64; 4] {
    let [z0, z1] = box_muller(x[0], x[1]);
    let [z2, z3] = box_muller(x[2], x[3]);
    [z0, z1, z2, z3]
}

#[inline]
fn box_muller(a: u32, b: u32) -> [f64; 2] {
    const UNIT: f64 = 1.0 / (1u64 << 32) as f64;
    let radius = (-2.0 * libm::log((f64::from(a) + 0.5) * UNIT)).sqrt();
    let (sin, cos) = libm::sincos(std::f64::consts::TAU * ((f64::from(b) + 0.5) * UNIT));
    [radius * cos, radius * sin]
}

/// The order in which a data set of `n` items is read in epoch `epoch`: a permutation of 0..n.
///
/// Fisher–Yates on the stream (seed, [`Purpose::Order`], epoch), so that it is a function of its arguments alone.
///
/// ```
/// use cm_schedule::rng::permutation;
/// let mut order = permutation(0, 3, 5);
/// assert_eq!(order, permutation(0, 3, 5));
/// order.sort();
/// assert_eq!(order, [0, 1, 2, 3, 4]);
/// ```
#[must_use]
pub fn permutation(seed: u64, epoch: u64, n: u32) -> Vec<u32> {
    let stream = Stream { seed, purpose: Purpose::Order, step: epoch as u32, sample: epoch >> 32 };
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        let j = stream.below(i, u64::from(i) + 1);
        order.swap(i as usize, j as usize);
    }
    order
}

/// One seed from several numbers; order and count matter.
///
/// For generators that cannot be told their position, such as libtorch's own for dropout:
/// `mix(&[seed, step, purpose])`. Each number is added and then scrambled by the finaliser of SplitMix64
/// (Steele, Lea and Flood, OOPSLA 2014), which is a bijection, so that lists that differ in their last number
/// alone never collide.
#[must_use]
pub fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(scramble(parts.len() as u64), |state, &part| scramble(state.wrapping_add(part)))
}

/// One step of SplitMix64.
fn scramble(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A stable number below 2^56 for a name, to serve as [`Stream::sample`]: a parameter's initial values then depend
/// on its name, not on the order in which the network creates its parameters.
///
/// FNV-1a over the UTF-8 bytes, scrambled once more and cut to 56 bits. Two of n names share a number with
/// probability about n²/2^57: 10⁻¹¹ for a thousand.
#[must_use]
pub fn name_id(name: &str) -> u64 {
    let fnv = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    scramble(fnv) >> 8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: Stream = Stream { seed: 42, purpose: Purpose::Noise, step: 5, sample: 9 };

    /// The three vectors that Random123 ships for philox4x32 with ten rounds (file `kat_vectors`).
    #[test]
    fn philox_known_answers() {
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
        }
    }

    #[test]
    fn every_field_has_its_place_in_the_counter() {
        let stream = Stream {
            seed: 0x1111_2222_3333_4444,
            purpose: Purpose::Order,
            step: 0x5555_6666,
            sample: 0x00AA_BBCC_DDEE_FF00,
        };
        assert_eq!(stream.counter(7), [7, 0x5555_6666, 0xDDEE_FF00, 0x04AA_BBCC]);
        assert_eq!(stream.key(), [0x3333_4444, 0x1111_2222]);
    }

    #[test]
    fn changing_any_field_changes_the_numbers() {
        let others = [
            Stream { seed: 43, ..STREAM },
            Stream { seed: 42 | 1 << 40, ..STREAM },
            Stream { purpose: Purpose::Sample, ..STREAM },
            Stream { step: 6, ..STREAM },
            Stream { sample: 10, ..STREAM },
            Stream { sample: 9 | 1 << 50, ..STREAM },
        ];
        for other in others {
            assert_ne!(other.block(0), STREAM.block(0), "{other:?}");
        }
        assert_ne!(STREAM.block(1), STREAM.block(0));
    }

    #[test]
    fn filling_equals_drawing_one_by_one() {
        for len in [0, 1, 3, 4, 5, 64, 67] {
            let mut filled = vec![0.0f32; len];
            STREAM.fill_normals(&mut filled);
            let single: Vec<f32> = (0..len as u32).map(|i| STREAM.normal(i) as f32).collect();
            assert_eq!(filled, single);
        }
    }

    /// A word of zeros is the worst case of the logarithm.
    #[test]
    fn normals_are_finite_at_the_ends_of_the_word() {
        for a in [0, 1, u32::MAX] {
            for b in [0, 1, u32::MAX / 4, u32::MAX] {
                for z in box_muller(a, b) {
                    assert!(z.abs() < 6.7638, "{a} {b} {z}");
                }
            }
        }
        // u₁ = u₂ = 2⁻³³: √(66 ln 2) · cos(0+).
        assert!((box_muller(0, 0)[0] - 6.763_705_6).abs() < 1e-6);
    }

    /// Mean, variance, and third and fourth moments of 2^16 draws, each within five standard errors.
    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let n = 1 << 16;
        let mut moments = [0.0; 4];
        for i in 0..n {
            let z = STREAM.normal(i);
            for (power, moment) in (1..).zip(&mut moments) {
                *moment += z.powi(power) / f64::from(n);
            }
        }
        let unit = f64::from(n).sqrt();
        // Standard deviations of z, z², z³ and z⁴: 1, √2, √15, √96.
        for (moment, (want, std)) in moments.iter().zip([(0.0, 1.0), (1.0, 1.42), (0.0, 3.88), (3.0, 9.8)]) {
            assert!((moment - want).abs() < 5.0 * std / unit, "{moments:?}");
        }
    }

    #[test]
    fn below_covers_its_range_evenly() {
        let mut counts = [0u32; 7];
        for i in 0..70_000 {
            counts[STREAM.below(i, 7) as usize] += 1;
        }
        // Five standard deviations of a binomial count: 5·√(70000/7·6/7) = 463.
        assert!(counts.iter().all(|&c| c.abs_diff(10_000) < 463), "{counts:?}");
        assert_eq!(STREAM.below(0, 1), 0);
        assert_eq!(STREAM.below(0, 0), 0);
    }

    #[test]
    fn permutations_differ_by_epoch_and_seed_and_are_pinned() {
        let order = permutation(7, 0, 1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        assert_ne!(order, permutation(7, 1, 1000));
        assert_ne!(order, permutation(8, 0, 1000));
        assert_ne!(order, permutation(7, 1 << 32, 1000));
        assert!(permutation(7, 0, 0).is_empty());
    }

    /// Data orders, initial weights and noise of old runs must stay what they were. (Numbers of a Python program
    /// written from the documentation of this module.)
    #[test]
    fn the_layout_is_pinned() {
        assert_eq!(permutation(0, 0, 8), [5, 6, 4, 2, 1, 7, 0, 3]);
        assert_eq!(mix(&[1, 2, 3]), 0x9beb_e6e8_daa6_58e7);
        assert_eq!(name_id("enc.32x32_conv.weight"), 0x00fb_dcb4_63ab_0c76);
        let want = [
            0.438_142_992_956_684_46,
            1.335_789_162_531_402_2,
            -0.741_068_934_603_38,
            -0.818_483_893_199_934_9,
        ];
        for (i, z) in (0..).zip(want) {
            assert!((STREAM.normal(i) - z).abs() < 1e-14);
        }
        assert!((STREAM.normal(4) - 0.029_769_692_313_581_06).abs() < 1e-14);
    }

    #[test]
    fn mixing_depends_on_order_and_count() {
        let all = [mix(&[]), mix(&[0]), mix(&[0, 0]), mix(&[1, 2]), mix(&[2, 1]), mix(&[1]), mix(&[2])];
        let distinct: std::collections::HashSet<u64> = all.into_iter().collect();
        assert_eq!(distinct.len(), all.len());
    }

    proptest! {
        #[test]
        fn draws_stay_in_range(seed: u64, step: u32, sample in 0..=Stream::MAX_SAMPLE, i: u32, n in 1u64..) {
            let stream = Stream { seed, purpose: Purpose::Index, step, sample };
            prop_assert!((0.0..1.0).contains(&stream.uniform(i)));
            prop_assert!(stream.below(i, n) < n);
            prop_assert!(stream.normal(i).is_finite());
        }

        #[test]
        fn names_fit_into_a_sample(name in ".*") {
            prop_assert!(name_id(&name) <= Stream::MAX_SAMPLE);
        }
    }
}
