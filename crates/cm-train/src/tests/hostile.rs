//! What a run reads back of its own folder, after others may have written there.

#[path = "../../../../tests/hostile/mutate.rs"]
mod mutate;

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;

use crate::events::EventFile;
use crate::logs::Logs;
use crate::testing::spec;
use crate::{Checkpoint, Checkpoints, EVENTS_FILE, Keep, PROGRESS_FILE, STATE_FILE, STATS_FILE};
use mutate::{assert_memory_bounded, assert_one_line, config, damaged, scratch};

/// A `state.json` of one file of eight bytes.
static STATE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = scratch();
    let write = |folder: &Path| Ok(fs::write(folder.join("weights"), "12345678").unwrap());
    let place = Checkpoints::of_run(folder.path()).save(20, 40, &spec(), write).unwrap();
    fs::read(place.join(STATE_FILE)).unwrap()
});

/// An event file with events of the steps 1 to 3.
static EVENTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let folder = scratch();
    let mut events = EventFile::of_run(folder.path()).unwrap();
    (1..4).for_each(|step| events.scalars(step, &[("loss", 0.5)]).unwrap());
    fs::read(folder.path().join(EVENTS_FILE)).unwrap()
});

/// A run folder whose checkpoint of step 20 has this `state.json`.
fn run_with(state: &[u8]) -> tempfile::TempDir {
    let folder = scratch();
    let place = Checkpoints::of_run(folder.path()).path(20);
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("weights"), "12345678").unwrap();
    fs::write(place.join(STATE_FILE), state).unwrap();
    folder
}

fn problem_of(state: &[u8]) -> Option<String> {
    let folder = run_with(state);
    let checkpoints = Checkpoints::of_run(folder.path());
    let fault = Checkpoint::open(&checkpoints.path(20)).err().map(|error| error.to_string());
    fault.iter().for_each(|text| assert_one_line(text));
    let (newest, broken) = checkpoints.newest_whole().unwrap();
    assert!(newest.is_none_or(|newest| newest.state.step == 20));
    broken.iter().for_each(|broken| assert_one_line(&broken.problem));
    checkpoints.prune(Keep { last: 1, milestone_every: 0 }).unwrap();
    assert!(checkpoints.path(20).is_dir(), "the only checkpoint was removed");
    assert_memory_bounded();
    fault
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn states_of_checkpoints(bytes in damaged(vec![STATE.clone()])) {
        let fault = problem_of(&bytes);
        prop_assert!(bytes != *STATE || fault.is_none(), "{fault:?}");
    }

    #[test]
    fn event_files(bytes in damaged(vec![EVENTS.clone()]), step in 0_u64..5) {
        let folder = scratch();
        let path = folder.path().join(EVENTS_FILE);
        fs::write(&path, &bytes).unwrap();
        let mut events = EventFile::open(folder.path(), step).unwrap();
        let kept = fs::read(&path).unwrap();
        // What stays was there or is the head of a new file, and can be gone on with.
        prop_assert!(bytes.starts_with(&kept) || EVENTS[..12] == kept[..12]);
        events.scalars(step + 1, &[("loss", 1.0)]).unwrap();
        drop(EventFile::open(folder.path(), step + 1).unwrap());
        prop_assert!(fs::read(&path).unwrap().len() > kept.len(), "the new event is whole");
        assert_memory_bounded();
    }

    #[test]
    fn logs(
        csv in damaged(vec![b"step,images,loss\n1,8,0.5\n2,16,nan\n3,24,0.25\n".to_vec()]),
        json in damaged(vec![b"{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"more\":[{}]}\n".to_vec()]),
        step in 0_u64..4,
    ) {
        let folder = scratch();
        for (name, bytes) in [(PROGRESS_FILE, csv), (STATS_FILE, json)] {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        drop(Logs::open(folder.path(), step).unwrap());
        let text = fs::read_to_string(folder.path().join(PROGRESS_FILE)).unwrap();
        let steps = text.lines().filter_map(|line| line.split(',').next()?.parse::<u64>().ok());
        prop_assert!(steps.into_iter().all(|logged| logged <= step), "{text}");
        assert_memory_bounded();
    }
}

#[test]
fn files_outside_of_a_checkpoint_are_none_of_its_files() {
    let text = String::from_utf8(STATE.clone()).unwrap();
    for name in ["../weights", "/etc/hostname", "..", "a/../weights", "", "./weights"] {
        let state = text.replace("\"weights\"", &format!("{name:?}"));
        let fault = problem_of(state.as_bytes()).unwrap();
        assert!(fault.contains("is no file of this folder"), "{name}: {fault}");
    }
}

#[test]
fn a_checkpoint_of_another_step_is_passed_over() {
    let text = String::from_utf8(STATE.clone()).unwrap();
    let folder = run_with(text.replace("\"step\": 20", "\"step\": 18446744073709551615").as_bytes());
    let (newest, broken) = Checkpoints::of_run(folder.path()).newest_whole().unwrap();
    assert!(newest.is_none() && broken[0].problem.contains("is of step 18446744073709551615"), "{broken:?}");
}
