//! Laws of Inception on random weights, and its files. Its numbers are checked by golden files.

mod common;

use cm_model::{Bundle, TensorMap};
use cm_net::inception::{CLASSES, POOLED, SPATIAL, convert};
use cm_net::{Error, Inception, ModelFile};
use common::{rel, wave};
use tch::{Device, Kind, Tensor};

fn random() -> Inception {
    tch::set_num_threads(1);
    Inception::random(3, Device::Cpu).unwrap()
}

#[test]
fn images_are_seen_one_by_one_and_grey_is_three_equal_colours() {
    let inception = random();
    let images = wave(&[2, 3, 20, 24]);
    let seen = inception.forward(&images).unwrap();
    assert_eq!(seen.pooled.size(), [2, POOLED]);
    assert_eq!(seen.spatial.size(), [2, SPATIAL]);
    assert_eq!((seen.logits.size(), seen.logits_unbiased.size()), (vec![2, CLASSES], vec![2, CLASSES]));
    assert!(seen.pooled.min().double_value(&[]) >= 0.0, "features come from a ReLU");
    let bias = inception.params().get("fc.bias").unwrap();
    assert!(rel(&(&seen.logits_unbiased + bias), &seen.logits) < 1e-6);
    let alone = inception.forward(&images.narrow(0, 1, 1)).unwrap();
    assert!(rel(&alone.pooled, &seen.pooled.narrow(0, 1, 1)) < 1e-5);
    assert!(rel(&alone.spatial, &seen.spatial.narrow(0, 1, 1)) < 1e-5);

    let grey = wave(&[1, 1, 16, 16]);
    let colour = inception.forward(&grey.expand([-1, 3, -1, -1], false)).unwrap();
    assert!(rel(&inception.forward(&grey).unwrap().pooled, &colour.pooled) < 1e-5);
    for shape in [&[1, 2, 8, 8][..], &[3, 8, 8], &[0, 3, 8, 8]] {
        let images = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert!(inception.forward(&images).unwrap_err().to_string().contains("images for Inception"));
    }
}

#[test]
fn files_hold_the_network_strictly() {
    let network = random();
    let state =
        || -> TensorMap { network.params().iter().map(|(n, t)| (n.into(), t.shallow_clone())).collect() };
    let weights = state();
    // 23,885,392 numbers of the published network, the moments of 94 normalisations among them.
    assert_eq!(state().values().map(Tensor::numel).sum::<usize>(), 23_885_392);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inception.safetensors");
    let mut published = state();
    // Newer versions of PyTorch count training steps.
    published.insert("Conv2d_1a_3x3.bn.num_batches_tracked".into(), Tensor::from(0i64));
    convert(published).unwrap().write(&path).unwrap();
    let loaded = Inception::load(&path, Device::Cpu).unwrap();
    assert!(
        loaded.params().iter().all(|(name, tensor)| tensor.equal(&weights[name]) && !tensor.requires_grad())
    );
    assert!(ModelFile::read(&path).unwrap_err().to_string().contains("weights of inception"));

    let mut wrong = state();
    wrong.remove("fc.bias");
    wrong.insert("AuxLogits.fc.weight".into(), wave(&[2, 2]));
    wrong.insert("Mixed_6a.branch3x3.bn.running_var".into(), wave(&[3]));
    let text = convert(wrong).unwrap_err().to_string();
    for words in ["'fc.bias' [1008] is missing", "'AuxLogits.fc.weight' is not", "[3], expected [384]"] {
        assert!(text.contains(words) && !text.contains('\n'), "{text}");
    }

    let mut bundle = Bundle::read(&path).unwrap();
    bundle.tensors.remove("fc.weight");
    bundle.write(&path).unwrap();
    assert!(matches!(Inception::load(&path, Device::Cpu), Err(Error::Weights { .. })));
    let key = bundle.metadata.keys().next().unwrap().clone();
    for (text, says) in [
        (r#"{"format":1,"kind":"lpips","net":"alex","version":"0.1"}"#, "something else"),
        (r#"{"format":1,"kind":"inception","version":"2020-01-01"}"#, "2020-01-01"),
    ] {
        bundle.metadata.insert(key.clone(), text.into());
        bundle.write(&path).unwrap();
        let error = Inception::load(&path, Device::Cpu).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("--as inception"), "{error}");
    }
    bundle.metadata.clear();
    bundle.write(&path).unwrap();
    assert!(Inception::load(&path, Device::Cpu).unwrap_err().to_string().contains("no description"));
}
