//! InceptionV3 in the form that FID is measured with: the port of TensorFlow's network of 2015 that the Python package
//! `pytorch-fid` uses.
//!
//! It differs from torchvision's network of the same name: average pools leave the padding out of the mean, the last
//! block pools by the maximum, and there are 1008 classes. Images of any size are resized to 299×299 bilinearly (corners
//! not aligned, no antialiasing), and lie in [-1, 1]. Weights come from a file that [`convert`] makes of the published
//! one. Nothing here is ever trained.
//!
//! # Source
//! Szegedy et al. 2015 (arXiv 1512.00567); as a measure Heusel et al. 2017 (arXiv 1706.08500).

mod blocks;
mod file;

use blocks::{BasicConv, Block, Kernel, shrink};
use cm_model::torch::autocast::Autocast;
use cm_model::{Cast, Params, ParamsBuilder, TensorMap};
use tch::{Device, Kind, Tensor};

pub use file::{FILE_NAME, KIND, convert};

use crate::layers::{LayerInit, Linear};
use crate::{Probe, Result};

/// Numbers in an image's features behind the last pooling.
pub const POOLED: i64 = 2048;
/// Numbers in an image's features that keep their place: 7 channels at 17×17.
pub const SPATIAL: i64 = SPATIAL_CHANNELS * 17 * 17;
/// Classes; the last eight mean nothing.
pub const CLASSES: i64 = 1008;

/// The side that images are resized to.
const SIDE: i64 = 299;
/// As many channels of the 1×1 branch of Mixed_6d are the spatial features.
const SPATIAL_CHANNELS: i64 = 7;

/// What the network sees in a batch of images.
#[derive(Debug)]
pub struct Activations {
    /// The mean over the pixels of the last block, `[B, 2048]`: features for FID, KID, precision and recall.
    pub pooled: Tensor,
    /// The first 7 channels of the 1×1 branch of Mixed_6d (`mixed_6/conv` in the network of 2015), `[B, 2023]`: features
    /// for sFID (Nash et al. 2021, arXiv 2103.03841).
    pub spatial: Tensor,
    /// `W·pooled`, without the bias, `[B, 1008]`: what the Inception score of the evaluators of StyleGAN and of OpenAI is
    /// made of.
    pub logits_unbiased: Tensor,
    /// `W·pooled + b`, `[B, 1008]`.
    pub logits: Tensor,
}

/// The network with its weights; see the [module](self).
#[derive(Debug)]
pub struct Inception {
    /// 1a, 2a, 2b; then pooling; 3b, 4a; then pooling.
    stem: [Vec<BasicConv>; 2],
    blocks: Vec<Block>,
    fc: Linear,
    params: Params,
}

/// The place in the list of blocks of the one whose 1×1 branch gives the spatial features.
const MIXED_6D: usize = 6;
/// The last block of the middle part.
const MIXED_6E: usize = 7;

impl Inception {
    fn build(builder: ParamsBuilder) -> Result<Self> {
        let root = builder.root();
        let conv = |name: &str, inputs, kernel| BasicConv::new(&root.sub(name), inputs, kernel);
        let stem = [
            vec![
                conv("Conv2d_1a_3x3", 3, Kernel(32, 3, 3))?.unpadded(2),
                conv("Conv2d_2a_3x3", 32, Kernel(32, 3, 3))?.unpadded(1),
                conv("Conv2d_2b_3x3", 32, Kernel(64, 3, 3))?,
            ],
            vec![
                conv("Conv2d_3b_1x1", 64, Kernel(80, 1, 1))?,
                conv("Conv2d_4a_3x3", 80, Kernel(192, 3, 3))?.unpadded(1),
            ],
        ];
        let blocks = vec![
            Block::five(root.sub("Mixed_5b"), 192, 32)?,
            Block::five(root.sub("Mixed_5c"), 256, 64)?,
            Block::five(root.sub("Mixed_5d"), 288, 64)?,
            Block::six_a(root.sub("Mixed_6a"))?,
            Block::six(root.sub("Mixed_6b"), 128)?,
            Block::six(root.sub("Mixed_6c"), 160)?,
            Block::six(root.sub("Mixed_6d"), 160)?,
            Block::six(root.sub("Mixed_6e"), 192)?,
            Block::seven_a(root.sub("Mixed_7a"))?,
            Block::seven_b(root.sub("Mixed_7b"))?,
            Block::seven_c(root.sub("Mixed_7c"))?,
        ];
        let fc = Linear::new(&root.sub("fc"), POOLED, CLASSES, LayerInit::FanIn)?;
        let params = builder.finish();
        params.set_requires_grad(false);
        Ok(Self { stem, blocks, fc, params })
    }

    /// A network with the weights `tensors`, under the names of the published file and in any float dtype.
    ///
    /// # Errors
    /// [`cm_model::Error::Weights`] with every difference.
    pub fn from_tensors(tensors: &TensorMap, device: Device) -> Result<Self> {
        let inception = Self::build(ParamsBuilder::unset(device))?;
        inception.params.load(tensors, Cast::Floats)?;
        Ok(inception)
    }

    /// A network with random weights: it costs what a trained one costs, and what it measures has no meaning.
    ///
    /// # Errors
    /// [`crate::Error::Model`] if there is no memory for it.
    pub fn random(seed: u64, device: Device) -> Result<Self> {
        Self::build(ParamsBuilder::new(seed, device))
    }

    /// The network's weights and the moments of its normalisations.
    #[must_use]
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What the network sees in `images`, without gradients.
    ///
    /// # Shapes
    /// `[B, 1 or 3, H, W]` in [-1, 1]; grey images are repeated to three channels.
    ///
    /// # Errors
    /// [`cm_model::Error::Shape`] for anything else.
    pub fn forward(&self, images: &Tensor) -> Result<Activations> {
        self.forward_probed(images, None)
    }

    /// [`Inception::forward`], which shows the ends of three parts as `block0_64`, `block1_192` (both behind their
    /// pooling) and `block2_768`.
    ///
    /// # Errors
    /// As [`Inception::forward`].
    pub fn forward_probed(&self, images: &Tensor, mut probe: Option<Probe<'_>>) -> Result<Activations> {
        let size = images.size();
        if size.len() != 4 || !matches!(size[1], 1 | 3) || size.contains(&0) {
            let (what, expected) = ("images for Inception".into(), "[B, 1 or 3, H, W]".into());
            return Err(cm_model::Error::Shape { what, expected, got: size }.into());
        }
        let _no_grad = tch::no_grad_guard();
        let _f32 = Autocast::enter(self.params.device(), None);
        let mut show = |name: &str, x: &Tensor| {
            if let Some(probe) = &mut probe {
                probe(name, x);
            }
        };
        let mut x = pixels(images);
        for (convs, name) in self.stem.iter().zip(["block0_64", "block1_192"]) {
            x = shrink(&convs.iter().fold(x, |x, conv| conv.forward(&x)));
            show(name, &x);
        }
        let mut spatial = None;
        for (place, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x);
            match place {
                // The 1×1 branch is the first one.
                MIXED_6D => spatial = Some(x.narrow(1, 0, SPATIAL_CHANNELS).permute([0, 2, 3, 1])),
                MIXED_6E => show("block2_768", &x),
                _ => {}
            }
        }
        let pooled = x.mean_dim([2, 3].as_slice(), false, Kind::Float);
        let spatial = spatial.map(|x| x.flatten(1, 3)).unwrap_or_else(|| pooled.shallow_clone());
        let [logits_unbiased, logits] = [self.fc.forward_unbiased(&pooled), self.fc.forward(&pooled)];
        Ok(Activations { pooled, spatial, logits_unbiased, logits })
    }
}

/// Images as the first layer takes them.
fn pixels(images: &Tensor) -> Tensor {
    let images = images.to_kind(Kind::Float);
    let sized = images.upsample_bilinear2d([SIDE, SIDE], false, None, None);
    if sized.size()[1] == 1 { sized.expand([-1, 3, -1, -1], false) } else { sized }
}
