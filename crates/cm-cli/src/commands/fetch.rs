//! `cm fetch`: published files, with progress, resumed where they tore, checked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cm_data::download::{Checksum, Download, Progress};
use cm_net::Lpips;
use cm_net::lpips::{LpipsNet, LpipsReading, LpipsSpec, convert};
use indicatif::{ProgressBar, ProgressStyle};
use tch::Device;

use crate::args::{FetchCommand, LpipsChoice};
use crate::exit::{OrUsage, Outcome};

/// Runs `cm fetch …`.
pub fn fetch(command: &FetchCommand) -> Outcome {
    let FetchCommand::Lpips { net, out } = command;
    for net in chosen(*net) {
        let file = lpips(net, out).or_usage()?;
        println!("{}", file.display());
    }
    Ok(())
}

fn chosen(choice: LpipsChoice) -> Vec<LpipsNet> {
    match choice {
        LpipsChoice::Vgg16 => vec![LpipsNet::Vgg16],
        LpipsChoice::Alex => vec![LpipsNet::Alex],
        LpipsChoice::Squeeze => vec![LpipsNet::Squeeze],
        LpipsChoice::All => LpipsNet::ALL.to_vec(),
    }
}

/// Runs a download with a progress bar and returns the file.
pub fn with_progress(download: &Download) -> Result<PathBuf> {
    let folder = download.to.parent().unwrap_or(Path::new("."));
    eprintln!("fetching {} into {}", download.url, folder.display());
    let bar = ProgressBar::no_length();
    let template = "{bytes}/{total_bytes} {wide_bar:.cyan/blue} {bytes_per_sec}  ETA {eta}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let result = download.run(&mut |progress: Progress| {
        if let Some(total) = progress.total {
            bar.set_length(total);
        }
        bar.set_position(progress.done);
    });
    bar.finish_and_clear();
    Ok(result?)
}

/// Where torchvision's weights are published.
const TORCHVISION: &str = "https://download.pytorch.org/models";

/// torchvision's weights of a network. Behind the last `-` stand the first digits of the file's SHA-256.
fn published(net: LpipsNet) -> &'static str {
    match net {
        LpipsNet::Vgg16 => "vgg16-397923af.pth",
        LpipsNet::Alex => "alexnet-owt-7be5be79.pth",
        LpipsNet::Squeeze => "squeezenet1_1-b8a52dc0.pth",
    }
}

fn download(net: LpipsNet, folder: &Path) -> Download {
    let name = published(net);
    let digits = name.trim_end_matches(".pth").rsplit('-').next().unwrap_or_default();
    let checksum = Checksum::Sha256Prefix(digits.to_owned());
    let otherwise = "and call this again, which makes the file of it that training reads";
    Download::new(&format!("{TORCHVISION}/{name}"), folder.join(name), checksum, otherwise)
}

/// The file of weights that LPIPS with `net` reads, made in `folder` if no whole one is there.
fn lpips(net: LpipsNet, folder: &Path) -> Result<PathBuf> {
    let file = folder.join(net.file_stem()).with_extension("safetensors");
    // A file serves both readings.
    let spec = LpipsSpec { net, reading: LpipsReading::Piq };
    if file.is_file() && Lpips::load(&file, spec, Device::Cpu).is_ok() {
        eprintln!("{} is there already", file.display());
        return Ok(file);
    }
    let source = with_progress(&download(net, folder))?;
    let tensors = cm_net::import::read_torch(&source)?;
    let bundle = convert(tensors, net).with_context(|| source.display().to_string())?;
    bundle.write(&file)?;
    eprintln!("made {} of {}, which is not needed any more", file.display(), source.display());
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_are_checked_by_the_digits_in_their_names() {
        for (net, digits) in
            [(LpipsNet::Vgg16, "397923af"), (LpipsNet::Alex, "7be5be79"), (LpipsNet::Squeeze, "b8a52dc0")]
        {
            let download = download(net, Path::new("data/lpips"));
            assert_eq!(download.checksum, Checksum::Sha256Prefix(digits.into()));
            assert!(download.to.starts_with("data/lpips") && download.url.ends_with(published(net)));
        }
    }

    /// What training looks for is what fetching makes.
    #[test]
    fn files_lie_where_the_metric_looks_for_them() {
        use crate::args::Cli;
        use clap::Parser;
        use cm_train::Metric;
        let cli = Cli::try_parse_from(["cm", "fetch", "lpips"]).unwrap();
        let crate::args::Command::Fetch(FetchCommand::Lpips { net, out }) = cli.command else {
            panic!("not a fetch")
        };
        assert_eq!(chosen(net), [LpipsNet::Vgg16]);
        for net in chosen(LpipsChoice::All) {
            let metric = Metric::of_lpips(LpipsSpec { net, reading: LpipsReading::Piq });
            assert_eq!(metric.lpips().unwrap().1, out.join(format!("lpips-{net}.safetensors")));
        }
    }
}
