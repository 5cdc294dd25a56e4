//! `cm edit …`: zero-shot edits of pictures.

pub mod edits;
mod input;
mod output;

use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use cm_model::{ConsistencyFn, ImageShape};
use cm_net::Model;
use cm_sampler::edit::{Inpaint, feather, stroke_sigma, stroke_times};
use cm_sampler::{Method, Times};
use tch::Tensor;

use super::session;
use crate::args::EditCommand;
use crate::args::edit::{
    CommonArgs, ComposeArgs, DenoiseArgs, FitChoice, InpaintArgs, InterpolateArgs, OutpaintArgs, PictureArgs,
    StrokeArgs, SuperresArgs, WalkArgs,
};
use crate::exit::{Failure, OrUsage, Outcome};
use crate::sources::ModelSource;
use edits::{Edited, Editor, Known, Small};
use input::Picture;

/// Runs `cm edit …`.
pub fn edit(command: &EditCommand) -> Outcome {
    match command {
        EditCommand::Inpaint(args) => inpaint(args),
        EditCommand::Colorize(args) => colorize(&args.picture, &args.walk, &args.common),
        EditCommand::Superres(args) => superres(args),
        EditCommand::Stroke(args) => stroke(args),
        EditCommand::Denoise(args) => denoise(args),
        EditCommand::Interpolate(args) => interpolate(args),
        EditCommand::Outpaint(args) => outpaint(args),
        EditCommand::Compose(args) => compose(args),
    }
}

/// A model that is loaded.
struct Loaded {
    model: Model,
    rho: f64,
}

impl Loaded {
    fn new(common: &CommonArgs) -> Result<Self> {
        let source = ModelSource::find(&common.model, common.kind.as_deref(), common.ema.as_deref())?;
        let path = source.path.display();
        let device = session::device(&common.device)?;
        let (spec, model) = source.read()?.into_model(device, common.dtype.compute())?;
        model.consistency().with_context(|| format!("{path}: edits need a consistency model"))?;
        eprintln!("model: {path} ({} parameters)", spec.net.num_parameters()?);
        Ok(Self { model, rho: spec.precond.rho })
    }

    fn f(&self) -> Result<&dyn ConsistencyFn> {
        Ok(self.model.consistency()?)
    }

    fn shape(&self) -> Result<ImageShape> {
        Ok(self.f()?.shape())
    }
}

/// Makes the place for results, once everything else is found to be right and before the work.
fn make_folder(common: &CommonArgs) -> Result<()> {
    let out = common.out.display();
    std::fs::create_dir_all(&common.out).with_context(|| format!("{out}: creating the folder"))
}

/// The seeds of the variations.
fn seeds(walk: &WalkArgs) -> Vec<u64> {
    match &walk.seeds {
        Some(seeds) => seeds.0.clone(),
        None => (0..walk.variations as u64).collect(),
    }
}

/// Runs an edit in several steps: `usual` are its time points where none were asked for. What is wrong with the request
/// is said before the model runs.
fn variations(
    loaded: &Loaded,
    walk: &WalkArgs,
    common: &CommonArgs,
    usual: Option<Times>,
    edit: impl FnOnce(&Editor<'_>) -> Result<Edited>,
) -> Outcome {
    let f = loaded.f().or_usage()?;
    let seeds = seeds(walk);
    let labels = input::labels(common.class, &seeds, f.num_classes(), false).or_usage()?;
    let times = input::times(walk, loaded.rho).or_usage()?;
    let labels = labels.as_deref();
    let mut editor = Editor { f, rho: loaded.rho, seeds: &seeds, labels, batch: walk.batch, times };
    let times = editor.times.take().or(usual).unwrap_or_else(|| editor.times());
    let evaluations = Method::multistep(f, &times).or_usage()?.num_evaluations();
    editor.times = Some(times);
    make_folder(common).or_usage()?;
    let started = std::time::Instant::now();
    let edited = edit(&editor)?;
    let seconds = started.elapsed().as_secs_f64();
    eprintln!("{} result(s) in {seconds:.2} s, {evaluations} evaluation(s) of the network each", seeds.len());
    Ok(output::write(common, &edited, &seeds, labels)?)
}

/// The picture of `args`, in the size of the model's images, and as it was read.
fn picture(args: &PictureArgs, shape: ImageShape) -> Outcome<(Tensor, Picture)> {
    let read = Picture::read(&args.image).or_usage()?;
    let tensor =
        read.to_tensor(shape, args.fit, "the size of the model's images (--fit exact)").or_usage()?;
    Ok((tensor, read))
}

fn mask(path: &Path, invert: bool, of: &Picture, shape: ImageShape, fit: FitChoice) -> Outcome<Tensor> {
    let mask = Picture::read(path).or_usage()?;
    mask.to_mask(of, shape, fit, invert).or_usage()
}

fn inpaint(args: &InpaintArgs) -> Outcome {
    let loaded = Loaded::new(&args.common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    let (picture, read) = picture(&args.picture, shape)?;
    let mask = mask(&args.mask, args.invert, &read, shape, args.picture.fit)?;
    let anew = feather(&mask, args.feather).context("--feather").or_usage()?;
    some_kept(&anew, args.feather).or_usage()?;
    variations(&loaded, &args.walk, &args.common, None, |editor| editor.inpaint(&picture, &anew))
}

/// A blend that reaches everywhere would keep nothing as it is.
fn some_kept(anew: &Tensor, feather: usize) -> Result<()> {
    ensure!(
        anew.min().double_value(&[]) == 0.0,
        "--feather {feather}: the blend reaches every pixel that is to be kept; give less"
    );
    Ok(())
}

fn colorize(of: &PictureArgs, walk: &WalkArgs, common: &CommonArgs) -> Outcome {
    let loaded = Loaded::new(common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    in_colour(shape, "colorize").or_usage()?;
    let (picture, _) = picture(of, shape)?;
    variations(&loaded, walk, common, None, |editor| editor.colorize(&picture))
}

fn in_colour(shape: ImageShape, edit: &str) -> Result<()> {
    ensure!(
        shape.channels == 3,
        "{edit}: the model makes grey images ({shape}); colours need three channels"
    );
    Ok(())
}

fn patches(shape: ImageShape, factor: i64) -> Result<()> {
    let fits = shape.height % factor == 0 && shape.width % factor == 0;
    let (width, height) = (shape.width, shape.height);
    ensure!(
        fits,
        "--factor {factor}: the model makes images of {width}x{height}, which is no multiple of it"
    );
    Ok(())
}

fn superres(args: &SuperresArgs) -> Outcome {
    let loaded = Loaded::new(&args.common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    patches(shape, args.factor).or_usage()?;
    let read = Picture::read(&args.image).or_usage()?;
    let small = ImageShape { height: shape.height / args.factor, width: shape.width / args.factor, ..shape };
    let (target, usual) = if args.demonstrate { (shape, FitChoice::Crop) } else { (small, FitChoice::Exact) };
    let needs = format!(
        "the model makes {}x{}, and the factor is {}; --demonstrate degrades a full picture, --fit scales a small one",
        shape.width, shape.height, args.factor
    );
    let picture = read.to_tensor(target, args.fit.unwrap_or(usual), &needs).or_usage()?;
    variations(&loaded, &args.walk, &args.common, None, |editor| {
        let small = if args.demonstrate { Small::Full(&picture) } else { Small::Low(&picture) };
        editor.superres(&small, args.factor)
    })
}

fn stroke(args: &StrokeArgs) -> Outcome {
    let loaded = Loaded::new(&args.common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    if let (Some(steps), None) = (args.walk.steps, &args.walk.ts) {
        return Err(Failure::Usage(anyhow!(
            "--steps {steps}: the whole grid begins at σ_max, where nothing of the drawing is left; give --sigma, or --ts \
             with it"
        )));
    }
    let (drawing, _) = picture(&args.picture, shape)?;
    let sigma = args.sigma.unwrap_or_else(|| stroke_sigma(shape));
    let usual = Some(stroke_times(sigma, loaded.f().or_usage()?.sigma_range()));
    variations(&loaded, &args.walk, &args.common, usual, |editor| editor.stroke(&drawing, sigma))
}

fn denoise(args: &DenoiseArgs) -> Outcome {
    let loaded = Loaded::new(&args.common).or_usage()?;
    let f = loaded.f().or_usage()?;
    let seeds = [0];
    let labels = input::labels(args.common.class, &seeds, f.num_classes(), true).or_usage()?;
    let (read, _) = picture(&args.picture, f.shape())?;
    known_level("--sigma", args.sigma, f).or_usage()?;
    known_level("--add-noise", args.add_noise, f).or_usage()?;
    let noisy = match args.add_noise {
        Some(sigma) => edits::with_noise(f, &read, sigma, 0)?,
        None => read.shallow_clone(),
    };
    let sigma = match args.sigma {
        Some(sigma) => sigma,
        None => estimated(&noisy, f).or_usage()?,
    };
    let labels = labels.as_deref();
    let editor = Editor { f, rho: loaded.rho, seeds: &seeds, labels, batch: 1, times: None };
    make_folder(&args.common).or_usage()?;
    let edited = editor.denoise(&noisy, sigma, args.add_noise.map(|_| &read))?;
    Ok(output::write(&args.common, &edited, &seeds, labels)?)
}

fn known_level(option: &str, level: Option<f64>, f: &dyn ConsistencyFn) -> Result<()> {
    let range = f.sigma_range();
    let (low, high) = (range.min(), range.max());
    let known = level.is_none_or(|level| range.contains(level));
    ensure!(
        known,
        "{option} {}: the model knows noise levels from {low} to {high}",
        level.unwrap_or_default()
    );
    Ok(())
}

/// The noise level of a picture, said aloud.
fn estimated(noisy: &Tensor, f: &dyn ConsistencyFn) -> Result<f64> {
    let (sigma, range) = (edits::noise_of(noisy)?, f.sigma_range());
    ensure!(
        sigma > range.min(),
        "the picture shows no noise (sigma is estimated at {sigma:.4}, the model begins at {}); give --sigma",
        range.min()
    );
    eprintln!("sigma: {sigma:.4}, estimated from the finest details (--sigma gives another)");
    Ok(sigma.min(range.max()))
}

fn interpolate(args: &InterpolateArgs) -> Outcome {
    let seeds = &args.seeds.0;
    let two = || anyhow!("--seeds: expected two, as in 3,8, and got {}", seeds.len());
    let [_, _] = seeds[..] else { return Err(Failure::Usage(two())) };
    let loaded = Loaded::new(&args.common).or_usage()?;
    let f = loaded.f().or_usage()?;
    let labels = input::labels(args.common.class, seeds, f.num_classes(), true).or_usage()?;
    let labels = labels.as_deref();
    let editor = Editor { f, rho: loaded.rho, seeds, labels, batch: args.batch, times: None };
    make_folder(&args.common).or_usage()?;
    let edited = editor.interpolate(args.frames)?;
    Ok(output::write_frames(&args.common, &edited, args.fps, labels)?)
}

fn outpaint(args: &OutpaintArgs) -> Outcome {
    let loaded = Loaded::new(&args.common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    let inner = inner(args, shape).or_usage()?;
    let needs = "what the margins leave of the model's images (--fit exact)";
    let picture = Picture::read(&args.picture.image).or_usage()?;
    let picture = picture.to_tensor(inner, args.picture.fit, needs).or_usage()?;
    let placed = Inpaint::outpaint(&picture, shape, args.left, args.top, args.feather).or_usage()?;
    some_kept(placed.anew(), args.feather).or_usage()?;
    variations(&loaded, &args.walk, &args.common, None, |editor| {
        editor.outpaint(&picture, args.left, args.top, args.feather)
    })
}

/// What the margins leave of the model's images.
fn inner(args: &OutpaintArgs, shape: ImageShape) -> Result<ImageShape> {
    let margins = [args.left, args.right, args.top, args.bottom];
    ensure!(margins != [0; 4], "no margin: give --left, --right, --top or --bottom in pixels of the result");
    let rest = |side: i64, before: usize, after: usize| {
        let margins = before.saturating_add(after);
        let rest = usize::try_from(side).unwrap_or(0).saturating_sub(margins);
        ensure!(rest > 0, "margins of {margins} pixels leave nothing of the {side} of the model's images");
        Ok(rest as i64)
    };
    let (width, height) =
        (rest(shape.width, args.left, args.right)?, rest(shape.height, args.top, args.bottom)?);
    let soft = i64::try_from(args.feather).unwrap_or(i64::MAX);
    ensure!(soft <= width.max(height), "--feather {soft}: the picture itself has {width}x{height} pixels");
    Ok(ImageShape { width, height, ..shape })
}

fn compose(args: &ComposeArgs) -> Outcome {
    let nothing = args.mask.is_none() && !args.grey && args.factor.is_none();
    if nothing {
        return Err(Failure::Usage(anyhow!(
            "nothing to keep: give --mask FILE, --grey, --factor P or several"
        )));
    }
    let loaded = Loaded::new(&args.common).or_usage()?;
    let shape = loaded.shape().or_usage()?;
    if args.grey {
        in_colour(shape, "--grey").or_usage()?;
    }
    args.factor.map_or(Ok(()), |factor| patches(shape, factor)).or_usage()?;
    let (picture, read) = picture(&args.picture, shape)?;
    let outside = match &args.mask {
        Some(path) => Some(mask(path, args.invert, &read, shape, args.picture.fit)?),
        None => None,
    };
    let known = Known { outside, luma: args.grey, factor: args.factor };
    variations(&loaded, &args.walk, &args.common, None, |editor| editor.compose(&picture, &known))
}
