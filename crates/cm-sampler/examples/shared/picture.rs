//! Pictures to tensors and back, by the crate `image`.
#![allow(dead_code)] // each example uses a part of it

use std::error::Error;
use std::path::Path;

use cm_sampler::model::ImageShape;
use cm_sampler::tch::{Kind, Tensor};

/// Images `[N, C, H, W]` in rows of `columns`, as `[C, H', W']`.
pub fn sheet(images: &Tensor, columns: i64) -> Tensor {
    let rows: Vec<Tensor> =
        images.split(columns, 0).iter().map(|row| Tensor::cat(&row.unbind(0), 2)).collect();
    Tensor::cat(&rows, 1)
}

/// Writes `[C, H, W]` in [-1, 1] in the format of the file's name.
pub fn save(image: &Tensor, path: &Path) -> Result<(), Box<dyn Error>> {
    let rgb = image.expand([3, image.size()[1], image.size()[2]], false).permute([1, 2, 0]);
    let bytes = ((rgb + 1.0) * 127.5).clamp(0.0, 255.0).round().to_kind(Kind::Uint8).contiguous();
    let (height, width) = (bytes.size()[0] as u32, bytes.size()[1] as u32);
    let bytes = Vec::<u8>::try_from(bytes.view([-1]))?;
    Ok(image::RgbImage::from_raw(width, height, bytes).ok_or("an image without pixels")?.save(path)?)
}

/// Reads a file as `[1, C, H, W]` in [-1, 1], scaled to the size of a model's images.
pub fn read(path: &Path, shape: ImageShape) -> Result<Tensor, Box<dyn Error>> {
    let (width, height) = (shape.width as u32, shape.height as u32);
    let image = image::open(path)?.resize_exact(width, height, image::imageops::FilterType::Lanczos3);
    let bytes =
        if shape.channels == 1 { image.into_luma8().into_raw() } else { image.into_rgb8().into_raw() };
    let pixels = Tensor::from_slice(&bytes).view([1, shape.height, shape.width, shape.channels]);
    Ok(pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float) / 127.5 - 1.0)
}
