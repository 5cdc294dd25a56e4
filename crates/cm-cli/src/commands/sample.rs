//! `cm sample`: images from a trained model.

use anyhow::{Context, Result, bail};
use cm_data::{Shape, batch, grid, npz};
use cm_net::{Model, ModelFile, ModelSpec, Role};
use cm_sampler::{Hooks, Method, Request, Solver, Times, sample_batches};
use cm_schedule::solver::Churn;

use super::session::{self, STUDENT_STEPS};
use crate::args::{SampleArgs, SamplerKind};
use crate::exit::{OrUsage, Outcome};
use crate::net::{HEUN_LEVELS, student_method};
use crate::pictures;
use crate::runs;
use crate::ui::Bar;

/// Grids of more images than this would be too large to look at.
const GRID_MOST: usize = 400;

/// Runs `cm sample`.
pub fn sample(args: &SampleArgs) -> Outcome {
    let path = runs::find_model(&args.model, args.ema.as_deref()).or_usage()?;
    let device = session::device(&args.device).or_usage()?;
    let file = ModelFile::read(&path).or_usage()?;
    let model = file.model(device, cm_model::Compute::default()).or_usage()?;
    let labels = labels(args, file.spec.net.num_classes()).or_usage()?;
    let method = method(args, &model, &file.spec).with_context(|| path.display().to_string()).or_usage()?;
    let seeds = &args.seeds.0;
    let request =
        Request { labels: labels.as_deref(), batch: args.batch, clip: !args.no_clip, ..Request::new(seeds) };
    // A folder that cannot be is found before the work.
    let out = args.out.display();
    std::fs::create_dir_all(&args.out).with_context(|| format!("{out}: creating the folder")).or_usage()?;
    eprintln!("model: {} ({} parameters)", path.display(), file.spec.net.num_parameters()?);
    let pixels = draw(&method, &request, args)?;
    write_all(args, &pixels, seeds, labels.as_deref())?;
    Ok(())
}

/// The shape of the images that a model makes.
pub fn shape(args: &SampleArgs) -> Result<[i64; 3]> {
    let path = runs::find_model(&args.model, args.ema.as_deref())?;
    let shape = cm_net::inspect(&path)?.spec.net.image_shape();
    Ok([shape.channels, shape.height, shape.width])
}

/// Draws the images of `args` and hands each batch on, without writing anything.
pub fn each_batch(args: &SampleArgs, sink: &mut dyn FnMut(&tch::Tensor) -> Result<()>) -> Result<()> {
    let path = runs::find_model(&args.model, args.ema.as_deref())?;
    // What `auto` chooses has been said.
    let device = cm_torch::device::resolve_with_note(&args.device)?.device;
    let file = ModelFile::read(&path)?;
    let model = file.model(device, cm_model::Compute::default())?;
    let labels = labels(args, file.spec.net.num_classes())?;
    let method = method(args, &model, &file.spec).with_context(|| path.display().to_string())?;
    let seeds = &args.seeds.0;
    let request =
        Request { labels: labels.as_deref(), batch: args.batch, clip: !args.no_clip, ..Request::new(seeds) };
    let mut failed = None;
    let drawn = sample_batches(&method, &request, Hooks::default(), &mut |_, images| {
        sink(&images).map_err(|error| {
            failed = Some(error);
            // Any error ends the drawing; the one above is what is told.
            cm_sampler::Error::EmptyBatch
        })
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(drawn?),
    }
}

/// The sampler that was asked for, or the usual one for the kind of model.
fn method<'a>(args: &SampleArgs, model: &'a Model, spec: &ModelSpec) -> Result<Method<'a>> {
    let distilled_to = spec.about.get(STUDENT_STEPS).and_then(|steps| steps.parse::<usize>().ok());
    let sampler = args.sampler.unwrap_or(match (model.role(), distilled_to) {
        (Role::Consistency, _) => SamplerKind::Onestep,
        (Role::Denoiser, None) => SamplerKind::Heun,
        (Role::Denoiser, Some(_)) => SamplerKind::Progdist,
    });
    if sampler != SamplerKind::Multistep && (args.ts.is_some() || args.sigmas.is_some()) {
        bail!("--ts and --sigmas are for --sampler multistep");
    }
    if sampler == SamplerKind::Onestep && args.steps.is_some() {
        bail!("--steps {}: one step is one step", args.steps.unwrap_or(1));
    }
    if let (SamplerKind::Multistep, Some(steps), None) = (sampler, args.steps, &args.ts) {
        bail!("--steps {steps}: with multistep it counts the points of the grid of --ts, which is not here");
    }
    let grid = spec.precond.grid()?;
    let levels = || grid.with_zero(args.steps.unwrap_or(HEUN_LEVELS));
    Ok(match sampler {
        SamplerKind::Onestep => Method::one_step(model.consistency()?)?,
        SamplerKind::Multistep => Method::multistep(model.consistency()?, &times(args, spec.precond.rho)?)?,
        SamplerKind::Heun => {
            Method::solver(model.denoiser()?, Solver::Heun { churn: Churn::NONE }, &levels())?
        }
        SamplerKind::Euler => Method::solver(model.denoiser()?, Solver::Euler, &levels())?,
        SamplerKind::Progdist => {
            let steps = args.steps.or(distilled_to).context(
                "--sampler progdist needs --steps: the model does not say how many steps it was distilled to",
            )?;
            student_method(model.denoiser()?, &grid, steps)?
        }
    })
}

/// A label for each seed: the class asked for, or all classes in turn where none was.
fn labels(args: &SampleArgs, classes: i64) -> Result<Option<Vec<i64>>> {
    match (args.class, classes) {
        (None, 0) => Ok(None),
        (Some(class), 0) => bail!("--class {class}: this model is unconditional; leave --class out"),
        (Some(class), n) if (0..n).contains(&class) => Ok(Some(vec![class; args.seeds.0.len()])),
        (Some(class), n) => bail!("--class {class}: expected 0 to {}", n - 1),
        (None, n) => Ok(Some(args.seeds.0.iter().map(|seed| (seed % n as u64) as i64).collect())),
    }
}

fn times(args: &SampleArgs, rho: f64) -> Result<Times> {
    match (&args.sigmas, &args.ts) {
        (Some(sigmas), _) => Ok(Times::Sigmas(sigmas.clone())),
        (None, Some(ts)) => {
            let last = ts.last().copied().unwrap_or(0);
            let steps = args.steps.unwrap_or_else(|| last.saturating_add(1));
            Ok(Times::Indices { ts: ts.clone(), steps, rho })
        }
        (None, None) => bail!("--sampler multistep needs --sigmas 80,0.8 or --ts 0,22,39"),
    }
}

/// Samples and returns uint8 NCHW pixels with their shape.
fn draw(method: &Method<'_>, request: &Request<'_>, args: &SampleArgs) -> Result<(Vec<u8>, Shape)> {
    let total = args.seeds.0.len() as u64;
    let mut bar = Bar::new("sample", "images", 0, total);
    let started = std::time::Instant::now();
    let mut batches = Vec::new();
    let mut done = 0;
    sample_batches(method, request, Hooks::default(), &mut |_, images| {
        done += images.size()[0] as u64;
        bar.set(done, format!("{:.1} img/s", done as f64 / started.elapsed().as_secs_f64()));
        batches.push(images.to_device(tch::Device::Cpu));
        Ok(())
    })?;
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "{total} images in {seconds:.2} s, {} evaluation(s) of the network each",
        method.num_evaluations()
    );
    let shape = batches.first().map(pictures::shape_of).context("no image was sampled")?;
    let pixels = batches.iter().map(batch::from_tensor).collect::<Result<Vec<_>, _>>()?;
    Ok((pixels.concat(), shape))
}

fn write_all(
    args: &SampleArgs,
    images: &(Vec<u8>, Shape),
    seeds: &[u64],
    labels: Option<&[i64]>,
) -> Result<()> {
    let (pixels, shape) = images;
    grid::save_samples(&args.out, pixels, *shape, seeds, args.subdirs)?;
    let archive = args.out.join(npz::samples_name(seeds.len(), *shape));
    npz::save(&archive, *shape, pixels, labels)?;
    let shown = seeds.len().min(GRID_MOST);
    let style = cm_data::GridStyle::readable(*shape, shown);
    let sheet = args.out.join("grid.png");
    pictures::save_png(&grid::grid(&pixels[..shown * shape.values()], *shape, &style)?, &sheet)?;
    println!("images: {}", args.out.display());
    println!("grid:   {}", sheet.display());
    println!("npz:    {}", archive.display());
    Ok(())
}
