//! Scaling and cropping to one size.

use image::{GrayImage, RgbImage, imageops};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::transform::Plain;

/// What is done with an image whose size is not the set's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// Nothing: another size is an error that names the file.
    #[default]
    Exact,
    /// Cut out the largest middle part of the wanted aspect ratio, then scale it: the short side is kept whole.
    /// EDM's data preparation crops first as well; OpenAI's scales first, which differs at the kernel's edges alone
    /// but lets a 1×16384 image grow to gigabytes. Of an odd rest the cut leaves the smaller half above and left.
    CenterCrop,
    /// Scale both sides on their own; the aspect ratio changes.
    Stretch,
}

/// The resampling kernel. Each is widened when it shrinks an image, so that none aliases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// The mean over the area that a new pixel covers, fractions of pixels included.
    Area,
    /// Catmull–Rom's cubic (a = −½), the bicubic of Pillow.
    Bicubic,
    /// Lanczos with three lobes; EDM's choice.
    #[default]
    Lanczos,
}

/// Brings an image to `height` × `width`.
///
/// # Errors
/// [`Error::Resolution`] that names `file` if the size differs under [`Fit::Exact`].
pub fn fit(image: Plain, height: usize, width: usize, fit: Fit, filter: Filter, file: &str) -> Result<Plain> {
    let (have_height, have_width) = image.size();
    if (have_height, have_width) == (height, width) {
        return Ok(image);
    }
    match fit {
        Fit::Exact => Err(Error::Resolution {
            file: file.into(),
            expected_width: width,
            expected_height: height,
            width: have_width,
            height: have_height,
        }),
        Fit::Stretch => Ok(resize(&image, height, width, filter)),
        Fit::CenterCrop => {
            // have_width : have_height against width : height, without division.
            let (crop_height, crop_width) = if have_width * height >= have_height * width {
                (have_height, ((have_height * width) as f64 / height as f64).round().max(1.0) as usize)
            } else {
                (((have_width * height) as f64 / width as f64).round().max(1.0) as usize, have_width)
            };
            Ok(resize(&crop_center(image, crop_height, crop_width), height, width, filter))
        }
    }
}

fn crop_center(image: Plain, height: usize, width: usize) -> Plain {
    let (have_height, have_width) = image.size();
    let (x, y) = (((have_width - width) / 2) as u32, ((have_height - height) / 2) as u32);
    match image {
        Plain::Grey(i) => Plain::Grey(imageops::crop_imm(&i, x, y, width as u32, height as u32).to_image()),
        Plain::Rgb(i) => Plain::Rgb(imageops::crop_imm(&i, x, y, width as u32, height as u32).to_image()),
    }
}

/// Scales to `height` × `width`.
fn resize(image: &Plain, height: usize, width: usize, filter: Filter) -> Plain {
    let kernel = match filter {
        Filter::Area => return resize_area(image, height, width),
        Filter::Bicubic => imageops::FilterType::CatmullRom,
        Filter::Lanczos => imageops::FilterType::Lanczos3,
    };
    let (w, h) = (width as u32, height as u32);
    match image {
        Plain::Grey(i) => Plain::Grey(imageops::resize(i, w, h, kernel)),
        Plain::Rgb(i) => Plain::Rgb(imageops::resize(i, w, h, kernel)),
    }
}

/// The area mean, first along rows and then along columns. The image crate's `thumbnail` leaves fractions of
/// pixels out, which shifts the picture at factors like 1.5.
fn resize_area(image: &Plain, height: usize, width: usize) -> Plain {
    let (have_height, have_width) = image.size();
    let channels = image.channels().count();
    let raw = match image {
        Plain::Grey(i) => i.as_raw(),
        Plain::Rgb(i) => i.as_raw(),
    };
    let columns = coverage(have_width, width);
    let mut rows = vec![0_f32; have_height * width * channels];
    for (from, to) in raw.chunks_exact(have_width * channels).zip(rows.chunks_exact_mut(width * channels)) {
        for (pixel, spans) in to.chunks_exact_mut(channels).zip(&columns) {
            for &(x, weight) in spans {
                for (c, value) in pixel.iter_mut().enumerate() {
                    *value += weight * f32::from(from[x * channels + c]);
                }
            }
        }
    }
    let stride = width * channels;
    let mut out = vec![0_u8; height * stride];
    let mut sum = vec![0_f32; stride];
    for (to, spans) in out.chunks_exact_mut(stride).zip(coverage(have_height, height)) {
        sum.fill(0.0);
        for (y, weight) in spans {
            for (s, &v) in sum.iter_mut().zip(&rows[y * stride..(y + 1) * stride]) {
                *s += weight * v;
            }
        }
        for (value, &s) in to.iter_mut().zip(&sum) {
            *value = s.round() as u8;
        }
    }
    let (w, h) = (width as u32, height as u32);
    match image {
        Plain::Grey(_) => Plain::Grey(GrayImage::from_raw(w, h, out).expect("h·w values were made")),
        Plain::Rgb(_) => Plain::Rgb(RgbImage::from_raw(w, h, out).expect("h·w·3 values were made")),
    }
}

/// For each of `to` new pixels along one axis: the old pixels that it covers and their shares, which sum to 1.
fn coverage(from: usize, to: usize) -> Vec<Vec<(usize, f32)>> {
    let ratio = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            let (start, end) = (i as f64 * ratio, ((i + 1) as f64 * ratio).min(from as f64));
            let last = (end.ceil() as usize).clamp(start as usize + 1, from);
            (start as usize..last)
                .map(|j| (j, ((end.min((j + 1) as f64) - start.max(j as f64)) / ratio) as f32))
                .filter(|&(_, weight)| weight > 0.0)
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Luma, Rgb};

    #[test]
    fn area_by_a_whole_factor_is_the_rounded_mean() {
        let image = GrayImage::from_raw(4, 2, vec![0, 10, 100, 101, 20, 30, 103, 104]).unwrap();
        let small = fit(Plain::Grey(image), 1, 2, Fit::Stretch, Filter::Area, "a").unwrap();
        let Plain::Grey(small) = small else { panic!("not grey") };
        assert_eq!(small.as_raw(), &[15, 102]);
    }

    #[test]
    fn area_counts_fractions_of_pixels() {
        // 3 → 2: the first new pixel covers the first and half of the second: (0 + 90/2) / 1.5 = 30.
        let image = GrayImage::from_raw(3, 1, vec![0, 90, 240]).unwrap();
        let small = fit(Plain::Grey(image), 1, 2, Fit::Stretch, Filter::Area, "a").unwrap();
        let Plain::Grey(small) = small else { panic!("not grey") };
        assert_eq!(small.as_raw(), &[30, 190]);
    }

    #[test]
    fn every_filter_keeps_a_flat_image_flat_and_shrinks_without_aliasing() {
        for filter in [Filter::Area, Filter::Bicubic, Filter::Lanczos] {
            let flat = RgbImage::from_pixel(31, 17, Rgb([40, 90, 200]));
            for (h, w) in [(8, 8), (40, 40), (17, 5)] {
                let Plain::Rgb(out) = fit(Plain::Rgb(flat.clone()), h, w, Fit::Stretch, filter, "a").unwrap()
                else {
                    panic!("not RGB")
                };
                assert!(out.pixels().all(|p| p.0 == [40, 90, 200]), "{filter:?} to {h}x{w}");
            }
            // A one-pixel checkerboard shrunk by 8 is its mean; plain subsampling would give 0 or 255.
            let board = GrayImage::from_fn(64, 64, |x, y| Luma([((x + y) % 2 * 255) as u8]));
            let Plain::Grey(out) = fit(Plain::Grey(board), 8, 8, Fit::Stretch, filter, "a").unwrap() else {
                panic!("not grey")
            };
            // The border is left out: there a kernel with negative lobes is cut off.
            let inner = imageops::crop_imm(&out, 1, 1, 6, 6).to_image();
            assert!(inner.as_raw().iter().all(|&v| v.abs_diff(128) <= 2), "{filter:?}: {:?}", inner.as_raw());
        }
    }

    #[test]
    fn center_crop_keeps_the_short_side_and_the_middle() {
        // Twice as wide as high: columns 2..6 of 8 remain, and are then halved.
        let image = GrayImage::from_fn(8, 4, |x, _| Luma([if (2..6).contains(&x) { 200 } else { 0 }]));
        let Plain::Grey(out) = fit(Plain::Grey(image), 2, 2, Fit::CenterCrop, Filter::Area, "a").unwrap()
        else {
            panic!("not grey")
        };
        assert_eq!(out.as_raw(), &[200; 4]);
        let thin = GrayImage::new(1, 5000);
        assert_eq!(
            fit(Plain::Grey(thin), 64, 64, Fit::CenterCrop, Filter::Lanczos, "a").unwrap().size(),
            (64, 64)
        );
    }

    #[test]
    fn exact_refuses_another_size_and_names_both() {
        let error =
            fit(Plain::Grey(GrayImage::new(5, 4)), 32, 32, Fit::Exact, Filter::Area, "b.png").unwrap_err();
        assert!(error.to_string().starts_with("b.png: expected 32x32 pixels, got 5x4"), "{error}");
    }
}
