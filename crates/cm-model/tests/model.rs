//! Laws of models, weights, files and noise.

use std::collections::BTreeMap;

use cm_model::{
    Backbone, Bundle, Cast, Cond, ConsistencyFn, Denoiser, Error, GaussianOracle, ImageShape, Init, Mode,
    NoiseSource, Params, ParamsBuilder, Philox, Preconditioned, Recorded, Sigma, Site, TensorMap, files,
};
use cm_schedule::{Boundary, Edm, NoiseCond, Purpose, SigmaRange};
use tch::{Device, Kind, Tensor};

const SHAPE: ImageShape = ImageShape { channels: 2, height: 3, width: 3 };

/// A pixel-wise linear map with dropout, the smallest network that has everything.
struct Pixelwise {
    params: Params,
    weight: Tensor,
}

impl Pixelwise {
    fn new(seed: u64) -> Self {
        let builder = ParamsBuilder::new(seed, Device::Cpu);
        let weight =
            builder.root().sub("conv").param("weight", &[2, 2, 1, 1], Init::Normal { std: 1.0 }).unwrap();
        Self { params: builder.finish(), weight }
    }
}

impl Backbone for Pixelwise {
    fn shape(&self) -> ImageShape {
        SHAPE
    }
    fn num_classes(&self) -> i64 {
        0
    }
    fn params(&self) -> &Params {
        &self.params
    }
    fn forward(&self, x: &Tensor, c_noise: &Tensor, _: &Cond, train: bool) -> cm_model::Result<Tensor> {
        let shifted = x + c_noise.view([-1, 1, 1, 1]);
        Ok(shifted.conv2d(&self.weight, None::<&Tensor>, 1, 0, 1, 1).dropout(0.5, train))
    }
}

fn range() -> SigmaRange {
    SigmaRange::new(0.002, 80.0).unwrap()
}

fn consistency(seed: u64) -> Preconditioned<Pixelwise, Boundary> {
    let boundary = Boundary::new(0.5, 0.002, NoiseCond::QuarterLog).unwrap();
    Preconditioned::new(Pixelwise::new(seed), boundary, range())
}

fn images(batch: i64) -> Tensor {
    Tensor::arange(batch * SHAPE.numel(), (Kind::Float, Device::Cpu)).view(SHAPE.batch(batch)) / 10.0
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn a_consistency_function_is_the_identity_at_sigma_min() {
    let (f, x) = (consistency(1), images(3));
    assert_eq!(max_difference(&f.jump(&x, Sigma::One(0.002), &Cond::none()).unwrap(), &x), 0.0);
    assert!(max_difference(&f.jump(&x, Sigma::One(1.0), &Cond::none()).unwrap(), &x) > 0.1);
}

#[test]
fn one_level_and_a_level_for_each_image_agree() {
    let edm = Edm::new(0.5, NoiseCond::QuarterLog).unwrap();
    let (d, x) = (Preconditioned::new(Pixelwise::new(1), edm, range()), images(2));
    let one = d.denoise(&x, Sigma::One(3.0), &Cond::none()).unwrap();
    let each = d.denoise(&x, Sigma::Each(&[3.0, 3.0]), &Cond::none()).unwrap();
    assert_eq!(max_difference(&one, &each), 0.0);
}

#[test]
fn one_dropout_seed_gives_one_mask_and_samplers_drop_nothing() {
    let (f, x) = (consistency(1), images(4));
    let run =
        |dropout_seed| f.evaluate(&x, Sigma::One(2.0), &Cond::none(), Mode::Train { dropout_seed }).unwrap();
    assert_eq!(max_difference(&run(5), &run(5)), 0.0);
    assert!(max_difference(&run(5), &run(6)) > 0.0);
    let sampled = f.jump(&x, Sigma::One(2.0), &Cond::none()).unwrap();
    assert_eq!(max_difference(&sampled, &f.jump(&x, Sigma::One(2.0), &Cond::none()).unwrap()), 0.0);
    assert!(!sampled.requires_grad());
}

#[test]
fn wrong_shapes_levels_and_labels_are_one_line() {
    let f = consistency(1);
    let jump = |x: &Tensor, sigma| f.jump(x, sigma, &Cond::none()).unwrap_err().to_string();
    let wrong = Tensor::zeros([1, 2, 4, 4], (Kind::Float, Device::Cpu));
    assert_eq!(jump(&wrong, Sigma::One(1.0)), "model input: expected shape [B, 2, 3, 3], got [1, 2, 4, 4]");
    assert!(jump(&images(1), Sigma::One(0.0)).contains("above 0, got 0"));
    assert!(jump(&images(1), Sigma::One(f64::NAN)).contains("NaN"));
    assert!(jump(&images(2), Sigma::Each(&[1.0])).contains("each of 2 images, got 1 noise levels"));
    let label = Cond::labels(&[3, 10], 10, Device::Cpu).unwrap_err().to_string();
    assert_eq!(label, "class label: expected 0 to 9, got 10");
}

#[test]
fn the_oracles_jump_is_the_end_of_its_flow() {
    let oracle = GaussianOracle { data_std: 0.5, shape: SHAPE, sigma_range: range() };
    let x = images(1);
    // dx/dσ = (x − D(x, σ))/σ, by central differences of f(x(σ), σ) = const along x(σ) ∝ √(s² + σ²).
    let at = |sigma: f64| &x * (0.25 + sigma * sigma).sqrt();
    let f = |sigma: f64| oracle.jump(&at(sigma), Sigma::One(sigma), &Cond::none()).unwrap();
    assert!(max_difference(&f(0.1), &f(70.0)) < 1e-5);
    let slope = (at(1.0 + 1e-3) - at(1.0 - 1e-3)) / 2e-3;
    let ode = at(1.0) - oracle.denoise(&at(1.0), Sigma::One(1.0), &Cond::none()).unwrap();
    assert!(max_difference(&slope, &ode) < 1e-3);
}

#[test]
fn weights_start_from_their_name_and_load_strictly() {
    let (a, b) = (Pixelwise::new(1), Pixelwise::new(2));
    assert_eq!(max_difference(&a.weight, &Pixelwise::new(1).weight), 0.0);
    assert!(max_difference(&a.weight, &b.weight) > 0.0);
    b.params.copy_from(&a.params).unwrap();
    assert_eq!(max_difference(&a.weight, &b.weight), 0.0);
    let mut wrong = a.params.snapshot();
    wrong.insert("conv.bias".into(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    wrong.insert("conv.weight".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
    let error = b.params.load(&wrong, Cast::Never).unwrap_err().to_string();
    assert!(error.contains("'conv.weight' has shape [1], expected [2, 2, 1, 1]"), "{error}");
    assert!(error.contains("'conv.bias' is not a part of the network"), "{error}");
    let half: BTreeMap<_, _> =
        a.params.snapshot().into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
    assert!(b.params.load(&half, Cast::Never).unwrap_err().to_string().contains("dtype Half"));
    b.params.load(&half, Cast::Floats).unwrap();
    assert_eq!(b.params.get("conv.weight").unwrap().kind(), Kind::Float);
    let builder = ParamsBuilder::new(0, Device::Cpu);
    assert_eq!(builder.root().param("w", &[1], Init::Zeros).unwrap().size(), [1]);
    assert!(matches!(builder.root().param("w", &[1], Init::Zeros), Err(Error::DuplicateParameter(_))));
}

#[test]
fn adopted_weights_are_what_the_layers_compute_with() {
    let (a, b) = (Pixelwise::new(1), Pixelwise::new(2));
    let wrong = TensorMap::from([("conv.weight".to_owned(), Tensor::zeros([1], (Kind::Float, Device::Cpu)))]);
    let before = b.weight.copy();
    assert!(b.params.adopt(wrong, Cast::Floats).is_err());
    assert_eq!(max_difference(&b.weight, &before), 0.0);
    let values = a.params.snapshot();
    let place = values["conv.weight"].data_ptr();
    b.params.adopt(values, Cast::Never).unwrap();
    assert_eq!((max_difference(&a.weight, &b.weight), b.weight.data_ptr()), (0.0, place));
    // Memory that is another's too, and a place that is read several times, are copied.
    let shared = a.params.snapshot();
    let handle = shared["conv.weight"].shallow_clone();
    b.params.adopt(shared, Cast::Never).unwrap();
    assert!(b.weight.data_ptr() != handle.data_ptr() && max_difference(&b.weight, &handle) == 0.0);
    let one = Tensor::from(0.5f32).expand([2, 2, 1, 1], false);
    b.params.adopt(TensorMap::from([("conv.weight".to_owned(), one)]), Cast::Never).unwrap();
    assert!(b.weight.is_contiguous());
    // Shapes alone, and another dtype.
    let half: TensorMap =
        a.params.snapshot().into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
    let builder = ParamsBuilder::shapes();
    let weight = builder.root().sub("conv").param("weight", &[2, 2, 1, 1], Init::Zeros).unwrap();
    builder.finish().adopt(half, Cast::Floats).unwrap();
    assert_eq!((weight.kind(), weight.is_contiguous()), (Kind::Float, true));
    assert!(max_difference(&a.weight, &weight) < 1e-3);
}

#[test]
fn parameters_that_are_shapes_alone_take_no_memory_and_are_compared() {
    let builder = ParamsBuilder::shapes();
    // 4 TB, if it were made.
    let side = 1 << 20;
    let _weight = builder.root().param("w", &[side, side], Init::Zeros).unwrap();
    let _buffer = builder.root().normal_buffer("b", &[2], 1.0).unwrap();
    let params = builder.finish();
    assert_eq!((params.num_parameters(), params.get("w").unwrap().size()), (side * side, vec![side, side]));
    let tensors = |size: &[i64], kind: Kind| {
        let tensor = Tensor::zeros(size, (kind, Device::Cpu));
        [("b".to_owned(), tensor.shallow_clone()), ("w".to_owned(), tensor)].into()
    };
    let line = params.check(&tensors(&[2], Kind::Half), Cast::Never).unwrap_err().to_string();
    assert!(line.contains("'b' has dtype Half") && line.contains("'w' has shape [2]"), "{line}");
    let line = params.check(&tensors(&[2], Kind::Half), Cast::Floats).unwrap_err().to_string();
    assert!(!line.contains("'b'"), "{line}");
}

#[test]
fn starts_have_the_moments_that_they_claim() {
    let builder = ParamsBuilder::new(3, Device::Cpu);
    let shape = [64, 32, 3, 3];
    let std =
        |name, init| builder.root().param(name, &shape, init).unwrap().detach().std(true).double_value(&[]);
    let (fan_in, fan_out) = (32.0 * 9.0f64, 64.0 * 9.0f64);
    for (name, init, want) in [
        ("a", Init::XavierUniform { scale: 2.0 }, 2.0 * (2.0 / (fan_in + fan_out)).powf(0.5)),
        ("b", Init::KaimingUniform { scale: 0.5 }, 0.5 / fan_in.sqrt()),
        ("c", Init::KaimingNormal { scale: 3.0 }, 3.0 / fan_in.sqrt()),
        ("d", Init::Uniform { bound: 0.3 }, 0.3 / 3f64.sqrt()),
        ("e", Init::Normal { std: 0.2 }, 0.2),
    ] {
        let got = std(name, init);
        assert!((got / want - 1.0).abs() < 0.03, "{name}: {got} against {want}");
    }
}

#[test]
fn channels_last_weights_compute_the_same() {
    let (f, x) = (consistency(1), images(2));
    let before = f.jump(&x, Sigma::One(2.0), &Cond::none()).unwrap();
    f.net.params.to_channels_last();
    let after = f.jump(&x, Sigma::One(2.0), &Cond::none()).unwrap();
    assert!(max_difference(&before, &after) < 1e-5);
}

#[test]
fn a_bundle_comes_back_bit_for_bit_and_its_bytes_are_reproducible() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/er/a.safetensors");
    let values = images(2);
    let tensors = [
        ("f32", values.shallow_clone()),
        ("bf16", values.to_kind(Kind::BFloat16)),
        ("strided", values.transpose(2, 3)),
        ("i64", Tensor::from_slice(&[1i64, -5])),
        ("empty", Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
        ("scalar", Tensor::from(2.5f64)),
    ];
    let bundle = Bundle {
        tensors: tensors.map(|(name, t)| (name.to_owned(), t)).into(),
        metadata: BTreeMap::from([("cm".to_owned(), "{\"a\": \"ü\"}".to_owned())]),
    };
    bundle.write(&path).unwrap();
    let first = std::fs::read(&path).unwrap();
    bundle.write(&path).unwrap();
    assert_eq!(first, std::fs::read(&path).unwrap());
    let back = Bundle::read(&path).unwrap();
    assert_eq!(back.metadata, bundle.metadata);
    for (name, want) in &bundle.tensors {
        let got = &back.tensors[name];
        assert_eq!((got.kind(), got.size()), (want.kind(), want.size()), "{name}");
        assert!(got.equal(want), "{name}");
    }
    let (metadata, listed) = Bundle::read_header(&path).unwrap();
    assert_eq!((metadata, listed.len()), (bundle.metadata, 6));
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn torn_and_foreign_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    Bundle { tensors: [("x".to_owned(), images(4))].into(), ..Default::default() }.write(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 7, 8, 40, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        for error in [Bundle::read(&path).unwrap_err(), Bundle::read_header(&path).unwrap_err()] {
            let error = error.to_string();
            assert!(error.contains("a.safetensors") && !error.contains('\n'), "{cut}: {error}");
        }
    }
    let mut claims = whole.clone();
    claims[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, &claims).unwrap();
    assert!(Bundle::read(&path).is_err() && Bundle::read_header(&path).is_err());
    let missing = Bundle::read(&folder.path().join("b")).unwrap_err().to_string();
    assert!(missing.contains("reading failed") && missing.contains("No such file"), "{missing}");
}

#[test]
fn a_write_that_fails_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    files::write_atomic(&path, |w| std::io::Write::write_all(w, b"old")).unwrap();
    let broken = files::write_atomic(&path, |w| {
        std::io::Write::write_all(w, b"half of the new")?;
        Err(std::io::Error::other("the disk is full"))
    });
    assert!(broken.unwrap_err().to_string().contains("a.txt: writing failed: the disk is full"));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn noise_belongs_to_the_sample_and_not_to_the_batch() {
    let mut source = Philox { seed: 9, device: Device::Cpu };
    let mut draw = |samples: &[u64], step| {
        source.normal(SHAPE, &Site { samples, step, purpose: Purpose::Sample }).unwrap()
    };
    let together = draw(&[4, 5, 6], 1);
    assert!(together.narrow(0, 1, 1).equal(&draw(&[5], 1)));
    assert!(!draw(&[5], 2).equal(&draw(&[5], 1)));
}

#[test]
fn recorded_noise_proves_its_use() {
    let site = Site { samples: &[0], step: 0, purpose: Purpose::Sample };
    let mut source = Recorded::new([images(1), images(1)]);
    assert!(source.normal(SHAPE, &site).unwrap().equal(&images(1)));
    assert!(source.finish().unwrap_err().to_string().contains("1 draws were not used"));
    let mut source = Recorded::new([images(1)]);
    assert!(source.normal(SHAPE, &site).unwrap().equal(&images(1)));
    assert!(source.normal(SHAPE, &site).unwrap_err().to_string().contains("draw 2"));
    assert!(Recorded::new([images(2)]).normal(SHAPE, &site).is_err());
}
