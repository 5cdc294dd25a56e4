//! Laws of LPIPS on networks of random weights, and its files.

mod common;

use cm_model::torch::autocast::Autocast;
use cm_model::{Bundle, ImageDistance, ImageShape, TensorMap};
use cm_net::lpips::{self, Form, LpipsNet, LpipsReading, LpipsSpec, PixelRange, Pooling};
use cm_net::{Error, Lpips, ModelFile};
use common::{rel, wave};
use tch::{Device, Kind, Tensor};

fn spec(net: LpipsNet, reading: LpipsReading) -> LpipsSpec {
    LpipsSpec { net, reading }
}

fn random(net: LpipsNet, reading: LpipsReading) -> Lpips {
    Lpips::random(spec(net, reading), 3, Device::Cpu).unwrap()
}

/// Two batches of images that differ.
fn pair(shape: &[i64]) -> (Tensor, Tensor) {
    let a = wave(shape);
    (a.shallow_clone(), (a * 0.8 + wave(shape).flip([2]) * 0.2) * 0.9)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

#[test]
fn distances_are_zero_at_home_positive_elsewhere_and_symmetric() {
    let (a, b) = pair(&[2, 3, 36, 33]);
    for net in LpipsNet::ALL {
        let lpips = random(net, LpipsReading::Package);
        assert_eq!(values(&lpips.distance(&a, &a).unwrap()), [0.0, 0.0], "{net}");
        let there = lpips.distance(&a, &b).unwrap();
        assert_eq!(there.kind(), Kind::Float);
        assert!(values(&there).iter().all(|&d| d > 1e-4), "{net}: {there:?}");
        assert_eq!(values(&there), values(&lpips.distance(&b, &a).unwrap()), "{net}");
        let layers = lpips.per_layer(&a, &b).unwrap();
        assert_eq!(layers.size(), [lpips::bundled_lins(net).unwrap().len() as i64, 2]);
        assert!(layers.min().double_value(&[]) > 0.0, "{net}: every layer takes part: {layers}");
        assert!(rel(&layers.sum_dim_intlist([0].as_slice(), false, Kind::Float), &there) < 1e-6);
    }
}

#[test]
fn images_of_a_batch_do_not_meet() {
    let (a, b) = pair(&[3, 3, 32, 32]);
    let lpips = random(LpipsNet::Squeeze, LpipsReading::Package);
    let together = lpips.distance(&a, &b).unwrap();
    let alone = (0..3).map(|i| lpips.distance(&a.narrow(0, i, 1), &b.narrow(0, i, 1)).unwrap());
    assert!(rel(&Tensor::cat(&alone.collect::<Vec<_>>(), 0), &together) < 1e-5);
    // The gradient of one image's distance leaves the others alone.
    let a = a.set_requires_grad(true);
    lpips.distance(&a, &b).unwrap().get(1).backward();
    let norms = values(&a.grad().square().sum_dim_intlist([1, 2, 3].as_slice(), false, Kind::Float));
    assert!(norms[0] == 0.0 && norms[1] > 0.0 && norms[2] == 0.0, "{norms:?}");
}

#[test]
fn gradients_reach_both_images_and_no_weight() {
    let lpips = random(LpipsNet::Alex, LpipsReading::Piq);
    let (a, b) = pair(&[1, 3, 16, 16]);
    let (a, b) = (a.set_requires_grad(true), b.set_requires_grad(true));
    lpips.distance(&a, &b).unwrap().sum(Kind::Float).backward();
    for image in [&a, &b] {
        let largest = image.grad().abs().max().double_value(&[]);
        assert!(largest > 0.0 && largest.is_finite(), "{largest}");
    }
    for (name, weight) in lpips.params().iter() {
        assert!(!weight.requires_grad() && !weight.grad().defined(), "{name} is trained");
    }
    // The slope along a direction is the gradient's. Roundings of float32 leave three digits of it.
    let along = a.grad().sign();
    let at = |t: f64| lpips.distance(&(a.detach() + &along * t), &b.detach()).unwrap().double_value(&[0]);
    let (measured, slope) =
        ((at(1e-3) - at(-1e-3)) / 2e-3, a.grad().abs().sum(Kind::Double).double_value(&[]));
    assert!((measured / slope - 1.0).abs() < 0.02, "{measured} {slope}");
}

/// Flat and black images too, whose features may all be 0.
#[test]
fn gradients_are_zero_at_home_and_finite_everywhere() {
    let flat = |value: f64| Tensor::full([1, 3, 32, 32], value, (Kind::Float, Device::Cpu));
    for net in LpipsNet::ALL {
        let lpips = random(net, LpipsReading::Package);
        for at in [wave(&[1, 3, 32, 32]), flat(0.0), flat(-1.0), flat(1.0)] {
            for (other, home) in [(at.copy(), true), (wave(&[1, 3, 32, 32]).flip([3]), false)] {
                let a = at.copy().set_requires_grad(true);
                lpips.distance(&a, &other).unwrap().sum(Kind::Float).backward();
                let largest = a.grad().abs().max().double_value(&[]);
                assert!(largest.is_finite() && (largest == 0.0) == home, "{net}: {largest}");
            }
        }
    }
}

#[test]
fn grey_images_are_rgb_of_equal_channels() {
    for reading in [LpipsReading::Package, LpipsReading::Piq] {
        let lpips = random(LpipsNet::Alex, reading);
        let (a, b) = pair(&[2, 1, 32, 32]);
        let grey = lpips.distance(&a, &b).unwrap();
        let rgb = lpips.distance(&a.repeat([1, 3, 1, 1]), &b.repeat([1, 3, 1, 1])).unwrap();
        assert!(rel(&grey, &rgb) < 1e-6, "{reading}");
    }
}

/// Where pooling and size agree, the two packages differ by roundings alone.
#[test]
fn the_readings_agree_where_size_and_pooling_do() {
    let (a, b) = pair(&[2, 3, 32, 32]);
    let (piq, package) = (Form::of(LpipsReading::Piq), Form::of(LpipsReading::Package));
    let lpips = random(LpipsNet::Alex, LpipsReading::Piq);
    let released = lpips.distance(&a, &b).unwrap();
    let lpips = lpips.with_form(Form { pooling: Pooling::Max, ..piq });
    let max = lpips.distance(&a, &b).unwrap();
    assert!(rel(&max, &released) > 1e-2, "pooling matters: {max} {released}");
    let lpips = lpips.with_form(Form { enlarge: true, ..package });
    let enlarged = lpips.distance(&a, &b).unwrap();
    assert!(rel(&enlarged, &max) < 1e-5, "{enlarged} {max}");
    let lpips = lpips.with_form(package);
    assert!(rel(&lpips.distance(&a, &b).unwrap(), &enlarged) > 1e-2, "size matters");
    let given01 = Form { given: PixelRange::Unit, ..package };
    let own = lpips.distance(&a, &b).unwrap();
    let unit = lpips.with_form(given01).distance(&((a + 1.0) / 2.0), &((b + 1.0) / 2.0)).unwrap();
    assert!(rel(&unit, &own) < 1e-5);
}

#[test]
fn images_are_enlarged_below_256_pixels_and_read_in_their_range() {
    let piq = Form::of(LpipsReading::Piq);
    let image = |side: i64, value: f64| Tensor::full([1, 3, side, side], value, (Kind::Float, Device::Cpu));
    for (side, want) in [(8, 224), (255, 224), (256, 256), (300, 300)] {
        let pixels = piq.pixels(&image(side, 0.5));
        assert_eq!(pixels.size(), [1, 3, want, want]);
        assert!((pixels.mean(Kind::Float).double_value(&[]) - 0.75).abs() < 1e-6);
    }
    let package = Form::of(LpipsReading::Package);
    assert!(package.pixels(&image(8, 0.5)).equal(&image(8, 0.5)));
    let given01 = Form { given: PixelRange::Unit, ..package };
    assert!(given01.pixels(&image(8, 0.25)).equal(&image(8, -0.5)));
}

#[test]
fn mixed_precision_around_it_changes_nothing() {
    let lpips = random(LpipsNet::Alex, LpipsReading::Package);
    let (a, b) = pair(&[1, 3, 32, 32]);
    let plain = lpips.between(&a, &b);
    let inside = {
        let _region = Autocast::enter(Device::Cpu, Some(Kind::BFloat16));
        lpips.between(&a, &b)
    };
    assert!(inside.equal(&plain));
}

#[test]
fn images_that_do_not_fit_say_what_is_needed() {
    let package = |net, shape| lpips::check(spec(net, LpipsReading::Package), shape);
    for (net, side) in [(LpipsNet::Vgg16, 16), (LpipsNet::Alex, 31), (LpipsNet::Squeeze, 17)] {
        package(net, ImageShape::square(3, side)).unwrap();
        let error = package(net, ImageShape::square(3, side - 1)).unwrap_err();
        assert!(matches!(error, Error::ImagesForLpips { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("at least {side}×{side}")) && text.contains("piq"), "{text}");
        assert!(lpips::check(spec(net, LpipsReading::Piq), ImageShape::square(1, 1)).is_ok());
    }
    let four = package(LpipsNet::Alex, ImageShape::square(4, 64)).unwrap_err().to_string();
    assert!(four.contains("1 or 3 channels") && four.contains("4×64×64"), "{four}");
    let wide = ImageShape { channels: 3, height: 8, width: 300 };
    let error = lpips::check(spec(LpipsNet::Vgg16, LpipsReading::Piq), wide).unwrap_err().to_string();
    assert!(error.contains("at least 16×16 pixels, got 3×8×300"), "{error}");

    let lpips = random(LpipsNet::Alex, LpipsReading::Package);
    let image = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for (a, b) in [
        (image(&[3, 32, 32]), image(&[3, 32, 32])),
        (image(&[1, 3, 32, 32]), image(&[2, 3, 32, 32])),
        (image(&[1, 3, 30, 32]), image(&[1, 3, 30, 32])),
        (image(&[1, 2, 32, 32]), image(&[1, 2, 32, 32])),
    ] {
        assert!(lpips.distance(&a, &b).is_err() && lpips.per_layer(&a, &b).is_err());
    }
}

/// A state dict as torchvision has it: the feature part of a random network, and a classifier.
fn state_dict(net: LpipsNet) -> TensorMap {
    let mut tensors = random(net, LpipsReading::Package).params().snapshot();
    tensors.retain(|name, _| name.starts_with("features."));
    tensors.insert("classifier.6.weight".into(), wave(&[10, 4]));
    tensors
}

#[test]
fn a_state_dict_becomes_a_file_that_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lpips.safetensors");
    for net in LpipsNet::ALL {
        let own = random(net, LpipsReading::Package);
        let bundle = lpips::convert(state_dict(net), net).unwrap();
        assert!(bundle.tensors.keys().all(|name| name.starts_with("features.") || name.starts_with("lin")));
        bundle.write(&path).unwrap();
        let loaded = Lpips::load(&path, spec(net, LpipsReading::Package), Device::Cpu).unwrap();
        let (a, b) = pair(&[1, 3, 32, 32]);
        assert!(loaded.between(&a, &b).equal(&own.between(&a, &b)), "{net}");
        assert!(loaded.params().iter().all(|(_, weight)| !weight.requires_grad()));
    }
    // Weights in half precision become float32.
    let half = |tensors: TensorMap| tensors.into_iter().map(|(n, t)| (n, t.to_kind(Kind::Half))).collect();
    let bundle = lpips::convert(half(state_dict(LpipsNet::Alex)), LpipsNet::Alex).unwrap();
    assert!(bundle.tensors.values().all(|tensor| tensor.kind() == Kind::Float));
}

#[test]
fn a_state_dict_that_does_not_fit_is_refused_with_every_difference() {
    let refused = |change: fn(&mut TensorMap)| {
        let mut tensors = state_dict(LpipsNet::Squeeze);
        change(&mut tensors);
        lpips::convert(tensors, LpipsNet::Squeeze).unwrap_err().to_string()
    };
    let text = refused(|tensors| {
        tensors.remove("features.0.weight");
        tensors.insert("features.3.squeeze.bias".into(), wave(&[17]));
        tensors.insert("fc.weight".into(), wave(&[2, 2]));
        tensors.insert("lin0".into(), wave(&[1, 64, 1, 1]));
    });
    for words in
        ["'features.0.weight' [64, 3, 3, 3] is missing", "[17], expected [16]", "'fc.weight'", "'lin0'"]
    {
        assert!(text.contains(words), "{text}");
    }
    assert!(refused(|tensors| drop(tensors.insert("lin6".into(), wave(&[1])))).contains("'lin6'"));
    assert!(lpips::convert(state_dict(LpipsNet::Vgg16), LpipsNet::Alex).is_err());
}

#[test]
fn files_of_anything_else_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lpips.safetensors");
    let load = |net| Lpips::load(&path, spec(net, LpipsReading::Piq), Device::Cpu).unwrap_err();
    assert!(matches!(load(LpipsNet::Alex), Error::Model(cm_model::Error::Io { .. })));
    let write = |change: &dyn Fn(&mut Bundle)| {
        let mut bundle = lpips::convert(state_dict(LpipsNet::Alex), LpipsNet::Alex).unwrap();
        change(&mut bundle);
        bundle.write(&path).unwrap();
    };
    let describe = |text: &'static str| {
        move |bundle: &mut Bundle| drop(bundle.metadata.insert("consistency-rs".into(), text.into()))
    };

    write(&|_| {});
    let other = load(LpipsNet::Vgg16).to_string();
    assert!(other.contains("holds LPIPS with alex") && other.contains("--as lpips-vgg16"), "{other}");
    // The file is none of a model that makes images.
    let model = ModelFile::read(&path).unwrap_err().to_string();
    assert!(model.contains("weights of lpips"), "{model}");

    write(&|bundle| bundle.metadata.clear());
    assert!(load(LpipsNet::Alex).to_string().contains("no description"));
    write(&describe(r#"{"format":1,"role":"denoiser"}"#));
    assert!(load(LpipsNet::Alex).to_string().contains("something else"));
    write(&describe(r#"{"format":1,"kind":"lpips","net":"alex","version":"0.0"}"#));
    assert!(load(LpipsNet::Alex).to_string().contains("lpips 0.0"));

    write(&|bundle| {
        bundle.tensors.remove("lin0");
        bundle.tensors.remove("features.0.bias");
    });
    let error = load(LpipsNet::Alex);
    assert!(matches!(&error, Error::Weights { path: named, .. } if named == &path), "{error}");
    let text = error.to_string();
    assert!(text.contains("'lin0'") && text.contains("'features.0.bias'"), "{text}");

    std::fs::write(&path, "short").unwrap();
    assert!(matches!(load(LpipsNet::Alex), Error::Model(cm_model::Error::File { .. })));
}

#[test]
fn specs_are_plain_data() {
    let text = r#"{"net":"squeeze","reading":"package"}"#;
    let read: LpipsSpec = serde_json::from_str(text).unwrap();
    assert_eq!(read, spec(LpipsNet::Squeeze, LpipsReading::Package));
    assert_eq!(serde_json::to_string(&read).unwrap(), text);
    assert!(serde_json::from_str::<LpipsSpec>(r#"{"net":"vgg19","reading":"piq"}"#).is_err());
    assert!(serde_json::from_str::<LpipsSpec>(r#"{"net":"alex","reading":"piq","x":1}"#).is_err());
    for net in LpipsNet::ALL {
        assert_eq!(serde_json::to_value(net).unwrap(), net.name());
    }
}
