//! `cm fetch`: published files, with progress, resumed where they tore, checked.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cm_data::download::{Checksum, Download, Progress};
use cm_model::{Bundle, TensorMap};
use cm_net::inception::{FILE_NAME, convert as convert_inception};
use cm_net::lpips::{LpipsNet, LpipsReading, LpipsSpec, convert};
use cm_net::{Inception, Lpips};
use indicatif::{ProgressBar, ProgressStyle};
use tch::Device;

use crate::args::{FetchCommand, LpipsChoice};
use crate::exit::{OrUsage, Outcome};

/// Runs `cm fetch …`.
pub fn fetch(command: &FetchCommand) -> Outcome {
    let files = match command {
        FetchCommand::Lpips { net, out } => {
            chosen(*net).into_iter().map(|net| lpips(net, out)).collect::<Result<Vec<_>>>()
        }
        FetchCommand::Inception { out } => inception(out).map(|file| vec![file]),
    };
    for file in files.or_usage()? {
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
    checked(TORCHVISION, published(net), folder)
}

/// A file of PyTorch's at `place`, known by the digits in its name.
fn checked(place: &str, name: &str, folder: &Path) -> Download {
    let digits = name.trim_end_matches(".pth").rsplit('-').next().unwrap_or_default();
    let checksum = Checksum::Sha256Prefix(digits.to_owned());
    let otherwise = "and call this again, which makes the file of it that is read";
    Download::new(&format!("{place}/{name}"), folder.join(name), checksum, otherwise)
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
    made(&download(net, folder), file, |tensors| convert(tensors, net))
}

/// Fetches published weights and makes `file` of them.
fn made(
    download: &Download,
    file: PathBuf,
    convert: impl FnOnce(TensorMap) -> cm_net::Result<Bundle>,
) -> Result<PathBuf> {
    let source = with_progress(download)?;
    let tensors = cm_net::import::read_torch(&source)?;
    convert(tensors).with_context(|| source.display().to_string())?.write(&file)?;
    eprintln!("made {} of {}, which is not needed any more", file.display(), source.display());
    Ok(file)
}

/// Where the weights of FID's network are published, and their file.
const PYTORCH_FID: [&str; 2] = [
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
    "pt_inception-2015-12-05-6726825d.pth",
];

/// The file of weights that `cm eval` reads, made in `folder` if no whole one is there.
fn inception(folder: &Path) -> Result<PathBuf> {
    let file = folder.join(FILE_NAME);
    if file.is_file() && Inception::load(&file, Device::Cpu).is_ok() {
        eprintln!("{} is there already", file.display());
        return Ok(file);
    }
    let [place, name] = PYTORCH_FID;
    made(&checked(place, name, folder), file, convert_inception)
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

    /// What `cm eval` looks for is what fetching makes.
    #[test]
    fn inception_lies_where_evaluation_looks_for_it() {
        use crate::args::{Cli, Command};
        use clap::Parser;
        let [place, name] = PYTORCH_FID;
        assert_eq!(checked(place, name, Path::new("x")).checksum, Checksum::Sha256Prefix("6726825d".into()));
        let parse = |words: [&str; 3]| Cli::try_parse_from(words).unwrap().command;
        let (Command::Fetch(FetchCommand::Inception { out }), Command::Eval(args)) =
            (parse(["cm", "fetch", "inception"]), parse(["cm", "eval", "digits"]))
        else {
            panic!("other commands")
        };
        assert_eq!(args.weights, out.join(FILE_NAME));
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
