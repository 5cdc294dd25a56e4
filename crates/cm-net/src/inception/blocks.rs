//! The parts of InceptionV3 in the port that FID is measured with. Names are torchvision's.

use cm_model::{Init, ParamPath};
use tch::{Device, Kind, Tensor};

use crate::Result;

/// Is added to a variance before its root is taken.
const EPS: f64 = 1e-3;

/// A convolution without bias, batch normalisation with fixed moments, and a ReLU.
#[derive(Debug)]
pub(super) struct BasicConv {
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    variance: Tensor,
    stride: i64,
    padding: [i64; 2],
}

/// The numbers that make a [`BasicConv`]: channels that come out, height and width of the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel(pub i64, pub i64, pub i64);

impl BasicConv {
    /// A convolution that keeps the size of images.
    pub(super) fn new(path: &ParamPath<'_>, inputs: i64, kernel: Kernel) -> Result<Self> {
        let Kernel(outputs, height, width) = kernel;
        let init = Init::KaimingNormal { scale: std::f64::consts::SQRT_2 };
        let norm = path.sub("bn");
        let options = (Kind::Float, Device::Cpu);
        Ok(Self {
            weight: path.sub("conv").param("weight", &[outputs, inputs, height, width], init)?,
            scale: norm.param("weight", &[outputs], Init::Ones)?,
            shift: norm.param("bias", &[outputs], Init::Zeros)?,
            mean: norm.buffer("running_mean", &Tensor::zeros([outputs], options))?,
            variance: norm.buffer("running_var", &Tensor::ones([outputs], options))?,
            stride: 1,
            padding: [height / 2, width / 2],
        })
    }

    /// The same layer with this stride and no padding.
    pub(super) fn unpadded(self, stride: i64) -> Self {
        Self { stride, padding: [0, 0], ..self }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let x = x.conv2d(&self.weight, None::<&Tensor>, self.stride, self.padding, 1, 1);
        let [scale, shift] = [&self.scale, &self.shift].map(Some);
        let [mean, variance] = [&self.mean, &self.variance].map(Some);
        // The momentum is for training.
        x.batch_norm(scale, shift, mean, variance, false, 0.0, EPS, true).relu_()
    }
}

/// What a branch does before its convolution, at stride 1.
#[derive(Debug, Clone, Copy)]
enum Pool {
    /// The mean of the pixels that are there, the padding left out.
    Average,
    Max,
}

/// One of the ways through a block.
#[derive(Debug)]
enum Branch {
    /// Convolutions in a row.
    Convs(Vec<BasicConv>),
    /// Convolutions in a row, and two beside each other behind them.
    Fork {
        stem: Vec<BasicConv>,
        ends: [BasicConv; 2],
    },
    Pooled(Pool, BasicConv),
    /// [`shrink`].
    Shrunk,
}

/// Branches side by side; their channels stand one behind the other.
#[derive(Debug)]
pub(super) struct Block(Vec<Branch>);

/// Max pooling to half the size, without padding.
pub(super) fn shrink(x: &Tensor) -> Tensor {
    x.max_pool2d(3, 2, 0, 1, false)
}

fn in_a_row(convs: &[BasicConv], x: &Tensor) -> Tensor {
    convs.iter().fold(x.shallow_clone(), |x, conv| conv.forward(&x))
}

impl Branch {
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Branch::Convs(convs) => in_a_row(convs, x),
            Branch::Fork { stem, ends } => {
                let x = in_a_row(stem, x);
                Tensor::cat(&ends.each_ref().map(|end| end.forward(&x)), 1)
            }
            Branch::Pooled(Pool::Average, conv) => conv.forward(&x.avg_pool2d(3, 1, 1, false, false, None)),
            Branch::Pooled(Pool::Max, conv) => conv.forward(&x.max_pool2d(3, 1, 1, 1, false)),
            Branch::Shrunk => shrink(x),
        }
    }
}

/// Builds the branches of one block.
struct Builder<'a> {
    path: ParamPath<'a>,
    inputs: i64,
}

impl Builder<'_> {
    fn convs(&self, kernels: &[(&str, Kernel)]) -> Result<Vec<BasicConv>> {
        let mut inputs = self.inputs;
        let conv = |&(name, kernel): &(&str, Kernel)| {
            let conv = BasicConv::new(&self.path.sub(name), inputs, kernel);
            inputs = kernel.0;
            conv
        };
        kernels.iter().map(conv).collect()
    }

    fn branch(&self, kernels: &[(&str, Kernel)]) -> Result<Branch> {
        Ok(Branch::Convs(self.convs(kernels)?))
    }

    /// A branch whose last convolution halves the size.
    fn halving(&self, kernels: &[(&str, Kernel)]) -> Result<Branch> {
        let mut convs = self.convs(kernels)?;
        let last = convs.pop().map(|last| last.unpadded(2));
        convs.extend(last);
        Ok(Branch::Convs(convs))
    }

    /// A branch that ends in a 1×3 and a 3×1 convolution.
    fn fork(&self, stem: &[(&str, Kernel)], ends: [&str; 2]) -> Result<Branch> {
        let inputs = stem.last().map_or(self.inputs, |(_, kernel)| kernel.0);
        let end = |name, kernel| BasicConv::new(&self.path.sub(name), inputs, kernel);
        let ends = [end(ends[0], Kernel(384, 1, 3))?, end(ends[1], Kernel(384, 3, 1))?];
        Ok(Branch::Fork { stem: self.convs(stem)?, ends })
    }

    fn pooled(&self, pool: Pool, outputs: i64) -> Result<Branch> {
        let path = self.path.sub("branch_pool");
        Ok(Branch::Pooled(pool, BasicConv::new(&path, self.inputs, Kernel(outputs, 1, 1))?))
    }
}

impl Block {
    /// Mixed_5b to 5d, at 35×35.
    pub(super) fn five(path: ParamPath<'_>, inputs: i64, pooled: i64) -> Result<Self> {
        let b = Builder { path, inputs };
        Ok(Self(vec![
            b.branch(&[("branch1x1", Kernel(64, 1, 1))])?,
            b.branch(&[("branch5x5_1", Kernel(48, 1, 1)), ("branch5x5_2", Kernel(64, 5, 5))])?,
            b.branch(&[
                ("branch3x3dbl_1", Kernel(64, 1, 1)),
                ("branch3x3dbl_2", Kernel(96, 3, 3)),
                ("branch3x3dbl_3", Kernel(96, 3, 3)),
            ])?,
            b.pooled(Pool::Average, pooled)?,
        ]))
    }

    /// Mixed_6a, from 35×35 to 17×17.
    pub(super) fn six_a(path: ParamPath<'_>) -> Result<Self> {
        let b = Builder { path, inputs: 288 };
        Ok(Self(vec![
            b.halving(&[("branch3x3", Kernel(384, 3, 3))])?,
            b.halving(&[
                ("branch3x3dbl_1", Kernel(64, 1, 1)),
                ("branch3x3dbl_2", Kernel(96, 3, 3)),
                ("branch3x3dbl_3", Kernel(96, 3, 3)),
            ])?,
            Branch::Shrunk,
        ]))
    }

    /// Mixed_6b to 6e, at 17×17, with `mid` channels inside the factorised 7×7 convolutions.
    pub(super) fn six(path: ParamPath<'_>, mid: i64) -> Result<Self> {
        let b = Builder { path, inputs: 768 };
        Ok(Self(vec![
            b.branch(&[("branch1x1", Kernel(192, 1, 1))])?,
            b.branch(&[
                ("branch7x7_1", Kernel(mid, 1, 1)),
                ("branch7x7_2", Kernel(mid, 1, 7)),
                ("branch7x7_3", Kernel(192, 7, 1)),
            ])?,
            b.branch(&[
                ("branch7x7dbl_1", Kernel(mid, 1, 1)),
                ("branch7x7dbl_2", Kernel(mid, 7, 1)),
                ("branch7x7dbl_3", Kernel(mid, 1, 7)),
                ("branch7x7dbl_4", Kernel(mid, 7, 1)),
                ("branch7x7dbl_5", Kernel(192, 1, 7)),
            ])?,
            b.pooled(Pool::Average, 192)?,
        ]))
    }

    /// Mixed_7a, from 17×17 to 8×8.
    pub(super) fn seven_a(path: ParamPath<'_>) -> Result<Self> {
        let b = Builder { path, inputs: 768 };
        Ok(Self(vec![
            b.halving(&[("branch3x3_1", Kernel(192, 1, 1)), ("branch3x3_2", Kernel(320, 3, 3))])?,
            b.halving(&[
                ("branch7x7x3_1", Kernel(192, 1, 1)),
                ("branch7x7x3_2", Kernel(192, 1, 7)),
                ("branch7x7x3_3", Kernel(192, 7, 1)),
                ("branch7x7x3_4", Kernel(192, 3, 3)),
            ])?,
            Branch::Shrunk,
        ]))
    }

    /// Mixed_7b, at 8×8.
    pub(super) fn seven_b(path: ParamPath<'_>) -> Result<Self> {
        Self::seven(path, 1280, Pool::Average)
    }

    /// Mixed_7c: the last one pools by the maximum, in the network that FID was defined with.
    pub(super) fn seven_c(path: ParamPath<'_>) -> Result<Self> {
        Self::seven(path, 2048, Pool::Max)
    }

    fn seven(path: ParamPath<'_>, inputs: i64, pool: Pool) -> Result<Self> {
        let b = Builder { path, inputs };
        Ok(Self(vec![
            b.branch(&[("branch1x1", Kernel(320, 1, 1))])?,
            b.fork(&[("branch3x3_1", Kernel(384, 1, 1))], ["branch3x3_2a", "branch3x3_2b"])?,
            b.fork(
                &[("branch3x3dbl_1", Kernel(448, 1, 1)), ("branch3x3dbl_2", Kernel(384, 3, 3))],
                ["branch3x3dbl_3a", "branch3x3dbl_3b"],
            )?,
            b.pooled(pool, 192)?,
        ]))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        let branches: Vec<Tensor> = self.0.iter().map(|branch| branch.forward(x)).collect();
        Tensor::cat(&branches, 1)
    }
}
