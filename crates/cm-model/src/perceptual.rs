use std::fmt;

use serde::{Deserialize, Serialize};
use tch::Tensor;

/// How far apart two images look, measured by a network that is not trained.
///
/// Training measures through this trait, so that it does not depend on any network.
pub trait ImageDistance: fmt::Debug {
    /// The distance of each pair of images, with gradients to both.
    ///
    /// It computes in float32, whatever region of mixed precision it is called in.
    ///
    /// # Shapes
    /// `a`, `b`: `[B, C, H, W]` in [-1, 1], of the shape that the distance was built for; the result is `[B]` float32.
    fn between(&self, a: &Tensor, b: &Tensor) -> Tensor;
}

/// The networks that LPIPS compares features of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LpipsNet {
    /// VGG-16 (Simonyan and Zisserman 2014), five layers.
    Vgg16,
    /// AlexNet in torchvision's form (Krizhevsky 2014), five layers.
    Alex,
    /// SqueezeNet 1.1 (Iandola et al. 2016), seven layers.
    Squeeze,
}

impl LpipsNet {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vgg16, Self::Alex, Self::Squeeze];

    /// The name in config files and file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vgg16 => "vgg16",
            Self::Alex => "alex",
            Self::Squeeze => "squeeze",
        }
    }

    /// What a file of weights of LPIPS with this network is called, as in `lpips-vgg16`.
    #[must_use]
    pub fn file_stem(self) -> String {
        format!("lpips-{self}")
    }
}

impl fmt::Display for LpipsNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The two readings of LPIPS that published results use. They differ in what happens before the first layer, and in
/// how the network pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LpipsReading {
    /// The authors' own, as in the Python package `lpips`: images as they are, max pooling.
    Package,
    /// That of the released consistency-model code, after the package `piq`: images narrower than 256 pixels are
    /// enlarged to 224×224 bilinearly (corners not aligned), and the network pools by averages.
    Piq,
}

impl LpipsReading {
    /// The name in config files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Package => "package",
            Self::Piq => "piq",
        }
    }
}

impl fmt::Display for LpipsReading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which LPIPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LpipsSpec {
    /// The network.
    pub net: LpipsNet,
    /// How it is used.
    pub reading: LpipsReading,
}

impl LpipsSpec {
    /// What the released consistency-model code trains with: VGG-16 in piq's reading.
    pub const CONSISTENCY_MODELS: Self = Self { net: LpipsNet::Vgg16, reading: LpipsReading::Piq };
}

impl fmt::Display for LpipsSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.net, self.reading)
    }
}
