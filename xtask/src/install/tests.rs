//! Installs with a stand-in for pip that copies a prepared set, whole or torn.

use super::*;
use crate::pip::tests::write_script;
use crate::wheels::tests::fake_site;
use std::thread;

struct Bench {
    dir: tempfile::TempDir,
    home: Home,
}

impl Bench {
    /// A stand-in whose `pip install --target T` runs `body`, in which `$T` is the target, `$W` the prepared wheels
    /// and `$N` counts the calls from 1.
    fn new(set: WheelSet, version: &str, body: &str) -> (Self, Python) {
        let dir = tempfile::tempdir().unwrap();
        let wheels = dir.path().join("wheels");
        fake_site(&wheels, set, version);
        let script = format!(
            "#!/bin/sh\nset -e\nW='{}'\nC='{}'\nwhile [ $# -gt 0 ]; do [ \"$1\" = --target ] && T=$2; shift; done\n\
             echo x >> \"$C\"\nN=$(wc -l < \"$C\")\n{body}\n",
            wheels.display(),
            dir.path().join("calls").display(),
        );
        let program = write_script(&dir.path().join("python"), &script).into_os_string();
        let home = Home { base: dir.path().join("home") };
        (Self { dir, home }, Python { program, version: "3.11".to_owned(), pip: "23".to_owned() })
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.dir.path().join("calls")).unwrap_or_default().lines().count()
    }

    /// Names in the folder of the install, sorted.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.home.base).unwrap().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

const COPY: &str = "cp -r \"$W\"/. \"$T\"";
const LEAN: Wanted = Wanted { set: WheelSet::Lean, force: false, whole: true };
const FULL: Wanted = Wanted { set: WheelSet::Full, force: false, whole: true };

fn unasked() -> Result<Python> {
    panic!("nothing was to be installed")
}

#[test]
fn a_second_setup_installs_nothing_and_force_does() {
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0+cu130", COPY);
    let first = ensure(&bench.home, LEAN, || Ok(python.clone())).unwrap();
    assert!(first.fresh);
    assert_eq!(first.manifest.set, WheelSet::Lean);
    assert_eq!(bench.names(), ["setup.lock", "site"]);
    assert!(!ensure(&bench.home, LEAN, unasked).unwrap().fresh);
    let forced = Wanted { force: true, ..LEAN };
    assert!(ensure(&bench.home, forced, || Ok(python)).unwrap().fresh);
    assert_eq!((bench.calls(), bench.names().len()), (2, 2));
}

#[test]
fn a_torn_download_is_tried_again() {
    let torn = "if [ $N = 1 ]; then mkdir -p \"$T/torch\"; echo 'ERROR: connection broken' >&2; exit 2; fi";
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0", &format!("{torn}\n{COPY}"));
    assert!(ensure(&bench.home, LEAN, || Ok(python)).unwrap().fresh);
    assert_eq!(bench.calls(), 2);
}

#[test]
fn a_torn_unpacking_is_tried_again_and_then_named() {
    let cut = format!("{COPY}\nprintf lib > \"$T/torch/lib/libtorch_cpu.so\"");
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0", &cut);
    let error = ensure(&bench.home, LEAN, || Ok(python)).unwrap_err().to_string();
    assert_eq!(
        error,
        "libtorch could not be installed: the install is not whole: torch/lib/libtorch_cpu.so has 3 bytes, 7 expected"
    );
    assert_eq!((bench.calls(), bench.names()), (2, vec!["setup.lock".to_owned()]));
}

#[test]
fn another_version_is_never_put_in_place() {
    let (bench, python) = Bench::new(WheelSet::Lean, "2.10.0", COPY);
    let error = ensure(&bench.home, LEAN, || Ok(python)).unwrap_err().to_string();
    assert!(error.ends_with("is 2.10.0, but this workspace needs 2.11.0"), "{error}");
    assert!(!bench.home.site().exists());
}

#[test]
fn damage_is_noticed_and_repaired() {
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0", COPY);
    ensure(&bench.home, LEAN, || Ok(python.clone())).unwrap();
    let library = bench.home.torch().join("lib/libtorch_cpu.so");
    for damage in 0..3 {
        match damage {
            0 => fs::write(&library, "lib").unwrap(),
            1 => fs::remove_file(&library).unwrap(),
            _ => fs::remove_dir_all(bench.home.torch()).unwrap(),
        }
        let quick = Wanted { whole: false, ..LEAN };
        assert!(ensure(&bench.home, quick, || Ok(python.clone())).unwrap().fresh);
        assert_eq!(fs::read_to_string(&library).unwrap(), "library");
    }
}

#[test]
fn a_killed_setup_is_cleared_or_finished() {
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0", COPY);
    let half = bench.home.base.join("site.partial-1");
    fs::create_dir_all(half.join("torch/lib")).unwrap();
    fs::create_dir_all(bench.home.base.join("tmp.partial-1")).unwrap();
    ensure(&bench.home, LEAN, || Ok(python)).unwrap();
    assert_eq!(bench.names(), ["setup.lock", "site"]);
    // Killed between the last two renames: the finished folder only needs its name.
    fs::rename(bench.home.site(), bench.home.base.join("site.partial-2")).unwrap();
    assert!(!ensure(&bench.home, LEAN, unasked).unwrap().fresh);
    assert_eq!(bench.names(), ["setup.lock", "site"]);
}

#[test]
fn the_lean_set_gives_way_to_the_full_one_and_not_back() {
    let (bench, python) = Bench::new(WheelSet::Full, "2.11.0", COPY);
    fake_site(&bench.home.site(), WheelSet::Lean, "2.11.0");
    assert_eq!(ensure(&bench.home, LEAN, unasked).unwrap().manifest.set, WheelSet::Lean);
    assert_eq!(ensure(&bench.home, FULL, || Ok(python)).unwrap().manifest.set, WheelSet::Full);
    assert_eq!(ensure(&bench.home, LEAN, unasked).unwrap().manifest.set, WheelSet::Full);
}

#[test]
fn setups_at_the_same_time_install_once() {
    let (bench, python) = Bench::new(WheelSet::Lean, "2.11.0", &format!("sleep 0.3\n{COPY}"));
    thread::scope(|scope| {
        for _ in 0..3 {
            let (home, python) = (&bench.home, python.clone());
            scope.spawn(move || ensure(home, LEAN, || Ok(python)).unwrap());
        }
    });
    assert_eq!((bench.calls(), bench.names()), (1, vec!["setup.lock".to_owned(), "site".to_owned()]));
}

#[test]
fn a_full_disk_is_told_before_the_download() {
    let dir = tempfile::tempdir().unwrap();
    assert!(check_space(dir.path(), 0).is_ok());
    let error = check_space(dir.path(), u64::MAX / 2).unwrap_err().to_string();
    assert!(error.contains("MB free and the install needs") && error.contains("--dir"), "{error}");
}
