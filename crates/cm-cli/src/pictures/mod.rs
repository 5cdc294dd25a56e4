//! Pictures that people look at: grids of samples, strips of grids as training went, charts.

mod chart;
mod sheet;

use std::path::Path;

use anyhow::{Context, Result};
use cm_data::{GridStyle, Shape, batch};
use image::{Rgb, RgbImage, imageops};
use tch::Tensor;

pub use chart::{Chart, Series};
pub use sheet::{Cell, Sheet, rounded, scale_of};

const BACKGROUND: [u8; 3] = [32, 32, 32];

/// Images `[N, C, H, W]` in [-1, 1] as a grid of cells that stand apart, enlarged so that a person sees them.
pub fn grid(images: &Tensor, columns: usize) -> Result<RgbImage> {
    let shape = shape_of(images);
    let style = GridStyle { background: BACKGROUND, ..GridStyle::with_columns(shape, columns) };
    Ok(cm_data::grid::grid(&batch::from_tensor(images)?, shape, &style)?)
}

/// The shape of one image of a batch.
pub fn shape_of(images: &Tensor) -> Shape {
    let size = images.size();
    let side = |axis: usize| size.get(axis).copied().unwrap_or(0) as usize;
    Shape { channels: side(1), height: side(2), width: side(3) }
}

/// Small grids (4×4, cells of at least 40 pixels) side by side, the oldest first.
pub fn strip(snapshots: &[(u64, Tensor)]) -> Result<RgbImage> {
    let grids: Vec<RgbImage> =
        snapshots.iter().map(|(_, images)| small_grid(images)).collect::<Result<_>>()?;
    let gap = 12;
    let width = grids.iter().map(|g| g.width() + gap).sum::<u32>().saturating_sub(gap).max(1);
    let height = grids.iter().map(RgbImage::height).max().unwrap_or(1);
    let mut out = RgbImage::from_pixel(width, height, Rgb([255, 255, 255]));
    let mut x = 0;
    for grid in &grids {
        imageops::replace(&mut out, grid, x, 0);
        x += i64::from(grid.width() + gap);
    }
    Ok(out)
}

/// Small grids side by side, each below its name.
pub fn side_by_side(columns: &[(String, Tensor)]) -> Result<RgbImage> {
    const HEAD: u32 = 24;
    let images: Vec<(u64, Tensor)> = columns.iter().map(|(_, images)| (0, images.shallow_clone())).collect();
    let grids = strip(&images)?;
    let mut out = RgbImage::from_pixel(grids.width(), grids.height() + HEAD, Rgb([255, 255, 255]));
    imageops::replace(&mut out, &grids, 0, i64::from(HEAD));
    let width = grids.width() as usize / columns.len().max(1);
    for (i, (name, _)) in columns.iter().enumerate() {
        out = chart::with_text(out, name, ((i * width + 4) as i32, 16));
    }
    Ok(out)
}

fn small_grid(images: &Tensor) -> Result<RgbImage> {
    let images = images.narrow(0, 0, images.size()[0].min(16));
    let shape = shape_of(&images);
    let scale = 40usize.div_ceil(shape.height.max(1)) as u32;
    let style = GridStyle { columns: 4, gap: 2, scale, background: BACKGROUND };
    Ok(cm_data::grid::grid(&batch::from_tensor(&images)?, shape, &style)?)
}

/// Writes a picture, whole or not at all, and makes its folder.
pub fn save_png(image: &RgbImage, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{}: creating the folder", folder.display()))?;
    }
    Ok(cm_data::grid::save_png(path, image)?)
}
