//! Training with a metric that needs a network's weights.

use cm_model::Bundle;
use cm_net::Lpips;
use cm_net::lpips::{LpipsNet, LpipsReading, LpipsSpec, convert};
use cm_tests::Sandbox;
use cm_torch::tch::Device;

/// Writes a file of weights of LPIPS with AlexNet, as if its random weights had been downloaded.
fn weights(sandbox: &Sandbox, name: &str, seed: u64) {
    let spec = LpipsSpec { net: LpipsNet::Alex, reading: LpipsReading::Piq };
    let mut tensors = Lpips::random(spec, seed, Device::Cpu).unwrap().params().snapshot();
    tensors.retain(|name, _| name.starts_with("features."));
    convert(tensors, spec.net).unwrap().write(&sandbox.path(name)).unwrap();
}

/// The losses that a run logged.
fn losses(sandbox: &Sandbox, out: &str) -> Vec<f64> {
    let log = sandbox.read(&format!("{out}/progress.csv"));
    let mut rows = log.lines().map(|row| row.split(',').collect::<Vec<_>>());
    let column = rows.next().unwrap().iter().position(|name| *name == "loss").unwrap();
    rows.map(|row| row[column].parse().unwrap()).collect()
}

#[test]
fn a_run_measures_with_the_weights_of_its_file() {
    let sandbox = Sandbox::new();
    weights(&sandbox, "data/lpips/lpips-alex.safetensors", 1);
    weights(&sandbox, "elsewhere/own.safetensors", 2);
    let short = ["train.total_steps=2", "train.batch=2", "run.checkpoint_every=2"];
    let run = |metric: &str, out: &str| {
        let command = sandbox.cm(&format!("train --config tiny.toml --device cpu --out {out}"));
        command.set(&short).set(&[&format!("train.metric={metric}")]).run().ok();
        losses(&sandbox, out)
    };
    let usual = run("{kind='lpips', net='alex'}", "usual");
    assert!(usual.iter().all(|loss| *loss > 0.0), "{usual:?}");
    assert_ne!(run("{kind='lpips', net='alex', weights='elsewhere/own.safetensors'}", "named"), usual);
    // The reading that a name alone stands for, and the other one.
    assert_eq!(run("{kind='lpips', net='alex', reading='piq'}", "again"), usual);
    assert_ne!(run("{kind='lpips', net='alex', reading='package'}", "package"), usual);
    // The run's own config keeps the place of the weights; a model file, which travels, does not.
    assert!(sandbox.read("named/config.toml").contains("elsewhere/own.safetensors"));
    let model = sandbox.path("named/checkpoints/step-00000002/raw.safetensors");
    let description = Bundle::read(&model).unwrap().metadata["consistency-rs"].clone();
    assert!(description.contains("lpips") && !description.contains("elsewhere"), "{description}");
}
