//! Images out of a model file, each in one evaluation of the network.
//!
//! ```text
//! cargo run --release -p cm-sampler --example one_step -- MODEL [OUT.png]
//! ```
//!
//! MODEL is a model in any form that says what it is: what `cargo xtask demo` trains, or a folder of diffusers.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program's output

#[path = "shared/picture.rs"]
mod picture;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use cm_sampler::tch::Device;
use cm_sampler::{Request, load, one_step};
use picture::{save, sheet};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let Some(model) = args.next() else {
        eprintln!(
            "usage: one_step MODEL [OUT.png]\n\
             `cargo xtask demo` trains a model in minutes: out/demo/model.safetensors. A folder of diffusers with a\n\
             consistency model, such as openai/diffusers-cd_imagenet64_l2, will do as well."
        );
        return ExitCode::from(2);
    };
    let out = args.next().unwrap_or_else(|| "one_step.png".into());
    match run(&model, &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(model: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let f = load(model, Device::Cpu)?.into_consistency()?;
    // Image k is a function of seed k, whatever is sampled beside it.
    let seeds: Vec<u64> = (0..16).collect();
    // A conditional model is asked for its classes in turn.
    let classes = f.num_classes();
    let labels: Vec<i64> = seeds.iter().map(|&seed| seed as i64 % classes.max(1)).collect();
    let labels = (classes > 0).then_some(labels.as_slice());
    let images = one_step(f.as_ref(), &Request { labels, ..Request::new(&seeds) })?;
    save(&sheet(&images, 4), out)?;
    println!("{} images of {} in {}", seeds.len(), f.shape(), out.display());
    Ok(())
}
