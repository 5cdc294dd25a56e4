//! `cm sample`: images from a trained model.

use anyhow::{Context, Result, bail};
use cm_data::{Shape, batch, grid, npz};
use cm_net::{Model, ModelSpec, Role};
use cm_sampler::{Guided, Method, ModelRef, Request, Solver, Steps, Times};
use cm_schedule::solver::Churn;

use super::session::{self, STUDENT_STEPS};
use crate::args::{SampleArgs, SamplerKind};
use crate::exit::{OrUsage, Outcome};
use crate::net::{HEUN_LEVELS, steps_of_student};
use crate::pictures;
use crate::sources::ModelSource;
use crate::ui::Bar;

/// Grids of more images than this would be too large to look at.
const GRID_MOST: usize = 400;

/// Runs `cm sample`.
pub fn sample(args: &SampleArgs) -> Outcome {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref()).or_usage()?;
    let device = session::device(&args.device).or_usage()?;
    let file = source.read().or_usage()?;
    let path = source.path.display();
    let model = file.model(device, cm_model::Compute::default()).or_usage()?;
    let labels = labels(args, file.spec.net.num_classes()).or_usage()?;
    let guided = guided(args, &model, &file.spec).with_context(|| path.to_string()).or_usage()?;
    let model = guided.as_ref().map_or(ModelRef::from(&model), |guided| ModelRef::Denoiser(guided));
    let steps = steps(args, &file.spec).or_usage()?;
    let method = Method::new(model, &steps).with_context(|| path.to_string()).or_usage()?;
    let seeds = &args.seeds.0;
    let request =
        Request { labels: labels.as_deref(), batch: args.batch, clip: !args.no_clip, ..Request::new(seeds) };
    // A folder that cannot be is found before the work.
    let out = args.out.display();
    std::fs::create_dir_all(&args.out).with_context(|| format!("{out}: creating the folder")).or_usage()?;
    eprintln!("model: {path} ({} parameters)", file.spec.net.num_parameters()?);
    let pixels = draw(&method, &request)?;
    write_all(args, &pixels, seeds, labels.as_deref())?;
    Ok(())
}

/// The denoiser that follows its class as closely as `--cfg` says.
fn guided<'a>(args: &SampleArgs, model: &'a Model, spec: &ModelSpec) -> Result<Option<Guided<'a>>> {
    let Some(weight) = args.cfg else { return Ok(None) };
    let Model::Denoiser(denoiser) = model else {
        bail!(
            "--cfg {weight}: guidance is for denoisers, and this is a consistency function; leave --cfg out"
        );
    };
    if spec.net.num_classes() == 0 {
        bail!("--cfg {weight}: guidance steers towards a class, and this model has none; leave --cfg out");
    }
    if spec.net.label_dropout() == 0.0 {
        bail!(
            "--cfg {weight}: this model was trained with label_dropout = 0 and knows no answer without a class, which \
             guidance compares with; leave --cfg out, or train with network.label_dropout = 0.1"
        );
    }
    if args.class.is_none() {
        bail!("--cfg {weight} steers towards a class: say which with --class");
    }
    Ok(Some(Guided::new(&**denoiser, weight)?))
}

/// The shape of the images that a model makes.
pub fn shape(args: &SampleArgs) -> Result<[i64; 3]> {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref())?;
    let shape = source.read()?.spec.net.image_shape();
    Ok([shape.channels, shape.height, shape.width])
}

/// Draws the images of `args` and hands each batch on, without writing anything.
pub fn each_batch(args: &SampleArgs, sink: &mut dyn FnMut(&tch::Tensor) -> Result<()>) -> Result<()> {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref())?;
    // What `auto` chooses has been said.
    let device = cm_torch::device::resolve_with_note(&args.device)?.device;
    let file = source.read()?;
    let model = file.model(device, cm_model::Compute::default())?;
    let labels = labels(args, file.spec.net.num_classes())?;
    let name = || source.path.display().to_string();
    let guided = guided(args, &model, &file.spec).with_context(name)?;
    let model = guided.as_ref().map_or(ModelRef::from(&model), |guided| ModelRef::Denoiser(guided));
    let method = Method::new(model, &steps(args, &file.spec)?).with_context(name)?;
    let (seeds, labels) = (&args.seeds.0, labels.as_deref());
    let request = Request { labels, batch: args.batch, clip: !args.no_clip, ..Request::new(seeds) };
    for evaluation in method.stream(&request)? {
        if let Some(images) = evaluation?.finished {
            sink(&images)?;
        }
    }
    Ok(())
}

/// The sampler that was asked for, or the usual one for the kind of model.
fn steps(args: &SampleArgs, spec: &ModelSpec) -> Result<Steps> {
    let distilled_to = spec.about.get(STUDENT_STEPS).and_then(|steps| steps.parse::<usize>().ok());
    let sampler = args.sampler.unwrap_or(match (spec.role, distilled_to) {
        (Role::Consistency, _) => SamplerKind::Onestep,
        (Role::Denoiser, None) => SamplerKind::Heun,
        (Role::Denoiser, Some(_)) => SamplerKind::Progdist,
    });
    check_options(args, sampler)?;
    let grid = spec.precond.grid()?;
    let solver = |solver| Steps::Solver { solver, levels: grid.with_zero(args.steps.unwrap_or(HEUN_LEVELS)) };
    Ok(match sampler {
        SamplerKind::Onestep => Steps::One,
        SamplerKind::Multistep => Steps::Multistep(times(args, spec.precond.rho)?),
        SamplerKind::Heun => solver(Solver::Heun { churn: churn(args)? }),
        SamplerKind::Dpm2 => solver(Solver::Dpm2 { churn: churn(args)? }),
        SamplerKind::Euler => solver(Solver::Euler),
        SamplerKind::Ancestral => solver(Solver::Ancestral),
        SamplerKind::Dpmpp2m => solver(Solver::DpmPp2m),
        SamplerKind::Progdist => {
            let steps = args.steps.or(distilled_to).context(
                "--sampler progdist needs --steps: the model does not say how many steps it was distilled to",
            )?;
            steps_of_student(&grid, steps)
        }
    })
}

/// Refuses options that would change nothing.
fn check_options(args: &SampleArgs, sampler: SamplerKind) -> Result<()> {
    let name = sampler.name();
    if sampler != SamplerKind::Multistep && (args.ts.is_some() || args.sigmas.is_some()) {
        bail!("--ts and --sigmas are for --sampler multistep");
    }
    if let (SamplerKind::Onestep, Some(steps)) = (sampler, args.steps) {
        bail!("--steps {steps}: one step is one step");
    }
    if let (SamplerKind::Multistep, Some(steps), None) = (sampler, args.steps, &args.ts) {
        bail!("--steps {steps}: with multistep it counts the points of the grid of --ts, which is not here");
    }
    let given = &args.churn;
    let others = [("--s-min", given.s_min), ("--s-max", given.s_max), ("--s-noise", given.s_noise)];
    if let (None, Some((option, Some(value)))) = (given.s_churn, others.iter().find(|(_, v)| v.is_some())) {
        bail!("{option} {value} is a part of churn: say how much there is with --s-churn");
    }
    let churns = matches!(sampler, SamplerKind::Heun | SamplerKind::Dpm2);
    if let (false, Some(s_churn)) = (churns, given.s_churn) {
        bail!("--s-churn {s_churn}: --sampler {name} adds no noise of this kind; heun and dpm2 do");
    }
    Ok(())
}

fn churn(args: &SampleArgs) -> Result<Churn> {
    let (none, given) = (Churn::NONE, &args.churn);
    let churn = Churn {
        s_churn: given.s_churn.unwrap_or(none.s_churn),
        s_min: given.s_min.unwrap_or(none.s_min),
        s_max: given.s_max.unwrap_or(none.s_max),
        s_noise: given.s_noise.unwrap_or(none.s_noise),
    };
    churn.validate()?;
    Ok(churn)
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
fn draw(method: &Method<'_>, request: &Request<'_>) -> Result<(Vec<u8>, Shape)> {
    let (total, evaluations) = (request.seeds.len(), method.num_evaluations());
    let mut bar = Bar::new("sample", "evaluations", 0, (total * evaluations) as u64);
    let started = std::time::Instant::now();
    let mut batches = Vec::new();
    let mut finished = 0;
    for evaluation in method.stream(request)? {
        let seen = evaluation?;
        finished = if seen.finished.is_some() { seen.images.end } else { finished };
        batches.extend(seen.finished.map(|images| images.to_device(tch::Device::Cpu)));
        let rate = finished as f64 / started.elapsed().as_secs_f64();
        let done = seen.images.start * evaluations + seen.images.len() * (seen.evaluation + 1);
        bar.set(done as u64, format!("{finished} images, {rate:.1} img/s, σ {:.3}", seen.sigma));
    }
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{total} images in {seconds:.2} s, {evaluations} evaluation(s) of the network each");
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
