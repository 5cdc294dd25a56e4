//! Pictures of every form: those of sets, and masks and inputs of edits, which are read by the same code.

use std::io::Cursor;

use cm_data::transform::{decode, read};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use proptest::prelude::*;

use crate::data::folder;
use crate::mutate::{assert_memory_bounded, assert_one_line, config, damaged};

const FORMS: [ImageFormat; 5] =
    [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Bmp, ImageFormat::Gif];

fn picture(form: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    let image = RgbImage::from_fn(6, 6, |x, y| Rgb([x as u8 * 40, y as u8 * 40, 9]));
    DynamicImage::from(image).write_to(&mut bytes, form).unwrap();
    bytes.into_inner()
}

/// A picture of 6×6.
pub fn png() -> Vec<u8> {
    picture(ImageFormat::Png)
}

/// Right checksums for the chunks of a PNG, so that what is in them is read.
fn mended(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 8;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= bytes.len()) else { break };
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[at + 4..end]);
        bytes[end..end + 4].copy_from_slice(&crc.sum().to_be_bytes());
        at = end + 4;
    }
    bytes
}

/// Whether it decodes, with what it holds in memory held against what it says.
fn check(bytes: &[u8]) -> bool {
    let plain = decode(bytes, "a picture");
    assert_memory_bounded();
    match plain {
        Ok(plain) => {
            let (height, width) = plain.size();
            assert!(height > 0 && width > 0);
            true
        }
        Err(error) => {
            assert_one_line(&error.to_string());
            false
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn pictures(bytes in damaged(FORMS.map(picture).to_vec())) {
        let whole = FORMS.iter().any(|form| bytes == picture(*form));
        prop_assert!(check(&bytes) || !whole);
    }

    #[test]
    fn pngs_with_right_checksums(bytes in damaged(vec![png()])) {
        check(&mended(bytes));
    }

    #[test]
    fn files_of_masks(bytes in damaged(vec![png()])) {
        let dir = folder(&[("mask.png", &bytes)]);
        let fault = read(&dir.path().join("mask.png")).err();
        fault.iter().for_each(|error| assert_one_line(&error.to_string()));
        prop_assert!(bytes != png() || fault.is_none());
    }
}

/// A head of 33 bytes that claims 128 million pixels: deflate makes at most 1032 bytes of one.
#[test]
fn a_picture_that_is_larger_than_its_file_can_say_is_refused() {
    let mut bytes = png();
    bytes[16..20].copy_from_slice(&16_384_u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&8192_u32.to_be_bytes());
    let error = decode(&mended(bytes), "a picture").unwrap_err().to_string();
    assert!(error.contains("a picture: claims 134217728 pixels"), "{error}");
}
