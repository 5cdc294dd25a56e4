//! `cm report`: the comparisons as one command, that goes on where it stood.

use cm_model::Bundle;
use cm_tests::{Cm, Sandbox};
use serde_json::Value;

/// Seven steps a run, the least that there can be.
const SHORT: &str = "report --smoke --budget 896 --trials pd,pd-2,cd --device cpu --out out";

fn report(sandbox: &Sandbox, more: &str) -> Cm {
    sandbox.cm(&format!("{SHORT} {more}"))
}

fn results(sandbox: &Sandbox) -> Value {
    serde_json::from_str(&sandbox.read("out/results.json")).unwrap()
}

/// Everything about a run that is no matter of time.
fn figures(run: &Value) -> [Value; 5] {
    ["trial", "seed", "steps", "curve", "scores"].map(|key| run[key].clone())
}

#[test]
fn a_killed_report_ends_as_an_undisturbed_one_and_grows() {
    let sandbox = Sandbox::new();
    let mut killed = report(&sandbox, "").start();
    killed.wait_for_step(&sandbox.path("out/runs/cd/seed-0"), 5);
    killed.signal("KILL");
    assert_eq!(killed.wait().code, None);
    let done = report(&sandbox, "").run().ok();
    assert!(done.stderr.contains("run 1 of 4: teacher seed 0: has finished"), "{}", done.stderr);
    let disturbed = results(&sandbox);
    let whole = Sandbox::new();
    report(&whole, "").run().ok();
    let runs = |results: &Value| results["runs"].as_array().unwrap().iter().map(figures).collect::<Vec<_>>();
    assert_eq!(runs(&disturbed), runs(&results(&whole)));

    let names: Vec<_> =
        disturbed["runs"].as_array().unwrap().iter().map(|run| run["trial"].clone()).collect();
    assert_eq!(names, ["teacher", "cd", "pd", "pd-2"], "in the order of the table");
    for run in disturbed["runs"].as_array().unwrap() {
        assert!(run["scores"].as_array().unwrap().iter().all(|score| score["fcd"].as_f64().unwrap() > 0.0));
        let of_student = run["trial"] != "teacher";
        assert_eq!(run["images"], if of_student { 896 } else { 1792 });
    }
    let steps = |run: &Value| {
        run["scores"].as_array().unwrap().iter().map(|s| s["evaluations"].clone()).collect::<Vec<_>>()
    };
    assert_eq!([1, 2, 3].map(|run| steps(&disturbed["runs"][run])), [&[1, 2, 4][..], &[1], &[2]]);
    let page = sandbox.read("out/results.md");
    assert!(page.contains("| CD is better than PD in two steps | cd, 2 evaluations |"), "{page}");
    assert!(
        page.contains("| CD is better than PD in one step |") && page.contains("fewer than 3 seeds"),
        "{page}"
    );
    assert!(sandbox.path("out/one-step.png").is_file() && sandbox.path("out/evaluations.png").is_file());
    assert_eq!(sandbox.list("out/runs/cd/seed-0").iter().filter(|name| *name == "checkpoints").count(), 0);

    // More seeds are more runs, and what is there stays.
    let more = report(&sandbox, "--seeds 2").run().ok();
    assert_eq!(more.stderr.matches("has finished").count(), 4, "{}", more.stderr);
    let grown = results(&sandbox);
    assert_eq!(grown["runs"].as_array().unwrap().len(), 7);
    let ranges = |results: &Value| -> Vec<u64> {
        let scores = results["runs"][0]["scores"].as_array().unwrap();
        scores.iter().filter_map(|score| score["range"].as_u64()).collect()
    };
    assert_eq!(ranges(&disturbed), [0, 0, 0]);
    assert_eq!(ranges(&grown), [0, 0, 0, 1], "the teacher is measured as often as a trial has seeds");
    sandbox.cm("sample out/runs/pd/seed-0/model.safetensors --seeds 0-3 --device cpu").run().ok();

    publishes(&sandbox);
    refuses_another_classifier(&sandbox);
    let other = sandbox.cm("report --smoke --budget 1792 --device cpu --out out").run();
    assert_eq!(other.code, Some(2));
    assert!(other.stderr.contains("budget 896, now 1792"), "{}", other.stderr);
}

/// Runs that one classifier scored are not joined by figures of another; nor are runs of other configs.
fn refuses_another_classifier(sandbox: &Sandbox) {
    let file = sandbox.list("out/cache").into_iter().find(|name| name.starts_with("classifier-")).unwrap();
    let path = sandbox.path(format!("out/cache/{file}"));
    let whole = std::fs::read(&path).unwrap();
    let mut bundle = Bundle::read(&path).unwrap();
    let _ = bundle.tensors.get_mut("linear1.bias").unwrap().g_add_scalar_(1.0);
    bundle.write(&path).unwrap();
    report(sandbox, "--seeds 2").run().fails(2, &["out: ", "another classifier", "--out"]);
    std::fs::write(&path, whole).unwrap();

    // A report from before the classifier was noted goes on with the one that it holds, and with no new one.
    let settings = sandbox.read("out/settings.json");
    let mut older: Value = serde_json::from_str(&settings).unwrap();
    assert!(older.as_object_mut().unwrap().remove("judge").unwrap().is_string());
    sandbox.write("out/settings.json", older.to_string());
    report(sandbox, "--seeds 2").run().ok();
    assert_eq!(sandbox.read("out/settings.json"), settings);
    sandbox.write("out/settings.json", older.to_string());
    std::fs::remove_file(&path).unwrap();
    report(sandbox, "--seeds 2").run().fails(2, &["classifier that is gone", "--out"]);
    sandbox.write("out/settings.json", &settings);

    let config = sandbox.read("out/runs/cd/seed-0/config.toml");
    sandbox.write("out/runs/cd/seed-0/config.toml", config.replace("lr = 0.001", "lr = 0.002"));
    report(sandbox, "--seeds 2").run().fails(2, &["cd/seed-0/config.toml", "other settings"]);
    sandbox.write("out/runs/cd/seed-0/config.toml", &config);
}

/// What was found goes into a checkout, and what people wrote there stays.
fn publishes(sandbox: &Sandbox) {
    let refused = sandbox.cm("report --publish-only --out out").run();
    assert!(refused.code == Some(2) && refused.stderr.contains("docs/results.md"), "{}", refused.stderr);
    sandbox.write("docs/results.md", "");
    sandbox.cm("report --publish-only --out out").run().ok();
    let page = sandbox.read("docs/results-digits.md");
    assert!(page.contains("](pictures/report-digits-one-step.png)"), "{page}");
    assert!(sandbox.path("docs/pictures/report-digits-one-step.png").is_file());
    let written = page.replace("<!-- end of notes -->", "Looked at.\n<!-- end of notes -->");
    sandbox.write("docs/results-digits.md", &written);
    sandbox.cm("report --publish-only --out out").run().ok();
    assert_eq!(sandbox.read("docs/results-digits.md"), written);
}

#[test]
fn what_cannot_be_is_one_line_before_anything_is_made() {
    let sandbox = Sandbox::new();
    for (line, words) in [
        ("--budget 100", "at least 896"),
        ("--data fashion", "name the folder"),
        ("--images x", "bundled"),
        ("--publish", "root of a checkout"),
        ("--publish-only", "root of a checkout"),
        ("--trials cd,cb", "cd-n8-euler"),
    ] {
        let done = sandbox.cm(&format!("report --device cpu --out out {line}")).run();
        assert_eq!(done.code, Some(2), "{line}: {done:#?}");
        assert!(done.stderr.contains(words), "{line}: {}", done.stderr);
        assert!(sandbox.list("out").is_empty());
    }
}
