//! Training, and what may interrupt it.

use cm_tests::{Cm, Running, Sandbox, assert_same_checkpoint, largest_difference};

const STEPS: u64 = 30;

/// Improved consistency training (Song and Dhariwal 2023), beside the CT of `tiny.toml`.
const ICT: &[&str] = &[
    "train.target={kind='live'}",
    "train.pairs.num_scales={kind='doubling', s0=3, s1=24}",
    "train.pairs.index={kind='log_normal', mean=-1.1, std=2.0}",
    "train.metric=pseudo_huber",
    "train.weighting=inverse_step",
    "train.optimizer.kind=adam",
    "train.lr_rule={kind='warmup', warmup_images=64.0}",
];

/// The recipe of Geng et al. 2024.
const ECT: &[&str] = &[
    "train.target={kind='live'}",
    "train.pairs={kind='continuous', sigma={mean=-0.8, std=1.6}, \
     map={q=2.0, stages=5, adjust={kind='sigmoid', k=8.0, b=1.0}}}",
    "train.metric={kind='pseudo_huber', c=0.0}",
    "train.weighting=inverse_step",
    "train.optimizer={kind='adam_w', beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01}",
    "train.lr_rule={kind='cosine', warmup_steps=5}",
];

/// The augmentation of Karras et al. 2022, more often than there.
const AUGMENT: &[&str] = &[
    "network.augment_dim=9",
    "augment={p=0.5, xflip=1e8, yflip=1, scale=1, rotate=1, aniso=1, translate=1}",
];

fn train(sandbox: &Sandbox, out: &str) -> Cm {
    sandbox.cm(&format!("train --config tiny.toml --device cpu --out {out}"))
}

fn resume(sandbox: &Sandbox, out: &str) -> Cm {
    sandbox.cm(&format!("train --device cpu --resume --out {out}"))
}

/// Starts a run and waits until it has taken `step`.
fn running(command: Cm, sandbox: &Sandbox, out: &str, step: u64) -> Running {
    let mut running = command.start();
    running.wait_for_step(&sandbox.path(out), step);
    running
}

/// The log of `out`, without the columns that tell the time.
fn log(sandbox: &Sandbox, out: &str) -> Vec<String> {
    let rows = sandbox.read(&format!("{out}/progress.csv"));
    let untimed = |row: &str| row.rsplitn(3, ',').last().unwrap_or_default().to_owned();
    rows.lines().map(untimed).collect()
}

/// The steps in `stats.jsonl`.
fn stats(sandbox: &Sandbox, out: &str) -> Vec<u64> {
    let text = sandbox.read(&format!("{out}/stats.jsonl"));
    let step = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    text.lines().map(step).collect()
}

/// Asserts that the runs `one` and `other` ended in the same state and logged the same steps, each once.
fn assert_same_run(sandbox: &Sandbox, one: &str, other: &str) {
    let last = |out: &str| sandbox.path(out).join(format!("checkpoints/step-{STEPS:08}"));
    assert_same_checkpoint(&last(one), &last(other));
    assert_eq!(log(sandbox, one), log(sandbox, other));
    assert_eq!(log(sandbox, one).len() as u64, 1 + STEPS, "a header and a row for each step");
    // The times in them differ, and their length does not.
    let events =
        |out: &str| std::fs::metadata(sandbox.path(out).join("events.out.tfevents.cm")).unwrap().len();
    assert_eq!(events(one), events(other));
    for out in [one, other] {
        assert_eq!(stats(sandbox, out), (1..=STEPS).collect::<Vec<_>>());
    }
}

#[test]
fn a_run_that_is_killed_ends_in_the_bits_of_one_that_is_not() {
    let sandbox = Sandbox::new();
    // With a checkpoint after every step a kill falls into the writing of one as often as not.
    let checkpoints = ["run.checkpoint_every=1", "run.keep_last=2"];
    train(&sandbox, "whole").set(&checkpoints).threads(2).run().ok();
    for (round, step) in [7, 15, 23].into_iter().enumerate() {
        let command = match round {
            0 => train(&sandbox, "killed").set(&checkpoints),
            _ => resume(&sandbox, "killed"),
        };
        let running = running(command.threads(2), &sandbox, "killed", step);
        running.signal("KILL");
        assert_eq!(running.wait().code, None, "a signal ended it");
        let saved = sandbox.list("killed/checkpoints");
        assert!(saved.iter().any(|name| name.starts_with("step-")), "{saved:?}");
    }
    let done = resume(&sandbox, "killed").threads(2).run().ok();
    assert!(done.stderr.contains("resumed at step"), "{done:#?}");
    assert_same_run(&sandbox, "whole", "killed");
    let kept = sandbox.list("killed/checkpoints");
    assert_eq!(kept, ["step-00000029", "step-00000030"], "two are kept, and nothing half-written");
}

/// Interrupts a run and goes on with the command that it prints.
fn interrupt(signal: &str, sets: &[&str]) {
    let sandbox = Sandbox::new();
    train(&sandbox, "whole").set(sets).run().ok();
    let running = running(train(&sandbox, "stopped").set(sets), &sandbox, "stopped", 12);
    running.signal(signal);
    let done = running.wait();
    assert_eq!(done.code, Some(130), "{done:#?}");
    let last = done.stderr.lines().last().unwrap();
    let step = step_in(last, "interrupted: saved step ");
    assert!((12..STEPS).contains(&step), "{last}");
    assert!(sandbox.path(format!("stopped/checkpoints/step-{step:08}/state.json")).is_file(), "{last}");
    let advice = last.split_once("go on with: cm ").expect("advice").1;
    let done = sandbox.cm(advice).arg("--device").arg("cpu").run().ok();
    assert!(done.stderr.contains(&format!("resumed at step {step}")), "{done:#?}");
    assert_same_run(&sandbox, "whole", "stopped");
}

fn step_in(line: &str, before: &str) -> u64 {
    let number = line.strip_prefix(before).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no step in: {line}"))
}

#[test]
fn ctrl_c_saves_and_the_resumed_run_ends_in_the_same_bits() {
    interrupt("INT", &[ECT, AUGMENT].concat());
}

#[test]
fn sigterm_saves_and_the_resumed_run_ends_in_the_same_bits() {
    interrupt("TERM", ICT);
}

#[test]
fn a_run_ends_at_its_last_step_and_resuming_it_changes_nothing() {
    let sandbox = Sandbox::new();
    let keep = ["run.checkpoint_every=4", "run.keep_last=2", "run.milestone_every=12"];
    let done = train(&sandbox, "a").set(&keep).run().ok();
    assert!(done.stdout.contains("step-00000030"), "{done:#?}");
    let checkpoints = ["step-00000012", "step-00000024", "step-00000028", "step-00000030"];
    assert_eq!(sandbox.list("a/checkpoints"), checkpoints, "milestones, and the two newest");
    let content = || {
        let last = sandbox.list("a/checkpoints/step-00000030");
        let read = |name: &String| std::fs::read(sandbox.path(format!("a/checkpoints/step-00000030/{name}")));
        let files: Vec<Vec<u8>> = last.iter().map(|name| read(name).unwrap()).collect();
        (files, sandbox.list("a/checkpoints"), sandbox.read("a/progress.csv"), sandbox.read("a/stats.jsonl"))
    };
    let before = content();
    resume(&sandbox, "a").run().ok();
    assert!(content() == before, "a finished run was changed");
}

#[test]
fn resuming_where_nothing_is_starts_a_run() {
    let sandbox = Sandbox::new();
    let done = train(&sandbox, "a").arg("--resume").set(&["train.total_steps=2"]).run().ok();
    assert!(done.stderr.contains("no checkpoint yet: starting from step 0"), "{done:#?}");
    assert_eq!(sandbox.list("a/checkpoints"), ["step-00000002"]);
}

#[test]
fn settings_that_change_on_resuming_are_named() {
    let sandbox = Sandbox::new();
    train(&sandbox, "a").set(&["train.total_steps=2"]).run().ok();
    let done = resume(&sandbox, "a").set(&["train.total_steps=3", "train.lr=5e-4"]).run().ok();
    for change in ["train.lr: 0.001 → 0.0005", "train.total_steps: 2 → 3"] {
        assert!(
            done.stderr.contains(&format!("WARNING: changed since the checkpoint: {change}")),
            "{done:#?}"
        );
    }
    assert_eq!(sandbox.list("a/checkpoints"), ["step-00000002", "step-00000003"]);
}

#[test]
fn micro_batches_change_the_rounding_and_nothing_else() {
    let sandbox = Sandbox::new();
    // Masks of dropout are drawn for a micro-batch at a time.
    let run = |out: &str, more: &[&str]| {
        train(&sandbox, out).set(&["network.dropout=0.0"]).set(more).run().ok();
        sandbox.path(out).join("checkpoints/step-00000030/raw.safetensors")
    };
    let whole = run("whole", &[]);
    let split = run("split", &["train.micro_batch=4"]);
    let other = run("other", &["train.seed=8"]);
    let (rounding, seed) = (largest_difference(&whole, &split), largest_difference(&whole, &other));
    assert!(rounding < 1e-5 && seed > 1e-2, "split: {rounding:e}, another seed: {seed:e}");
}

#[test]
fn blocks_that_are_computed_again_change_the_rounding_and_nothing_else() {
    let sandbox = Sandbox::new();
    // Dropout is on, and parts of 3 images lie across the border between two ranks.
    let sets = ["train.micro_batch=3"];
    let raw = |out: &str| sandbox.path(out).join("checkpoints/step-00000030/raw.safetensors");
    let again = ["compute.checkpoint_activations=true"];
    train(&sandbox, "kept").set(&sets).run().ok();
    train(&sandbox, "again").set(&sets).set(&again).run().ok();
    train(&sandbox, "other").set(&sets).set(&["train.seed=8"]).run().ok();
    let line = "launch --nproc 2 -- train --config tiny.toml --device cpu --out ranks";
    sandbox.cm(line).set(&sets).set(&again).run().ok();
    let seed = largest_difference(&raw("kept"), &raw("other"));
    for out in ["again", "ranks"] {
        let rounding = largest_difference(&raw("kept"), &raw(out));
        assert!(rounding < 1e-5 && seed > 1e-2, "{out}: {rounding:e}, another seed: {seed:e}");
    }
}

#[test]
fn a_broken_checkpoint_is_passed_over_with_a_warning() {
    let sandbox = Sandbox::new();
    train(&sandbox, "whole").run().ok();
    train(&sandbox, "torn").run().ok();
    let torn = "torn/checkpoints/step-00000030/optimizer.safetensors";
    let bytes = std::fs::read(sandbox.path(torn)).unwrap();
    sandbox.write(torn, &bytes[..bytes.len() / 2]);
    let done = resume(&sandbox, "torn").run().ok();
    let warning = done.stderr.lines().find(|line| line.starts_with("WARNING: ")).expect("a warning");
    for word in ["step-00000030", "optimizer.safetensors", "passed over"] {
        assert!(warning.contains(word), "{warning}");
    }
    assert!(done.stderr.contains("resumed at step 20"), "{done:#?}");
    assert_same_run(&sandbox, "whole", "torn");
}

#[test]
fn a_run_with_no_whole_checkpoint_is_an_error() {
    let sandbox = Sandbox::new();
    train(&sandbox, "a").set(&["train.total_steps=2"]).run().ok();
    sandbox.write("a/checkpoints/step-00000002/raw.safetensors", "torn");
    let words = ["step-00000002", "raw.safetensors", "no older checkpoint is whole"];
    resume(&sandbox, "a").run().fails(2, &words);
}

#[test]
fn a_disk_that_is_full_ends_the_run_and_spares_what_was_saved() {
    let sandbox = Sandbox::new();
    train(&sandbox, "whole").run().ok();
    train(&sandbox, "full").set(&["train.total_steps=10"]).run().ok();
    // The settings of a run are its own: `whole` has them from its first step.
    std::fs::copy(sandbox.path("whole/config.toml"), sandbox.path("full/config.toml")).unwrap();
    let line = resume(&sandbox, "full").with_files_up_to(64).run();
    line.fails(1, &["full/checkpoints/", "step-00000020", "writing failed"]);
    assert_eq!(sandbox.list("full/checkpoints"), ["step-00000010"], "no half of a checkpoint is left");
}

#[test]
fn a_folder_in_which_another_process_trains_is_refused() {
    let sandbox = Sandbox::new();
    train(&sandbox, "whole").run().ok();
    let first = running(train(&sandbox, "shared"), &sandbox, "shared", 12);
    // Frozen, it holds the folder for as long as it takes.
    first.signal("STOP");
    let owner = sandbox.read("shared/.lock");
    for command in [resume(&sandbox, "shared"), train(&sandbox, "shared").arg("--resume")] {
        let words = ["shared: another process trains in this folder", owner.trim(), "--out"];
        command.run().fails(2, &words);
    }
    first.signal("KILL");
    assert_eq!(first.wait().code, None, "a signal ended it");
    resume(&sandbox, "shared").run().ok();
    assert_same_run(&sandbox, "whole", "shared");
    assert_eq!(sandbox.read("shared/.lock"), "", "nobody holds it");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_step_and_last_good_checkpoint() {
    let sandbox = Sandbox::new();
    let done = train(&sandbox, "a").set(&["train.lr=1e30", "run.checkpoint_every=1"]).run();
    done.fails(
        3,
        &[
            "step 2: ",
            "the loss (NaN) is not finite",
            "last good checkpoint is a/checkpoints/step-00000001;",
            "lower train.lr (1000000000000000",
            "set train.grad_clip (none is set)",
        ],
    );
    assert_eq!(sandbox.list("a/checkpoints"), ["step-00000001"]);
}

#[test]
fn a_gradient_that_is_not_finite_ends_the_run_and_names_its_tensor() {
    let sandbox = Sandbox::new();
    // Neighbouring levels of 10^22 are so close that the loss fits into float32 and its gradient does not.
    let huge = ["precond.sigma_max=1e22", "precond.sigma_data=1e22"];
    let close = "train.pairs.num_scales={kind='fixed', num_scales=10000}";
    let line = train(&sandbox, "a").set(&huge).set(&[close]).run();
    let line = line.fails(3, &["step 1: the gradient of '", "no checkpoint had been written"]);
    let tensor = line.split('\'').nth(1).unwrap();
    assert!(tensor.ends_with(".weight") || tensor.ends_with(".bias"), "{line}");
    assert_eq!(sandbox.list("a/checkpoints"), Vec::<String>::new());
}
