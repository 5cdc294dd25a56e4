//! Wrong input: the exit code, and one line that says what was expected, what came, and what to do.

use std::fs;

use cm_tests::{Cm, Sandbox};

fn train(sandbox: &Sandbox) -> Cm {
    sandbox.cm("train --config tiny.toml --device cpu --out run")
}

/// Runs the command and asserts exit code 2, the words, and that no run was begun.
fn refused(sandbox: &Sandbox, command: Cm, words: &[&str]) -> String {
    let line = command.run().fails(2, words);
    assert!(!sandbox.path("run").join("checkpoints").exists(), "a run was begun: {line}");
    line
}

#[test]
fn keys_values_and_files_of_an_experiment() {
    let sandbox = Sandbox::new();
    for (set, words) in [
        ("train.lerning_rate=1", &["--set train.lerning_rate", "unknown field", "`lr`"][..]),
        ("train.lr", &["--set train.lr", "section.key=value"]),
        ("train.lr=fast", &["--set train.lr", "fast"]),
        ("train.lr=-1", &["train.lr = -1", "above 0"]),
        ("train.metric=l7", &["train.metric", "l7", "pseudo_huber"]),
        ("train.batch=0", &["train.batch = 0"]),
        ("precond.sigma_min=0", &["tiny.toml", "sigma_min = 0", "0.002"]),
        ("precond.sigma_max=0.001", &["tiny.toml", "sigma_max"]),
        ("network.attn_resolutions=[5]", &["tiny.toml", "attn_resolutions", "[8, 4]"]),
        ("run.keep_last=0", &["run.keep_last = 0"]),
        (
            "augment={p=0.1, scale=1, translate=1}",
            &["tiny.toml", "network.augment_dim = 0", "[augment]", "3 labels"],
        ),
        ("augment={p=2, scale=1}", &["augment.p = 2", "0 to 1"]),
        ("augment={p=0.1, hue=1}", &["--set augment", "unknown field `hue`"]),
        ("compute.autocast=fp16", &["fp16", "needs CUDA", "bf16"]),
        ("compute.tf32=true", &["compute.tf32", "needs CUDA", "leave it out"]),
        ("compute.cudnn_benchmark=true", &["compute.cudnn_benchmark", "needs CUDA"]),
        ("data.path='x'", &["path = x", "digits is bundled"]),
    ] {
        refused(&sandbox, train(&sandbox).set(&[set]), words);
    }
    let text = sandbox.read("tiny.toml");
    sandbox.write("tiny.toml", text.replace("batch = 8\n", "batch = 8\nbatchsize = 8\n"));
    refused(&sandbox, train(&sandbox), &["tiny.toml: train", "unknown field `batchsize`"]);
    sandbox.write("tiny.toml", text.replace("batch = 8\n", "batch = = 8\n"));
    let line = 1 + text.lines().position(|line| line == "batch = 8").unwrap();
    refused(&sandbox, train(&sandbox), &[&format!("tiny.toml: line {line}: ")]);
}

#[test]
fn experiments_that_are_nowhere() {
    let sandbox = Sandbox::new();
    let words = ["nope: neither a file nor a preset", "digits-ct", "cifar10-ct"];
    refused(&sandbox, sandbox.cm("train --config nope --out run"), &words);
    refused(&sandbox, sandbox.cm("preset show nope"), &words);
    refused(&sandbox, sandbox.cm("train --out run"), &["--config is missing"]);
    refused(&sandbox, sandbox.cm("train --out run --resume"), &["run: no config.toml in this folder"]);
}

#[test]
fn lpips_without_weights_names_the_file_and_the_way_to_it() {
    let sandbox = Sandbox::new();
    let words = [
        "train.metric = lpips",
        "data/lpips/lpips-vgg16.safetensors",
        "cargo xtask fetch lpips",
        "cm model import FILE --as lpips-vgg16 -o",
        "--set train.metric=",
    ];
    refused(&sandbox, train(&sandbox).set(&["train.metric=lpips"]), &words);
    let own = "train.metric={kind='lpips', net='alex', weights='own.safetensors'}";
    refused(&sandbox, train(&sandbox).set(&[own]), &["own.safetensors", "fetch lpips --net alex"]);
    sandbox.write("own.safetensors", "torn");
    refused(&sandbox, train(&sandbox).set(&[own]), &["own.safetensors", "not a whole safetensors file"]);
    fs::remove_file(sandbox.path("own.safetensors")).unwrap();
    // The authors' reading takes images as they are.
    let small = "train.metric={kind='lpips', net='alex', reading='package'}";
    refused(&sandbox, train(&sandbox).set(&[small]), &["train.metric", "at least 31×31", "1×8×8"]);
    // The paper's settings: metric and data are both missing, and nothing is downloaded for a run that cannot start.
    let words = [&words[..], &["cifar-10-binary.tar.gz", "cargo xtask demo"]].concat();
    refused(&sandbox, sandbox.cm("train-cifar10 --device cpu --out run"), &words);
    assert_eq!(sandbox.list(""), ["tiny.toml"]);
}

#[test]
fn data_that_is_missing_names_file_place_and_demo() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.path("empty")).unwrap();
    let words = ["cifar-10-binary.tar.gz", "https://", "cargo xtask demo"];
    for (data, found) in [("nowhere", "nothing"), ("empty", "an empty folder")] {
        for command in ["train-cifar10", "train --config cifar10-ct"] {
            let line = format!("{command} --data {data} --device cpu --out run");
            let command = sandbox.cm(&line).set(&["train.metric=l2"]);
            refused(&sandbox, command, &[&words[..], &[data, found]].concat());
        }
    }
    let command = train(&sandbox).set(&["data={kind='folder', path='nowhere'}"]);
    refused(&sandbox, command, &["nowhere"]);
}

#[test]
fn a_machine_without_network_is_told_which_file_goes_where() {
    let sandbox = Sandbox::new();
    // A proxy that nobody is behind stands for a line that is down.
    let offline = |mut command: Cm| {
        for name in ["ALL_PROXY", "HTTPS_PROXY", "https_proxy"] {
            command = command.env(name, "http://127.0.0.1:9");
        }
        command.env("NO_PROXY", "").env("no_proxy", "")
    };
    let command = sandbox.cm("train-cifar10 --device cpu --out run").set(&["train.metric=l2"]);
    let words = ["cannot download https://", "cifar-10-binary.tar.gz into data/cifar10", "cargo xtask demo"];
    refused(&sandbox, offline(command), &words);
    let words =
        ["cannot download https://", "put alexnet-owt-7be5be79.pth into data/lpips", "call this again"];
    refused(&sandbox, offline(sandbox.cm("fetch lpips --net alex")), &words);
    // Another file under that name is named, and kept.
    sandbox.write("data/lpips/alexnet-owt-7be5be79.pth", "mine");
    let words = ["alexnet-owt-7be5be79.pth", "expected SHA-256 7be5be79", "delete it"];
    refused(&sandbox, offline(sandbox.cm("fetch lpips --net alex")), &words);
    assert_eq!(sandbox.read("data/lpips/alexnet-owt-7be5be79.pth"), "mine");
}

/// Writes `count` grey PNGs of `side` pixels into `folder`.
fn pictures(sandbox: &Sandbox, folder: &str, side: u32, count: u32) {
    for i in 0..count {
        let path = sandbox.write(&format!("{folder}/{i}.png"), "");
        image::GrayImage::from_fn(side, side, |x, y| image::Luma([(x * y + i) as u8])).save(path).unwrap();
    }
}

#[test]
fn images_of_another_size() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, "large", 16, 8);
    let data = |more: &str| format!("data={{kind='folder', path='large'{more}}}");
    let words = ["large", "16x16", "8×8"];
    refused(&sandbox, train(&sandbox).set(&[&data("")]), &words);
    let words = ["large", "expected 8x8 pixels, got 16x16", "center_crop"];
    refused(&sandbox, train(&sandbox).set(&[&data(", resolution=8")]), &words);
    let scaled = data(", resolution=8, fit='stretch'");
    train(&sandbox).set(&[&scaled, "train.total_steps=1"]).run().ok();
}

#[test]
fn a_png_that_is_corrupt_is_named() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, "pictures", 8, 8);
    let whole = fs::read(sandbox.path("pictures/5.png")).unwrap();
    for torn in [&whole[..whole.len() / 2], b"not a PNG"] {
        sandbox.write("pictures/5.png", torn);
        let done = train(&sandbox).set(&["data={kind='folder', path='pictures'}"]).run();
        // What only decoding finds is found while running.
        let code = done.code.unwrap_or_default();
        assert!(code == 1 || code == 2, "{done:#?}");
        done.fails(code, &["pictures/5.png", "cannot decode"]);
    }
}

#[test]
fn labels_that_do_not_fit() {
    let sandbox = Sandbox::new();
    pictures(&sandbox, "pictures", 8, 2);
    sandbox.write("pictures/dataset.json", r#"{"labels": [["0.png", 3], ["1.png", 99]]}"#);
    let data = |more: &str| format!("data={{kind='folder', path='pictures'{more}}}");
    let ten = data(", num_classes=10");
    let words = ["dataset.json: 1.png", "label 99 is outside 0..=9"];
    refused(&sandbox, train(&sandbox).set(&[&ten, "network.num_classes=10"]), &words);
    let words = ["100 classes", "network.num_classes is 10"];
    refused(&sandbox, train(&sandbox).set(&[&data(""), "network.num_classes=10"]), &words);
    let words = ["no labels", "10 classes"];
    let none = data(", labels='none'");
    refused(&sandbox, train(&sandbox).set(&[&none, "network.num_classes=10"]), &words);
}

#[test]
fn folders_that_cannot_be_a_run() {
    let sandbox = Sandbox::new();
    train(&sandbox).set(&["train.total_steps=1"]).run().ok();
    let again = train(&sandbox).run();
    again.fails(2, &["run: this folder holds a run", "step 1", "--resume", "--out"]);
    for out in ["tiny.toml", "tiny.toml/run"] {
        let command = sandbox.cm(&format!("train --config tiny.toml --device cpu --out {out}"));
        command.run().fails(2, &[out]);
        let done = sandbox.cm(&format!("sample run --device cpu --out {out}")).run();
        assert!(!done.stderr.contains("img/s"), "found before the work: {done:#?}");
        done.fails(2, &[out]);
    }
}

#[test]
fn devices_that_are_not_there() {
    let sandbox = Sandbox::new();
    refused(&sandbox, sandbox.cm("train --config tiny.toml --out run --device cuda:99"), &["cuda:99"]);
    let doctor = sandbox.cm("doctor").run().ok().stdout;
    let cuda = doctor.lines().find_map(|line| line.strip_prefix("CUDA ")).unwrap().trim();
    if let Some(reason) = cuda.strip_prefix("none: ") {
        let command = sandbox.cm("train --config tiny.toml --out run --device cuda:0");
        refused(&sandbox, command, &["device cuda:0 is not available", reason]);
    }
    let done = sandbox.cm("train --config tiny.toml --out run --device tpu").run();
    assert!(done.code == Some(2) && done.stderr.starts_with("error: "), "{done:#?}");
}

#[test]
fn models_that_are_none() {
    let sandbox = Sandbox::new();
    train(&sandbox).set(&["train.total_steps=1"]).run().ok();
    let checkpoint = "run/checkpoints/step-00000001";
    sandbox
        .cm("sample run --seeds 0-3 --device cpu --cuda-graph")
        .run()
        .fails(2, &["a CUDA graph: expected a CUDA device, got Cpu"]);
    let whole = fs::read(sandbox.path(checkpoint).join("raw.safetensors")).unwrap();
    let half = whole.len() / 2;
    sandbox.write("half.safetensors", &whole[..half]);
    sandbox.write("empty.safetensors", "");
    fs::create_dir(sandbox.path("folder")).unwrap();
    for (model, words) in [
        ("half.safetensors", &["half.safetensors: ", &format!("{half} bytes")][..]),
        ("empty.safetensors", &["empty.safetensors: not a", "safetensors file"]),
        ("tiny.toml", &["tiny.toml: not a", "safetensors file"]),
        ("nowhere", &["nowhere: no such file or folder"]),
        ("folder", &["folder: no checkpoint in this folder"]),
        (&format!("{checkpoint}/optimizer.safetensors"), &["optimizer.safetensors"]),
    ] {
        for command in ["sample --device cpu", "model info"] {
            sandbox.cm(&format!("{command} {model}")).run().fails(2, words);
        }
    }
    sandbox.write(&format!("{checkpoint}/raw.safetensors"), &whole[..half]);
    for model in ["run", checkpoint] {
        sandbox.cm(&format!("sample {model} --device cpu")).run().fails(2, &[checkpoint, "raw.safetensors"]);
    }
    assert!(!sandbox.path("out").exists(), "nothing was written");
}

#[test]
fn options_of_sampling() {
    let sandbox = Sandbox::new();
    train(&sandbox).set(&["train.total_steps=1"]).run().ok();
    for (options, words) in [
        ("--class 3", &["--class 3", "unconditional"][..]),
        ("--sigmas 80", &["--sampler multistep"]),
        ("--sampler multistep", &["--sigmas 80,0.8", "--ts 0,22,39"]),
        ("--sampler multistep --sigmas 1,2", &["sigmas[1] = 2", "fall"]),
        ("--sampler multistep --sigmas nan", &["sigmas[0] = NaN"]),
        ("--sampler multistep --ts 0,22,45 --steps 40", &["ts = 45", "39"]),
        ("--sampler multistep --ts 22,0", &["ts"]),
    ] {
        sandbox.cm(&format!("sample run --device cpu {options}")).run().fails(2, words);
    }
    // What the command line itself refuses has its usage behind the error.
    for option in ["seeds=5-2", "seeds=x", "seeds=0-99999999999", "seeds=-1", "seeds=1,,2", "batch=0"] {
        let done = sandbox.cm(&format!("sample run --device cpu --{option}")).run();
        assert!(done.code == Some(2) && done.stderr.starts_with("error: invalid value"), "{done:#?}");
    }
    assert!(!sandbox.path("out").exists(), "nothing was written");
}
