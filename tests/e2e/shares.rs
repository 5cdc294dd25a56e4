//! Several processes that sample and evaluate: what they share, and that it shows in nothing.

use std::time::{Duration, Instant};

use cm_data::{Shape, npz};
use cm_tests::Sandbox;
use cm_torch::tch::Device;
use serde_json::Value;

use crate::ranks::{SOON, start, wait};

fn trained(sets: &[&str]) -> Sandbox {
    let sandbox = Sandbox::new();
    let train = sandbox.cm("train --config tiny.toml --device cpu --out run");
    train.set(&["precond.sigma_data=10"]).set(sets).run().ok();
    sandbox
}

/// Asserts that two folders have the same files.
fn assert_same_files(sandbox: &Sandbox, one: &str, other: &str) {
    let names = sandbox.list(one);
    assert!(names.len() > 2 && names == sandbox.list(other), "{other}: {:?}", sandbox.list(other));
    for name in &names {
        let [one, other] = [one, other].map(|out| std::fs::read(sandbox.path(out).join(name)).unwrap());
        assert!(one == other, "{name}");
    }
}

#[test]
fn ranks_sample_what_one_process_does_to_the_bit() {
    let sandbox = trained(&["network.num_classes=10", "data.labels='auto'"]);
    for (method, which) in [("", "one"), ("--sampler multistep --sigmas 80,5,0.5", "many")] {
        // Batches of 3, 3, 3 and 2: the last one falls to any rank.
        let line = |out: &str| format!("sample run {method} --seeds 5-15 --batch 3 --device cpu --out {out}");
        sandbox.cm(&line(which)).run().ok();
        for ranks in [2, 3, 5] {
            let out = format!("{which}-{ranks}");
            let done = sandbox.cm(&format!("launch --nproc {ranks} -- {}", line(&out))).run().ok();
            assert!(done.stderr.contains("11 images in"), "{done:#?}");
            assert!(!done.stderr.contains("[rank "), "other ranks are silent: {done:#?}");
            let idle =
                done.stderr.contains("1 of 5 processes have nothing to do: 11 images are 4 of --batch 3");
            assert_eq!(idle, ranks == 5, "{done:#?}");
            assert_same_files(&sandbox, which, &out);
        }
    }
}

/// An evaluation without its date.
fn evaluation(sandbox: &Sandbox, name: &str) -> Value {
    let mut report: Value = serde_json::from_str(&sandbox.read(&format!("{name}.json"))).unwrap();
    assert!(report.as_object_mut().unwrap().remove("date").is_some());
    assert!(!report["runs"][0]["figures"].as_object().unwrap().is_empty());
    report
}

#[test]
fn ranks_evaluate_as_one_process_does_to_the_bit() {
    let sandbox = trained(&[]);
    let eval = |ranks: usize, name: &str, more: &str| {
        let line = format!("eval run --device cpu --seeds 0-199 --seeds 200-409 --sample --no-clip {more}");
        let line = format!("{line} --save-stats {name}.npz -o {name}.json");
        let line = if ranks == 1 { line } else { format!("launch --nproc {ranks} -- {line}") };
        let done = sandbox.cm(&line).run().ok();
        assert_eq!(done.stdout.matches("| fcd").count(), 1, "one process speaks: {done:#?}");
        let statistics = std::fs::read(sandbox.path(format!("{name}.npz"))).unwrap();
        ((evaluation(&sandbox, name), statistics), done.stderr)
    };
    let (one, _) = eval(1, "one", "--no-cache");
    let (two, said) = eval(2, "two", "");
    assert_eq!(said.matches("training a classifier").count(), 1, "{said}");
    assert!(one == two, "without and with a cache, {} and {}", one.0, two.0);
    // What the ranks have kept serves one process, and the other way round.
    let (again, said) = eval(1, "again", "");
    assert!(one == again && !said.contains("training a classifier"), "{said}");
    let (three, said) = eval(3, "three", "");
    assert!(one == three && !said.contains("training a classifier"), "{said}");
}

#[test]
fn ranks_see_through_inception_what_one_process_does() {
    let sandbox = Sandbox::new();
    let random = cm_net::Inception::random(1, Device::Cpu).unwrap();
    let weights = cm_net::inception::convert(random.params().snapshot()).unwrap();
    weights.write(&sandbox.path("data/inception/inception.safetensors")).unwrap();
    let shape = Shape::square(1, 8);
    for (name, step) in [("a.npz", 3), ("b.npz", 5)] {
        let pixels: Vec<u8> = (0..7 * shape.values()).map(|i| ((i * i * 7 + i * step) % 251) as u8).collect();
        npz::save(&sandbox.path(name), shape, &pixels, None).unwrap();
    }
    let line = |name: &str| {
        let metrics = "--metrics kid,is,pr --is-splits 2 --kid-subsets 3 --batch 3 --no-cache";
        format!("eval a.npz --reference b.npz --device cpu {metrics} -o {name}.json")
    };
    sandbox.cm(&line("one")).run().ok();
    sandbox.cm(&format!("launch --nproc 2 -- {}", line("two"))).run().ok();
    assert!(evaluation(&sandbox, "one") == evaluation(&sandbox, "two"));
}

#[test]
fn a_rank_that_samples_something_else_or_fails_or_dies_is_named() {
    let sandbox = trained(&[]);
    let one = "sample run --device cpu --batch 2 --out a --seeds 0-7";
    for (other, key) in [
        (format!("{one} --no-clip"), "no_clip"),
        (one.replace("0-7", "0-6"), "seeds"),
        (format!("{one} --sampler multistep --sigmas 80,1"), "sampler"),
        (format!("{one} --ema raw"), "model.weights"),
    ] {
        let command = |rank| sandbox.cm(if rank == 1 { &other } else { one });
        for done in wait(start(2, command)) {
            done.fails(2, &["rank 1: its settings are not those of rank 0", key]);
        }
    }
    let line = "eval run --device cpu --no-cache --seeds 0-199 -o a.json";
    let command = |rank| sandbox.cm(&format!("{line} --metrics {}", ["fcd", "fcd,kcd"][rank]));
    for done in wait(start(2, command)) {
        done.fails(2, &["rank 1: its settings are not those of rank 0", "metrics"]);
    }
    assert!(!sandbox.path("a").exists() && !sandbox.path("a.json").exists(), "nothing is written");

    // A disk that is full, on the rank that writes.
    let line = "sample run --device cpu --seeds 0-99 --batch 8 --out full";
    let command = |rank| match rank {
        0 => sandbox.cm(line).with_files_up_to(1),
        _ => sandbox.cm(line),
    };
    let done = wait(start(2, command));
    assert_eq!(done[1].code, Some(1), "{done:#?}");
    let line = done[1].stderr.lines().last().unwrap();
    assert!(line.starts_with("error: rank 0: ") && line.contains("full/samples_100x8x8x1.npz"), "{done:#?}");
    assert!(line.ends_with("(os error 27)") && !done[0].stderr.contains("ZipWriter"), "{done:#?}");
    assert!(sandbox.list("full").iter().all(|name| name.ends_with(".png")), "{:?}", sandbox.list("full"));

    let long = "sample run --device cpu --seeds 0-9999999 --batch 1 --out killed";
    let mut ranks = start(2, |_| sandbox.cm(long));
    let began = Instant::now();
    while !sandbox.path("killed").exists() {
        assert!(began.elapsed() < SOON, "the work does not begin");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(500));
    let killed = Instant::now();
    ranks[1].signal("KILL");
    let first = ranks.remove(0).wait();
    assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
    first.fails(1, &["rank 1: it is gone without a word"]);
    assert_eq!(sandbox.list("killed"), [""; 0], "nothing is half-written");
    ranks.remove(0).wait();
}

#[test]
fn what_knows_nothing_of_ranks_refuses_them() {
    let sandbox = Sandbox::new();
    for line in ["gallery", "search-ts run", "eval --compare a.json b.json"] {
        for done in wait(start(2, |_| sandbox.cm(line))) {
            done.fails(2, &["one process, and WORLD_SIZE=2; start it without ranks"]);
        }
    }
}
