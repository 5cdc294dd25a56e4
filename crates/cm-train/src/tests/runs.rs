use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::checkpoints::flip;
use crate::testing::{Model, batch, spec, trainer};
use crate::{
    Batch, BoxError, Checkpoints, Ending, Error, LogEntry, Observer, PROGRESS_FILE, RAW_FILE, Result,
    RunSpec, STATS_FILE, Session, StepReport, Trainer, Weights, resume, run,
};

const EVERY: RunSpec =
    RunSpec { log_every: 2, sample_every: 8, checkpoint_every: 6, keep_last: 2, milestone_every: 0 };

/// Writes down what it hears, and stops the run at a step.
#[derive(Default)]
struct Diary {
    steps: Vec<u64>,
    logs: Vec<u64>,
    checkpoints: Vec<u64>,
    samples: Vec<u64>,
    stop_at: Option<u64>,
    stop: AtomicBool,
}

struct Ears<'a>(&'a RefCell<Diary>);

impl Observer<Model> for Ears<'_> {
    fn on_step(&mut self, report: &StepReport) {
        let mut diary = self.0.borrow_mut();
        diary.steps.push(report.step);
        if diary.stop_at == Some(report.step) {
            diary.stop.store(true, Ordering::Relaxed);
        }
    }
    fn on_log(&mut self, entry: &LogEntry) {
        self.0.borrow_mut().logs.push(entry.step);
    }
    fn on_checkpoint(&mut self, folder: &Path, step: u64) {
        assert!(folder.join(RAW_FILE).is_file());
        self.0.borrow_mut().checkpoints.push(step);
    }
    fn on_sample(&mut self, trainer: &Trainer<Model>) -> std::result::Result<(), BoxError> {
        self.0.borrow_mut().samples.push(trainer.steps_done());
        Ok(())
    }
}

fn metadata(_: Weights<'_>, _: u64) -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn batches(step: u64) -> std::result::Result<Batch, BoxError> {
    Ok(batch(step, 12))
}

/// Trains in `folder` with a stop flag that `stop` may set.
fn train(trainer: &mut Trainer<Model>, folder: &Path, stop: &AtomicBool, source: Source) -> Result<Ending> {
    let session = Session { folder, spec: &EVERY, stop, metadata: &metadata };
    let mut source = source;
    run(trainer, &mut source, &session, &mut ())
}

type Source = fn(u64) -> std::result::Result<Batch, BoxError>;

fn columns(folder: &Path) -> Vec<Vec<String>> {
    let text = fs::read_to_string(folder.join(PROGRESS_FILE)).unwrap();
    // The last two columns are times.
    text.lines().map(|line| line.split(',').take(7).map(str::to_owned).collect()).collect()
}

#[test]
fn a_run_ends_at_its_last_step_and_tells_what_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let diary = RefCell::new(Diary::default());
    let stop = AtomicBool::new(false);
    let mut trainer = trainer(&spec(), 0.0);
    let session = Session { folder: folder.path(), spec: &EVERY, stop: &stop, metadata: &metadata };
    let ending = run(&mut trainer, &mut batches, &session, &mut Ears(&diary)).unwrap();
    assert_eq!((ending, trainer.steps_done()), (Ending::Finished, 20));
    let diary = diary.into_inner();
    assert!(diary.steps.iter().copied().eq(1..=20));
    assert_eq!(diary.logs, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]);
    assert_eq!(diary.checkpoints, [6, 12, 18, 20]);
    assert_eq!(diary.samples, [8, 16, 20]);
    assert_eq!(Checkpoints::of_run(folder.path()).steps().unwrap(), [18, 20]);
    assert_eq!(columns(folder.path()).len(), 11);
    // A finished run has nothing left to do.
    assert_eq!(train(&mut trainer, folder.path(), &stop, batches).unwrap(), Ending::Finished);
    assert_eq!(columns(folder.path()).len(), 11);
}

#[test]
fn a_stopped_run_saves_and_goes_on_where_it_was() {
    let [whole, parts] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let go = AtomicBool::new(false);
    train(&mut trainer(&spec(), 0.3), whole.path(), &go, batches).unwrap();

    let diary = RefCell::new(Diary { stop_at: Some(7), ..Diary::default() });
    let stop = AtomicBool::new(false);
    struct Relay<'a>(&'a RefCell<Diary>, &'a AtomicBool);
    impl Observer<Model> for Relay<'_> {
        fn on_step(&mut self, report: &StepReport) {
            Ears(self.0).on_step(report);
            self.1.store(self.0.borrow().stop.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }
    let session = Session { folder: parts.path(), spec: &EVERY, stop: &stop, metadata: &metadata };
    let mut first = trainer(&spec(), 0.3);
    assert_eq!(run(&mut first, &mut batches, &session, &mut Relay(&diary, &stop)).unwrap(), Ending::Stopped);
    assert_eq!(Checkpoints::of_run(parts.path()).steps().unwrap(), [6, 7]);

    let mut second = trainer(&spec(), 0.3);
    assert_eq!(resume(&mut second, parts.path()).unwrap().step, Some(7));
    assert_eq!(train(&mut second, parts.path(), &go, batches).unwrap(), Ending::Finished);
    for file in [RAW_FILE, "ema-0.9.safetensors", "optimizer.safetensors", "target.safetensors"] {
        let read = |folder: &Path| fs::read(Checkpoints::of_run(folder).path(20).join(file)).unwrap();
        assert!(read(whole.path()) == read(parts.path()), "{file}");
    }
    // The stop made one entry more (step 7), and no step appears twice.
    let (whole, parts) = (columns(whole.path()), columns(parts.path()));
    let at = |rows: &[Vec<String>], step: &str| rows.iter().find(|row| row[0] == step).cloned();
    assert_eq!(parts.len(), whole.len() + 1);
    assert_eq!(at(&parts, "20"), at(&whole, "20"));
    assert_eq!(at(&parts, "7").unwrap()[1], "84");
}

/// Goes on with the run in `folder` from behind what is damaged, and returns the step that it went on from and where
/// damaged checkpoints were put.
fn mend(folder: &Path, keep_last: usize) -> (Option<u64>, Vec<PathBuf>) {
    struct Told(Vec<PathBuf>);
    impl Observer<Model> for Told {
        fn on_set_aside(&mut self, folder: &Path) {
            self.0.push(folder.to_owned());
        }
    }
    let mut trainer = trainer(&spec(), 0.3);
    let from = resume(&mut trainer, folder).unwrap().step;
    let (spec, stop) = (RunSpec { keep_last, ..EVERY }, AtomicBool::new(false));
    let session = Session { folder, spec: &spec, stop: &stop, metadata: &metadata };
    let mut told = Told(Vec::new());
    run(&mut trainer, &mut batches, &session, &mut told).unwrap();
    (from, told.0)
}

#[test]
fn a_run_writes_checkpoints_anew_that_were_damaged() {
    let whole = tempfile::tempdir().unwrap();
    let go = AtomicBool::new(false);
    train(&mut trainer(&spec(), 0.3), whole.path(), &go, batches).unwrap();
    let raw = |folder: &Path, step| fs::read(Checkpoints::of_run(folder).path(step).join(RAW_FILE)).unwrap();
    // The last one of a run that had ended, and one on the way of a run that was broken off; each goes on with as many
    // checkpoints as it had kept, and with one.
    let at_18: Source = |step| if step == 19 { Err("a cable is pulled".into()) } else { batches(step) };
    for (source, damaged, from) in [(batches as Source, 20, 18), (at_18, 18, 12)] {
        for keep_last in [2, 1] {
            let folder = tempfile::tempdir().unwrap();
            let ended = train(&mut trainer(&spec(), 0.3), folder.path(), &go, source);
            assert_eq!(ended.is_ok(), damaged == 20);
            let checkpoints = Checkpoints::of_run(folder.path());
            flip(&checkpoints.path(damaged).join(RAW_FILE));
            let (resumed, aside) = mend(folder.path(), keep_last);
            assert_eq!(resumed, Some(from));
            let name = format!("step-{damaged:08}.damaged");
            assert_eq!(aside, [folder.path().join("checkpoints").join(name)], "keep_last {keep_last}");
            let (newest, broken) = checkpoints.newest_whole().unwrap();
            assert_eq!((newest.unwrap().state.step, broken.len()), (20, 0));
            assert!(raw(whole.path(), 20) == raw(folder.path(), 20), "damaged at {damaged}");
            assert_eq!(checkpoints.steps().unwrap().len(), keep_last);
        }
    }
}

#[test]
fn logs_of_a_lost_session_are_cut_back() {
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let fails: Source = |step| if step == 15 { Err("out of data".into()) } else { batches(step) };
    let error = train(&mut trainer(&spec(), 0.0), folder.path(), &stop, fails).unwrap_err().to_string();
    assert_eq!(error, "the batch of step 16: out of data");
    assert_eq!(columns(folder.path()).last().unwrap()[0], "14");
    let mut again = trainer(&spec(), 0.0);
    assert_eq!(resume(&mut again, folder.path()).unwrap().step, Some(12));
    train(&mut again, folder.path(), &stop, batches).unwrap();
    let steps: Vec<String> = columns(folder.path()).into_iter().skip(1).map(|row| row[0].clone()).collect();
    assert_eq!(steps, ["2", "4", "6", "8", "10", "12", "14", "16", "18", "20"]);
    assert_eq!(fs::read_to_string(folder.path().join(STATS_FILE)).unwrap().lines().count(), 10);
}

#[test]
fn a_run_that_diverges_names_the_step_and_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let spoils: Source = |step| {
        let batch = batch(step, 12);
        Ok(if step == 9 { Batch { images: batch.images * f64::NAN, ..batch } } else { batch })
    };
    let error = train(&mut trainer(&spec(), 0.0), folder.path(), &stop, spoils).unwrap_err();
    assert!(
        matches!(&error, Error::Diverged { checkpoint: Some(path), .. } if path.ends_with("step-00000006"))
    );
    let text = error.to_string();
    for part in ["step 10: ", "image 0 of the batch", "the loss (NaN)", "step-00000006", "mend the data"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(Checkpoints::of_run(folder.path()).steps().unwrap(), [6]);
}

#[test]
fn a_new_run_does_not_write_over_another() {
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    train(&mut trainer(&spec(), 0.0), folder.path(), &stop, batches).unwrap();
    let before = columns(folder.path());
    let error = train(&mut trainer(&spec(), 0.0), folder.path(), &stop, batches).unwrap_err().to_string();
    assert!(error.contains("step-00000020") && error.contains("--resume"), "{error}");
    assert_eq!(columns(folder.path()), before);
}

#[test]
fn an_observer_may_end_a_run() {
    struct Fails;
    impl Observer<Model> for Fails {
        fn on_sample(&mut self, _: &Trainer<Model>) -> std::result::Result<(), BoxError> {
            Err("disk full".into())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let stop = AtomicBool::new(false);
    let session = Session { folder: folder.path(), spec: &EVERY, stop: &stop, metadata: &metadata };
    let error = run(&mut trainer(&spec(), 0.0), &mut batches, &session, &mut Fails).unwrap_err().to_string();
    assert_eq!(error, "after step 8: disk full");
}

#[test]
fn intervals_are_checked() {
    let check = |change: fn(&mut RunSpec)| {
        let mut spec = EVERY;
        change(&mut spec);
        spec.check().map_err(|e| e.to_string())
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert!(check(|spec| spec.log_every = 0).unwrap_err().starts_with("run.log_every = 0"));
    assert!(check(|spec| spec.keep_last = 0).unwrap_err().starts_with("run.keep_last = 0"));
}
