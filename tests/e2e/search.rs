//! The search for time points: what it finds, what it writes down, and that it asks for nothing twice.

use std::fs;

use cm_tests::{Done, Sandbox};

use crate::distill::teacher;

const LOG: &str = "log.jsonl";

/// A model after 30 steps, in `run`.
fn trained() -> Sandbox {
    let sandbox = Sandbox::new();
    sandbox.cm("train --config tiny.toml --device cpu --out run").run().ok();
    sandbox
}

fn search(sandbox: &Sandbox, options: &str) -> Done {
    let log = if options.contains("--log") { String::new() } else { format!("--log {LOG}") };
    sandbox.cm(&format!("search-ts run --device cpu --samples 40 --steps 12 {log} {options}")).run()
}

/// The evaluations in the log.
fn evaluations(sandbox: &Sandbox) -> Vec<serde_json::Value> {
    sandbox.read(LOG).lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn asked(done: &Done) -> usize {
    done.stderr.lines().filter(|line| line.contains(" of at most ")).count()
}

#[test]
fn a_classifier_and_inception_can_judge() {
    let sandbox = trained();
    let fcd = search(&sandbox, "--score fcd --cache cache").ok();
    assert!(fcd.stderr.contains("training a classifier (labels)"), "{fcd:#?}");
    assert!(asked(&fcd) >= 3 && fcd.stdout.contains("best: 0,"), "{fcd:#?}");
    let again = search(&sandbox, "--score fcd --cache cache").ok();
    assert!(!again.stderr.contains("training a classifier"), "it is kept: {again:#?}");
    // Scores of pixels are no scores of a classifier.
    search(&sandbox, "").fails(2, &[LOG, "score"]);
    search(&sandbox, "--score fid --log fid.jsonl")
        .fails(2, &["no weights of Inception", "cm fetch inception"]);
}

#[test]
fn the_points_that_it_prints_are_the_best_of_those_in_its_log_and_sample() {
    let sandbox = trained();
    let one = search(&sandbox, "").ok();
    let found = evaluations(&sandbox);
    assert_eq!(asked(&one), found.len());
    assert!((3..=2 * 6).contains(&found.len()), "2⌈log₁.₅ 10⌉ = 12: {found:#?}");
    let score = |e: &serde_json::Value| e["score"].as_f64().unwrap();
    let best = found.iter().min_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
    let ts = best["ts"].as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    assert!(ts.starts_with("0,") && ts.ends_with(",11"), "{ts}");
    let line = format!("cm sample run --sampler multistep --ts {ts} --steps 12");
    assert!(one.stdout.contains(&line), "{line}: {one:#?}");
    sandbox.cm(line.strip_prefix("cm ").unwrap()).arg("--seeds").arg("0-3").run().ok();

    // What is known is not asked again, whole or torn.
    let again = search(&sandbox, "").ok();
    assert_eq!((asked(&again), &again.stdout), (0, &one.stdout));
    let text = sandbox.read(LOG);
    fs::write(sandbox.path(LOG), &text[..text.len() - 3]).unwrap();
    let torn = search(&sandbox, "").ok();
    assert_eq!((asked(&torn), &torn.stdout), (1, &one.stdout));
    assert_eq!(sandbox.read(LOG), text);

    // The same search of other weights prints how to sample those.
    let raw = search(&sandbox, "--ema raw --log raw.jsonl").ok();
    assert!(raw.stdout.contains("cm sample run --ema raw --sampler multistep --ts 0,"), "{raw:#?}");

    // A second point goes on from the first.
    let two = search(&sandbox, "--points 2").ok();
    let more = evaluations(&sandbox);
    assert_eq!(found.len() + asked(&two), more.len());
    assert!(more[found.len()..].iter().all(|e| e["ts"].as_array().unwrap().len() == 4));
}

#[test]
fn wrong_use_is_one_line() {
    let sandbox = trained();
    search(&sandbox, "--data emoji --points 1").ok();
    search(&sandbox, "--points 1")
        .fails(2, &[LOG, "the log of another search", "data bundled emoji", "--log"]);
    search(&sandbox, "--points 11").fails(2, &["11 time points on a grid of 12", "from 1 to 10"]);
    search(&sandbox, "--data nowhere").fails(2, &["nowhere"]);
    let model = sandbox.list("run/checkpoints").pop().unwrap();
    let line = format!("search-ts run/checkpoints/{model}/raw.safetensors --device cpu");
    sandbox.cm(&line).run().fails(2, &["--data", "digits, emoji"]);
    teacher(&sandbox);
    sandbox.cm("search-ts edm --device cpu").run().fails(2, &["edm/", "denoiser", "consistency"]);
}
