//! Teachers, what is distilled from them, and runs that begin with the weights of another.

use cm_tests::{Cm, Sandbox, assert_same_checkpoint, largest_difference};

use crate::model::{TINY, fixture};

/// EDM's diffusion training (Karras et al. 2022) in place of the CT of `tiny.toml`.
pub const EDM: &[&str] = &[
    "train.pairs={kind='denoise', sigma={mean=-1.2, std=1.2}}",
    "train.target={kind='image'}",
    "train.metric=squared_norm",
    "train.weighting=karras",
    "train.lr_rule={kind='warmup', warmup_images=64.0}",
];

/// Consistency distillation (Song et al. 2023, Algorithm 2).
pub const CD: &[&str] = &[
    "train.pairs.num_scales={kind='fixed', num_scales=18}",
    "train.target={kind='ema', rule={kind='fixed', mu=0.95}}",
    "train.teacher={solver='heun'}",
];

/// Progressive distillation to 4, 2 and 1 steps (Salimans and Ho 2022): stages of 6, 12 and 12 steps.
pub const PD: &[&str] = &[
    "train.pairs={kind='steps', rho=7.0, num_scales={kind='prog_dist', start=4, steps_per_stage=6}}",
    "train.target={kind='two_steps'}",
    "train.weighting=truncated_snr",
    "train.lr_rule={kind='linear'}",
    "train.optimizer.kind=adam",
];

/// A denoiser after 30 steps, in `edm`.
pub fn teacher(sandbox: &Sandbox) {
    let train = sandbox.cm("train-teacher --config tiny.toml --device cpu --out edm");
    train.set(EDM).set(&["network.dropout=0"]).run().ok();
}

fn distill(sandbox: &Sandbox, sets: &[&str], out: &str) -> Cm {
    let line = format!("distill --teacher edm --config tiny.toml --device cpu --out {out}");
    sandbox.cm(&line).set(sets)
}

/// Kills a distillation in the middle and resumes it from another folder's point of view: without naming anything.
fn survives(sets: &[&str], step: u64) -> Sandbox {
    let sandbox = Sandbox::new();
    teacher(&sandbox);
    let checkpoints = ["run.checkpoint_every=1", "run.keep_last=2"];
    distill(&sandbox, sets, "whole").set(&checkpoints).run().ok();
    let mut running = distill(&sandbox, sets, "killed").set(&checkpoints).start();
    running.wait_for_step(&sandbox.path("killed"), step);
    running.signal("KILL");
    assert_eq!(running.wait().code, None, "killed");
    // The teacher goes on, which changes nothing for what was distilled from it; and where it is needed no more it
    // may even move.
    sandbox.cm("train --resume --device cpu --out edm").set(&["train.total_steps=40"]).run().ok();
    if sets == PD {
        std::fs::rename(sandbox.path("edm"), sandbox.path("moved")).expect("moving the teacher");
    }
    sandbox.cm("distill --resume --device cpu --out killed").run().ok();
    let last = |out: &str| sandbox.path(format!("{out}/checkpoints/step-00000030"));
    assert_same_checkpoint(&last("whole"), &last("killed"));
    sandbox
}

#[test]
fn a_consistency_distillation_that_is_killed_ends_in_the_bits_of_one_that_is_not() {
    let sandbox = survives(CD, 11);
    let info = sandbox.cm("model info whole").run().ok().stdout;
    assert!(info.contains("consistency function"), "{info}");
    sandbox.cm("sample whole --seeds 0-3 --device cpu --out one").run().ok();
    assert_eq!(sandbox.list("one").len(), 6, "four pictures, a grid and an archive");
}

#[test]
fn a_progressive_distillation_resumes_in_any_stage_and_knows_its_steps() {
    for step in [3, 6, 13] {
        let sandbox = survives(PD, step);
        let info = sandbox.cm("model info whole").run().ok().stdout;
        assert!(info.contains("denoiser") && info.contains("student_steps 1"), "{info}");
        let done = sandbox.cm("sample whole --seeds 0-3 --device cpu --out one").run().ok();
        assert!(done.stderr.contains("1 evaluation(s)"), "{}", done.stderr);
    }
}

#[test]
fn a_teacher_is_sampled_by_solvers_and_by_nothing_else() {
    let sandbox = Sandbox::new();
    teacher(&sandbox);
    let done = sandbox.cm("sample edm --seeds 0-3 --device cpu --out heun").run().ok();
    assert!(done.stderr.contains("35 evaluation(s)"), "{}", done.stderr);
    let done = sandbox.cm("sample edm --sampler euler --steps 5 --seeds 0-3 --device cpu --out euler").run();
    assert!(done.ok().stderr.contains("5 evaluation(s)"));
    let words = ["denoiser", "consistency function", "Heun"];
    sandbox.cm("sample edm --sampler onestep --device cpu --out x").run().fails(2, &words);
    let words = ["--sampler progdist needs --steps"];
    sandbox.cm("sample edm --sampler progdist --device cpu --out x").run().fails(2, &words);
    sandbox.cm("train --config tiny.toml --device cpu --out ct").run().ok();
    let words = ["consistency function", "denoiser", "multistep"];
    sandbox.cm("sample ct --sampler heun --device cpu --out x").run().fails(2, &words);
}

#[test]
fn a_student_starts_from_its_teacher_and_any_run_from_any_model() {
    let sandbox = Sandbox::new();
    teacher(&sandbox);
    let still = ["train.lr=1e-30", "train.total_steps=1", "train.optimizer.kind=adam"];
    distill(&sandbox, CD, "cd").set(&still).run().ok();
    let weights =
        |run: &str, step: u64| sandbox.path(format!("{run}/checkpoints/step-{step:08}/raw.safetensors"));
    // `edm` means its first average, which is not its raw weights.
    let average = sandbox.path("edm/checkpoints/step-00000030/ema-0.9.safetensors");
    assert_eq!(largest_difference(&average, &weights("cd", 1)), 0.0);
    assert!(largest_difference(&weights("edm", 30), &weights("cd", 1)) > 0.0);
    let from = |model: &str, out: &str| {
        let line = format!("train --config tiny.toml --device cpu --init-from {model} --out {out}");
        sandbox.cm(&line).set(&still)
    };
    from("edm", "ct").run().ok();
    assert_eq!(largest_difference(&average, &weights("ct", 1)), 0.0);
    from("edm/checkpoints/step-00000030/raw.safetensors", "raw").run().ok();
    assert_eq!(largest_difference(&weights("edm", 30), &weights("raw", 1)), 0.0);
}

#[test]
fn a_teacher_that_does_not_fit_is_one_error_before_any_data_is_touched() {
    let sandbox = Sandbox::new();
    teacher(&sandbox);
    let nowhere = ["data={kind='folder', path='nowhere'}"];
    let refused = |command: Cm, words: &[&str]| drop(command.set(&nowhere).run().fails(2, words));
    let other = ["network.model_channels=32", "network.channel_mult=[1, 2, 2]", "precond.sigma_data=0.25"];
    let words = [
        "edm/checkpoints/step-00000030/ema-0.9.safetensors does not fit the experiment tiny",
        "network.model_channels: 16 in the file, 32 in the experiment",
        "network.channel_mult: [1,2] in the file, [1,2,2] in the experiment",
        "precond.sigma_data: 0.5 in the file, 0.25 in the experiment",
    ];
    refused(distill(&sandbox, CD, "x").set(&other), &words);
    let words = ["it makes images of 1×8×8", "3×8×8"];
    refused(distill(&sandbox, CD, "x").set(&["network.image_channels=3"]), &words);
    // The data of CIFAR-10 would be fetched: it is not, for a model that is not there.
    for line in ["distill --teacher missing.pt", "train-cifar10 --init-from missing.pt"] {
        let command = sandbox.cm(&format!("{line} --config cifar10-ct --device cpu --out x"));
        command.run().fails(2, &["missing.pt", "no such file"]);
    }
    assert!(sandbox.list("data").is_empty());
    let line = "distill --teacher missing.pt --config tiny.toml --device cpu --out x";
    refused(sandbox.cm(line).set(CD), &["missing.pt", "no such file"]);
    sandbox.write("torn.pt", "PK\u{3}\u{4} and no more");
    refused(sandbox.cm(&line.replace("missing", "torn")).set(CD), &["torn.pt"]);
    let line = "train --config tiny.toml --device cpu --out x";
    refused(sandbox.cm(line).set(CD), &["--teacher FILE", "cargo xtask distill"]);
    sandbox.cm("train --config tiny.toml --device cpu --out ct").run().ok();
    let line = "distill --teacher ct --config tiny.toml --device cpu --out x";
    refused(sandbox.cm(line).set(CD), &["a consistency function cannot teach", "--init-from"]);
    assert!(sandbox.list("x").is_empty());
}

#[test]
fn presets_that_distil_a_teacher_are_found_or_listed() {
    let sandbox = Sandbox::new();
    let train = |out: &str, preset: &str| {
        let line = format!("train-teacher --config {preset} --device cpu --out {out}");
        sandbox.cm(&line).set(&["train.total_steps=1", "train.batch=2"]).run().ok();
    };
    train("digits", "digits-edm");
    let still = ["train.total_steps=1", "train.batch=2"];
    let done = sandbox.cm("distill --teacher digits --device cpu --out cd").set(&still).run().ok();
    assert!(done.stderr.contains("preset digits-cd"), "{}", done.stderr);
    teacher(&sandbox);
    let words = ["no preset has a network like it", "cm preset show", "--config"];
    sandbox.cm("distill --teacher edm --device cpu --out x").run().fails(2, &words);
    let done = sandbox.cm("distill --teacher digits --device cpu --dry-run --out x").run().ok();
    for words in ["the named model fits the experiment", "step, 1 image"] {
        assert!(done.stdout.contains(words), "{words}: {}", done.stdout);
    }
    let words = ["it does not train a diffusion model", "cifar10-edm"];
    for config in ["digits-ct", "digits-pd"] {
        sandbox.cm(&format!("train-teacher --config {config} --out x")).run().fails(2, &words);
    }
    let words = ["it trains a diffusion model, which distils nothing"];
    sandbox.cm("distill --teacher digits --config digits-edm --out x").run().fails(2, &words);
    sandbox.cm("train --config digits-ct --as edm --out x").run().fails(2, &["--as belongs to"]);
}

/// The network of the fixture in OpenAI's names, which knows ten classes.
const OPENAI: &[&str] = &[
    "network={kind='openai_unet', image_size=8, image_channels=3, num_classes=10, model_channels=32, \
     channel_mult=[1,2], num_blocks=1, attn_resolutions=[4], attn_heads={head_channels=32}, dropout=0.0, \
     scale_shift_norm=true, resblock_updown=true}",
    "data={kind='digits', channels='rgb', labels='auto'}",
    "precond.noise_cond=thousand_quarter_log",
    "train.total_steps=2",
];

#[test]
fn a_published_form_teaches_as_it_is_once_its_kind_is_told() {
    let sandbox = Sandbox::new();
    sandbox.write("edm.pt", fixture("openai_cond.pt.gz"));
    let line = "distill --teacher edm.pt --config tiny.toml --device cpu --out cd";
    sandbox.cm(line).set(CD).set(OPENAI).run().fails(2, &["edm.pt", "--as KIND"]);
    let kind = TINY.replace("role=consistency", "role=denoiser");
    sandbox.cm(&format!("{line} {kind}")).set(CD).set(OPENAI).run().ok();
    sandbox.cm("sample cd --class 7 --seeds 0-1 --device cpu --out out").run().ok();
    // The same weights as what they are not.
    let words = ["a consistency function cannot teach"];
    sandbox.cm(&format!("{line}2 {TINY}")).set(CD).set(OPENAI).run().fails(2, &words);
    let line = "train --init-from edm.pt --config tiny.toml --device cpu --out ct";
    sandbox.cm(&format!("{line} {TINY}")).set(OPENAI).run().ok();
}
