//! The two small sets that travel inside the binary, so that a first run needs no download and no path.
//!
//! Sources and licences: `assets/ATTRIBUTION.md` of this crate; both are CC BY 4.0.

use image::GenericImageView;

use crate::dataset::{MemorySet, Shape};
use crate::error::{Error, Result};
use crate::formats::idx;
use crate::limits::gunzip;
use crate::transform::{Plain, decode};

const DIGITS: &[u8] = include_bytes!("../../assets/digits-images-idx3-ubyte.gz");
const DIGIT_LABELS: &[u8] = include_bytes!("../../assets/digits-labels-idx1-ubyte.gz");
const EMOJI: &[u8] = include_bytes!("../../assets/emoji32.png");
/// The sheet has 48 columns; its last 14 of 1,920 cells are blank.
const EMOJI_COLUMNS: u32 = 48;
const EMOJI_COUNT: u32 = 1906;
const EMOJI_SIDE: u32 = 32;

/// 1,797 hand-written digits, 8×8 grey, labels 0..9 (E. Alpaydin and C. Kaynak, UCI, CC BY 4.0).
///
/// # Errors
/// None but a fault in the bundled bytes.
pub fn digits() -> Result<MemorySet> {
    let stream = |bytes: &'static [u8], name: &str| gunzip(bytes, bytes.len() as u64, name.into());
    let (shape, pixels) = idx::read_images(&mut stream(DIGITS, "bundled digits"))?;
    let count = pixels.len() / shape.values();
    let mut labels = idx::read_labels(&mut stream(DIGIT_LABELS, "bundled digit labels"), count, Some(10))?;
    labels.names = Some((0..10).map(|d| d.to_string()).collect());
    MemorySet::new("bundled digits", shape, pixels, Some(labels))
}

/// 1,906 colour emoji, 32×32 RGB over white, without labels (Twemoji, © Twitter, Inc. and other contributors, CC BY 4.0).
///
/// # Errors
/// None but a fault in the bundled bytes.
pub fn emoji() -> Result<MemorySet> {
    let sheet = match decode(EMOJI, "bundled emoji")?.into_channels(crate::Channels::Rgb) {
        Plain::Rgb(sheet) => sheet,
        Plain::Grey(_) => return Err(Error::corrupt("bundled emoji", "the sheet is not in colour")),
    };
    let shape = Shape::square(3, EMOJI_SIDE as usize);
    let rows = EMOJI_COUNT.div_ceil(EMOJI_COLUMNS);
    if sheet.width() != EMOJI_COLUMNS * EMOJI_SIDE || sheet.height() < rows * EMOJI_SIDE {
        return Err(Error::corrupt(
            "bundled emoji",
            format!("the sheet is {}x{}", sheet.width(), sheet.height()),
        ));
    }
    let mut pixels = vec![0; EMOJI_COUNT as usize * shape.values()];
    for (cell, chw) in (0..EMOJI_COUNT).zip(pixels.chunks_exact_mut(shape.values())) {
        let (x, y) = (cell % EMOJI_COLUMNS * EMOJI_SIDE, cell / EMOJI_COLUMNS * EMOJI_SIDE);
        Plain::Rgb(sheet.view(x, y, EMOJI_SIDE, EMOJI_SIDE).to_image()).write_chw(chw);
    }
    MemorySet::new("bundled emoji", shape, pixels, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Dataset;

    #[test]
    fn digits_are_what_their_source_says() {
        let set = digits().unwrap();
        assert_eq!((set.len(), set.shape(), set.num_classes()), (1797, Shape::square(1, 8), 10));
        let mut counts = [0; 10];
        set.labels().unwrap().iter().for_each(|&l| counts[l as usize] += 1);
        // The class sizes published with the test part of the UCI set.
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert_eq!(set.labels().unwrap()[..3], [0, 1, 2]);
        // Values 0..16 spread over 0..255: both ends occur.
        assert!(set.image(0).contains(&0) && (0..1797).any(|i| set.image(i).contains(&255)));
    }

    #[test]
    fn emoji_are_cut_at_their_cells() {
        let set = emoji().unwrap();
        assert_eq!((set.len(), set.shape(), set.num_classes()), (1906, Shape::square(3, 32), 0));
        // Every cell shows something, and lies over white: its corners are rarely covered.
        let blank = (0..1906).filter(|&i| set.image(i).iter().all(|&v| v == 255)).count();
        assert_eq!(blank, 0);
        let white = (0..1906).filter(|&i| (0..3).all(|c| set.image(i)[c * 1024] == 255)).count();
        assert!(white > 1500, "{white} of 1906 top left corners are white");
    }
}
