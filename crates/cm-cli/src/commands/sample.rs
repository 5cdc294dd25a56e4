//! `cm sample`: images from a trained model.

use std::cell::Cell;

use anyhow::{Context, Result, bail};
use cm_data::{Shape, batch, digest, grid, npz};
use cm_net::{Model, ModelFile, ModelSpec, Role};
use cm_sampler::{Guided, Method, ModelRef, Request, Solver, Steps, Times};
use cm_schedule::solver::Churn;
use serde_json::{Value, json};
use tch::Tensor;

use super::eval::cache::digest_of;
use super::session::STUDENT_STEPS;
use crate::args::{Dtype, SampleArgs, SamplerKind};
use crate::exit::{OrUsage, Outcome};
use crate::net::{HEUN_LEVELS, steps_of_student};
use crate::pictures;
use crate::ranks::Ranks;
use crate::sources::ModelSource;
use crate::ui::{self, Bar};

/// Grids of more images than this would be too large to look at.
const GRID_MOST: usize = 400;

/// Runs `cm sample`.
pub fn sample(args: &SampleArgs, ranks: &Ranks) -> Outcome {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref()).or_usage()?;
    let device = ranks.device(&args.device).or_usage()?;
    let file = source.read().or_usage()?;
    let path = source.path.display();
    ranks.agree_on(|| settings_of(args, &file)).or_usage()?;
    let (spec, model) = file.into_model(device, args.compute()).or_usage()?;
    let labels = labels(args, spec.net.num_classes()).or_usage()?;
    let guided = guided(args, &model, &spec).with_context(|| path.to_string()).or_usage()?;
    let model = guided.as_ref().map_or(ModelRef::from(&model), |guided| ModelRef::Denoiser(guided));
    let steps = steps(args, &spec).or_usage()?;
    let method = Method::new(model, &steps).with_context(|| path.to_string()).or_usage()?;
    let seeds = &args.seeds.0;
    let request =
        Request { labels: labels.as_deref(), batch: args.batch, clip: !args.no_clip, ..Request::new(seeds) };
    if ranks.group.is_first() {
        // A folder that cannot be is found before the work.
        let out = args.out.display();
        std::fs::create_dir_all(&args.out)
            .with_context(|| format!("{out}: creating the folder"))
            .or_usage()?;
    }
    ui::say(&format!("model: {path} ({} parameters)", spec.net.num_parameters()?));
    let pixels = draw(&method, &request, ranks)?;
    if ranks.group.is_first() {
        let _busy = ranks.group.busy();
        write_all(args, &pixels, seeds, labels.as_deref())?;
    }
    Ok(())
}

/// All that decides about the images, for ranks to compare.
pub fn settings(args: &SampleArgs) -> Result<Value> {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref())?;
    settings_of(args, &source.read()?)
}

fn settings_of(args: &SampleArgs, file: &ModelFile) -> Result<Value> {
    let seeds: Vec<[u8; 8]> = args.seeds.0.iter().map(|seed| seed.to_le_bytes()).collect();
    Ok(json!({
        "model": { "weights": digest_of(&file.tensors), "description": file.spec.metadata() },
        "sampler": format!("{:?}", steps(args, &file.spec)?),
        "seeds": digest::of_bytes(seeds.iter().map(<[u8; 8]>::as_slice)),
        "class": args.class,
        "cfg": args.cfg,
        "batch": args.batch,
        "no_clip": args.no_clip,
        "dtype": format!("{:?}", args.dtype),
    }))
}

/// What a model's images are made by, for people who want to know later.
#[derive(Debug)]
pub struct MadeBy {
    /// The SHA-256 of the weights: of the numbers with their names, in whatever file they are.
    pub weights: String,
    /// The options of `cm sample` that decide about the images, also those that were not given.
    pub sampler: String,
}

/// What the images of `args` are made by.
pub fn made_by(args: &SampleArgs) -> Result<MadeBy> {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref())?;
    let file = source.read()?;
    Ok(MadeBy { weights: digest_of(&file.tensors), sampler: sampler_words(args, &file.spec)? })
}

fn sampler_words(args: &SampleArgs, spec: &ModelSpec) -> Result<String> {
    let sampler = sampler(args, spec);
    let mut words = format!("--sampler {}", sampler.name());
    let mut add = |option: &str, value: Option<String>| {
        if let Some(value) = value {
            words += &format!(" {option} {value}");
        }
    };
    match sampler {
        SamplerKind::Onestep => {}
        SamplerKind::Multistep => match times(args, spec.precond.rho)? {
            Times::Sigmas(sigmas) => add("--sigmas", Some(list(&sigmas))),
            Times::Indices { ts, steps, .. } => {
                add("--ts", Some(list(&ts)));
                add("--steps", Some(steps.to_string()));
            }
        },
        SamplerKind::Progdist => {
            let steps = args.steps.or(distilled_to(spec));
            add("--steps", steps.map(|steps| steps.to_string()));
        }
        _ => add("--steps", Some(args.steps.unwrap_or(HEUN_LEVELS).to_string())),
    }
    let churn = &args.churn;
    for (option, value) in [
        ("--s-churn", churn.s_churn),
        ("--s-min", churn.s_min),
        ("--s-max", churn.s_max),
        ("--s-noise", churn.s_noise),
        ("--cfg", args.cfg),
    ] {
        add(option, value.map(|value| value.to_string()));
    }
    add("--class", args.class.map(|class| class.to_string()));
    add("--no-clip", args.no_clip.then(String::new));
    add("--dtype", (args.dtype != Dtype::F32).then(|| format!("{:?}", args.dtype).to_lowercase()));
    Ok(words.trim_end().to_owned())
}

fn list<T: ToString>(values: &[T]) -> String {
    values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
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

/// Draws this rank's share of the images of `args` and hands each batch on, without writing anything.
pub fn each_batch(
    args: &SampleArgs,
    ranks: &Ranks,
    sink: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<()> {
    let source = ModelSource::find(&args.model, args.kind.as_deref(), args.ema.as_deref())?;
    // What `auto` chooses has been said.
    let device = ranks.device_again(&args.device)?;
    let (spec, model) = source.read()?.into_model(device, args.compute())?;
    let labels = labels(args, spec.net.num_classes())?;
    let name = || source.path.display().to_string();
    let guided = guided(args, &model, &spec).with_context(name)?;
    let model = guided.as_ref().map_or(ModelRef::from(&model), |guided| ModelRef::Denoiser(guided));
    let method = Method::new(model, &steps(args, &spec)?).with_context(name)?;
    let share = Share::of(&args.seeds.0, labels.as_deref(), args.batch, ranks);
    if share.seeds.is_empty() {
        return Ok(());
    }
    let request = Request { batch: args.batch, clip: !args.no_clip, ..share.request() };
    for evaluation in method.stream(&request)? {
        if let Some(images) = evaluation?.finished {
            sink(&images)?;
        }
    }
    Ok(())
}

/// What one of several ranks draws.
struct Share {
    seeds: Vec<u64>,
    labels: Option<Vec<i64>>,
}

impl Share {
    fn of(seeds: &[u64], labels: Option<&[i64]>, batch: usize, ranks: &Ranks) -> Self {
        Self { seeds: ranks.share(seeds, batch), labels: labels.map(|labels| ranks.share(labels, batch)) }
    }

    fn request(&self) -> Request<'_> {
        Request { labels: self.labels.as_deref(), ..Request::new(&self.seeds) }
    }
}

/// The steps that a model was progressively distilled to.
fn distilled_to(spec: &ModelSpec) -> Option<usize> {
    spec.about.get(STUDENT_STEPS).and_then(|steps| steps.parse().ok())
}

/// The sampler that was asked for, or the usual one for the kind of model.
fn sampler(args: &SampleArgs, spec: &ModelSpec) -> SamplerKind {
    args.sampler.unwrap_or(match (spec.role, distilled_to(spec)) {
        (Role::Consistency, _) => SamplerKind::Onestep,
        (Role::Denoiser, None) => SamplerKind::Heun,
        (Role::Denoiser, Some(_)) => SamplerKind::Progdist,
    })
}

/// [`sampler`] with what it needs to know.
fn steps(args: &SampleArgs, spec: &ModelSpec) -> Result<Steps> {
    let sampler = sampler(args, spec);
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
            let steps = args.steps.or(distilled_to(spec)).context(
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

/// Samples, and returns on rank 0 uint8 NCHW pixels with their shape.
fn draw(method: &Method<'_>, request: &Request<'_>, ranks: &Ranks) -> Result<(Vec<u8>, Shape)> {
    let (total, evaluations) = (request.seeds.len(), method.num_evaluations());
    let share = Share::of(request.seeds, request.labels, request.batch, ranks);
    let own = Request { batch: request.batch, clip: request.clip, ..share.request() };
    let mut turns = ranks.turns(total, request.batch);
    let due = (share.seeds.len() * evaluations) as u64;
    let mut bar = (!ui::is_quiet()).then(|| Bar::new("sample", "evaluations", 0, due));
    let started = std::time::Instant::now();
    let (image, mut pixels) = (method.shape(), Vec::new());
    let [channels, height, width] = [image.channels, image.height, image.width].map(|side| side as usize);
    let shape = Shape { channels, height, width };
    let finished = Cell::new(0);
    let mut take = |made: Vec<Tensor>| -> Result<()> {
        for bytes in &made {
            pixels.extend(Vec::<u8>::try_from(bytes)?);
        }
        finished.set(pixels.len() / shape.values());
        Ok(())
    };
    let stream = if share.seeds.is_empty() { None } else { Some(method.stream(&own)?) };
    for evaluation in stream.into_iter().flatten() {
        let seen = evaluation?;
        if let Some(images) = &seen.finished {
            turns.hand_on(&[Tensor::f_from_slice(&batch::from_tensor(images)?)?], &mut take)?;
        }
        let (images, seconds) = (finished.get(), started.elapsed().as_secs_f64());
        let done = seen.images.start * evaluations + seen.images.len() * (seen.evaluation + 1);
        if let Some(bar) = &mut bar {
            let rate = images as f64 / seconds;
            bar.set(done as u64, format!("{images} images, {rate:.1} img/s, σ {:.3}", seen.sigma));
        }
    }
    turns.finish(&mut take)?;
    if let Some(bar) = bar {
        bar.finish();
    }
    let seconds = started.elapsed().as_secs_f64();
    ui::say(&format!("{total} images in {seconds:.2} s, {evaluations} evaluation(s) of the network each"));
    Ok((pixels, shape))
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
