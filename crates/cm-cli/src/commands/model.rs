//! `cm model`: what a model file says about itself.

use cm_train::gigabytes;

use crate::args::ModelCommand;
use crate::exit::{OrUsage, Outcome};
use crate::runs;

/// Runs `cm model …`.
pub fn model(command: &ModelCommand) -> Outcome {
    let ModelCommand::Info { file } = command;
    let path = runs::find_model(file, None).or_usage()?;
    let info = cm_net::inspect(&path).or_usage()?;
    let precond = &info.spec.precond;
    let shape = info.spec.net.image_shape();
    println!("file        {}", path.display());
    println!("size        {} in {}", gigabytes(info.bytes), join(info.dtypes.iter().map(String::as_str)));
    println!("role        {}", info.spec.role);
    println!("parameters  {}", info.num_parameters);
    println!(
        "images      {shape}, {}",
        match info.spec.net.num_classes() {
            0 => "unconditional".to_owned(),
            classes => format!("{classes} classes"),
        }
    );
    println!(
        "sigma       {} to {}, sigma_data {}, rho {}",
        precond.sigma_min, precond.sigma_max, precond.sigma_data, precond.rho
    );
    for (key, value) in info.spec.about.iter().filter(|(key, _)| *key != "config") {
        println!("{key:<11} {value}");
    }
    println!("network     {}", serde_json::to_string(&info.spec.net)?);
    Ok(())
}

fn join<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.collect::<Vec<_>>().join(", ")
}
