use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use cm_model::{ImageDistance, ImageShape, LpipsNet, LpipsReading, LpipsSpec};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Every metric's name.
const NAMES: &[&str] = &["l1", "l2", "l2_32", "squared_norm", "pseudo_huber", "lpips"];
/// iCT's c for an image of D values is this times √D.
const HUBER_C_PER_ROOT: f64 = 0.000_54;
/// Where weights of LPIPS lie if no file is named.
const LPIPS_FOLDER: &str = "data/lpips";

/// How far apart two images are, as a value in a config file.
///
/// In a file it is a name, `metric = "l2"`, or a table with that name as its kind,
/// `metric = { kind = "pseudo_huber", c = 0.03 }`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Metric {
    /// `mean |a − b|`.
    L1,
    /// `mean (a − b)²`.
    L2,
    /// [`Metric::L2`] of both images resized to 32×32 bilinearly (corners not aligned), as the released
    /// consistency-model code has it for ablations.
    L2At32,
    /// `‖a − b‖²`: [`Metric::L2`] summed over the image instead of averaged, as EDM's training has it (Adam differs
    /// between the two by its ε alone).
    SquaredNorm,
    /// `√(‖a − b‖² + c²) − c` with the norm over the whole image, not over single values (iCT, arXiv
    /// 2310.14189).
    PseudoHuber {
        /// The width of the quadratic part, in units of the norm. `None` is iCT's 0.00054·√D for images of D
        /// values; 0 gives the norm itself (ECT on CIFAR-10), with a gradient of 0 where the images are equal.
        c: Option<f64>,
    },
    /// LPIPS (Zhang et al. 2018, arXiv 1801.03924), the distance of the features that a classifier sees. The name
    /// alone is what the released consistency-model code trains with: VGG-16 in piq's reading.
    Lpips {
        /// The network, `vgg16` if left out.
        net: LpipsNet,
        /// How it is used, `piq` if left out.
        reading: LpipsReading,
        /// The file of its weights; `None` is `data/lpips/lpips-NET.safetensors`.
        weights: Option<PathBuf>,
    },
}

impl Metric {
    /// The metric's name in config files.
    pub fn name(&self) -> &'static str {
        match self {
            Metric::L1 => "l1",
            Metric::L2 => "l2",
            Metric::L2At32 => "l2_32",
            Metric::SquaredNorm => "squared_norm",
            Metric::PseudoHuber { .. } => "pseudo_huber",
            Metric::Lpips { .. } => "lpips",
        }
    }

    /// LPIPS as `spec` says, with weights from the usual place.
    pub fn of_lpips(spec: LpipsSpec) -> Self {
        Metric::Lpips { net: spec.net, reading: spec.reading, weights: None }
    }

    /// Which LPIPS it is and where its weights lie, if it is one.
    pub fn lpips(&self) -> Option<(LpipsSpec, PathBuf)> {
        let Metric::Lpips { net, reading, weights } = self else { return None };
        Some((LpipsSpec { net: *net, reading: *reading }, weights_file(*net, weights.as_deref())))
    }

    fn from_name(name: &str) -> Option<Self> {
        match name {
            "l1" => Some(Metric::L1),
            "l2" => Some(Metric::L2),
            "l2_32" | "l2-32" => Some(Metric::L2At32),
            "squared_norm" => Some(Metric::SquaredNorm),
            "pseudo_huber" => Some(Metric::PseudoHuber { c: None }),
            "lpips" => Some(Metric::of_lpips(LpipsSpec::CONSISTENCY_MODELS)),
            _ => None,
        }
    }

    /// A metric that needs no network, as a function of images of `shape`.
    ///
    /// # Errors
    /// [`Error::MissingWeights`] for LPIPS; [`Error::Setting`] for a negative or infinite c.
    pub fn build(&self, shape: ImageShape) -> Result<Distance> {
        self.build_with(shape, None)
    }

    /// Any metric as a function of images of `shape`. `perceptual` is what LPIPS measures with: the caller loads it
    /// from the file that [`Metric::lpips`] names, since this crate knows no network. Other metrics leave it alone.
    ///
    /// # Errors
    /// [`Error::MissingWeights`] for LPIPS without `perceptual`; [`Error::Setting`] for a negative or infinite c.
    pub fn build_with(
        &self,
        shape: ImageShape,
        perceptual: Option<Rc<dyn ImageDistance>>,
    ) -> Result<Distance> {
        match *self {
            Metric::L1 => Ok(Distance::L1),
            Metric::L2 => Ok(Distance::L2),
            Metric::L2At32 => Ok(Distance::L2At32),
            Metric::SquaredNorm => Ok(Distance::SquaredNorm),
            Metric::PseudoHuber { c } => {
                let c = c.unwrap_or_else(|| HUBER_C_PER_ROOT * (shape.numel() as f64).sqrt());
                if !(c.is_finite() && c >= 0.0) {
                    return Err(Error::setting(
                        "train.metric.c",
                        c,
                        "a finite number, 0 or above",
                        "leave it out for iCT's 0.00054·√D",
                    ));
                }
                Ok(Distance::PseudoHuber { c })
            }
            Metric::Lpips { net, ref weights, .. } => {
                let missing = || Error::MissingWeights { net, file: weights_file(net, weights.as_deref()) };
                perceptual.map(Distance::Perceptual).ok_or_else(missing)
            }
        }
    }
}

/// The file that is named, or that of the usual place.
fn weights_file(net: LpipsNet, named: Option<&Path>) -> PathBuf {
    let usual = || Path::new(LPIPS_FOLDER).join(net.file_stem()).with_extension("safetensors");
    named.map_or_else(usual, Path::to_owned)
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Metric::PseudoHuber { c: Some(c) } => write!(f, "pseudo_huber (c = {c})"),
            Metric::Lpips { net, reading, .. } => write!(f, "lpips ({net}, {reading})"),
            metric => f.write_str(metric.name()),
        }
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("kind", self.name())?;
        match self {
            Metric::PseudoHuber { c: Some(c) } => map.serialize_entry("c", c)?,
            Metric::Lpips { net, reading, weights } => {
                map.serialize_entry("net", net)?;
                map.serialize_entry("reading", reading)?;
                if let Some(weights) = weights {
                    map.serialize_entry("weights", weights)?;
                }
            }
            _ => {}
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Metric {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        deserializer.deserialize_any(MetricVisitor)
    }
}

struct MetricVisitor;

impl<'de> Visitor<'de> for MetricVisitor {
    type Value = Metric;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the name of a metric ({}) or a table with it as kind", NAMES.join(", "))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<Metric, E> {
        Metric::from_name(name).ok_or_else(|| E::unknown_variant(name, NAMES))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Metric, A::Error> {
        let table = Table::deserialize(MapAccessDeserializer::new(map))?;
        let mut metric: Metric = self.visit_str(&table.kind)?;
        let allowed = match &mut metric {
            Metric::PseudoHuber { c } => {
                *c = table.c;
                &["kind", "c"][..]
            }
            Metric::Lpips { net, reading, weights } => {
                *net = table.net.unwrap_or(*net);
                *reading = table.reading.unwrap_or(*reading);
                weights.clone_from(&table.weights);
                &["kind", "net", "reading", "weights"]
            }
            _ => &["kind"],
        };
        match table.given().find(|key| !allowed.contains(key)) {
            Some(key) => Err(de::Error::unknown_field(key, allowed)),
            None => Ok(metric),
        }
    }
}

/// The keys of all kinds; which of them a kind has is checked when it is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    kind: String,
    c: Option<f64>,
    net: Option<LpipsNet>,
    reading: Option<LpipsReading>,
    weights: Option<PathBuf>,
}

impl Table {
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let keys = [
            ("c", self.c.is_some()),
            ("net", self.net.is_some()),
            ("reading", self.reading.is_some()),
            ("weights", self.weights.is_some()),
        ];
        keys.into_iter().filter_map(|(key, given)| given.then_some(key))
    }
}

/// A metric that is ready to measure; [`Metric::build`] and [`Metric::build_with`] make it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Distance {
    /// `mean |a − b|`.
    L1,
    /// `mean (a − b)²`.
    L2,
    /// [`Distance::L2`] at 32×32.
    L2At32,
    /// `‖a − b‖²` over the whole image.
    SquaredNorm,
    /// `√(‖a − b‖² + c²) − c` over the whole image.
    PseudoHuber {
        /// The width of the quadratic part.
        c: f64,
    },
    /// What a network sees between them, such as LPIPS.
    Perceptual(Rc<dyn ImageDistance>),
}

impl Distance {
    /// The distance of each pair of images.
    ///
    /// Means are taken over channels, rows and columns. The gradient of [`Distance::PseudoHuber`] with respect to
    /// an image, `(a − b)/√(‖a − b‖² + c²)`, is shorter than 1 (and 0 where `a = b`, also for c = 0).
    ///
    /// # Shapes
    /// `a`, `b`: `[B, C, H, W]` float32; the result is `[B]`.
    pub fn between(&self, a: &Tensor, b: &Tensor) -> Tensor {
        const IMAGE: [i64; 3] = [1, 2, 3];
        let squares = || (a - b).square().sum_dim_intlist(IMAGE.as_slice(), false, Kind::Float);
        match self {
            Distance::L1 => (a - b).abs().mean_dim(IMAGE.as_slice(), false, Kind::Float),
            Distance::L2 => (a - b).square().mean_dim(IMAGE.as_slice(), false, Kind::Float),
            Distance::L2At32 => Distance::L2.between(&at_32(a), &at_32(b)),
            Distance::SquaredNorm => squares(),
            Distance::PseudoHuber { c } => {
                let squares = squares();
                if *c > 0.0 {
                    return (squares + c * c).sqrt() - *c;
                }
                // The square root has no gradient at 0: a one is put under it there and taken away behind it.
                let equal = squares.eq(0.0).to_kind(Kind::Float);
                (squares + &equal).sqrt() - equal
            }
            Distance::Perceptual(distance) => distance.between(a, b),
        }
    }
}

fn at_32(images: &Tensor) -> Tensor {
    match images.size().as_slice() {
        [.., 32, 32] => images.shallow_clone(),
        _ => images.upsample_bilinear2d([32, 32], false, None, None),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const SHAPE: ImageShape = ImageShape { channels: 3, height: 4, width: 4 };

    fn images(side: i64, phase: f64) -> Tensor {
        let count = 2 * 3 * side * side;
        let angles = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 0.61 + phase;
        angles.sin().to_kind(Kind::Float).view([2, 3, side, side])
    }

    fn pair() -> (Tensor, Tensor) {
        (images(4, 0.0), images(4, 1.0))
    }

    fn values(metric: &Metric, a: &Tensor, b: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(metric.build(SHAPE).unwrap().between(a, b).to_kind(Kind::Double)).unwrap()
    }

    const ALL: [Metric; 6] = [
        Metric::L1,
        Metric::L2,
        Metric::L2At32,
        Metric::SquaredNorm,
        Metric::PseudoHuber { c: None },
        Metric::PseudoHuber { c: Some(0.0) },
    ];

    #[test]
    fn distances_are_zero_at_home_positive_elsewhere_and_symmetric() {
        let (a, b) = pair();
        for metric in ALL {
            assert_eq!(values(&metric, &a, &a), [0.0, 0.0], "{metric}");
            let there = values(&metric, &a, &b);
            assert!(there.iter().all(|d| *d > 0.0), "{metric}: {there:?}");
            assert_eq!(there, values(&metric, &b, &a), "{metric}");
        }
    }

    #[test]
    fn values_by_hand() {
        let a = Tensor::zeros([1, 3, 4, 4], (Kind::Float, Device::Cpu));
        let b = &a + 0.5;
        let close = |metric: Metric, want: f64| {
            let got = values(&metric, &a, &b)[0];
            assert!((got - want).abs() < 1e-6, "{metric}: {got} {want}");
        };
        close(Metric::L1, 0.5);
        close(Metric::L2, 0.25);
        close(Metric::L2At32, 0.25);
        let square = 48.0 * 0.25;
        close(Metric::SquaredNorm, square);
        close(Metric::PseudoHuber { c: Some(0.0) }, f64::sqrt(square));
        close(Metric::PseudoHuber { c: Some(2.0) }, f64::sqrt(square + 4.0) - 2.0);
        let c = 0.00054 * f64::sqrt(48.0);
        close(Metric::PseudoHuber { c: None }, f64::sqrt(square + c * c) - c);
    }

    /// 0.0299 for CIFAR-10 and 0.0599 for ImageNet-64, as the paper prints c.
    #[test]
    fn the_default_c_is_that_of_the_paper() {
        for (side, want) in [(32, 0.0299), (64, 0.0599)] {
            let built = Metric::PseudoHuber { c: None }.build(ImageShape::square(3, side)).unwrap();
            assert!(matches!(built, Distance::PseudoHuber { c } if (c - want).abs() < 5e-5), "{built:?}");
        }
    }

    #[test]
    fn a_pseudo_huber_gradient_is_shorter_than_one_and_zero_at_home() {
        let (a, b) = pair();
        for c in [0.0, 0.03, 1.0] {
            let distance = Distance::PseudoHuber { c };
            for (other, at_home) in [(&b, false), (&a, true)] {
                let a = a.copy().set_requires_grad(true);
                distance.between(&a, other).sum(Kind::Float).backward();
                let norms =
                    a.grad().square().sum_dim_intlist([1, 2, 3].as_slice(), false, Kind::Float).sqrt();
                let norms = Vec::<f32>::try_from(norms).unwrap();
                if at_home {
                    assert_eq!(norms, [0.0, 0.0], "c = {c}");
                } else if c == 0.0 {
                    assert!(norms.iter().all(|n| (n - 1.0).abs() < 1e-6), "{norms:?}");
                } else {
                    assert!(norms.iter().all(|n| *n < 1.0 && *n > 0.5), "{norms:?}");
                }
            }
        }
    }

    #[test]
    fn resizing_leaves_images_of_32_as_they_are() {
        let a = images(32, 0.0);
        let b = &a * 0.5;
        let equal = Distance::L2.between(&a, &b).equal(&Distance::L2At32.between(&a, &b));
        assert!(equal);
    }

    #[test]
    fn files_name_metrics_and_unknown_ones_are_refused() {
        let read = |text: &str| serde_json::from_str::<Metric>(text).map_err(|e| e.to_string());
        assert_eq!(read("\"l2\""), Ok(Metric::L2));
        assert_eq!(read("\"l2-32\""), Ok(Metric::L2At32));
        assert_eq!(read(r#"{"kind":"pseudo_huber"}"#), Ok(Metric::PseudoHuber { c: None }));
        assert_eq!(read(r#"{"kind":"pseudo_huber","c":0}"#), Ok(Metric::PseudoHuber { c: Some(0.0) }));
        assert!(read("\"l3\"").unwrap_err().contains("l3"));
        assert!(read(r#"{"kind":"l1","c":1}"#).unwrap_err().contains("`c`"));
        assert!(read(r#"{"kind":"pseudo_huber","d":1}"#).unwrap_err().contains("`d`"));
        assert!(read(r#"{"c":1}"#).unwrap_err().contains("kind"));
        for metric in ALL {
            assert_eq!(read(&serde_json::to_string(&metric).unwrap()), Ok(metric));
        }
    }

    #[test]
    fn lpips_is_that_of_the_released_code_unless_a_file_says_otherwise() {
        let read = |text: &str| serde_json::from_str::<Metric>(text).map_err(|e| e.to_string());
        let released = Metric::of_lpips(LpipsSpec::CONSISTENCY_MODELS);
        assert_eq!(read("\"lpips\""), Ok(released.clone()));
        assert_eq!(read(r#"{"kind":"lpips"}"#), Ok(released.clone()));
        assert_eq!(
            (released.to_string().as_str(), released.lpips().unwrap().1.as_path()),
            ("lpips (vgg16, piq)", Path::new("data/lpips/lpips-vgg16.safetensors"))
        );
        let own = Metric::Lpips {
            net: LpipsNet::Alex,
            reading: LpipsReading::Package,
            weights: Some("own.safetensors".into()),
        };
        let text = r#"{"kind":"lpips","net":"alex","reading":"package","weights":"own.safetensors"}"#;
        assert_eq!(read(text), Ok(own.clone()));
        let (spec, file) = own.lpips().unwrap();
        assert_eq!((spec.net, file.as_path()), (LpipsNet::Alex, Path::new("own.safetensors")));
        for metric in [released, own] {
            assert_eq!(read(&serde_json::to_string(&metric).unwrap()), Ok(metric));
        }
        assert!(read(r#"{"kind":"lpips","net":"vgg19"}"#).unwrap_err().contains("vgg19"));
        assert!(read(r#"{"kind":"lpips","c":1}"#).unwrap_err().contains("`c`"));
        assert!(read(r#"{"kind":"l2","net":"alex"}"#).unwrap_err().contains("`net`"));
        assert!(read(r#"{"kind":"l2","weights":"x"}"#).unwrap_err().contains("`weights`"));
    }

    /// Stands for a network: the distance of the means.
    #[derive(Debug)]
    struct Means;

    impl ImageDistance for Means {
        fn between(&self, a: &Tensor, b: &Tensor) -> Tensor {
            (a - b).mean_dim([1, 2, 3].as_slice(), false, Kind::Float).abs()
        }
    }

    #[test]
    fn a_perceptual_metric_is_what_the_caller_hands_in() {
        let lpips = Metric::of_lpips(LpipsSpec::CONSISTENCY_MODELS);
        let (a, b) = pair();
        let distance = lpips.build_with(SHAPE, Some(Rc::new(Means))).unwrap();
        assert!(distance.clone().between(&a, &b).equal(&Means.between(&a, &b)));
        // Other metrics leave it alone.
        let l1 = Metric::L1.build_with(SHAPE, Some(Rc::new(Means))).unwrap();
        assert!(l1.between(&a, &b).equal(&Distance::L1.between(&a, &b)));
    }

    #[test]
    fn lpips_without_weights_says_how_to_get_them() {
        let error = |net| {
            let spec = LpipsSpec { net, reading: LpipsReading::Piq };
            Metric::of_lpips(spec).build(SHAPE).unwrap_err().to_string()
        };
        let vgg = error(LpipsNet::Vgg16);
        for words in [
            "train.metric = lpips",
            "data/lpips/lpips-vgg16.safetensors",
            "`cargo xtask fetch lpips`",
            "`cm model import FILE --as lpips-vgg16 -o data/lpips/lpips-vgg16.safetensors`",
            "--set train.metric=",
        ] {
            assert!(vgg.contains(words), "'{words}' is missing in: {vgg}");
        }
        assert!(!vgg.contains('\n'));
        assert!(error(LpipsNet::Alex).contains("`cargo xtask fetch lpips --net alex`"));
    }

    #[test]
    fn a_negative_c_is_refused() {
        assert!(Metric::PseudoHuber { c: Some(-1.0) }.build(SHAPE).is_err());
    }
}
