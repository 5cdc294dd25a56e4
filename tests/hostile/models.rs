//! Folders of diffusers, the names of kinds, devices, and shapes that are to be a network.

use std::path::Path;
use std::sync::LazyLock;

use cm_model::TensorMap;
use cm_net::import::{Architecture, Kind, describe, export_diffusers, load_any};
use cm_net::{ModelFile, ModelSpec, NetSpec, OpenaiUnetSpec, Role, save_model};
use cm_torch::device::DeviceSpec;
use proptest::prelude::*;
use proptest::sample::Index;
use tch::{Device, Tensor};
use tempfile::TempDir;

use crate::mutate::{assert_memory_bounded, assert_one_line, config, damaged_text, scratch};
use crate::safetensors::{net, precond};

fn openai() -> OpenaiUnetSpec {
    OpenaiUnetSpec { num_classes: 0, dropout: 0.0, ..crate::common::openai() }
}

/// A folder of diffusers with a whole model.
fn diffusers() -> TempDir {
    let dir = scratch();
    let path = dir.path().join("model.safetensors");
    let mut precond = precond();
    precond.noise_cond = cm_model::schedule::NoiseCond::ThousandQuarterLog;
    let spec = ModelSpec::new(Role::Consistency, openai().into(), precond);
    let built = cm_net::build(&spec.net, 1, Device::Cpu).unwrap();
    save_model(&path, built.params(), &spec).unwrap();
    export_diffusers(&ModelFile::read(&path).unwrap(), &dir.path().join("folder")).unwrap();
    dir
}

fn one_line<T, E: std::fmt::Display>(result: Result<T, E>) {
    result.err().iter().for_each(|error| assert_one_line(&error.to_string()));
    assert_memory_bounded();
}

/// Every file named `name` below `folder`.
fn find(folder: &Path, name: &str) -> std::path::PathBuf {
    let mut pending = vec![folder.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.file_name() {
                Some(file) if file == name => return path,
                _ if path.is_dir() => pending.push(path),
                _ => {}
            }
        }
    }
    panic!("no {name}")
}

fn damage_json(name: &str) {
    let dir = diffusers();
    let folder = dir.path().join("folder");
    let path = find(&folder, name);
    let whole = std::fs::read_to_string(&path).unwrap();
    load_any(&folder, None).unwrap();
    let mut runner = proptest::test_runner::TestRunner::new(config());
    let outcome = runner.run(&damaged_text(&[&whole]), |text| {
        std::fs::write(&path, &text).unwrap();
        one_line(describe(&folder));
        Ok(())
    });
    outcome.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn configs_of_diffusers() {
    damage_json("config.json");
}

#[test]
fn schedulers_of_diffusers() {
    damage_json("scheduler_config.json");
}

type Shapes = Vec<(String, Vec<i64>)>;

/// Names and shapes of two networks.
static SHAPES: LazyLock<[Shapes; 2]> = LazyLock::new(|| {
    [openai().into(), net().into()].map(|net: NetSpec| {
        let built = cm_net::build(&net, 1, Device::Cpu).unwrap();
        built.params().iter().map(|(name, tensor)| (name.to_owned(), tensor.size())).collect()
    })
});

/// A tensor of this shape that takes no memory.
fn of_shape(shape: &[i64]) -> Tensor {
    Tensor::from(1.0_f32).expand(shape, false)
}

const SIDES: [i64; 9] = [0, 1, 2, 3, 7, 64, 1 << 20, 1 << 31, 1 << 40];

proptest! {
    #![proptest_config(config())]

    #[test]
    fn kinds(text in damaged_text(&[
        "openai:image_size=32,head_channels=64,role=denoiser",
        "openai:image_size=8,num_heads=2,role=consistency,sigma_min=0.002,sigma_max=80,rho=7",
        "edm:role=consistency,fourier_scale=0.02,sigma_data=0.5",
        "openai-imagenet64-cd",
    ])) {
        one_line(text.parse::<Kind>());
    }

    #[test]
    fn devices(text in damaged_text(&["auto", "cpu", "cuda", "cuda:0", "cuda:255"])) {
        one_line(text.parse::<DeviceSpec>());
    }

    #[test]
    fn shapes_of_state_dicts(
        edits in proptest::collection::vec((any::<Index>(), any::<Index>(), 0_u8..4), 0..6),
        which in 0_usize..2,
    ) {
        let mut tensors: TensorMap =
            SHAPES[which].iter().map(|(name, shape)| (name.clone(), of_shape(shape))).collect();
        for (at, value, what) in edits {
            let names: Vec<String> = tensors.keys().cloned().collect();
            let name = names[at.index(names.len())].clone();
            let mut shape = tensors[&name].size();
            match what {
                0 => drop(shape.pop()),
                1 => shape.push(*value.get(&SIDES)),
                2 => shape = vec![*value.get(&SIDES); shape.len()],
                _ => {
                    let tensor = tensors.remove(&name).unwrap();
                    tensors.insert(name.replace('1', "0").replace('2', "17"), tensor);
                    continue;
                }
            }
            let product = shape.iter().try_fold(1_i64, |n, side| n.checked_mul((*side).max(1)));
            if product.is_some_and(|n| n < 1 << 60) {
                tensors.insert(name, of_shape(&shape));
            }
        }
        one_line(Architecture::of(&tensors));
    }
}

/// Found by [`kinds`] and [`devices`]: what was typed went to the terminal as it was.
#[test]
fn what_was_typed_is_shown_on_one_line() {
    for text in ["\n", "openai:image_size=8,num_heads=2,role=consistency,\0\n\0=", "edm:a\r=1,a\r=2"] {
        assert_one_line(&text.parse::<Kind>().unwrap_err().to_string());
        assert_one_line(&text.parse::<DeviceSpec>().unwrap_err().to_string());
    }
}
