//! The pinned wheels, what an install of them must look like, and the manifest that says it is whole.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::tools::two_numbers;

/// Requirements of the lean set, in pip's format, with the hash of every file.
pub const LEAN_REQUIREMENTS: &str = include_str!("../wheels/lean.txt");
/// What the full set adds.
pub const CUDA_REQUIREMENTS: &str = include_str!("../wheels/cuda.txt");
/// Headers that the object of `cargo xtask cuda-object` is built with.
pub const HEADER_REQUIREMENTS: &str = include_str!("../wheels/headers.txt");

/// Name of the manifest in the folder that it describes. It is written last, so an install that has one finished.
const MANIFEST: &str = "cm-wheels.json";
/// Changed when the manifest's form changes; another number is read as no manifest.
const LAYOUT: u64 = 1;

/// How much is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WheelSet {
    /// All that a CPU needs.
    Lean,
    /// With every CUDA library.
    Full,
}

impl WheelSet {
    /// The word in the manifest.
    pub fn key(self) -> &'static str {
        match self {
            Self::Lean => "lean",
            Self::Full => "full",
        }
    }

    /// What a person reads.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Lean => "lean CPU set",
            Self::Full => "full CUDA set",
        }
    }

    /// Bytes that the install takes while wheels and unpacked files lie side by side, and what remains of them,
    /// in MB as measured on Linux x86-64.
    pub fn peak_and_final_mb(self) -> (u64, u64) {
        match self {
            Self::Lean => (1_750, 1_220),
            Self::Full => (6_420, 4_010),
        }
    }
}

/// One wheel of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    pub name: String,
    pub version: String,
}

/// The wheels of a set on this system.
pub fn pins(set: WheelSet) -> Vec<Pin> {
    let mut all = parse_pins(LEAN_REQUIREMENTS, cfg!(target_os = "linux"));
    if set == WheelSet::Full {
        all.extend(parse_pins(CUDA_REQUIREMENTS, cfg!(target_os = "linux")));
    }
    all
}

/// Reads `name==version [; marker] \` lines; the one marker in use is for Linux.
fn parse_pins(requirements: &str, linux: bool) -> Vec<Pin> {
    requirements
        .lines()
        .filter(|line| !line.starts_with('#') && !line.starts_with(' '))
        .filter(|line| linux || !line.contains("platform_system == \"Linux\""))
        .filter_map(|line| {
            let (name, rest) = line.split_once("==")?;
            let version = rest.split([' ', ';', '\\']).next()?;
            Some(Pin { name: name.trim().to_owned(), version: version.to_owned() })
        })
        .collect()
}

/// The version of torch that this workspace is written for.
pub fn required_torch() -> String {
    parse_pins(LEAN_REQUIREMENTS, true)
        .into_iter()
        .find(|p| p.name == "torch")
        .map_or_else(String::new, |p| p.version)
}

/// Reads the version out of the wheel's `torch/version.py`, as `2.11.0+cu130`.
pub fn parse_version_py(text: &str) -> Option<String> {
    let value = text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("__version__")?.trim_start();
        // The line may carry a type annotation before the equals sign.
        rest.split_once('=').map(|(_, value)| value.trim())
    })?;
    let quote = value.chars().next().filter(|c| ['"', '\''].contains(c))?;
    let version = value[1..].split(quote).next()?;
    two_numbers(version).map(|_| version.to_owned())
}

/// One line saying that `found` is not the version needed, or nothing if it is.
pub fn check_version(found: &str, place: &str) -> Result<()> {
    let required = required_torch();
    if found.split('+').next() == Some(required.as_str()) {
        return Ok(());
    }
    bail!("libtorch in {place} is {found}, but this workspace needs {required}")
}

/// How an install was found.
#[derive(Debug)]
pub enum State {
    /// Whole.
    Ready(Manifest),
    /// Nothing there.
    Absent,
    /// There, and in this way not whole.
    Faulty(String),
}

/// How closely [`inspect`] looks.
#[derive(Clone, Copy, PartialEq)]
pub enum Depth {
    /// Version and libraries: a few dozen files.
    Quick,
    /// Every file that the wheels list.
    Whole,
}

/// What was installed.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub torch: String,
    pub set: WheelSet,
    wheels: Vec<String>,
    /// Libraries and a few other key files with their sizes.
    files: BTreeMap<String, u64>,
}

impl Manifest {
    /// Checks every file that the wheels of `set` list under `site` and describes the result.
    pub fn survey(site: &Path, set: WheelSet) -> Result<Self> {
        let torch = installed_torch(site)?;
        let pins = pins(set);
        let files = check_records(site, &pins)?;
        let files = files.into_iter().filter(|(path, _)| is_key_file(path)).collect();
        Ok(Self { torch, set, wheels: wheel_names(&pins), files })
    }

    /// Writes the manifest into `site`; from then on the install counts as whole.
    pub fn write(&self, site: &Path) -> Result<()> {
        let value = json!({
            "layout": LAYOUT, "torch": self.torch, "set": self.set.key(), "wheels": self.wheels, "files": self.files,
        });
        let path = site.join(MANIFEST);
        fs::write(&path, format!("{value:#}\n")).with_context(|| format!("cannot write {}", path.display()))
    }

    /// The manifest in `site`, if there is a readable one of this layout.
    fn read(site: &Path) -> Option<Self> {
        let value: Value = serde_json::from_str(&fs::read_to_string(site.join(MANIFEST)).ok()?).ok()?;
        if value.get("layout")?.as_u64()? != LAYOUT {
            return None;
        }
        let set = [WheelSet::Lean, WheelSet::Full].into_iter().find(|s| value["set"] == s.key())?;
        let wheels = value.get("wheels")?.as_array()?;
        let wheels = wheels.iter().map(|w| w.as_str().map(str::to_owned)).collect::<Option<_>>()?;
        let files = value.get("files")?.as_object()?;
        let files =
            files.iter().map(|(path, size)| Some((path.clone(), size.as_u64()?))).collect::<Option<_>>()?;
        Some(Self { torch: value.get("torch")?.as_str()?.to_owned(), set, wheels, files })
    }

    fn check(&self, site: &Path, depth: Depth) -> Result<()> {
        check_version(&installed_torch(site)?, &site.display().to_string())?;
        let pins = pins(self.set);
        if self.wheels != wheel_names(&pins) {
            bail!("it was installed from other wheels than those pinned now");
        }
        for (path, &size) in &self.files {
            check_size(site, path, &[size])?;
        }
        if depth == Depth::Whole {
            check_records(site, &pins)?;
        }
        Ok(())
    }
}

/// Looks at an install. One without a manifest whose files are all there (made by hand with pip) is described and
/// adopted by the caller.
pub fn inspect(site: &Path, depth: Depth) -> State {
    if !site.exists() {
        return State::Absent;
    }
    let checked = match Manifest::read(site) {
        Some(manifest) => manifest.check(site, depth).map(|()| manifest),
        None => Manifest::survey(site, WheelSet::Full)
            .or_else(|_| Manifest::survey(site, WheelSet::Lean))
            .and_then(|m| check_version(&m.torch, &site.display().to_string()).map(|()| m))
            .context("no manifest of a finished install, and the files are not whole"),
    };
    match checked {
        Ok(manifest) => State::Ready(manifest),
        Err(why) => State::Faulty(format!("{why:#}")),
    }
}

/// Whether `site` carries a manifest.
pub fn has_manifest(site: &Path) -> bool {
    Manifest::read(site).is_some()
}

fn installed_torch(site: &Path) -> Result<String> {
    let path = site.join("torch/version.py");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_version_py(&text).with_context(|| format!("{} names no version", path.display()))
}

fn wheel_names(pins: &[Pin]) -> Vec<String> {
    pins.iter().map(|pin| format!("{}=={}", pin.name, pin.version)).collect()
}

/// Files that linking and running need, whose loss or truncation the quick check must notice.
fn is_key_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let library = name.contains(".so") || [".dylib", ".dll", ".lib"].iter().any(|end| name.ends_with(end));
    library || path == "torch/version.py" || path.ends_with("api/include/torch/torch.h")
}

/// Compares every file that the wheels list with the disk; returns the files with their sizes.
fn check_records(site: &Path, pins: &[Pin]) -> Result<BTreeMap<String, u64>> {
    let mut listed: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for pin in pins {
        let record = record_of(site, pin)?;
        for (path, size) in parse_record(&record) {
            listed.entry(path).or_default().push(size);
        }
    }
    let mut found = BTreeMap::new();
    for (path, sizes) in listed {
        found.insert(path.clone(), check_size(site, &path, &sizes)?);
    }
    Ok(found)
}

/// `sizes` has more than one entry where several wheels bring the same path, and then the last one installed won.
fn check_size(site: &Path, path: &str, sizes: &[u64]) -> Result<u64> {
    let Ok(meta) = fs::metadata(site.join(path)) else { bail!("{path} is missing") };
    if sizes.contains(&meta.len()) {
        return Ok(meta.len());
    }
    bail!("{path} has {} bytes, {} expected", meta.len(), sizes.first().copied().unwrap_or_default())
}

/// The text of the RECORD file of one installed wheel.
fn record_of(site: &Path, pin: &Pin) -> Result<String> {
    // The folder's name may write the wheel's name with other punctuation and case.
    let plain = |name: &str| name.replace(['-', '.'], "_").to_lowercase();
    for entry in fs::read_dir(site).with_context(|| format!("cannot list {}", site.display()))?.flatten() {
        let folder = entry.file_name().to_string_lossy().into_owned();
        let matches = folder
            .strip_suffix(".dist-info")
            .and_then(|folder| folder.rsplit_once('-'))
            .is_some_and(|(name, version)| plain(name) == plain(&pin.name) && version == pin.version);
        if matches {
            let path = entry.path().join("RECORD");
            return fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()));
        }
    }
    bail!("{} {} is not installed", pin.name, pin.version)
}

/// Lines `path,hash,size` (CSV, so a path with a comma is quoted); entries without a size are not checked, nor are
/// scripts outside the folder and files that Python compiles when it likes.
fn parse_record(text: &str) -> Vec<(String, u64)> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.rsplitn(3, ',');
            let size = fields.next()?.trim().parse().ok()?;
            let path = fields.nth(1)?;
            let path = match path.strip_prefix('"').and_then(|p| p.strip_suffix('"')) {
                Some(quoted) => quoted.replace("\"\"", "\""),
                None => path.to_owned(),
            };
            (!path.starts_with("../") && !path.ends_with(".pyc")).then_some((path, size))
        })
        .collect()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    const VERSION_PY: &str = "from typing import Optional\n\n__all__ = ['__version__', 'debug']\n\
        __version__ = '2.11.0+cu130'\ndebug = False\n";

    /// Writes what pip would leave of a set: tiny libraries, RECORD files, version.py.
    pub fn fake_site(site: &Path, set: WheelSet, version: &str) {
        for pin in pins(set) {
            let mut files = vec![(format!("{}/data.txt", pin.name), "data".to_owned())];
            if pin.name == "torch" {
                files = vec![
                    ("torch/version.py".to_owned(), format!("__version__ = '{version}'\n")),
                    ("torch/lib/libtorch_cpu.so".to_owned(), "library".to_owned()),
                    ("torch/include/a.h".to_owned(), "header".to_owned()),
                ];
            }
            let mut record = "../../bin/torchrun,sha256=x,247\n__pycache__/a.pyc,,\n".to_owned();
            for (path, text) in &files {
                let full = site.join(path);
                fs::create_dir_all(full.parent().unwrap()).unwrap();
                fs::write(full, text).unwrap();
                record += &format!("{path},sha256=x,{}\n", text.len());
            }
            let info = site.join(format!("{}-{}.dist-info", pin.name.replace('-', "_"), pin.version));
            fs::create_dir_all(&info).unwrap();
            fs::write(info.join("RECORD"), record).unwrap();
        }
    }

    fn fault(state: State) -> String {
        match state {
            State::Faulty(why) => why,
            other => panic!("expected a fault, got {other:?}"),
        }
    }

    #[test]
    fn versions_are_read_from_version_py() {
        assert_eq!(parse_version_py(VERSION_PY).as_deref(), Some("2.11.0+cu130"));
        assert_eq!(parse_version_py("__version__: str = \"2.10.0\"  # x\n").as_deref(), Some("2.10.0"));
        for bad in ["", "__all__ = ['__version__']\n", "__version__ = None\n", "__version__ = ''\n"] {
            assert_eq!(parse_version_py(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_wrong_version_is_one_line() {
        assert!(check_version("2.11.0+cpu", "x").is_ok());
        assert!(check_version("2.11.0", "x").is_ok());
        for wrong in ["2.11.01", "2.1.0", "2.12.0+cu130"] {
            let error = check_version(wrong, "SITE").unwrap_err().to_string();
            assert_eq!(error, format!("libtorch in SITE is {wrong}, but this workspace needs 2.11.0"));
        }
    }

    #[test]
    fn the_requirement_files_pin_every_wheel_by_hash() {
        for (text, linux, wheels) in [
            (LEAN_REQUIREMENTS, true, 3),
            (LEAN_REQUIREMENTS, false, 1),
            (CUDA_REQUIREMENTS, true, 13),
            (CUDA_REQUIREMENTS, false, 0),
        ] {
            assert_eq!(parse_pins(text, linux).len(), wheels);
        }
        for text in [LEAN_REQUIREMENTS, CUDA_REQUIREMENTS] {
            let joined = text.replace(" \\\n", " ");
            for block in joined.lines().filter(|line| !line.starts_with('#')) {
                let hashes: Vec<&str> = block.split("--hash=sha256:").skip(1).collect();
                assert!(hashes.len() >= 2, "two machines at least: {block}");
                assert!(hashes.iter().all(|h| h[..64].bytes().all(|b| b.is_ascii_hexdigit())), "{block}");
            }
        }
        assert_eq!(required_torch(), "2.11.0");
    }

    #[test]
    fn records_are_read_with_quotes_and_without_what_is_not_checked() {
        let text = "../../bin/run,sha256=a,9\n\"a,b \"\"c\"\"\",sha256=b,5\nx/y.py,sha256=c,7\nx/y.pyc,sha256=d,8\n\
                    t.dist-info/RECORD,,\n";
        assert_eq!(parse_record(text), [("a,b \"c\"".to_owned(), 5), ("x/y.py".to_owned(), 7)]);
    }

    #[test]
    fn an_install_counts_only_while_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let site = dir.path().join("site");
        assert!(matches!(inspect(&site, Depth::Quick), State::Absent));
        fake_site(&site, WheelSet::Lean, "2.11.0+cu130");
        let manifest = Manifest::survey(&site, WheelSet::Lean).unwrap();
        manifest.write(&site).unwrap();
        assert_eq!(Manifest::read(&site), Some(manifest.clone()));
        assert!(matches!(inspect(&site, Depth::Quick), State::Ready(m) if m == manifest));

        fs::remove_file(site.join("torch/include/a.h")).unwrap();
        assert!(matches!(inspect(&site, Depth::Quick), State::Ready(_)));
        assert_eq!(fault(inspect(&site, Depth::Whole)), "torch/include/a.h is missing");

        fs::write(site.join("torch/lib/libtorch_cpu.so"), "lib").unwrap();
        let why = fault(inspect(&site, Depth::Quick));
        assert_eq!(why, "torch/lib/libtorch_cpu.so has 3 bytes, 7 expected");
    }

    #[test]
    fn an_install_made_by_hand_is_adopted_only_if_whole() {
        let dir = tempfile::tempdir().unwrap();
        fake_site(dir.path(), WheelSet::Lean, "2.11.0");
        assert!(matches!(inspect(dir.path(), Depth::Quick), State::Ready(m) if m.set == WheelSet::Lean));
        fs::remove_file(dir.path().join("torch/include/a.h")).unwrap();
        let why = fault(inspect(dir.path(), Depth::Quick));
        assert!(why.starts_with("no manifest of a finished install"), "{why}");
        assert!(why.ends_with("torch/include/a.h is missing"), "{why}");
    }

    #[test]
    fn other_versions_and_unreadable_manifests_are_faults() {
        let dir = tempfile::tempdir().unwrap();
        fake_site(dir.path(), WheelSet::Lean, "2.11.0");
        Manifest::survey(dir.path(), WheelSet::Lean).unwrap().write(dir.path()).unwrap();
        fs::write(dir.path().join("torch/version.py"), "__version__ = '2.10.0'\n").unwrap();
        let why = fault(inspect(dir.path(), Depth::Quick));
        assert!(why.ends_with("is 2.10.0, but this workspace needs 2.11.0"), "{why}");
        fs::write(dir.path().join(MANIFEST), "{").unwrap();
        assert!(!has_manifest(dir.path()));
        assert!(fault(inspect(dir.path(), Depth::Quick)).contains("no manifest"));
    }
}
