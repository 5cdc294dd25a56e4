//! The feature parts of three classifiers. Names and layers are torchvision's.

use cm_model::{LpipsNet, ParamPath};
use tch::Tensor;

use super::Pooling;
use crate::Result;
use crate::layers::{Conv2d, LayerInit};

/// Weights that keep the size of activations through a ReLU. They are what a network without a file starts from.
const INIT: LayerInit = LayerInit::Normal { gain: std::f64::consts::SQRT_2 };
/// All pooling has this stride.
const POOL_STRIDE: i64 = 2;

/// A part of a network. A ReLU follows every convolution.
#[derive(Debug, Clone, Copy)]
enum Part {
    /// A convolution; the index is its place in torchvision's list.
    Conv { index: i64, channels: [i64; 2], kernel: i64, stride: i64, padding: i64 },
    /// SqueezeNet's: 1×1 to `squeeze` channels, from there 1×1 and 3×3 to `expand` channels each.
    Fire { index: i64, inputs: i64, squeeze: i64, expand: i64 },
    /// Pooling with stride 2; `ceil` keeps a window that hangs over the border.
    Pool { kernel: i64, ceil: bool },
    /// Features of so many channels are read here.
    Tap { channels: i64 },
}

fn plan(net: LpipsNet) -> Vec<Part> {
    match net {
        LpipsNet::Vgg16 => vgg16(),
        LpipsNet::Alex => alex(),
        LpipsNet::Squeeze => squeeze(),
    }
}

fn vgg16() -> Vec<Part> {
    const POOL: Part = Part::Pool { kernel: 2, ceil: false };
    let (mut parts, mut index, mut inputs) = (Vec::new(), 0, 3);
    for (channels, convolutions) in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)] {
        if index > 0 {
            parts.push(POOL);
            index += 1;
        }
        for _ in 0..convolutions {
            parts.push(Part::Conv { index, channels: [inputs, channels], kernel: 3, stride: 1, padding: 1 });
            // The ReLU has a place of its own.
            index += 2;
            inputs = channels;
        }
        parts.push(Part::Tap { channels });
    }
    parts
}

fn alex() -> Vec<Part> {
    const POOL: Part = Part::Pool { kernel: 3, ceil: false };
    let conv = |index, channels: [i64; 2], kernel, stride, padding| {
        [Part::Conv { index, channels, kernel, stride, padding }, Part::Tap { channels: channels[1] }]
    };
    [
        &conv(0, [3, 64], 11, 4, 2)[..],
        &[POOL],
        &conv(3, [64, 192], 5, 1, 2),
        &[POOL],
        &conv(6, [192, 384], 3, 1, 1),
        &conv(8, [384, 256], 3, 1, 1),
        &conv(10, [256, 256], 3, 1, 1),
    ]
    .concat()
}

fn squeeze() -> Vec<Part> {
    const POOL: Part = Part::Pool { kernel: 3, ceil: true };
    let fire = |index, inputs, squeeze, expand| Part::Fire { index, inputs, squeeze, expand };
    let tap = |channels| Part::Tap { channels };
    vec![
        Part::Conv { index: 0, channels: [3, 64], kernel: 3, stride: 2, padding: 0 },
        tap(64),
        POOL,
        fire(3, 64, 16, 64),
        fire(4, 128, 16, 64),
        tap(128),
        POOL,
        fire(6, 128, 32, 128),
        fire(7, 256, 32, 128),
        tap(256),
        POOL,
        fire(9, 256, 48, 192),
        tap(384),
        fire(10, 384, 48, 192),
        tap(384),
        fire(11, 384, 64, 256),
        tap(512),
        fire(12, 512, 64, 256),
        tap(512),
    ]
}

/// Channels of each layer that is read.
pub(super) fn tap_channels(net: LpipsNet) -> Vec<i64> {
    let channels = |part| match part {
        Part::Tap { channels } => Some(channels),
        _ => None,
    };
    plan(net).into_iter().filter_map(channels).collect()
}

/// The smallest side of an image that leaves at least one pixel in every layer.
pub(super) fn smallest_side(net: LpipsNet) -> i64 {
    let parts = plan(net);
    let fits = |side: &i64| parts.iter().try_fold(*side, |side, part| part.side_after(side)).is_some();
    // A side of this length halved for each part still has pixels.
    let most = 1 << parts.len();
    (1..most).find(fits).unwrap_or(most)
}

impl Part {
    /// The side of what comes out for a side that goes in, if anything does.
    fn side_after(self, side: i64) -> Option<i64> {
        let windows =
            |side: i64, kernel: i64, stride: i64| (side >= kernel).then(|| (side - kernel) / stride + 1);
        match self {
            Part::Conv { kernel, stride, padding, .. } => windows(side + 2 * padding, kernel, stride),
            Part::Pool { kernel, ceil: false } => windows(side, kernel, POOL_STRIDE),
            // One more window may hang over the border, if it begins inside the image.
            Part::Pool { kernel, ceil: true } => windows(side + POOL_STRIDE - 1, kernel, POOL_STRIDE),
            Part::Fire { .. } | Part::Tap { .. } => Some(side),
        }
    }
}

/// One part with its weights.
#[derive(Debug)]
enum Layer {
    Conv(Conv2d),
    Fire { squeeze: Conv2d, expand: [Conv2d; 2] },
    Pool { kernel: i64, ceil: bool },
    Tap,
}

/// A network that gives the features of its layers.
#[derive(Debug)]
pub(super) struct Features(Vec<Layer>);

impl Features {
    pub(super) fn new(net: LpipsNet, root: &ParamPath<'_>) -> Result<Self> {
        let path = root.sub("features");
        Ok(Self(plan(net).into_iter().map(|part| Layer::new(part, &path)).collect::<Result<_>>()?))
    }

    /// The features of each layer that is read, in order.
    pub(super) fn taps(&self, images: &Tensor, pooling: Pooling) -> Vec<Tensor> {
        let (mut x, mut taps) = (images.shallow_clone(), Vec::new());
        for layer in &self.0 {
            x = match layer {
                Layer::Conv(conv) => relu(conv, &x),
                Layer::Fire { squeeze, expand: [one, three] } => {
                    let x = relu(squeeze, &x);
                    Tensor::cat(&[relu(one, &x), relu(three, &x)], 1)
                }
                Layer::Pool { kernel, ceil } => pool(&x, *kernel, *ceil, pooling),
                Layer::Tap => {
                    taps.push(x.shallow_clone());
                    continue;
                }
            };
        }
        taps
    }
}

impl Layer {
    fn new(part: Part, path: &ParamPath<'_>) -> Result<Self> {
        Ok(match part {
            Part::Conv { index, channels: [inputs, outputs], kernel, stride, padding } => {
                let conv = Conv2d::new(&path.sub(index), inputs, outputs, kernel, INIT)?;
                Layer::Conv(conv.strided(stride).padded(padding))
            }
            Part::Fire { index, inputs, squeeze, expand } => {
                let path = path.sub(index);
                let conv = |name, inputs, outputs, kernel| {
                    Conv2d::new(&path.sub(name), inputs, outputs, kernel, INIT)
                };
                Layer::Fire {
                    squeeze: conv("squeeze", inputs, squeeze, 1)?,
                    expand: [conv("expand1x1", squeeze, expand, 1)?, conv("expand3x3", squeeze, expand, 3)?],
                }
            }
            Part::Pool { kernel, ceil } => Layer::Pool { kernel, ceil },
            Part::Tap { .. } => Layer::Tap,
        })
    }
}

/// In place: nothing else reads the convolution's result, and features at 224×224 are large.
fn relu(conv: &Conv2d, x: &Tensor) -> Tensor {
    conv.forward(x).relu_()
}

fn pool(x: &Tensor, kernel: i64, ceil: bool, pooling: Pooling) -> Tensor {
    match pooling {
        Pooling::Max => x.max_pool2d(kernel, POOL_STRIDE, 0, 1, ceil),
        Pooling::Average => x.avg_pool2d(kernel, POOL_STRIDE, 0, ceil, true, None),
    }
}

#[cfg(test)]
mod tests {
    use cm_model::ParamsBuilder;
    use tch::{Device, Kind};

    use super::*;

    fn build(net: LpipsNet) -> (Features, cm_model::Params) {
        let builder = ParamsBuilder::new(0, Device::Cpu);
        let features = Features::new(net, &builder.root()).unwrap();
        (features, builder.finish())
    }

    fn images(height: i64, width: i64) -> Tensor {
        Tensor::ones([1, 3, height, width], (Kind::Float, Device::Cpu))
    }

    /// torchvision's counts without the classifiers' 123,642,856, 58,631,144 and 513,000.
    #[test]
    fn networks_have_the_published_number_of_parameters() {
        for (net, all, classifier) in [
            (LpipsNet::Vgg16, 138_357_544, 123_642_856),
            (LpipsNet::Alex, 61_100_840, 58_631_144),
            (LpipsNet::Squeeze, 1_235_496, 513_000),
        ] {
            assert_eq!(build(net).1.num_parameters(), all - classifier, "{net}");
        }
    }

    #[test]
    fn features_have_the_channels_that_are_said() {
        for net in LpipsNet::ALL {
            let (features, _params) = build(net);
            for pooling in [Pooling::Max, Pooling::Average] {
                let taps = features.taps(&images(40, 48), pooling);
                let channels: Vec<i64> = taps.iter().map(|tap| tap.size()[1]).collect();
                assert_eq!(channels, tap_channels(net), "{net}");
                assert!(taps.iter().all(|tap| tap.min().double_value(&[]) >= 0.0), "they come from a ReLU");
            }
        }
    }

    /// The smallest side is libtorch's own: one pixel less, and an operation refuses.
    #[test]
    fn the_smallest_side_is_where_libtorch_begins_to_compute() {
        for net in LpipsNet::ALL {
            let (features, _params) = build(net);
            let side = smallest_side(net);
            features.taps(&images(side, side), Pooling::Max);
            let too_small = [(side - 1, side), (side, side - 1)].map(|(height, width)| {
                let images = images(height, width);
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    let taps = features.taps(&images, Pooling::Max);
                    assert!(taps.iter().all(|tap| tap.numel() > 0), "{net}: a layer without pixels");
                }))
                .is_err()
            });
            assert_eq!(too_small, [true, true], "{net}: {side}");
        }
    }
}
