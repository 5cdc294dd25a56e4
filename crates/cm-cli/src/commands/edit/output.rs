//! What an edit leaves behind.

use std::path::{Path, PathBuf};

use anyhow::Result;
use cm_data::{grid, npz};
use image::codecs::gif::{GifEncoder, Repeat};
use image::{Delay, DynamicImage, Frame, imageops};

use super::edits::Edited;
use crate::args::edit::CommonArgs;
use crate::pictures;

/// Writes a PNG for each result, the sheet and, if it is asked for, an archive.
pub fn write(common: &CommonArgs, edited: &Edited, seeds: &[u64], labels: Option<&[i64]>) -> Result<()> {
    results(common, &common.out, edited, seeds, labels)?;
    let sheet = common.out.join("sheet.png");
    pictures::save_png(&edited.sheet.draw()?, &sheet)?;
    println!("images: {}", common.out.display());
    println!("sheet:  {}", sheet.display());
    Ok(())
}

/// Writes the frames, the strip of them and the animation, which goes there and back.
pub fn write_frames(common: &CommonArgs, edited: &Edited, fps: u32, labels: Option<&[i64]>) -> Result<()> {
    let frames = common.out.join("frames");
    let numbers: Vec<u64> = (0..edited.results.size()[0] as u64).collect();
    let labels = labels.and_then(|labels| labels.first()).map(|&class| vec![class; numbers.len()]);
    results(common, &frames, edited, &numbers, labels.as_deref())?;
    let strip = common.out.join("strip.png");
    pictures::save_png(&edited.sheet.draw()?, &strip)?;
    let gif = common.out.join("interpolation.gif");
    animate(edited, fps, &gif)?;
    println!("frames: {}", frames.display());
    println!("strip:  {}", strip.display());
    println!("gif:    {}", gif.display());
    Ok(())
}

fn results(
    common: &CommonArgs,
    folder: &Path,
    edited: &Edited,
    numbers: &[u64],
    labels: Option<&[i64]>,
) -> Result<()> {
    let shape = pictures::shape_of(&edited.results);
    let pixels = pictures::rounded(&edited.results)?;
    grid::save_samples(folder, &pixels, shape, numbers, false)?;
    if common.npz {
        let archive: PathBuf = common.out.join(npz::samples_name(numbers.len(), shape));
        npz::save(&archive, shape, &pixels, labels)?;
        println!("npz:    {}", archive.display());
    }
    Ok(())
}

/// A GIF of the results, enlarged as on the sheet.
fn animate(edited: &Edited, fps: u32, path: &Path) -> Result<()> {
    let shape = pictures::shape_of(&edited.results);
    let scale = pictures::scale_of(shape);
    let pixels = pictures::rounded(&edited.results)?;
    let mut frames = Vec::new();
    for chw in pixels.chunks_exact(shape.values()) {
        let style = cm_data::GridStyle { columns: 1, gap: 0, scale, background: [0; 3] };
        frames.push(DynamicImage::ImageRgb8(grid::grid(chw, shape, &style)?).into_rgba8());
    }
    // Both ends stand once.
    let back = (1..frames.len().saturating_sub(1)).rev();
    let order: Vec<usize> = (0..frames.len()).chain(back).collect();
    let delay = Delay::from_numer_denom_ms(1000, fps);
    let mut bytes = Vec::new();
    {
        let mut encoder = GifEncoder::new_with_speed(&mut bytes, 10);
        encoder.set_repeat(Repeat::Infinite)?;
        let frame = |i: usize| {
            let picture = imageops::crop_imm(&frames[i], 0, 0, frames[i].width(), frames[i].height());
            Frame::from_parts(picture.to_image(), 0, 0, delay)
        };
        encoder.encode_frames(order.into_iter().map(frame))?;
    }
    cm_model::files::write_atomic(path, |out| std::io::Write::write_all(out, &bytes))?;
    Ok(())
}
