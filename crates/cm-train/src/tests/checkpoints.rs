use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cm_model::Bundle;
use cm_schedule::EmaRule;

use crate::testing::{batch, spec, trainer};
use crate::{
    Checkpoint, Checkpoints, Keep, OPTIMIZER_FILE, RAW_FILE, Result, STATE_FILE, TARGET_FILE, TargetRule,
    TrainSpec, Trainable, Weights, ema_file, resume,
};

const ALL: Keep = Keep { last: 100, milestone_every: 0 };

fn metadata(weights: Weights<'_>, step: u64) -> BTreeMap<String, String> {
    BTreeMap::from([("config".to_owned(), format!("{weights:?} {step}"))])
}

/// A checkpoint with one small file.
fn save(checkpoints: &Checkpoints, step: u64) {
    let write = |folder: &Path| -> Result<()> {
        fs::write(folder.join("weights"), step.to_le_bytes().repeat(100)).unwrap();
        Ok(())
    };
    checkpoints.save(step, step * 2, &spec(), write).unwrap();
}

fn saved(steps: &[u64]) -> (tempfile::TempDir, Checkpoints) {
    let folder = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::of_run(folder.path());
    steps.iter().for_each(|&step| save(&checkpoints, step));
    (folder, checkpoints)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_is_a_folder_of_files_that_load_by_themselves() {
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(&spec(), 0.0);
    trainer.step(&batch(0, 12)).unwrap();
    let path = trainer.save(&Checkpoints::of_run(folder.path()), &metadata).unwrap();
    assert_eq!(path, folder.path().join("checkpoints/step-00000001"));
    let emas = ["0.9", "halflife-100-rampup-0.05"].map(ema_file);
    let mut expected = vec![RAW_FILE, TARGET_FILE, OPTIMIZER_FILE, STATE_FILE, &emas[0], &emas[1]];
    expected.sort_unstable();
    assert_eq!(names(&path), expected);
    let bundle = Bundle::read(&path.join(&emas[0])).unwrap();
    assert_eq!(bundle.metadata["config"], "Ema(\"0.9\") 1");
    let average = trainer.with_ema("0.9", |model| model.params().snapshot()).unwrap();
    assert!(average.iter().all(|(name, tensor)| tensor.equal(&bundle.tensors[name])));
    assert!(!bundle.tensors["in.weight"].equal(trainer.student().params().get("in.weight").unwrap()));
    let state = Checkpoint::open(&path).unwrap().state;
    assert_eq!((state.step, state.images, state.train), (1, 12, spec()));
}

/// Trains to the end without a break, and with one after `at` steps in which everything but the checkpoint is lost;
/// every file of the last checkpoints must be the same.
pub(super) fn check_resume(spec: &TrainSpec, at: u64) {
    let [whole, parts] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let steps = |trainer: &mut crate::Trainer<_>, range: std::ops::Range<u64>| {
        range.for_each(|step| drop(trainer.step(&batch(step, 12)).unwrap()));
    };
    let mut uninterrupted = trainer(spec, 0.3);
    steps(&mut uninterrupted, 0..20);
    let want = uninterrupted.save(&Checkpoints::of_run(whole.path()), &metadata).unwrap();

    let mut first = trainer(spec, 0.3);
    steps(&mut first, 0..at);
    let middle = first.save(&Checkpoints::of_run(parts.path()), &metadata).unwrap();
    drop(first);
    let mut second = trainer(spec, 0.3);
    let resumed = resume(&mut second, parts.path()).unwrap();
    assert_eq!((resumed.step, resumed.changed, second.images_seen()), (Some(at), Vec::new(), 12 * at));
    steps(&mut second, at..20);
    let got = second.save(&Checkpoints::of_run(parts.path()), &metadata).unwrap();

    assert_eq!(names(&want), names(&got));
    let same =
        |a: &Path, b: &Path, name: &str| fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap();
    for name in names(&want) {
        assert!(same(&want, &got, &name), "{name}, resumed at {at}");
    }
    assert!(!same(&middle, &got, RAW_FILE));
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
    for target in [spec().target, TargetRule::Live {}] {
        check_resume(&TrainSpec { target, micro_batch: Some(5), ..spec() }, 10);
    }
}

#[test]
fn resuming_with_other_settings_says_what_changed_or_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    trainer(&spec(), 0.0).save(&Checkpoints::of_run(folder.path()), &metadata).unwrap();
    let mut faster = trainer(&TrainSpec { lr: 0.5, ..spec() }, 0.0);
    assert_eq!(resume(&mut faster, folder.path()).unwrap().changed, ["train.lr: 0.01 → 0.5"]);
    let mut other = trainer(&TrainSpec { emas: vec![EmaRule::Beta { beta: 0.75 }], ..spec() }, 0.0);
    let error = resume(&mut other, folder.path()).unwrap_err().to_string();
    assert!(error.contains("ema-0.75.safetensors") && error.contains("ema-0.9.safetensors"), "{error}");
}

/// Ways in which a folder stops being whole, and what the report says.
#[test]
fn broken_checkpoints_are_passed_over_by_name() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str); 6] = [
        (|path| fs::remove_file(path.join("weights")).unwrap(), "weights: "),
        (
            |path| {
                let bytes = fs::read(path.join("weights")).unwrap();
                fs::write(path.join("weights"), &bytes[..77]).unwrap();
            },
            "weights has 77 bytes, 800 were written",
        ),
        (
            |path| {
                let mut bytes = fs::read(path.join("weights")).unwrap();
                bytes[400] ^= 1;
                fs::write(path.join("weights"), bytes).unwrap();
            },
            "weights is not what was written",
        ),
        (|path| fs::remove_file(path.join(STATE_FILE)).unwrap(), "state.json: "),
        (|path| fs::write(path.join(STATE_FILE), "{\"format\": 1, ").unwrap(), "state.json: "),
        (|path| fs::write(path.join(STATE_FILE), "{\"format\": 99}").unwrap(), "reads format 1, got 99"),
    ];
    for (damage, says) in damages {
        let (folder, checkpoints) = saved(&[10, 20]);
        damage(&checkpoints.path(20));
        let (newest, broken) = checkpoints.newest_whole().unwrap();
        assert_eq!(newest.unwrap().state.step, 10);
        assert_eq!(broken.len(), 1);
        assert!(broken[0].path.ends_with("step-00000020") && broken[0].problem.contains(says), "{broken:?}");
        damage(&checkpoints.path(10));
        let error = resume(&mut trainer(&spec(), 0.0), folder.path()).unwrap_err().to_string();
        assert!(error.contains("step-00000020") && error.contains("no older checkpoint is whole"), "{error}");
    }
}

#[test]
fn a_folder_without_checkpoints_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let resumed = resume(&mut trainer(&spec(), 0.0), folder.path()).unwrap();
    assert_eq!((resumed.step, resumed.passed_over.len()), (None, 0));
}

#[test]
fn the_newest_and_the_milestones_stay() {
    let (_folder, checkpoints) = saved(&[10, 20, 30, 40, 50]);
    let removed = checkpoints.prune(Keep { last: 2, milestone_every: 20 }).unwrap();
    assert_eq!(removed, [10, 30].map(|step| checkpoints.path(step)));
    assert_eq!(checkpoints.steps().unwrap(), [20, 40, 50]);
    assert!(checkpoints.prune(Keep { last: 0, milestone_every: 0 }).unwrap().len() == 2);
    assert_eq!(checkpoints.steps().unwrap(), [50]);
}

#[test]
fn the_only_whole_checkpoint_is_never_removed() {
    let (_folder, checkpoints) = saved(&[10, 20, 30]);
    for step in [20, 30] {
        fs::write(checkpoints.path(step).join("weights"), "torn").unwrap();
    }
    checkpoints.prune(Keep { last: 1, milestone_every: 0 }).unwrap();
    assert_eq!(checkpoints.steps().unwrap(), [10, 20, 30]);
    assert_eq!(checkpoints.newest_whole().unwrap().0.unwrap().state.step, 10);
}

#[test]
fn a_failed_save_leaves_nothing_and_a_killed_one_is_cleaned_up() {
    let (folder, checkpoints) = saved(&[10]);
    let fails = |_: &Path| Err(crate::Error::setting("x", 1, "2", "3"));
    assert!(checkpoints.save(20, 40, &spec(), fails).is_err());
    assert_eq!(names(&folder.path().join("checkpoints")), ["step-00000010"]);
    let root = folder.path().join("checkpoints");
    for leftover in [".step-00000020.partial", ".step-00000005.old"] {
        fs::create_dir(root.join(leftover)).unwrap();
        fs::write(root.join(leftover).join("weights"), "half").unwrap();
    }
    assert_eq!(checkpoints.steps().unwrap(), [10]);
    checkpoints.prune(ALL).unwrap();
    assert_eq!(names(&root), ["step-00000010"]);
}

#[test]
fn a_step_is_written_once_and_a_broken_one_is_replaced() {
    let (_folder, checkpoints) = saved(&[10]);
    let must_not = |_: &Path| -> Result<()> { panic!("the checkpoint is whole") };
    checkpoints.save(10, 20, &spec(), must_not).unwrap();
    fs::write(checkpoints.path(10).join("weights"), "torn").unwrap();
    save(&checkpoints, 10);
    assert_eq!(checkpoints.newest_whole().unwrap().0.unwrap().state.step, 10);
}

/// Turns a bit round: a file's length says nothing of it.
pub(super) fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_damaged_one_of_the_right_length_is_written_anew_and_kept_beside() {
    let (folder, checkpoints) = saved(&[10, 20]);
    for aside in ["step-00000020.damaged", "step-00000020.damaged-2"] {
        flip(&checkpoints.path(20).join("weights"));
        let damaged = fs::read(checkpoints.path(20).join("weights")).unwrap();
        save(&checkpoints, 20);
        let aside = folder.path().join("checkpoints").join(aside);
        assert_eq!(checkpoints.take_set_aside(), [aside.as_path()]);
        assert!(fs::read(aside.join("weights")).unwrap() == damaged);
        let (newest, broken) = Checkpoints::of_run(folder.path()).newest_whole().unwrap();
        assert_eq!((newest.unwrap().state.step, broken.len()), (20, 0));
    }
    assert!(checkpoints.take_set_aside().is_empty(), "each is told once");
    // What is set aside is neither a checkpoint nor a leftover.
    checkpoints.prune(Keep { last: 1, milestone_every: 0 }).unwrap();
    let kept = ["step-00000020", "step-00000020.damaged", "step-00000020.damaged-2"];
    assert_eq!(names(&folder.path().join("checkpoints")), kept);
}

#[test]
fn a_damaged_one_of_the_right_length_never_stands_for_a_whole_one() {
    for damaged in [vec![30], vec![20], vec![20, 30]] {
        let (folder, checkpoints) = saved(&[10, 20, 30]);
        damaged.iter().for_each(|&step| flip(&checkpoints.path(step).join("weights")));
        let whole = [30, 20, 10].into_iter().find(|step| !damaged.contains(step)).unwrap();
        // Another process, which has written none of them.
        let checkpoints = Checkpoints::of_run(folder.path());
        checkpoints.prune(Keep { last: 1, milestone_every: 0 }).unwrap();
        assert_eq!(checkpoints.newest_whole().unwrap().0.unwrap().state.step, whole, "{damaged:?}");
    }
}
