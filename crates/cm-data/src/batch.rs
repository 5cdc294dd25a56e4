//! The one place where pixels become tensors and tensors pixels.

use cm_model::ImageShape;
use tch::{Device, Kind, Tensor};

use crate::dataset::Shape;
use crate::error::{Error, Result};
use crate::loader::Batch;
use crate::pixels::to_uint8;

impl From<Shape> for ImageShape {
    fn from(shape: Shape) -> Self {
        ImageShape { channels: shape.channels as i64, height: shape.height as i64, width: shape.width as i64 }
    }
}

impl Batch {
    /// The images in [−1, 1] on `device`: x/127.5 − 1.
    ///
    /// # Shapes
    /// float32 `[B, C, H, W]`. The bytes travel, and are converted where they arrive.
    ///
    /// # Errors
    /// [`Error::Torch`], for instance if the device has no memory left.
    pub fn to_images(&self, device: Device) -> Result<Tensor> {
        to_tensor(&self.pixels, self.shape, device)
    }

    /// The labels on `device`, int64 `[B]`; `None` if the set is unlabelled.
    ///
    /// # Errors
    /// [`Error::Torch`].
    pub fn to_labels(&self, device: Device) -> Result<Option<Tensor>> {
        let Some(labels) = &self.labels else { return Ok(None) };
        let wide: Vec<i64> = labels.iter().map(|&l| l.into()).collect();
        let tensor = Tensor::f_from_slice(&wide).and_then(|t| t.f_to_device(device));
        tensor.map(Some).map_err(torch("copying labels"))
    }
}

/// NCHW bytes to float32 `[B, C, H, W]` in [−1, 1].
///
/// # Errors
/// [`Error::Argument`] if the bytes are not whole images; [`Error::Torch`].
pub fn to_tensor(pixels: &[u8], shape: Shape, device: Device) -> Result<Tensor> {
    let values = shape.values();
    if values == 0 || !pixels.len().is_multiple_of(values) {
        let expected = format!("whole images of {shape}");
        return Err(Error::Argument { what: "pixels", expected, got: format!("{} bytes", pixels.len()) });
    }
    let size = ImageShape::from(shape).batch((pixels.len() / values) as i64);
    let convert = || {
        let bytes = Tensor::f_from_slice(pixels)?.f_view(size)?.f_to_device(device)?;
        bytes.f_to_kind(Kind::Float)?.f_div_scalar_(127.5)?.f_sub_scalar_(1.0)
    };
    convert().map_err(torch("copying images"))
}

/// A batch of images in [−1, 1] to NCHW bytes: [`to_uint8`] of float32 values.
///
/// # Errors
/// [`Error::Torch`].
pub fn from_tensor(images: &Tensor) -> Result<Vec<u8>> {
    let convert = || {
        let flat = images.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_reshape([-1])?;
        let mut values = vec![0_f32; flat.numel()];
        flat.f_copy_data(&mut values, flat.numel())?;
        Ok(values)
    };
    convert().map(|values| to_uint8(&values)).map_err(torch("reading images"))
}

fn torch(what: &'static str) -> impl FnOnce(tch::TchError) -> Error {
    move |cause| Error::Torch { what, cause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pixels::from_uint8;

    #[test]
    fn the_tensor_holds_what_the_scalar_formula_gives() {
        let shape = Shape { channels: 1, height: 16, width: 16 };
        let bytes: Vec<u8> = (0..=255).collect();
        let tensor = to_tensor(&bytes, shape, Device::Cpu).unwrap();
        assert_eq!((tensor.size(), tensor.kind()), (vec![1, 1, 16, 16], Kind::Float));
        let values = Vec::<f32>::try_from(tensor.reshape([-1])).unwrap();
        assert_eq!(values, from_uint8(&bytes));
        assert_eq!((values[0], values[255]), (-1.0, 1.0));
        assert_eq!(from_tensor(&tensor).unwrap(), to_uint8(&values));
    }

    #[test]
    fn pixels_leave_as_torch_would_convert_them() {
        let x = Tensor::arange_start_step(-1.3, 1.3, 0.001, (Kind::Float, Device::Cpu));
        let reference = ((&x + 1.0) * 127.5).clamp(0.0, 255.0).to_kind(Kind::Uint8);
        assert_eq!(from_tensor(&x).unwrap(), Vec::<u8>::try_from(reference).unwrap());
        // A view that is not contiguous, in another kind.
        let grid = Tensor::from_slice(&[-1.0, 0.0, 1.0, 0.5]).reshape([2, 2]).transpose(0, 1);
        assert_eq!(from_tensor(&grid).unwrap(), [0, 255, 127, 191]);
    }

    #[test]
    fn labels_are_int64_and_absent_where_there_are_none() {
        let shape = Shape::square(1, 1);
        let mut batch = Batch {
            shape,
            pixels: vec![0, 255],
            labels: Some(vec![3, 7]),
            ids: vec![0, 1],
            indices: vec![0, 1],
        };
        let labels = batch.to_labels(Device::Cpu).unwrap().unwrap();
        assert_eq!((labels.kind(), Vec::<i64>::try_from(labels).unwrap()), (Kind::Int64, vec![3, 7]));
        assert_eq!(batch.to_images(Device::Cpu).unwrap().size(), [2, 1, 1, 1]);
        batch.labels = None;
        assert!(batch.to_labels(Device::Cpu).unwrap().is_none());
    }

    #[test]
    fn half_an_image_is_refused() {
        assert!(matches!(to_tensor(&[0; 5], Shape::square(1, 2), Device::Cpu), Err(Error::Argument { .. })));
        assert!(matches!(to_tensor(&[], Shape::square(0, 2), Device::Cpu), Err(Error::Argument { .. })));
    }
}
