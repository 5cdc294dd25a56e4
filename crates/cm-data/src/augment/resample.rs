//! Moving the pixels of images along affine maps with little aliasing, by libtorch's operations.
//!
//! An image is widened by its reflection, doubled in size with the low-pass filter of the sym6 wavelet, read at the
//! mapped places by bilinear interpolation, and halved with the same filter. Halving is the transpose of doubling,
//! and the filter is orthonormal to its own shifts by 2, so that without a map in between the two cancel.

use tch::{Device, TchError, Tensor};

use super::transform::Affine;

/// The low-pass filter of the sym6 wavelet (Daubechies' least asymmetric one with six vanishing moments).
const SYM6: [f64; 12] = [
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
];
/// How far the filter reaches to each side, in pixels of the image.
const REACH: i64 = 3;
/// The tap that stands at a pixel's own place in the doubled image: the one nearest to the filter's centre.
const CENTRE: i64 = 5;

/// Pixels by which images are widened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Margins {
    pub(super) left: i64,
    pub(super) right: i64,
    pub(super) top: i64,
    pub(super) bottom: i64,
}

impl Margins {
    /// What the maps of a batch need: the farthest place that the corners of an image come from, and the reach of
    /// both filters. A reflection cannot be wider than the image, less its edge.
    pub(super) fn of(inverses: &[Affine], height: i64, width: i64) -> Self {
        let half = [(width - 1) as f64 / 2.0, (height - 1) as f64 / 2.0];
        let size = [width, height];
        // Per axis, the largest coordinate in the negative and in the positive direction.
        let mut farthest = [[f64::NEG_INFINITY; 2]; 2];
        for map in inverses {
            for (x, y) in [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)] {
                let corner = map.at(x * half[0], y * half[1]);
                for axis in 0..2 {
                    let [before, after] = &mut farthest[axis];
                    *before = before.max(-corner[axis]);
                    *after = after.max(corner[axis]);
                }
            }
        }
        let margin = |axis: usize, side: usize| {
            let needed = farthest[axis][side] + (2 * REACH) as f64 - half[axis];
            // Rounding up after clamping, and never above the clamp, whose ends are whole numbers.
            needed.clamp(0.0, (size[axis] - 1) as f64).ceil() as i64
        };
        Self { left: margin(0, 0), right: margin(0, 1), top: margin(1, 0), bottom: margin(1, 1) }
    }
}

/// Images `[B, C, H, W]` float32 read at the places that `inverses` say, one map for each image, in pixels from the
/// centre; `margins` are those of their whole batch.
///
/// Images whose map is the identity are not touched, but count for the margins as in the released code.
pub(super) fn resample(images: &Tensor, inverses: &[Affine], margins: Margins) -> Result<Tensor, TchError> {
    let moved: Vec<i64> =
        (0..).zip(inverses).filter(|(_, map)| **map != Affine::IDENTITY).map(|(i, _)| i).collect();
    if moved.is_empty() {
        return Ok(images.shallow_clone());
    }
    let maps: Vec<Affine> = moved.iter().map(|&i| inverses[i as usize]).collect();
    let index = Tensor::f_from_slice(&moved)?.f_to_device(images.device())?;
    let changed = warp(&images.f_index_select(0, &index)?, &maps, margins)?;
    images.f_index_copy(0, &index, &changed)
}

fn warp(images: &Tensor, inverses: &[Affine], margins: Margins) -> Result<Tensor, TchError> {
    let (batch, channels, height, width) = images.size4()?;
    let Margins { left, right, top, bottom } = margins;
    let (wide_height, wide_width) = (height + top + bottom, width + left + right);
    // The result is read a little beyond its edges, for the filter that halves it.
    let (read_height, read_width) = (height + 2 * REACH, width + 2 * REACH);
    let half = |size: i64| size as f64 / 2.0;
    let theta: Vec<f32> = inverses
        .iter()
        .flat_map(|&map| {
            // From the centre of the image to that of the widened one,
            let map = Affine::translate(half(left - right), half(top - bottom)) * map;
            // to the pixels of the doubled one, whose centre is half a pixel off,
            let map = Affine::scale(2.0, 2.0) * map * Affine::scale(0.5, 0.5);
            let map = Affine::translate(-0.5, -0.5) * map * Affine::translate(0.5, 0.5);
            // and to libtorch's coordinates, which go from −1 to 1.
            let map = Affine::scale(1.0 / wide_width as f64, 1.0 / wide_height as f64)
                * map
                * Affine::scale(read_width as f64, read_height as f64);
            map.0.into_iter().flatten().map(|value| value as f32)
        })
        .collect();
    let device = images.device();
    let theta = Tensor::f_from_slice(&theta)?.f_view([batch, 2, 3])?.f_to_device(device)?;
    let size = [batch, channels, 2 * read_height, 2 * read_width];
    let grid = Tensor::f_affine_grid_generator(&theta, size, false)?;
    let wide = images.f_reflection_pad2d([left, right, top, bottom])?;
    let along_x = wide.f_matmul(&doubling(wide_width, device)?.f_tr()?)?;
    let doubled = doubling(wide_height, device)?.f_matmul(&along_x)?;
    // Mode 0 is bilinear interpolation, padding 0 is zeros outside.
    let read = doubled.f_grid_sampler_2d(&grid, 0, 0, false)?;
    let inner = |size: i64| doubling(size + 2 * REACH, device)?.f_narrow(1, REACH, size);
    inner(height)?.f_tr()?.f_matmul(&read.f_matmul(&inner(width)?)?)
}

/// The matrix `[2·size, size]` that doubles a row or a column of pixels: zeros in between, then the filter. Its
/// transpose halves one.
///
/// The filter has 12 taps, and still these products are several times faster than strided convolutions of one
/// channel, which libtorch has no fast way for.
fn doubling(size: i64, device: Device) -> Result<Tensor, TchError> {
    let mut matrix = vec![0f32; (2 * size * size) as usize];
    for (i, row) in (0..).zip(matrix.chunks_exact_mut(size as usize)) {
        for (j, value) in (0..).zip(row) {
            let tap = usize::try_from(i - 2 * j + CENTRE).ok().and_then(|tap| SYM6.get(tap));
            *value = tap.map_or(0.0, |&tap| tap as f32);
        }
    }
    Tensor::f_from_slice(&matrix)?.f_view([2 * size, size])?.f_to_device(device)
}
