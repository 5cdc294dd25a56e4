//! `cm data`: look at data sets, fetch CIFAR-10.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use cm_data::download::Download;
use cm_data::{InspectOptions, cifar, inspect};

use super::fetch::with_progress;
use crate::args::DataCommand;
use crate::exit::{OrUsage, Outcome};
use crate::pictures;

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
        DataCommand::Fetch { out } => {
            let archive = fetch_cifar10(out).or_usage()?;
            println!("{}", archive.display());
        }
    }
    Ok(())
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
