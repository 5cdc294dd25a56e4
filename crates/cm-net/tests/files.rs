//! A file of weights says what it is, and says so when it is something else.

mod common;

use std::path::Path;

use cm_model::schedule::NoiseCond;
use cm_model::{Bundle, Cond, Sigma, TensorMap};
use cm_net::{
    Error, ModelFile, ModelSpec, NetSpec, PrecondSpec, Role, SongUnetSpec, build, import, inspect, load,
    save_model, save_tensors,
};
use common::{all, fill, ncsnpp, rel, song, wave};
use tch::{Device, Kind};

fn precond() -> PrecondSpec {
    PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    }
}

/// Writes a filled network of the given kind.
fn write(path: &Path, role: Role, net: impl Into<NetSpec>) -> ModelSpec {
    let mut spec = ModelSpec::new(role, net.into(), precond());
    spec.about.insert("step".into(), "30".into());
    let net = build(&spec.net, 1, Device::Cpu).unwrap();
    fill(net.params());
    save_model(path, net.params(), &spec).unwrap();
    spec
}

#[test]
fn a_file_gives_the_model_that_was_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for net in all() {
        let spec = write(&path, Role::Consistency, net.clone());
        let file = ModelFile::read(&path).unwrap();
        assert_eq!(file.spec, spec);
        let (saved, loaded) = (build(&net, 1, Device::Cpu).unwrap(), file.backbone(Device::Cpu).unwrap());
        fill(saved.params());
        assert!(saved.params().iter().all(|(name, t)| t.equal(loaded.params().get(name).unwrap())));
        assert!(loaded.params().trainable().all(|(_, t)| !t.requires_grad()));

        let info = inspect(&path).unwrap();
        assert_eq!(info.spec, spec);
        assert_eq!(info.num_parameters, saved.params().num_parameters());
        assert_eq!(info.dtypes.iter().collect::<Vec<_>>(), ["F32"]);
        assert_eq!(info.bytes, std::fs::metadata(&path).unwrap().len());

        let copy = folder.path().join("copy.safetensors");
        write(&copy, Role::Consistency, net);
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&copy).unwrap(), "same content, same bytes");
    }
}

#[test]
fn the_wrong_kind_is_one_typed_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let x = wave(&[2, 3, 8, 8]);
    write(&path, Role::Denoiser, song());
    let error = load(&path, Device::Cpu).unwrap().into_consistency().err().unwrap();
    assert!(matches!(error, Error::WrongRole { got: Role::Denoiser, wanted: Role::Consistency, .. }));
    assert!(error.to_string().contains("is a denoiser and a consistency function was asked for"), "{error}");
    let denoiser = load(&path, Device::Cpu).unwrap().into_denoiser().unwrap();
    // Where f is the identity, D is not.
    let denoised = denoiser.denoise(&x, Sigma::One(0.002), &Cond::none()).unwrap();
    assert!(!denoised.equal(&x) && denoiser.sigma_range().max() == 80.0);

    write(&path, Role::Consistency, song());
    let error = load(&path, Device::Cpu).unwrap().into_denoiser().err().unwrap();
    assert!(matches!(error, Error::WrongRole { got: Role::Consistency, wanted: Role::Denoiser, .. }));
    let f = load(&path, Device::Cpu).unwrap().into_consistency().unwrap();
    assert!(f.jump(&x, Sigma::One(0.002), &Cond::none()).unwrap().equal(&x));
}

#[test]
fn every_difference_is_in_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let spec = write(&path, Role::Denoiser, song());
    let mut tensors = Bundle::read(&path).unwrap().tensors;
    tensors.remove("map_layer0.weight");
    tensors.insert("map_layer9.weight".into(), wave(&[1]));
    tensors.insert("map_layer1.bias".into(), wave(&[3]));
    save_tensors(&path, tensors, &spec).unwrap();
    for error in [load(&path, Device::Cpu).err().unwrap(), inspect(&path).unwrap_err()] {
        let text = error.to_string();
        let parts =
            ["'map_layer0.weight' [64, 16] is missing", "'map_layer9.weight'", "'map_layer1.bias'", "[3]"];
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
        assert!(text.contains("model.safetensors"), "{text}");
    }
}

#[test]
fn a_description_of_what_cannot_be_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let net = SongUnetSpec { num_blocks: 1_000_000_000, ..song() };
    save_tensors(&path, TensorMap::new(), &ModelSpec::new(Role::Denoiser, net.into(), precond())).unwrap();
    for error in [
        load(&path, Device::Cpu).err().unwrap(),
        inspect(&path).unwrap_err(),
        import::describe(&path).unwrap_err(),
        import::load_any(&path, None).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("model.safetensors") && text.contains("num_blocks = 1000000000"), "{text}");
    }
}

#[test]
fn half_precision_files_become_float32() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let spec = write(&path, Role::Denoiser, ncsnpp());
    let full = Bundle::read(&path).unwrap().tensors;
    for kind in [Kind::Half, Kind::BFloat16] {
        let halved = full.iter().map(|(name, t)| (name.clone(), t.to_kind(kind))).collect();
        save_tensors(&path, halved, &spec).unwrap();
        let net = ModelFile::read(&path).unwrap().backbone(Device::Cpu).unwrap();
        for (name, tensor) in net.params().iter() {
            assert_eq!(tensor.kind(), Kind::Float);
            assert!(rel(tensor, &full[name]) < 0.01, "{name}");
        }
    }
}

#[test]
fn other_files_say_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let error = |path: &Path| {
        [load(path, Device::Cpu).err().unwrap(), inspect(path).unwrap_err()].map(|e| e.to_string())
    };

    for text in error(&path) {
        assert!(text.contains("model.safetensors"), "{text}");
    }
    Bundle::default().write(&path).unwrap();
    for text in error(&path) {
        assert!(text.contains("without a description of its model"), "{text}");
    }
    write(&path, Role::Denoiser, song());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    for text in error(&path) {
        assert!(text.contains("model.safetensors"), "{text}");
    }
    // Only the version's digit changes, so that the length of the head stays.
    let newer = String::from_utf8_lossy(&bytes[..4096]).replacen(r#"\"format\":1"#, r#"\"format\":2"#, 1);
    std::fs::write(&path, [newer.as_bytes(), &bytes[4096..]].concat()).unwrap();
    for text in error(&path) {
        assert!(text.contains("has format 2, this version reads format 1"), "{text}");
    }
}
