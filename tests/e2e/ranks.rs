//! Several processes that train one run, and what may happen to one of them.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::distill::{CD, PD, teacher};
use cm_tests::{Cm, Done, Running, Sandbox, assert_same_checkpoint, relative_difference};

/// Every step's checkpoint stays; images are augmented, beside dropout and flips, so that everything is drawn that can
/// be drawn.
const RUN: &[&str] = &[
    "train.total_steps=20",
    "run.checkpoint_every=1",
    "run.keep_last=20",
    "network.augment_dim=9",
    "augment={p=0.5, xflip=1e8, yflip=1, scale=1, rotate=1, aniso=1, translate=1}",
];

/// By when all must know that a rank is gone, with room for a machine that does other things.
pub const SOON: Duration = Duration::from_secs(20);

fn train(sandbox: &Sandbox, out: &str) -> Cm {
    sandbox.cm(&format!("train --config tiny.toml --device cpu --out {out}"))
}

fn launch(sandbox: &Sandbox, ranks: usize, out: &str) -> Cm {
    sandbox.cm(&format!("launch --nproc {ranks} -- train --config tiny.toml --device cpu --out {out}"))
}

/// Starts ranks as a launcher does; `command` says what each of them runs.
pub fn start(ranks: usize, command: impl Fn(usize) -> Cm) -> Vec<Running> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let one = |rank: usize| {
        let (number, size) = (rank.to_string(), ranks.to_string());
        let command = command(rank).env("RANK", &number).env("WORLD_SIZE", &size);
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).start()
    };
    (0..ranks).map(one).collect()
}

pub fn wait(ranks: Vec<Running>) -> Vec<Done> {
    ranks.into_iter().map(Running::wait).collect()
}

fn checkpoint(sandbox: &Sandbox, out: &str, step: u64, file: &str) -> PathBuf {
    sandbox.path(out).join(format!("checkpoints/step-{step:08}/{file}"))
}

/// The first and last id of each step in the log of a rank.
fn ids(sandbox: &Sandbox, out: &str, rank: usize) -> Vec<[u64; 3]> {
    let text = sandbox.read(&format!("{out}/ranks/rank-{rank:04}.csv"));
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("step,first_id,last_id"));
    let row = |line: &str| {
        let numbers: Vec<u64> = line.split(',').map(|number| number.parse().unwrap()).collect();
        <[u64; 3]>::try_from(numbers).unwrap()
    };
    lines.map(row).collect()
}

/// Asserts that `ranks` saw in steps `from..=to` what one process sees, and nothing twice.
fn assert_ids(sandbox: &Sandbox, out: &str, ranks: usize, from: u64, to: u64) {
    let logs: Vec<Vec<[u64; 3]>> = (0..ranks).map(|rank| ids(sandbox, out, rank)).collect();
    for step in from..=to {
        let of_step = logs.iter().flatten().filter(|row| row[0] == step);
        let seen: Vec<u64> = of_step.flat_map(|&[_, first, last]| first..=last).collect();
        assert!(seen.iter().copied().eq(8 * (step - 1)..8 * step), "step {step}: {seen:?}");
    }
    assert!(logs.iter().flatten().all(|row| row[0] <= to));
}

#[test]
fn ranks_take_the_steps_of_one_process_whatever_their_number() {
    let sandbox = Sandbox::new();
    train(&sandbox, "one").set(RUN).run().ok();
    train(&sandbox, "other").set(RUN).set(&["train.seed=8"]).run().ok();
    launch(&sandbox, 1, "alone").set(RUN).run().ok();
    let folder = |out| checkpoint(&sandbox, out, 20, "");
    assert_same_checkpoint(&folder("one"), &folder("alone"));
    // The first moment of step 1 is the gradient, but for a factor.
    let gradient = |one: &str, other: &str| {
        let [one, other] = [one, other].map(|out| checkpoint(&sandbox, out, 1, "optimizer.safetensors"));
        relative_difference(&one, &other, |name| name.starts_with("exp_avg."))
    };
    let weights = |one: &str, other: &str, file: &str| {
        let [one, other] = [one, other].map(|out| checkpoint(&sandbox, out, 20, file));
        relative_difference(&one, &other, |_| true)
    };
    assert!(gradient("one", "other") > 0.1 && weights("one", "other", "raw.safetensors") > 1e-3);
    // Parts of 3 images lie across the borders between ranks.
    let parts = ["train.micro_batch=3"];
    train(&sandbox, "parts").set(RUN).set(&parts).run().ok();
    for (ranks, base, more) in [(2, "one", [].as_slice()), (4, "one", &[]), (3, "parts", &parts)] {
        let out = format!("of-{ranks}");
        let done = launch(&sandbox, ranks, &out).set(RUN).set(more).run().ok();
        assert!(done.stderr.contains(&format!("ranks: {ranks} processes")), "{done:#?}");
        assert!(!done.stderr.contains("[rank "), "other ranks are silent: {done:#?}");
        let difference = gradient(base, &out);
        assert!(difference < 1e-5, "{ranks} ranks, gradient of step 1: {difference:e}");
        for file in ["raw.safetensors", "ema-0.9.safetensors", "target.safetensors"] {
            let difference = weights(base, &out, file);
            assert!(difference < 1e-4, "{ranks} ranks, {file} of step 20: {difference:e}");
        }
        assert_ids(&sandbox, &out, ranks, 1, 20);
        let rows = sandbox.read(&format!("{out}/progress.csv"));
        assert_eq!(rows.lines().count(), 21, "one process writes the log");
    }
}

#[test]
fn averages_and_moments_in_shares_end_in_the_same_files_and_any_number_of_ranks_goes_on() {
    let sandbox = Sandbox::new();
    let shared = ["train.shard_state=true", "run.sample_every=10"];
    launch(&sandbox, 3, "whole").set(RUN).run().ok();
    launch(&sandbox, 3, "shared").set(RUN).set(&shared).run().ok();
    let assert_same = |step: u64| {
        for file in ["raw", "ema-0.9", "target", "optimizer"] {
            let [whole, shared] = ["whole", "shared"]
                .map(|out| checkpoint(&sandbox, out, step, &format!("{file}.safetensors")));
            assert_eq!(relative_difference(&whole, &shared, |_| true), 0.0, "{file} of step {step}");
        }
    };
    assert_same(20);
    assert!(sandbox.list("shared/samples").contains(&"step-00000010-ema-0.9.png".to_owned()));
    for out in ["whole", "shared"] {
        let resumed = sandbox.cm(&format!("launch --nproc 2 -- train --device cpu --resume --out {out}"));
        let done = resumed.set(&["train.total_steps=24"]).run().ok();
        assert!(done.stderr.contains("resumed at step 20"), "{done:#?}");
    }
    assert_same(24);
}

#[test]
fn ranks_distil_as_one_process_does() {
    let sandbox = Sandbox::new();
    teacher(&sandbox);
    for (name, recipe) in [("cd", CD), ("pd", PD)] {
        let line = format!("distill --teacher edm --config tiny.toml --device cpu --out {name}");
        sandbox.cm(&line).set(recipe).run().ok();
        sandbox.cm(&format!("launch --nproc 2 -- {line}-of-2")).set(recipe).run().ok();
        for file in ["raw.safetensors", "target.safetensors"] {
            let [one, two] = ["", "-of-2"].map(|of| checkpoint(&sandbox, &format!("{name}{of}"), 30, file));
            let difference = relative_difference(&one, &two, |_| true);
            assert!(difference < 1e-4, "{name}, {file}: {difference:e}");
        }
        // Stages of PD begin with averages and moments of their own, in shares too.
        let shared = format!("launch --nproc 2 -- {line}-in-shares");
        sandbox.cm(&shared).set(recipe).set(&["train.shard_state=true"]).run().ok();
        for file in ["raw.safetensors", "ema-0.9.safetensors", "optimizer.safetensors"] {
            let of = |of: &str| checkpoint(&sandbox, &format!("{name}-{of}"), 30, file);
            assert_eq!(relative_difference(&of("of-2"), &of("in-shares"), |_| true), 0.0, "{name}, {file}");
        }
    }
}

#[test]
fn a_rank_that_is_killed_ends_all_by_name_and_fewer_ranks_go_on_in_the_same_order() {
    let sandbox = Sandbox::new();
    let sets = [RUN, &["train.total_steps=60", "run.keep_last=60"]].concat();
    train(&sandbox, "whole").set(&sets).run().ok();
    let mut ranks = start(3, |_| train(&sandbox, "killed").set(&sets));
    ranks[0].wait_for_step(&sandbox.path("killed"), 5);
    let killed = Instant::now();
    ranks[2].signal("KILL");
    let done = wait(ranks);
    assert!(killed.elapsed() < SOON, "{:?}", killed.elapsed());
    assert_eq!(done[2].code, None);
    for rank in [0, 1] {
        let line = done[rank].stderr.lines().last().unwrap();
        assert_eq!(done[rank].code, Some(1), "{done:#?}");
        assert!(line.starts_with("error: rank 2: it is gone without a word"), "{done:#?}");
    }
    let saved = sandbox.list("killed/checkpoints");
    assert!(saved.iter().all(|name| name.starts_with("step-")), "nothing is half-written: {saved:?}");
    let sandbox = &sandbox;
    let resumed = start(2, |_| sandbox.cm("train --device cpu --resume --out killed"));
    let done = wait(resumed);
    let first = &done[0].stderr;
    assert!(done.iter().all(|done| done.code == Some(0)) && first.contains("resumed at step"), "{done:#?}");
    let file = |out| checkpoint(sandbox, out, 60, "raw.safetensors");
    let difference = relative_difference(&file("whole"), &file("killed"), |_| true);
    assert!(difference < 1e-4, "{difference:e}");
    assert_ids(sandbox, "killed", 3, 1, 60);
}

#[test]
fn rank_0_that_is_killed_and_a_rank_that_is_stopped_are_named() {
    let sandbox = Sandbox::new();
    let sets = ["train.total_steps=3000", "run.checkpoint_every=1000"];
    for (signal, rank, other) in [("KILL", 0, 1), ("STOP", 1, 0)] {
        let command = || train(&sandbox, signal).set(&sets).env("CM_DIST_TIMEOUT", "8");
        let mut ranks = start(2, |_| command());
        ranks[0].wait_for_step(&sandbox.path(signal), 5);
        let began = Instant::now();
        ranks[rank].signal(signal);
        let left = ranks.remove(other).wait();
        assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
        let hit = ranks.remove(0);
        hit.signal("KILL");
        hit.wait();
        left.fails(
            1,
            &[&format!("rank {rank}: "), if rank == 0 { "it is gone" } else { "no sign of life for 8 s" }],
        );
        assert_eq!(sandbox.list(&format!("{signal}/checkpoints")), Vec::<String>::new());
    }
}

#[test]
fn a_rank_with_another_config_or_other_data_is_named_with_the_key() {
    let sandbox = Sandbox::new();
    for (set, words) in [
        ("train.lr=0.002", "train.lr: 0.001 → 0.002"),
        ("data.holdout=7", "data.holdout: 5 → 7"),
        ("run.log_every=2", "run.log_every: 1 → 2"),
    ] {
        let sets = [set];
        let command = |rank| train(&sandbox, "a").set(if rank == 1 { &sets } else { &[] });
        for done in wait(start(3, command)) {
            done.fails(2, &["rank 1: its settings are not those of rank 0", words]);
        }
    }
    let slip = ["train.lr=fast"];
    let command = |rank| train(&sandbox, "a").set(if rank == 1 { &slip } else { &[] });
    for (done, code) in std::iter::zip(wait(start(2, command)), [1, 2]) {
        done.fails(code, &["--set train.lr: train.lr: ", "fast"]);
    }
    assert!(!sandbox.path("a").exists(), "nothing is written");
}

#[test]
fn an_error_of_one_rank_is_the_error_of_all() {
    let sandbox = Sandbox::new();
    // A disk that is full, on the rank that writes.
    let sets = ["run.checkpoint_every=2"];
    let command = |rank| match rank {
        0 => train(&sandbox, "full").set(&sets).with_files_up_to(64),
        _ => train(&sandbox, "full").set(&sets),
    };
    let done = wait(start(2, command));
    assert_eq!(done[1].code, Some(1), "{done:#?}");
    let line = done[1].stderr.lines().last().unwrap();
    assert!(
        line.starts_with("error: rank 0: full/checkpoints/") && line.ends_with("(os error 27)"),
        "{line}"
    );
    let nan = ["train.lr=1e30"];
    for done in wait(start(2, |_| train(&sandbox, "nan").set(&nan))) {
        done.fails(3, &["step 2: ", "is not finite"]);
    }
}

#[test]
fn the_launcher_passes_requests_to_end_on_and_tells_who_was_killed() {
    let sandbox = Sandbox::new();
    let long = ["train.total_steps=3000", "run.checkpoint_every=1000"];
    let mut running = launch(&sandbox, 2, "stopped").set(&long).start();
    running.wait_for_step(&sandbox.path("stopped"), 3);
    running.signal("TERM");
    let done = running.wait();
    assert_eq!(done.code, Some(130), "{done:#?}");
    assert!(done.stderr.contains("interrupted: saved step "), "{done:#?}");
    assert_eq!(sandbox.list("stopped/checkpoints").len(), 1, "the step at which all stopped");

    let mut running = launch(&sandbox, 2, "killed").set(&long).start();
    running.wait_for_step(&sandbox.path("killed"), 3);
    let ranks = running.children();
    assert_eq!(ranks.len(), 2);
    running.signal_to(ranks[1], "KILL");
    let done = running.wait();
    assert_eq!(done.code, Some(137), "{done:#?}");
    assert!(done.stderr.contains("error: rank 1: it is gone"), "{done:#?}");
    let last = done.stderr.lines().last().unwrap();
    assert_eq!(last, "error: rank 1 was ended by signal 9, and with it the others");

    let crowd = launch(&sandbox, 2, "crowd").set(&["train.batch=1"]).run();
    assert_eq!(crowd.code, Some(2), "{crowd:#?}");
    assert!(
        crowd.stderr.contains("[rank 1] error: train.batch = 1: expected at least 1 image"),
        "{crowd:#?}"
    );
}

#[test]
fn what_several_processes_cannot_do_is_refused_in_one_line() {
    let sandbox = Sandbox::new();
    let refused = |line: &str, words: &[&str]| {
        for done in wait(start(2, |_| sandbox.cm(line))) {
            done.fails(2, words);
        }
    };
    let cuda = ["device cuda:1 is not available: each of several ranks", "LOCAL_RANK"];
    refused("train --config tiny.toml --out a --device cuda:1", &cuda);
    refused("train --config tiny.toml --out a --sweep train.lr=1,2", &["--sweep: it runs in one process"]);
    refused(
        "train --config tiny.toml --out a --device cpu --dry-run",
        &["--dry-run: it runs in one process"],
    );
    let one = |rank: &str| train(&sandbox, "a").env("RANK", rank).env("WORLD_SIZE", "2").run();
    one("2").fails(2, &["RANK=2: expected a whole number from 0 to 1"]);
    one("1").fails(2, &["MASTER_ADDR is not set: expected the name or address of the machine of rank 0"]);
    let alone = train(&sandbox, "a").env("RANK", "0").env("WORLD_SIZE", "1").set(&["train.total_steps=1"]);
    alone.run().ok();
    assert!(!sandbox.path("a/ranks").exists(), "one process is no group");
}

#[test]
fn one_rank_that_is_connected_trains_as_one_process_does() {
    let sandbox = Sandbox::new();
    let run = ["train.total_steps=3", "train.shard_state=true"];
    train(&sandbox, "plain").set(&run).run().ok();
    let command = |_| train(&sandbox, "connected").set(&run).env("CM_DIST_ALONE", "1");
    for done in wait(start(1, command)) {
        done.ok();
    }
    assert!(sandbox.path("connected/ranks/rank-0000.csv").exists(), "it was no group");
    let last = |out| checkpoint(&sandbox, out, 3, "");
    assert_same_checkpoint(&last("plain"), &last("connected"));
}
