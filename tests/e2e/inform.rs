//! What `cm` says about experiments, models and machines.

use cm_tests::{Sandbox, root};

/// Names and texts of the files in `configs/`.
fn configs() -> Vec<(String, String)> {
    let entries = std::fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    let named = |path: std::path::PathBuf| {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read_to_string(path).unwrap())
    };
    let mut configs: Vec<_> = files.map(named).collect();
    configs.sort();
    configs
}

#[test]
fn every_config_is_a_preset_and_shown_as_it_is() {
    let sandbox = Sandbox::new();
    let listed = sandbox.cm("preset list").run().ok().stdout;
    let mut names: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    names.sort();
    let configs = configs();
    assert_eq!(names, configs.iter().map(|(name, _)| name).collect::<Vec<_>>());
    for (name, text) in &configs {
        assert_eq!(&sandbox.cm(&format!("preset show {name}")).run().ok().stdout, text, "{name}");
    }
    // Tables 3 and App. C of Song et al. 2023.
    for row in ["cifar10-ct ", "56395523 parameters, 800000 steps of 512 images"] {
        assert!(listed.lines().any(|line| line.contains(row) && line.starts_with("cifar10-ct ")), "{listed}");
    }
}

#[test]
fn a_preset_that_was_shown_trains_as_a_file() {
    let sandbox = Sandbox::new();
    let text = sandbox.cm("preset show digits-ct").run().ok().stdout;
    sandbox.write("mine.toml", text);
    let short = ["train.total_steps=1", "train.batch=4"];
    sandbox.cm("train --config mine.toml --device cpu").set(&short).run().ok();
    assert_eq!(sandbox.list("out/runs/digits-ct/checkpoints"), ["step-00000001"], "the default folder");
}

#[test]
fn a_model_file_says_what_it_is() {
    let sandbox = Sandbox::new();
    sandbox.cm("train --config tiny.toml --device cpu --out run").set(&["train.total_steps=2"]).run().ok();
    let of_run = sandbox.cm("model info run").run().ok().stdout;
    let file = "run/checkpoints/step-00000002/ema-0.9.safetensors";
    assert_eq!(sandbox.cm(&format!("model info {file}")).run().ok().stdout, of_run);
    let dry = sandbox.cm("train --config tiny.toml --device cpu --dry-run").run().ok().stdout;
    let parameters = row(&dry, "parameters");
    assert_eq!(row(&of_run, "parameters"), parameters);
    for (name, value) in [("role", "consistency function"), ("step", "2"), ("weights", "ema 0.9")] {
        assert_eq!(row(&of_run, name), value);
    }
    assert!(row(&of_run, "images").contains("1×8×8"), "{of_run}");
    assert!(row(&of_run, "network").contains(r#""kind":"song_unet""#), "{of_run}");
}

/// What stands behind `name` in lines of names and values.
fn row<'a>(text: &'a str, name: &str) -> &'a str {
    let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    values.next().unwrap_or_else(|| panic!("no {name} in:\n{text}")).trim()
}

#[test]
fn a_dry_run_needs_no_data_and_measures_the_papers_network() {
    let sandbox = Sandbox::new();
    // Neither the weights of the paper's metric nor its data are here, and neither is needed.
    let dry = sandbox.cm("train-cifar10 --dry-run --device cpu").run().ok();
    assert_eq!(row(&dry.stdout, "parameters"), "56395523");
    for words in [
        "memory model, micro-batch 1",
        "memory model, micro-batch 512: ",
        "made-up pixels",
        "lpips (vgg16, piq), with random weights",
    ] {
        assert!(dry.stdout.contains(words), "{words}: {}", dry.stdout);
    }
    let gigabytes: f64 = row(&dry.stdout, "measured peak").trim_end_matches(" GB").parse().unwrap();
    // Weights, target, two moments, one average and gradients are 6 × 226 MB.
    assert!((1.3..6.0).contains(&gigabytes), "{gigabytes} GB");
    assert!(row(&dry.stdout, "step, 1 image").contains("loss "), "{}", dry.stdout);
    let config: String = dry
        .stdout
        .lines()
        .skip(1)
        .take_while(|line| !line.starts_with("metric  "))
        .fold(String::new(), |text, line| text + line + "\n");
    let config: toml::Table = config.parse().expect("the resolved config is TOML");
    assert_eq!(config["train"]["total_steps"].as_integer(), Some(800_000));
    assert_eq!(sandbox.list(""), ["tiny.toml"], "nothing is written");
}

#[test]
fn doctor_names_libtorch_and_devices() {
    let sandbox = Sandbox::new();
    let report = sandbox.cm("doctor").run().ok().stdout;
    assert!(row(&report, "libtorch").starts_with("2.11.0"), "{report}");
    assert_eq!(row(&report, "CPU threads"), "1");
    row(&report, "CUDA");
}
