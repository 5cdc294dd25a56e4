//! `cm model`: what a file of weights says about itself, and ways from and to published forms.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use cm_model::{Bundle, TensorMap};
use cm_net::ModelFile;
use cm_net::import::{self, Description, Kind};
use cm_net::inception;
use cm_net::lpips::{self, LpipsNet};
use cm_train::gigabytes;

use crate::args::{ExportForm, LPIPS_KINDS, ModelCommand, StoredDtype};
use crate::exit::{OrUsage, Outcome};
use crate::runs;
use crate::ui::Bar;

/// Bytes from which on reading gets a bar.
const SLOW: u64 = 200_000_000;
const MB: u64 = 1_000_000;

/// Runs `cm model …`.
pub fn model(command: &ModelCommand) -> Outcome {
    match command {
        ModelCommand::Info { file } => info(file),
        ModelCommand::Import { file, kind, out } => import(file, kind.as_deref(), out),
        ModelCommand::Export { file, to, dtype, out } => export(file, *to, *dtype, out),
    }
}

/// A file or folder of a published form, or what a run folder means.
fn find(file: &Path) -> Outcome<PathBuf> {
    if import::is_diffusers_folder(file) {
        return Ok(file.to_owned());
    }
    runs::find_model(file, None).or_usage()
}

fn info(file: &Path) -> Outcome {
    let path = find(file)?;
    let description = import::describe(&path).or_usage()?;
    match description.own {
        true => own_info(&path),
        false => published_info(&path, &description),
    }
}

fn own_info(path: &Path) -> Outcome {
    let info = cm_net::inspect(path).or_usage()?;
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

fn published_info(path: &Path, description: &Description) -> Outcome {
    let architecture = description.architecture.as_ref();
    let architecture = architecture.map_err(|why| anyhow!("{}: {why}", path.display())).or_usage()?;
    println!("file        {}", path.display());
    println!("form        {}", description.form);
    let dtypes = join(description.dtypes.iter().map(String::as_str));
    println!("size        {} in {dtypes}", gigabytes(description.bytes));
    println!("numbers     {} in {} tensors", description.num_scalars, description.num_tensors);
    println!("network     {architecture}");
    let option = match (&description.spec, description.kinds.as_slice()) {
        (Some(spec), _) => {
            println!("role        {}", spec.role);
            ""
        }
        (None, kinds) => {
            let names = join(kinds.iter().map(Kind::name));
            println!("kinds       {}", if kinds.is_empty() { "none of the published" } else { &names });
            " --as KIND"
        }
    };
    println!("import      cm model import {}{option} -o model.safetensors", path.display());
    Ok(())
}

fn import(file: &Path, kind: Option<&str>, out: &Path) -> Outcome {
    if let Some(net) = kind.and_then(|kind| kind.strip_prefix("lpips-")) {
        return import_lpips(file, net, out);
    }
    if kind == Some(inception::KIND) {
        return import_weights(file, out, "Inception of FID", inception::convert);
    }
    let kind = kind.map(str::parse::<Kind>).transpose().or_usage()?;
    let path = find(file)?;
    if same(&path, out) {
        return Err(anyhow!("{}: -o names the file that is read", out.display())).or_usage();
    }
    let (model, bar) = read(&path, kind);
    let written =
        model.or_usage().and_then(|model| Ok(cm_net::save_tensors(out, model.tensors, &model.spec)?));
    finish(bar);
    written?;
    own_info(out)
}

/// Reads a model; a large one with a bar, which stays while the caller writes.
fn read(path: &Path, kind: Option<Kind>) -> (cm_net::Result<ModelFile>, Option<Bar>) {
    let (mut bar, mut shown) = (None::<Bar>, 0);
    let model = import::load_any_watched(path, kind, &mut |done, total| {
        if total > SLOW && (done / MB > shown || bar.is_none()) {
            shown = done / MB;
            let bar = bar.get_or_insert_with(|| Bar::new("reading", "MB", 0, total / MB));
            bar.set(shown, if done == total { "done, writing …".to_owned() } else { String::new() });
        }
    });
    (model, bar)
}

fn finish(bar: Option<Bar>) {
    if let Some(bar) = bar {
        bar.finish();
    }
}

/// torchvision's weights become the file that LPIPS is read from.
fn import_lpips(file: &Path, net: &str, out: &Path) -> Outcome {
    let named = LpipsNet::ALL.into_iter().find(|known| known.to_string() == net);
    let net = named.with_context(|| format!("--as lpips-{net}: expected one of {LPIPS_KINDS}")).or_usage()?;
    import_weights(file, out, &format!("LPIPS with {net}, heads v0.1"), |tensors| {
        lpips::convert(tensors, net)
    })
}

/// Published weights of something that measures become the file that it is read from.
fn import_weights(
    file: &Path,
    out: &Path,
    what: &str,
    convert: impl FnOnce(TensorMap) -> cm_net::Result<Bundle>,
) -> Outcome {
    if same(file, out) {
        return Err(anyhow!("{}: -o names the file that is read", out.display())).or_usage();
    }
    let tensors = import::read_torch(file).or_usage()?;
    convert(tensors).with_context(|| file.display().to_string()).or_usage()?.write(out)?;
    println!("{}: {what}", out.display());
    Ok(())
}

fn export(file: &Path, to: ExportForm, dtype: Option<StoredDtype>, out: &Path) -> Outcome {
    if dtype.is_some() && to != ExportForm::Own {
        return Err(anyhow!("--dtype is for --to own")).or_usage();
    }
    let path = find(file)?;
    if same(&path, out) {
        return Err(anyhow!("{}: -o names the file that is read", out.display())).or_usage();
    }
    let (model, bar) = read(&path, None);
    let written = model.and_then(|model| {
        match to {
            ExportForm::Openai => import::export_openai(&model, out)?,
            ExportForm::Diffusers => import::export_diffusers(&model, out)?,
            ExportForm::Own => cm_net::save_tensors(out, stored(&model, dtype)?, &model.spec)?,
        }
        Ok(model)
    });
    finish(bar);
    let model = written.or_usage()?;
    println!("{}: {} in {} form", out.display(), model.spec.role, name(to));
    if to == ExportForm::Diffusers && model.spec.role == cm_net::Role::Denoiser {
        println!(
            "diffusers has a pipeline for consistency functions alone: unet/ was written, without a scheduler"
        );
    }
    Ok(())
}

/// The weights in the dtype that was asked for. Buffers stay as they are: frequencies and filters are few, and rounding
/// them changes the network more than rounding its weights.
fn stored(model: &ModelFile, dtype: Option<StoredDtype>) -> cm_net::Result<TensorMap> {
    let kind = match dtype {
        Some(StoredDtype::Bf16) => tch::Kind::BFloat16,
        Some(StoredDtype::F32) | None => tch::Kind::Float,
    };
    let net = model.backbone(tch::Device::Cpu)?;
    let weights: BTreeSet<&str> = net.params().trainable().map(|(name, _)| name).collect();
    let stored = |(name, tensor): (&String, &tch::Tensor)| {
        let tensor =
            if weights.contains(name.as_str()) { tensor.to_kind(kind) } else { tensor.shallow_clone() };
        (name.clone(), tensor)
    };
    Ok(model.tensors.iter().map(stored).collect())
}

fn name(form: ExportForm) -> &'static str {
    match form {
        ExportForm::Own => "this project's",
        ExportForm::Openai => "OpenAI's",
        ExportForm::Diffusers => "diffusers'",
    }
}

/// Whether two paths lead to one file that is there.
fn same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

fn join<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.collect::<Vec<_>>().join(", ")
}
