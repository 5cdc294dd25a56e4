//! What a race prints and leaves: a line for each ratio, a record and its table, and their place in docs/.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Race;
use super::record::{Line, Machine, Record, Run, Standing, replaced};
use super::rows;
use crate::tools;

/// The record of this race, as it grows.
pub struct Report {
    record: Record,
    published: Option<Published>,
}

/// Where published results are.
struct Published {
    page: PathBuf,
    block: String,
    file: PathBuf,
}

impl Published {
    fn of(machine: &Machine) -> Self {
        let docs = tools::workspace_root().join("docs");
        let Machine { size, device, .. } = machine;
        Self {
            page: docs.join("performance.md"),
            block: format!("race {size} {device}"),
            file: docs.join(format!("race/{size}-{device}.json")),
        }
    }

    fn page_with(&self, table: &str) -> Result<String> {
        let shown = self.page.display();
        let text = fs::read_to_string(&self.page).with_context(|| format!("cannot read {shown}"))?;
        replaced(&text, &self.block, table).with_context(|| shown.to_string())
    }

    /// Before anything is measured: is there a place for it?
    fn check(&self, machine: &Machine) -> Result<()> {
        self.page_with("")?;
        let Some(record) = Record::read(&self.file)? else { return Ok(()) };
        record
            .check_machine(machine)
            .with_context(|| format!("{}: remove it to publish this machine's instead", self.file.display()))
    }

    fn publish(&self, newer: &Record) -> Result<()> {
        let record = match Record::read(&self.file)? {
            Some(mut record) => {
                record.take_in(newer.clone());
                record
            }
            None => newer.clone(),
        };
        write(&self.file, &record.json()?)?;
        write(&self.page, &self.page_with(&record.table())?)
    }
}

impl Report {
    pub fn begin(race: &Race) -> Result<Self> {
        let machine = machine(race)?;
        let published = race.args.publish.then(|| Published::of(&machine));
        if let Some(published) = &published {
            published.check(&machine)?;
        }
        let run = Run {
            date: time::OffsetDateTime::now_utc().date().to_string(),
            commit: commit(),
            command: command(),
            load: [load(), String::new()],
        };
        Ok(Self { record: Record { machine, runs: vec![run], rows: Vec::new() }, published })
    }

    /// Takes a row in and prints its lines.
    pub fn add(&mut self, row: &str, about: &str, standings: Vec<Standing>) {
        for standing in standings {
            let line = Line { row: row.to_owned(), about: about.to_owned(), run: 0, standing };
            line.print();
            self.record.rows.push(line);
        }
    }

    pub fn needs_gpu(&mut self, row: &str) {
        self.add(row, rows::about(row), vec![Standing::Needs { needs: "a GPU".to_owned() }]);
    }

    /// Writes the record so far and its table into `out`.
    pub fn write(&self, out: &Path) -> Result<()> {
        write(&out.join("race.json"), &self.record.json()?)?;
        write(&out.join("race.md"), &self.record.table())
    }

    /// Writes the whole record into `out`, and where it is published if that is asked for.
    pub fn end(&mut self, out: &Path) -> Result<()> {
        if let Some(run) = self.record.runs.first_mut() {
            run.load[1] = load();
        }
        self.write(out)?;
        println!("{} and race.md", out.join("race.json").display());
        if let Some(published) = &self.published {
            published.publish(&self.record)?;
            println!("published into {} and {}", published.file.display(), published.page.display());
        }
        Ok(())
    }

    pub fn holds(&self) -> bool {
        self.record.holds()
    }
}

/// Writes a file beside its place and renames it into it.
fn write(path: &Path, text: &str) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(cannot)?;
    }
    let beside = path.with_extension("part");
    fs::write(&beside, text).and_then(|()| fs::rename(&beside, path)).with_context(cannot)
}

fn machine(race: &Race) -> Result<Machine> {
    let device = if race.has_gpu() { "cuda" } else { "cpu" };
    let hardware = match race.has_gpu() {
        true => format!("{}, {}", gpu(&race.args.device)?, processor()),
        false => processor(),
    };
    let script = "\
import platform
from importlib.metadata import version, PackageNotFoundError
found = ['Python ' + platform.python_version()]
for name in ('torch', 'diffusers'):
    try:
        found.append(f'{name} {version(name)}')
    except PackageNotFoundError:
        found.append(f'no {name}')
print(', '.join(found))";
    let versions = tools::first_line(Command::new(&race.python).args(["-c", script]))
        .context("the peers' environment does not work")?;
    let size = race.args.size.name().to_owned();
    Ok(Machine { size, device: device.to_owned(), hardware, threads: race.threads, versions })
}

/// The name of the GPU `device`.
fn gpu(device: &str) -> Result<String> {
    let index = device.split_once(':').map_or("0", |(_, index)| index);
    let query = ["--query-gpu=name", "--format=csv,noheader", "-i", index];
    tools::first_line(Command::new("nvidia-smi").args(query))
        .with_context(|| format!("--device {device}: nvidia-smi does not show it"))
}

/// The commit that is checked out, and whether anything that is measured differs from it.
fn commit() -> String {
    let git = |args: &[&str]| {
        tools::first_line(Command::new("git").current_dir(tools::workspace_root()).args(args))
    };
    let Ok(commit) = git(&["rev-parse", "--short=7", "HEAD"]) else { return "unknown".to_owned() };
    match git(&["status", "--porcelain", "--untracked-files=no", "--", "crates", "scripts", "Cargo.lock"]) {
        Ok(changes) if changes.is_empty() => commit,
        _ => format!("{commit} with changes"),
    }
}

/// The call, as it is typed.
fn command() -> String {
    let words =
        std::env::args().skip(1).map(|word| if word.contains(' ') { format!("'{word}'") } else { word });
    format!("cargo xtask {}", words.collect::<Vec<_>>().join(" "))
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let has = |flag: &str| value("flags").is_some_and(|flags| flags.split(' ').any(|f| f == flag));
    let name = value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let extra: Vec<&str> = ["avx512_bf16", "amx_bf16"].into_iter().filter(|flag| has(flag)).collect();
    if extra.is_empty() { name } else { format!("{name} with {}", extra.join(" and ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_race_has_a_place_on_the_page() {
        for size in ["tiny", "cifar10", "imagenet64"] {
            for device in ["cpu", "cuda"] {
                let machine = Machine {
                    size: size.to_owned(),
                    device: device.to_owned(),
                    hardware: String::new(),
                    threads: 1,
                    versions: String::new(),
                };
                let page = Published::of(&machine).page_with("content\n").unwrap();
                assert!(page.contains(&format!("<!-- race {size} {device} -->\ncontent\n<!--")));
            }
        }
    }
}
