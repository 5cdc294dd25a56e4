//! `cm eval`: models, images and statistics against data.

use std::io::{Read, Write};

use cm_data::{Shape, npz};
use cm_model::Bundle;
use cm_tests::Sandbox;
use cm_torch::tch::Device;
use serde_json::Value;

/// The figures of an evaluation, over its runs.
fn summary(sandbox: &Sandbox, json: &str) -> Value {
    let report: Value = serde_json::from_str(&sandbox.read(json)).unwrap();
    report["summary"].clone()
}

fn mean(summary: &Value, figure: &str) -> f64 {
    summary[figure]["mean"].as_f64().unwrap_or_else(|| panic!("no {figure} in {summary}"))
}

/// Writes `count` grey 8×8 images that look like nothing, and the same for the same seed.
fn samples(sandbox: &Sandbox, name: &str, count: usize, seed: usize) {
    let shape = Shape::square(1, 8);
    let pixels: Vec<u8> = (0..count * shape.values()).map(|i| ((i * i * 7 + i * seed) % 251) as u8).collect();
    npz::save(&sandbox.path(name), shape, &pixels, None).unwrap();
}

#[test]
fn a_run_is_judged_by_its_own_data_with_spread_and_a_cache() {
    let sandbox = Sandbox::new();
    sandbox.cm("train --config tiny.toml --device cpu --out run").run().ok();
    let eval = |more: &str| {
        let line = format!("eval run --device cpu --seeds 0-199 --seeds 200-399 -o a.json {more}");
        sandbox.cm(&line).run().ok()
    };
    let first = eval("");
    assert!(first.stderr.contains("training a classifier (labels)"), "{}", first.stderr);
    assert!(first.stdout.contains("| fcd") && first.stdout.contains(" ± "), "{}", first.stdout);
    let figures = summary(&sandbox, "a.json");
    assert_eq!(figures["fcd"]["runs"], 2);
    assert!(figures["fcd"]["std"].as_f64().unwrap() > 0.0 && mean(&figures, "fcd") > 1.0);
    assert!(mean(&figures, "classifier_precision") < 0.5, "30 steps make no digits");
    assert!(sandbox.read("a.md").contains("| fcd") && sandbox.read("a.md").contains("--sampler onestep"));
    says_what_was_judged(&sandbox);

    // The second time nothing of the data is measured again, and with another sampler the figures are others.
    let again = eval("");
    assert!(
        !again.stderr.contains("training") && !again.stderr.contains("measuring again"),
        "{}",
        again.stderr
    );
    assert_eq!(summary(&sandbox, "a.json"), figures);

    // A cache that was changed is noticed, and measured again to the same figures.
    let files = sandbox.list("out/eval/cache");
    let cached = files.iter().find(|name| name.starts_with("statistics-")).unwrap();
    let path = sandbox.path(format!("out/eval/cache/{cached}"));
    let mut bundle = Bundle::read(&path).unwrap();
    let _ = bundle.tensors.get_mut("mu").unwrap().g_add_scalar_(1.0);
    bundle.write(&path).unwrap();
    let damaged = eval("");
    assert!(damaged.stderr.contains("not those that were written; measuring again"), "{}", damaged.stderr);
    assert_eq!(summary(&sandbox, "a.json"), figures);
    std::fs::write(&path, "torn").unwrap();
    assert!(eval("").stderr.contains("measuring again"));
    assert_eq!(summary(&sandbox, "a.json"), figures);

    sandbox.cm("eval digits-ct:test --reference digits-ct --device cpu -o b.json").run().ok();
    let floor = summary(&sandbox, "b.json");
    assert!(mean(&floor, "fcd") < 0.5 * mean(&figures, "fcd"), "{floor} {figures}");
    let compared = sandbox.cm("eval --compare a.json b.json").run().ok().stdout;
    assert!(compared.contains("| fcd") && compared.contains("images"), "{compared}");
}

/// The JSON names the weights, the sampler as it was, and the seeds; a copy of the weights elsewhere is the same model.
fn says_what_was_judged(sandbox: &Sandbox) {
    let json = |name: &str| -> Value { serde_json::from_str(&sandbox.read(name)).unwrap() };
    let first = json("a.json");
    assert_eq!(first["input"]["sampler"], "--sampler onestep");
    assert_eq!(first["input"]["file"].as_str().map(str::len), Some(64));
    assert_eq!([0, 1].map(|run| first["runs"][run]["seeds"].clone()), ["0-199", "200-399"]);

    let checkpoint =
        sandbox.list("run/checkpoints").into_iter().filter(|name| name.starts_with("step-")).max();
    let folder = format!("run/checkpoints/{}", checkpoint.unwrap());
    let averages = sandbox.list(&folder);
    let ema = averages.iter().find(|name| name.starts_with("ema-")).unwrap();
    for copy in ["x/model.safetensors", "y/model.safetensors"] {
        sandbox.write(copy, std::fs::read(sandbox.path(format!("{folder}/{ema}"))).unwrap());
        let line = format!("eval {copy} --reference tiny.toml --device cpu --metrics fcd --seeds 0-199");
        sandbox.cm(&line).run().ok();
    }
    let [x, y] = ["out/eval/x-model.json", "out/eval/y-model.json"].map(json);
    assert_eq!(x["input"]["file"], first["input"]["file"]);
    assert_eq!(x["summary"], y["summary"]);
    let compared = sandbox.cm("eval --compare out/eval/x-model.json out/eval/y-model.json").run().ok().stdout;
    assert!(compared.contains("the same weights by the same sampler"), "{compared}");
    // Too few images in the second range are found before any of the first is drawn.
    let done = sandbox.cm("eval run --device cpu --metrics fcd --seeds 0-199 --seeds 0-99").run();
    assert!(!done.stderr.contains("img/s"), "{done:#?}");
    done.fails(2, &["100 images", "128", "singular", "--allow-few"]);
    for (metrics, seeds, words) in
        [("cpr", "0-2", ["--pr-k 3", "got 3"]), ("kcd", "7", ["at least 2 images", "got 1"])]
    {
        let line = format!("eval run --device cpu --metrics {metrics} --seeds 0-199 --seeds {seeds}");
        let done = sandbox.cm(&line).run();
        assert!(!done.stderr.contains("img/s"), "{done:#?}");
        done.fails(2, &words);
    }
}

#[test]
fn a_folder_an_npz_and_stored_statistics_of_the_same_images_agree() {
    let sandbox = Sandbox::new();
    samples(&sandbox, "a.npz", 300, 3);
    let set = npz::read(&sandbox.path("a.npz"), false, None).unwrap();
    use cm_data::Dataset;
    let pixels: Vec<u8> = (0..set.len()).flat_map(|i| set.get(i).unwrap().pixels).collect();
    let seeds: Vec<u64> = (0..300).collect();
    cm_data::grid::save_samples(&sandbox.path("pictures"), &pixels, set.shape(), &seeds, false).unwrap();

    let common = "--reference digits --device cpu --metrics fcd";
    sandbox.cm(&format!("eval a.npz {common} -o npz.json --save-stats a-stats.npz")).run().ok();
    sandbox.cm(&format!("eval pictures {common} -o folder.json")).run().ok();
    sandbox.cm(&format!("eval a-stats.npz {common} -o statistics.json")).run().ok();
    let fcd = |json: &str| mean(&summary(&sandbox, json), "fcd");
    assert_eq!(fcd("npz.json"), fcd("folder.json"));
    assert!((fcd("npz.json") - fcd("statistics.json")).abs() < 1e-6 * fcd("npz.json"));
    let json: Value = serde_json::from_str(&sandbox.read("statistics.json")).unwrap();
    assert_eq!(
        json["input"]["file"].as_str().map(str::len),
        Some(64),
        "the digest of the file of statistics"
    );

    // As reference they serve where the classifier is the one that they were measured with.
    let classifier =
        sandbox.list("out/eval/cache").into_iter().find(|n| n.starts_with("classifier")).unwrap();
    let named = format!("--classifier out/eval/cache/{classifier}");
    let line = format!("eval a.npz --reference a-stats.npz --device cpu --metrics fcd {named} -o self.json");
    sandbox.cm(&line).run().ok();
    assert!(fcd("self.json") < 1e-6);
    sandbox
        .cm("eval a.npz --reference a-stats.npz --device cpu --metrics fcd")
        .run()
        .fails(2, &["--classifier"]);
    sandbox
        .cm(&format!("eval a.npz --reference a-stats.npz --device cpu --metrics kcd {named}"))
        .run()
        .fails(2, &["a-stats.npz", "no features of single images"]);
    sandbox
        .cm("eval a-stats.npz --reference emoji --device cpu --metrics fcd --save-stats b.npz")
        .run()
        .fails(2, &["a-stats.npz", "other weights"]);
}

#[test]
fn inception_judges_with_the_weights_of_its_file() {
    let sandbox = Sandbox::new();
    let random = cm_net::Inception::random(1, Device::Cpu).unwrap();
    let weights = cm_net::inception::convert(random.params().snapshot()).unwrap();
    weights.write(&sandbox.path("data/inception/inception.safetensors")).unwrap();
    samples(&sandbox, "a.npz", 6, 3);
    samples(&sandbox, "b.npz", 6, 5);
    let line = "eval a.npz --reference b.npz --device cpu --metrics kid,is,pr --is-splits 2 --kid-subsets 3";
    let done = sandbox.cm(line).run().ok();
    let figures = summary(&sandbox, "out/eval/a.json");
    assert!(mean(&figures, "is") >= 1.0 && figures["kid_std"].is_object(), "{figures}");
    assert!((0.0..=1.0).contains(&mean(&figures, "recall")) && done.stdout.contains("| precision"));
    sandbox
        .cm("eval a.npz --reference b.npz --device cpu")
        .run()
        .fails(2, &["6 images", "2048", "--allow-few"]);

    // Spatial features: 2023 numbers an image, of which six images say something all the same.
    let line = "--device cpu --metrics sfid --allow-few --save-stats s.npz -o s.json";
    sandbox.cm(&format!("eval a.npz --reference b.npz {line}")).run().ok();
    let apart = mean(&summary(&sandbox, "s.json"), "sfid");
    let json: Value = serde_json::from_str(&sandbox.read("s.json")).unwrap();
    assert!(json["warnings"][0].as_str().unwrap().contains("2023 numbers"), "{json}");
    let stored = cm_data::arrays::read(&sandbox.path("s.npz"), &["mu_s", "sigma_s"]).unwrap();
    assert_eq!((&stored["mu_s"].shape[..], &stored["sigma_s"].shape[..]), (&[2023][..], &[2023, 2023][..]));
    sandbox.cm(&format!("eval a.npz --reference a.npz {line}")).run().ok();
    let same = mean(&summary(&sandbox, "s.json"), "sfid");
    assert!(apart > 0.0 && same.abs() < 1e-6 * apart, "{apart} {same}");
}

/// Half a gigabyte of black images in half a megabyte, and a network that answers with no number.
fn bad_numbers_end_in_one_line(sandbox: &Sandbox) {
    let file = std::fs::File::create(sandbox.path("bomb.npz")).unwrap();
    let mut archive = zip::ZipWriter::new(file);
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated)
        .compression_level(Some(1));
    archive.start_file("arr_0.npy", options).unwrap();
    let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (8388608, 8, 8), }\n";
    let length = (header.len() as u16).to_le_bytes();
    archive.write_all(&[b"\x93NUMPY\x01\x00".as_slice(), &length, header.as_bytes()].concat()).unwrap();
    std::io::copy(&mut std::io::repeat(0).take(512 << 20), &mut archive).unwrap();
    archive.finish().unwrap();
    let line = "eval bomb.npz --reference digits --metrics fcd --device cpu";
    sandbox.cm(line).run().fails(2, &["bomb.npz: arr_0", "bytes unpacked"]);

    sandbox.cm("eval a.npz --reference digits --metrics fcd --device cpu -o a.json").run().ok();
    let cached = sandbox.list("out/eval/cache");
    let classifier = cached.iter().find(|name| name.starts_with("classifier-")).unwrap();
    let mut bundle = Bundle::read(&sandbox.path(format!("out/eval/cache/{classifier}"))).unwrap();
    let _ = bundle.tensors.get_mut("linear0.bias").unwrap().fill_(f64::NAN);
    bundle.write(&sandbox.path("nan.safetensors")).unwrap();
    for metrics in ["fcd", "kcd", "cpr"] {
        let line = format!("eval a.npz --reference digits --metrics {metrics} --classifier nan.safetensors");
        let done = sandbox.cm(&format!("{line} --device cpu")).run();
        let code = done.code.unwrap_or_default();
        assert!(matches!(code, 1 | 2), "{done:#?}");
        done.fails(code, &["finite"]);
    }
}

#[test]
fn bad_inputs_end_in_one_line() {
    let sandbox = Sandbox::new();
    samples(&sandbox, "a.npz", 300, 3);
    samples(&sandbox, "few.npz", 20, 3);
    samples(&sandbox, "one.npz", 1, 3);
    let fails = |line: &str, words: &[&str]| {
        sandbox.cm(&format!("{line} --device cpu")).run().fails(2, words);
    };
    fails("eval a.npz --reference digits --metrics fid", &["no weights of Inception", "fetch inception"]);
    fails("eval a.npz", &["--reference"]);
    fails("eval nothing --reference digits", &["nothing"]);
    fails("eval a.npz --reference digits --sample --no-clip", &["--sample is for models"]);
    fails("eval few.npz --reference digits --metrics fcd", &["20 images", "128", "singular", "--allow-few"]);
    fails("eval one.npz --reference digits --metrics fcd", &["at least 2", "got 1"]);
    fails("eval a.npz --reference emoji", &["1x8x8", "3x32x32"]);
    fails("eval digits:test --reference digits", &["holdout"]);

    let whole = std::fs::read(sandbox.path("a.npz")).unwrap();
    sandbox.write("torn.npz", &whole[..whole.len() / 2]);
    fails("eval torn.npz --reference digits", &["torn.npz"]);
    // A picture of another size among the others.
    let shape = Shape::square(1, 8);
    cm_data::grid::save_samples(&sandbox.path("mixed"), &[9; 64], shape, &[0], false).unwrap();
    let wide = Shape { channels: 1, height: 8, width: 9 };
    cm_data::grid::save_samples(&sandbox.path("mixed"), &[9; 72], wide, &[1], false).unwrap();
    fails("eval mixed --reference digits", &["expected 8x8 pixels, got 9x8"]);

    bad_numbers_end_in_one_line(&sandbox);
    let statistics = |name: &str, sigma: [f64; 4]| {
        let array = |shape: &[usize], values: &[f64]| cm_data::arrays::Array {
            shape: shape.into(),
            values: values.into(),
        };
        let (mu, sigma) = (array(&[2], &[0.0, 1.0]), array(&[2, 2], &sigma));
        cm_data::arrays::save(&sandbox.path(name), &[("mu", &mu), ("sigma", &sigma)]).unwrap();
    };
    let random = cm_net::Inception::random(1, Device::Cpu).unwrap();
    let weights = cm_net::inception::convert(random.params().snapshot()).unwrap();
    weights.write(&sandbox.path("data/inception/inception.safetensors")).unwrap();
    for (sigma, says) in [
        ([1.0, 0.0, 0.0, f64::NAN], "NaN"),
        ([0.0; 4], "zeros"),
        ([1.0, 3.0, 3.0, 1.0], "eigenvalue"),
        ([1.0, 1.0, 1.0, 1.0], "rank 1"),
    ] {
        statistics("s.npz", sigma);
        fails("eval few.npz --reference s.npz --metrics fid", &[says]);
    }
    sandbox.write("x.json", "{}");
    sandbox.cm("eval --compare x.json x.json").run().fails(2, &["x.json", "format 1"]);
    sandbox.cm("model import a.npz --as inception -o x.safetensors").run().fails(2, &["a.npz"]);
}
