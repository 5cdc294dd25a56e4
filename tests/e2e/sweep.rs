//! Sweeps: runs that differ in some values, and their table.

use cm_tests::{Cm, Sandbox, assert_same_checkpoint};
use serde_json::Value;

const LAST: &str = "checkpoints/step-00000030";

fn sweep(sandbox: &Sandbox, values: &[&str]) -> Cm {
    let command = sandbox.cm("train --config tiny.toml --device cpu --out all");
    values.iter().fold(command, |command, values| command.arg("--sweep").arg(values))
}

fn table(sandbox: &Sandbox) -> Vec<Value> {
    let table: Value = serde_json::from_str(&sandbox.read("all/sweep.json")).unwrap();
    table["runs"].as_array().unwrap().clone()
}

fn statuses(sandbox: &Sandbox) -> Vec<String> {
    table(sandbox).iter().map(|run| run["status"].as_str().unwrap().to_owned()).collect()
}

/// Asserts that a run of the sweep ended as a run on its own with the same values does.
fn assert_as_on_its_own(sandbox: &Sandbox, name: &str, sets: &[&str]) {
    let single = sandbox.cm("train --config tiny.toml --device cpu --out single").set(sets);
    single.run().ok();
    assert_same_checkpoint(
        &sandbox.path("single").join(LAST),
        &sandbox.path(format!("all/{name}")).join(LAST),
    );
}

#[test]
fn runs_end_as_they_do_on_their_own_and_stand_in_one_table() {
    let sandbox = Sandbox::new();
    let values = ["train.lr=1e-3,5e-4", "train.metric={kind='pseudo_huber', c=0.1}"];
    let done = sweep(&sandbox, &values).run().ok();
    assert_eq!(statuses(&sandbox), ["finished", "finished"]);
    let runs = table(&sandbox);
    let name = runs[1]["name"].as_str().unwrap();
    assert!(name.starts_with("lr=5e-4,metric=kind=-pseudo_huber-"), "{name}");
    assert_eq!(runs[1]["folder"], format!("all/{name}"));
    assert_as_on_its_own(&sandbox, name, &["train.lr=5e-4", "train.metric={kind='pseudo_huber', c=0.1}"]);
    let log = sandbox.read(&format!("all/{name}/progress.csv"));
    let loss: f64 = log.lines().last().unwrap().split(',').nth(2).unwrap().parse().unwrap();
    assert_eq!(runs[1]["loss"].as_f64(), Some(loss));
    for figure in ["minutes", "images_per_second"] {
        assert!(runs[1][figure].as_f64().unwrap() > 0.0, "{runs:?}");
    }
    let csv = sandbox.read("all/sweep.csv");
    assert!(csv.starts_with("train.lr,train.metric,status,loss,images_per_second,minutes,folder\n"), "{csv}");
    assert!(csv.contains(&format!(",finished,{loss},")), "{csv}");
    let lines: Vec<_> = done.stdout.lines().collect();
    assert!(lines.len() == 3 && lines[0].starts_with("train.lr  train.metric"), "{done:#?}");
    assert!(lines[2].starts_with("5e-4 ") && lines[2].ends_with(&format!("all/{name}")), "{done:#?}");

    let before =
        std::fs::metadata(sandbox.path(format!("all/{name}/stats.jsonl"))).unwrap().modified().unwrap();
    let again = sandbox.cm("train --out all --resume --device cpu").run().ok();
    assert_eq!(again.stderr.matches("has finished").count(), 2, "{again:#?}");
    assert_eq!(again.stdout, done.stdout, "the table of finished runs stays");
    let after =
        std::fs::metadata(sandbox.path(format!("all/{name}/stats.jsonl"))).unwrap().modified().unwrap();
    assert_eq!(before, after, "a finished run was repeated");
}

#[test]
fn ctrl_c_stops_all_runs_and_the_resumed_sweep_ends_in_the_same_bits() {
    let sandbox = Sandbox::new();
    let mut running = sweep(&sandbox, &["train.seed=1,2,3"]).start();
    running.wait_for_step(&sandbox.path("all/seed=2"), 12);
    running.signal("INT");
    let done = running.wait();
    assert_eq!(done.code, Some(130), "{done:#?}");
    assert_eq!(statuses(&sandbox), ["finished", "interrupted", "waiting"]);
    let last = done.stderr.lines().last().unwrap();
    assert!(last.starts_with("interrupted: 1 of 3 runs have finished; "), "{last}");
    let first = sandbox.read("all/seed=1/stats.jsonl");
    let advice = last.split_once("go on with: cm ").expect("advice").1;
    let done = sandbox.cm(advice).arg("--device").arg("cpu").run().ok();
    assert!(done.stderr.contains("run 1 of 3: seed=1 has finished"), "{done:#?}");
    assert!(done.stderr.contains("resumed at step 1"), "{done:#?}");
    assert_eq!(statuses(&sandbox), ["finished"; 3]);
    assert_eq!(sandbox.read("all/seed=1/stats.jsonl"), first);
    assert_as_on_its_own(&sandbox, "seed=2", &["train.seed=2"]);
}

#[test]
fn values_may_be_added_to_a_sweep() {
    let sandbox = Sandbox::new();
    let short = ["train.total_steps=2"];
    sweep(&sandbox, &["train.seed=1"]).set(&short).run().ok();
    sweep(&sandbox, &["train.seed=1,2"]).set(&short).arg("--resume").run().ok();
    assert_eq!(statuses(&sandbox), ["finished"; 2]);
    assert_eq!(sandbox.list("all"), ["seed=1", "seed=2", "sweep.csv", "sweep.json"]);
    // The settings of a run that has finished cannot be changed any more; its end can be put off.
    let resume = || sandbox.cm("train --out all --resume --device cpu");
    resume().set(&["train.lr=1e-4"]).run().fails(2, &["seed=1: it has finished, with other values"]);
    resume().set(&["train.total_steps=3"]).run().ok();
    assert_eq!(sandbox.list("all/seed=2/checkpoints"), ["step-00000002", "step-00000003"]);
}

#[test]
fn a_run_that_fails_is_reported_and_the_others_go_on() {
    let sandbox = Sandbox::new();
    let done = sweep(&sandbox, &["train.lr=1e30,1e-3"]).run();
    assert!(done.stderr.contains("FAILED: lr=1e30: step 2: "), "{done:#?}");
    done.fails(1, &["1 of 2 runs failed: lr=1e30", "all/sweep.json"]);
    assert_eq!(statuses(&sandbox), ["failed", "finished"]);
    assert!(table(&sandbox)[0]["error"].as_str().unwrap().contains("the loss (NaN) is not finite"));
    assert!(sandbox.path("all/lr=1e-3").join(LAST).is_dir());
}

#[test]
fn values_that_cannot_be_are_all_found_before_a_run_begins() {
    let sandbox = Sandbox::new();
    for (values, words) in [
        (&["train.lr=1e-3,-1,fast"][..], &["2 of 3 runs", "lr=-1: ", "train.lr = -1", "lr=fast: "][..]),
        (&["train.lr=1e-3", "train.lerning_rate=1"], &["unknown field", "lerning_rate"]),
        (&["network.image_channels=1,3"], &["1 of 2 runs", "image_channels=3: ", "1x8x8"]),
        (&["train.seed=1,1"], &["--sweep train.seed", "1 is there twice"]),
        (&["precond.sigma_data=1.0,1.00"], &["1.00 is there twice"]),
        (&["train.lr"], &["--sweep train.lr", "section.key=a,b,c"]),
        (&["train.metric=l2,{kind='l2'}"], &["metric=l2 and metric=", "same experiment"]),
        (&["run.log_every=1,0"], &["run.log_every = 0"]),
    ] {
        sweep(&sandbox, values).run().fails(2, words);
        assert!(!sandbox.path("all").exists(), "{values:?}: something was begun");
    }
    let both = sweep(&sandbox, &["train.seed=1"]).set(&["train.seed=2"]);
    both.run().fails(2, &["--set train.seed=2", "drop one"]);
    let homeless = sandbox.cm("train --config tiny.toml --sweep train.seed=1").run();
    assert!(homeless.code == Some(2) && homeless.stderr.contains("--out <DIR>"), "{homeless:#?}");
}

#[test]
fn a_sweep_is_not_written_over_another() {
    let sandbox = Sandbox::new();
    let done = sweep(&sandbox, &["train.seed=1"]).arg("--dry-run").run().ok();
    assert!(done.stdout.contains("# seed=1") && !sandbox.path("all").exists(), "{done:#?}");
    sweep(&sandbox, &["train.seed=1"]).set(&["train.total_steps=1"]).run().ok();
    sweep(&sandbox, &["train.seed=2"]).run().fails(2, &["all/sweep.json", "--resume", "--out"]);
    sandbox.write("all/sweep.json", "{");
    let resume = sandbox.cm("train --out all --resume --device cpu").run();
    resume.fails(2, &["all/sweep.json: this is no table of a sweep"]);
}
