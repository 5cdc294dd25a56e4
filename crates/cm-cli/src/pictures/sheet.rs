//! Contact sheets: pictures below their captions, what went in to the left of what came out.

use anyhow::Result;
use cm_data::{GridStyle, Shape, batch};
use image::{Rgb, RgbImage, imageops};
use tch::Tensor;

use super::{chart, shape_of};

/// Height of the line of a caption.
const CAPTION: u32 = 20;
/// Width of a character of a caption.
const CHARACTER: usize = 8;
const GAP: u32 = 8;
/// Between what went in and what came out.
const DIVIDE: u32 = 16;
/// Results in a row.
const COLUMNS: usize = 6;
/// A side that a person sees well.
const VISIBLE: usize = 128;

/// A picture with a caption.
pub struct Cell {
    caption: String,
    /// `[1, C, H, W]`.
    image: Tensor,
}

impl Cell {
    /// A picture `[1, C, H, W]` or `[C, H, W]` in [−1, 1].
    pub fn new(caption: impl Into<String>, image: &Tensor) -> Self {
        let image = if image.dim() == 3 { image.unsqueeze(0) } else { image.shallow_clone() };
        Self { caption: caption.into(), image }
    }
}

/// Pictures to be shown together.
pub struct Sheet {
    /// What went in, in the first row.
    pub left: Vec<Cell>,
    /// What came out, row by row.
    pub cells: Vec<Cell>,
}

impl Sheet {
    /// Draws the sheet. Pictures are enlarged by whole factors; smaller ones are enlarged to the size of the others.
    pub fn draw(&self) -> Result<RgbImage> {
        let all = || self.left.iter().chain(&self.cells);
        let sides =
            |side: fn(Shape) -> usize| all().map(|cell| side(shape_of(&cell.image))).max().unwrap_or(1);
        let largest = Shape { channels: 1, height: sides(|s| s.height), width: sides(|s| s.width) };
        let scale = scale_of(largest);
        let (width, height) = (largest.width as u32 * scale, largest.height as u32 * scale);
        let columns = self.cells.len().clamp(1, COLUMNS);
        let rows = self.cells.len().div_ceil(columns).max(1) as u32;
        let divide = if self.left.is_empty() { 0 } else { DIVIDE };
        let total = (self.left.len() + columns) as u32 * (width + GAP) + GAP + divide;
        let white = Rgb([255, 255, 255]);
        let mut out = RgbImage::from_pixel(total, rows * (height + CAPTION + GAP) + GAP, white);
        let x_of = |column: usize| GAP + column as u32 * (width + GAP);
        let y_of = |row: usize| GAP + row as u32 * (height + CAPTION + GAP);
        let left = self.left.iter().enumerate().map(|(i, cell)| (cell, x_of(i), y_of(0)));
        let first = self.left.len();
        let right = self
            .cells
            .iter()
            .enumerate()
            .map(|(i, cell)| (cell, x_of(first + i % columns) + divide, y_of(i / columns)));
        for (cell, x, y) in left.chain(right) {
            let caption: String = cell.caption.chars().take(width as usize / CHARACTER).collect();
            out = chart::with_text(out, &caption, (x as i32, (y + CAPTION - 7) as i32));
            let picture = enlarged(&cell.image, width, height)?;
            // Smaller than its cell, it stands in the middle.
            let (dx, dy) = ((width - picture.width()) / 2, (height - picture.height()) / 2);
            imageops::replace(&mut out, &picture, i64::from(x + dx), i64::from(y + CAPTION + dy));
        }
        Ok(out)
    }
}

/// The whole factor that makes images of `shape` easy to see.
pub fn scale_of(shape: Shape) -> u32 {
    VISIBLE.div_ceil(shape.height.max(shape.width).max(1)) as u32
}

/// Images `[N, C, H, W]` as bytes, each rounded to the nearest: what was read from a file and kept is the same in the
/// file that is written.
pub fn rounded(images: &Tensor) -> Result<Vec<u8>> {
    // The conversion of published samples cuts off; half a step makes rounding of it.
    Ok(batch::from_tensor(&(images + 1.0 / 255.0))?)
}

/// The picture, as large as whole factors let it be in its cell.
fn enlarged(image: &Tensor, width: u32, height: u32) -> Result<RgbImage> {
    let shape = shape_of(image);
    let scale = (width / shape.width.max(1) as u32).min(height / shape.height.max(1) as u32).max(1);
    let style = GridStyle { columns: 1, gap: 0, scale, background: [255; 3] };
    Ok(cm_data::grid::grid(&rounded(image)?, shape, &style)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn picture(value: f64, side: i64) -> Tensor {
        Tensor::full([1, 3, side, side], value, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn what_went_in_stands_left_of_what_came_out_and_small_pictures_grow() {
        let left = vec![Cell::new("input", &picture(-1.0, 8)), Cell::new("measurement", &picture(0.0, 4))];
        let cells = (0..7).map(|i| Cell::new(format!("seed {i}"), &picture(0.5, 8))).collect();
        let sheet = Sheet { left, cells }.draw().unwrap();
        assert_eq!(sheet.width(), 8 * (128 + GAP) + GAP + DIVIDE);
        assert_eq!(sheet.height(), 2 * (128 + CAPTION + GAP) + GAP);
        let at = |column: u32, row: u32, divide: u32| {
            let y = GAP + row * (128 + CAPTION + GAP) + CAPTION;
            let x = GAP + column * (128 + GAP) + divide;
            [(1, 1), (126, 126)].map(|(dx, dy)| sheet.get_pixel(x + dx, y + dy).0[0])
        };
        assert_eq!(at(0, 0, 0), [0, 0]);
        assert_eq!(at(1, 0, 0), [128, 128], "4x4 pixels fill the cell of 8x8");
        assert_eq!(at(2, 0, DIVIDE), [191, 191]);
        assert_eq!(at(7, 0, DIVIDE), [191, 191]);
        assert_eq!(at(2, 1, DIVIDE), [191, 191], "the seventh in the second row");
        assert_eq!(at(3, 1, DIVIDE), [255, 255]);
        let ink = sheet.enumerate_pixels().filter(|(_, y, p)| *y < GAP + CAPTION && p.0[0] < 128).count();
        assert!(ink > 100, "captions: {ink}");
    }

    #[test]
    fn bytes_that_were_kept_come_back() {
        let all: Vec<u8> = (0..=255).collect();
        let tensor = batch::to_tensor(&all, Shape::square(1, 16), Device::Cpu).unwrap();
        assert_eq!(rounded(&tensor).unwrap(), all);
        assert_eq!(rounded(&(tensor * 1.1)).unwrap()[255], 255);
    }
}
