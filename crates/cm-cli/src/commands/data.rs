//! `cm data`: look at data sets, fetch CIFAR-10.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use cm_data::download::Download;
use cm_data::shards::{self, Packing};
use cm_data::{InspectOptions, SourceKind, SourceSpec, cifar, inspect};
use toml::Table;

use super::fetch::with_progress;
use super::session;
use crate::args::{DataCommand, PackArgs};
use crate::exit::{Failure, OrUsage, Outcome};
use crate::pictures;
use crate::ui::Bar;

/// The folder that `train-cifar10` looks in and downloads into where no other is named.
const CIFAR10_FOLDER: &str = "data/cifar10";

/// Runs `cm data …`.
pub fn data(command: &DataCommand) -> Outcome {
    match command {
        DataCommand::Inspect { path, sheet } => {
            let inspection = inspect(path, &InspectOptions::default()).or_usage()?;
            println!("{}", inspection.report.to_string().trim_end());
            pictures::save_png(&inspection.sheet, sheet)?;
            println!("contact sheet: {}", sheet.display());
        }
        DataCommand::Pack(args) => pack(args)?,
        DataCommand::Fetch { out } => {
            let archive = fetch_cifar10(out).or_usage()?;
            println!("{}", archive.display());
        }
    }
    Ok(())
}

/// Runs `cm data pack`.
fn pack(args: &PackArgs) -> Outcome {
    let set = source(args).and_then(|spec| Ok(spec.open()?)).or_usage()?;
    eprintln!("{}: {} images of {}", set.source(), set.len(), set.shape());
    let (mut bar, started) = (Bar::new("pack", "images", 0, set.len() as u64), Instant::now());
    let stop = session::stop_on_signal()?;
    let packing = Packing { per_shard: args.per_shard, max_corrupt: args.max_corrupt };
    let packed = shards::pack(&*set, &args.out, packing, &mut |done| {
        let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
        bar.set(done as u64, format!("{rate:.0} img/s"));
        !stop.load(Ordering::Relaxed)
    });
    bar.finish();
    let Some(left_out) = packed.or_usage()? else {
        return Err(Failure::Interrupted(format!("{} was not written", args.out.display())));
    };
    for problem in left_out {
        eprintln!("WARNING: left out: {problem}");
    }
    println!("{}", args.out.display());
    println!("try: cm train --config CONFIG --data {} --set data.kind=shards", args.out.display());
    Ok(())
}

/// The set to be packed, in the words of a config.
fn source(args: &PackArgs) -> Result<SourceSpec> {
    let kind = cm_data::inspect::detect(&args.path)?;
    let mut table = Table::new();
    let mut set = |key: &str, value: &str| drop(table.insert(key.to_owned(), value.to_owned().into()));
    set("kind", kind.name());
    for (key, value) in [("fit", &args.fit), ("labels", &args.labels), ("split", &args.split)] {
        set(key, value);
    }
    for (key, value) in [("filter", &args.filter), ("channels", &args.channels)] {
        value.iter().for_each(|value| set(key, value));
    }
    let mut spec: SourceSpec = serde_path_to_error::deserialize(table).map_err(|error| {
        anyhow!("--{}: {}", error.path(), error.inner().message().trim_end().replace('\n', " "))
    })?;
    let bundled = matches!(kind, SourceKind::Digits | SourceKind::Emoji);
    spec.path = (!bundled).then(|| args.path.clone());
    spec.resolution = args.resolution;
    spec.max_corrupt = args.max_corrupt;
    Ok(spec)
}

/// The place of CIFAR-10 for a real run: `given`, where it has to be, or the usual folder, into which it is
/// downloaded if it is not there yet. A run that cannot start for `other` reasons downloads nothing.
pub fn place_of_cifar10(given: Option<&Path>, other: Option<cm_train::Error>) -> Result<PathBuf> {
    if let Some(path) = given {
        cifar::find(path)?;
        return Ok(path.to_owned());
    }
    let folder = PathBuf::from(CIFAR10_FOLDER);
    match (cifar::find(&folder), other) {
        (Ok(_), _) => {}
        (Err(missing), Some(other)) => bail!("{other}; also, {missing}"),
        (Err(_), None) => drop(fetch_cifar10(&folder)?),
    }
    Ok(folder)
}

/// Downloads CIFAR-10's binary archive into `folder`, with a progress bar.
fn fetch_cifar10(folder: &Path) -> Result<PathBuf> {
    with_progress(&Download::cifar10(folder))
}
