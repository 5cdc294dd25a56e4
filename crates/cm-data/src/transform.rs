//! An encoded image of any kind to plain 8-bit pixels: decode, orient, flatten; and CHW to HWC and back.

use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, GrayImage, ImageDecoder, ImageReader, Limits, RgbImage};
use serde::{Deserialize, Serialize};

use crate::dataset::Shape;
use crate::error::{Error, Result};
use crate::limits::{MAX_ENCODED, MAX_PIXELS, MAX_SIDE, PIXELS_A_BYTE, read_file};

/// Colour of the images that a set yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    /// One channel. Colour becomes luma with the sRGB primaries' weights, 0.2126 R + 0.7152 G + 0.0722 B.
    Grey,
    /// Three channels. Grey is repeated.
    Rgb,
}

impl Channels {
    /// 1 or 3.
    pub const fn count(self) -> usize {
        match self {
            Channels::Grey => 1,
            Channels::Rgb => 3,
        }
    }
}

/// A decoded image without alpha.
#[derive(Debug, Clone, PartialEq)]
pub enum Plain {
    /// 8-bit grey.
    Grey(GrayImage),
    /// 8-bit RGB.
    Rgb(RgbImage),
}

impl Plain {
    /// Height and width in pixels.
    pub fn size(&self) -> (usize, usize) {
        let (width, height) = match self {
            Plain::Grey(image) => image.dimensions(),
            Plain::Rgb(image) => image.dimensions(),
        };
        (height as usize, width as usize)
    }

    /// The colour that it is stored in.
    pub fn channels(&self) -> Channels {
        match self {
            Plain::Grey(_) => Channels::Grey,
            Plain::Rgb(_) => Channels::Rgb,
        }
    }

    /// The same picture in the colour that is asked for.
    #[must_use]
    pub fn into_channels(self, channels: Channels) -> Plain {
        match (self, channels) {
            (Plain::Rgb(image), Channels::Grey) => Plain::Grey(DynamicImage::ImageRgb8(image).into_luma8()),
            (Plain::Grey(image), Channels::Rgb) => Plain::Rgb(DynamicImage::ImageLuma8(image).into_rgb8()),
            (same, _) => same,
        }
    }

    /// A plain image from CHW values; `None` unless 1 or 3 channels.
    pub(crate) fn from_chw(shape: Shape, chw: &[u8]) -> Option<Plain> {
        let (width, height) = (shape.width as u32, shape.height as u32);
        match shape.channels {
            1 => GrayImage::from_raw(width, height, chw.to_vec()).map(Plain::Grey),
            3 => {
                let mut hwc = vec![0; chw.len()];
                interleave(shape, chw, &mut hwc);
                RgbImage::from_raw(width, height, hwc).map(Plain::Rgb)
            }
            _ => None,
        }
    }

    /// The values as CHW.
    pub fn to_chw(&self) -> Vec<u8> {
        let (height, width) = self.size();
        let mut chw = vec![0; self.channels().count() * height * width];
        self.write_chw(&mut chw);
        chw
    }

    /// Writes the values as CHW; `out` holds C·H·W bytes.
    pub(crate) fn write_chw(&self, out: &mut [u8]) {
        match self {
            Plain::Grey(image) => out.copy_from_slice(image.as_raw()),
            Plain::Rgb(image) => {
                let plane = out.len() / 3;
                for (i, pixel) in image.as_raw().chunks_exact(3).enumerate() {
                    for (c, &value) in pixel.iter().enumerate() {
                        out[c * plane + i] = value;
                    }
                }
            }
        }
    }
}

/// CHW values to HWC.
pub(crate) fn interleave(shape: Shape, chw: &[u8], hwc: &mut [u8]) {
    let plane = shape.plane();
    for (i, pixel) in hwc.chunks_exact_mut(shape.channels).enumerate() {
        for (c, value) in pixel.iter_mut().enumerate() {
            *value = chw[c * plane + i];
        }
    }
}

/// HWC values to CHW.
pub(crate) fn deinterleave(shape: Shape, hwc: &[u8], chw: &mut [u8]) {
    let plane = shape.plane();
    for (i, pixel) in hwc.chunks_exact(shape.channels).enumerate() {
        for (c, &value) in pixel.iter().enumerate() {
            chw[c * plane + i] = value;
        }
    }
}

/// Reads one image file, as [`decode`] does.
///
/// # Errors
/// [`Error::Io`] with the file, [`Error::TooLarge`] if it is too long, and those of [`decode`].
pub fn read(path: &Path) -> Result<Plain> {
    decode(&read_file(path, "bytes of an image file", MAX_ENCODED)?, &path.display().to_string())
}

/// Decodes one image file: the form is told by its first bytes, EXIF orientation is applied, 16-bit values are
/// rounded to 8, and alpha is composited over white.
///
/// # Errors
/// [`Error::TooLarge`] before anything is allocated for an image beyond the crate's limits, [`Error::Corrupt`]
/// for what does not decode; both name `file`.
pub fn decode(bytes: &[u8], file: &str) -> Result<Plain> {
    let corrupt = |e: &dyn std::fmt::Display| Error::corrupt(file, e);
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| corrupt(&e))?;
    let jpeg = reader.format() == Some(image::ImageFormat::Jpeg);
    let webp = reader.format() == Some(image::ImageFormat::WebP);
    // Sides are checked below, with a message of our own; this bounds what decoders allocate inside.
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_PIXELS * 16);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| corrupt(&e))?;
    let (width, height) = decoder.dimensions();
    if width.max(height) > MAX_SIDE {
        let (claimed, limit) = (width.max(height).into(), MAX_SIDE.into());
        return Err(Error::TooLarge { file: file.into(), what: "pixels on a side", claimed, limit });
    }
    let pixels = u64::from(width) * u64::from(height);
    let held = if webp { u64::MAX } else { (bytes.len() as u64).saturating_mul(PIXELS_A_BYTE) };
    let limit = held.min(MAX_PIXELS);
    if pixels > limit {
        return Err(Error::TooLarge { file: file.into(), what: "pixels", claimed: pixels, limit });
    }
    if pixels == 0 {
        return Err(corrupt(&"an image without pixels"));
    }
    // A JPEG that was cut off decodes with grey in place of the missing rows; only its end marker tells.
    if jpeg && !jpeg_is_whole(bytes) {
        return Err(corrupt(&"no end marker; the JPEG is truncated"));
    }
    let orientation = decoder.orientation().map_err(|e| corrupt(&e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| corrupt(&e))?;
    image.apply_orientation(orientation);
    Ok(flatten(image))
}

/// Whether an end marker follows the start of the picture's own scan. Segments before it are skipped by their
/// length, since an EXIF segment may carry a thumbnail with an end marker of its own.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        match (marker, bytes.get(at + 2..at + 4)) {
            (0xda, _) => return bytes[at..].windows(2).rev().any(|w| w == [0xff, 0xd9]),
            (0xff, _) => at += 1, // a fill byte
            (_, Some(&[high, low])) => at += 2 + usize::from(u16::from_be_bytes([high, low])),
            (_, _) => return false,
        }
    }
    false
}

/// 8 bits a channel and no alpha: c·α + 255·(1 − α), rounded.
fn flatten(image: DynamicImage) -> Plain {
    let over_white = |c: u8, a: u8| {
        let (c, a) = (u32::from(c), u32::from(a));
        ((c * a + 255 * (255 - a) + 127) / 255) as u8
    };
    let color = image.color();
    match (color.has_color(), color.has_alpha()) {
        (false, false) => Plain::Grey(image.into_luma8()),
        (true, false) => Plain::Rgb(image.into_rgb8()),
        (false, true) => {
            let source = image.into_luma_alpha8();
            let mut out = GrayImage::new(source.width(), source.height());
            for (to, from) in out.pixels_mut().zip(source.pixels()) {
                to.0[0] = over_white(from.0[0], from.0[1]);
            }
            Plain::Grey(out)
        }
        (true, true) => {
            let source = image.into_rgba8();
            let mut out = RgbImage::new(source.width(), source.height());
            for (to, from) in out.pixels_mut().zip(source.pixels()) {
                to.0 = [0, 1, 2].map(|c| over_white(from.0[c], from.0[3]));
            }
            Plain::Rgb(out)
        }
    }
}

/// Mirrors every row of a CHW image in place.
pub(crate) fn flip_rows(chw: &mut [u8], width: usize) {
    chw.chunks_exact_mut(width).for_each(<[u8]>::reverse);
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ImageFormat, Luma, LumaA, Rgb, Rgba, imageops};

    fn encode(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn gradient(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| Rgb([(x * 7) as u8, (y * 11) as u8, (x * y) as u8]))
    }

    #[test]
    fn png_comes_back_value_for_value() {
        let image = gradient(9, 5);
        assert_eq!(decode(&encode(image.clone(), ImageFormat::Png), "a").unwrap(), Plain::Rgb(image));
    }

    #[test]
    fn alpha_is_composited_over_white() {
        let image = image::RgbaImage::from_pixel(1, 1, Rgba([10, 20, 30, 0]));
        let Plain::Rgb(clear) = decode(&encode(image, ImageFormat::Png), "a").unwrap() else {
            panic!("not RGB")
        };
        assert_eq!(clear.get_pixel(0, 0).0, [255, 255, 255]);
        // 100·51/255 + 255·204/255 = 20 + 204
        let image = image::GrayAlphaImage::from_pixel(1, 1, LumaA([100, 51]));
        let Plain::Grey(fifth) = decode(&encode(image, ImageFormat::Png), "a").unwrap() else {
            panic!("not grey")
        };
        assert_eq!(fifth.get_pixel(0, 0).0, [224]);
    }

    #[test]
    fn sixteen_bits_become_eight() {
        let image =
            image::ImageBuffer::<Luma<u16>, _>::from_fn(3, 1, |x, _| Luma([[0, 0x8080, 0xffff][x as usize]]));
        let Plain::Grey(grey) = decode(&encode(image, ImageFormat::Png), "a").unwrap() else {
            panic!("not grey")
        };
        assert_eq!(grey.as_raw(), &[0, 128, 255]);
    }

    #[test]
    fn exif_orientation_is_applied() {
        // Orientation 6: the camera was turned, the picture has to be rotated by 90° clockwise.
        let exif = [
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01".as_slice(),
            &[0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        let plain = encode(gradient(16, 8), ImageFormat::Jpeg);
        let mut turned = plain[..2].to_vec();
        turned.extend([0xff, 0xe1]);
        turned.extend(((exif.len() + 2) as u16).to_be_bytes());
        turned.extend(&exif);
        turned.extend(&plain[2..]);
        assert_eq!(decode(&plain, "a").unwrap().size(), (8, 16));
        let Plain::Rgb(got) = decode(&turned, "a").unwrap() else { panic!("not RGB") };
        let Plain::Rgb(flat) = decode(&plain, "a").unwrap() else { panic!("not RGB") };
        assert_eq!(got, imageops::rotate90(&flat));
    }

    #[test]
    fn a_cut_file_is_an_error_that_names_it() {
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::Bmp, ImageFormat::Gif] {
            let bytes = encode(gradient(64, 64), format);
            for keep in [bytes.len() * 3 / 4, bytes.len() / 4, 12, 0] {
                let error = decode(&bytes[..keep], "cut.img")
                    .map(|image| image.size())
                    .expect_err(&format!("{format:?} cut to {keep}"));
                assert!(error.to_string().starts_with("cut.img: cannot decode"), "{error}");
            }
        }
    }

    #[test]
    fn a_damaged_png_is_an_error() {
        let mut bytes = encode(gradient(64, 64), ImageFormat::Png);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        assert!(matches!(decode(&bytes, "a"), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn a_claimed_size_is_refused_before_it_is_allocated() {
        let mut bytes = encode(gradient(4, 4), ImageFormat::Png);
        // IHDR holds the width at byte 16; its CRC covers type and data.
        bytes[16..20].copy_from_slice(&0x7fff_ffff_u32.to_be_bytes());
        let crc = crc32(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        assert!(matches!(decode(&bytes, "a"), Err(Error::TooLarge { .. } | Error::Corrupt { .. })));
    }

    fn crc32(bytes: &[u8]) -> u32 {
        let mut crc = flate2::Crc::new();
        crc.update(bytes);
        crc.sum()
    }

    #[test]
    fn chw_and_back_is_the_identity() {
        let shape = Shape { channels: 3, height: 2, width: 5 };
        let chw: Vec<u8> = (0..30).collect();
        let mut back = vec![0; 30];
        let image = Plain::from_chw(shape, &chw).unwrap();
        image.write_chw(&mut back);
        assert_eq!(back, chw);
        assert_eq!(image.to_chw(), chw);
        let (mut hwc, mut again) = (vec![0; 30], vec![0; 30]);
        interleave(shape, &chw, &mut hwc);
        assert_eq!(&hwc[..3], &[0, 10, 20]);
        deinterleave(shape, &hwc, &mut again);
        assert_eq!(again, chw);
    }

    #[test]
    fn flipping_twice_is_the_identity_and_once_mirrors_rows() {
        let mut chw = vec![1, 2, 3, 4, 5, 6];
        flip_rows(&mut chw, 3);
        assert_eq!(chw, [3, 2, 1, 6, 5, 4]);
        flip_rows(&mut chw, 3);
        assert_eq!(chw, [1, 2, 3, 4, 5, 6]);
    }
}
