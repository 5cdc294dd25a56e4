//! The pictures of a report, in the manner of the paper's figures.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cm_data::{Batch, LabelRule, SourceSpec, Split};
use tch::{Device, Tensor};

use super::plan::{TEACHER, sampled_in};
use super::results::{Results, Spread};
use crate::args::SeedRange;
use crate::commands::eval::input;
use crate::commands::sample;
use crate::pictures::{self, Chart, Series};
use crate::ranks::Ranks;

/// A picture: file name without its ending, what it shows, and the trials of its curves.
type Curves = (&'static str, &'static str, &'static [&'static str]);

/// One-step scores against training images.
const CURVES: [Curves; 4] = [
    ("metrics", "CD by metric (pseudo-Huber is cd)", &["cd", "cd-l1", "cd-l2", "cd-lpips"]),
    (
        "solvers",
        "CD by solver and N (cd: Heun, N = 18)",
        &["cd", "cd-euler", "cd-n8", "cd-n8-euler", "cd-n40"],
    ),
    ("schedules", "CT by schedule", &["ct", "ct-n18", "ct-live"]),
    ("recipes", "Recipes", &["cd", "ct", "ict", "ect"]),
];

/// The trials whose quality is drawn against evaluations, and whose samples are shown.
const SHOWN: [&str; 5] = ["pd", "cd", "ct", "ict", "ect"];
/// The teacher's solvers: the option of `cm sample`, and the name in the chart.
const SOLVERS: [(&str, &str); 3] = [("heun", "EDM Heun"), ("dpmpp2m", "DPM-Solver++"), ("euler", "Euler")];
/// Seeds of the grids, the same for every model.
const GRID_SEEDS: u64 = 16;

/// The pictures of samples, with their number of steps.
pub const SAMPLES: [(&str, &str, u64); 2] = [
    ("one-step", "Samples in one step, equal seeds (teacher: 35 evaluations)", 1),
    ("two-step", "Samples in two steps, equal seeds (teacher: 35 evaluations)", 2),
];

/// A picture that was drawn: its file name without the ending, and what it shows.
pub type Drawn = (&'static str, &'static str);

/// Draws everything that the results have figures for into the folder `out`.
pub fn charts(results: &Results, out: &Path) -> Result<Vec<Drawn>> {
    let mut drawn = Vec::new();
    for (name, title, trials) in CURVES {
        let series: Vec<Series> = trials.iter().filter_map(|trial| curve(results, trial)).collect();
        if series.len() > 1 {
            let chart = Chart {
                title: format!("{title}: FCD of one step"),
                x_label: "training images".into(),
                log_y: true,
                dots: true,
                series,
                ..Chart::default()
            };
            save(&chart, out, name)?;
            drawn.push((name, title));
        }
    }
    let chart = Chart {
        title: "FCD against evaluations of the network".into(),
        x_label: "evaluations".into(),
        log_x: true,
        log_y: true,
        dots: true,
        series: quality(results),
    };
    save(&chart, out, "evaluations")?;
    drawn.push(("evaluations", "Quality against evaluations"));
    Ok(drawn)
}

fn save(chart: &Chart, out: &Path, name: &str) -> Result<()> {
    pictures::save_png(&chart.draw(), &out.join(format!("{name}.png")))
}

/// The mean over seeds at each point of a trial's runs.
fn curve(results: &Results, trial: &str) -> Option<Series> {
    let runs: Vec<_> = results.of(trial).filter(|run| !run.curve.is_empty()).collect();
    let first = runs.first()?;
    let at =
        |i: usize| Spread::of(&runs.iter().filter_map(|run| Some(run.curve.get(i)?.fcd)).collect::<Vec<_>>());
    let spreads: Vec<Spread> = (0..first.curve.len()).filter_map(at).collect();
    series(trial, first.curve.iter().map(|point| point.images as f64).zip(spreads).collect())
}

/// Quality against evaluations: the teacher by each solver, and the students.
fn quality(results: &Results) -> Vec<Series> {
    let teacher = results.of(TEACHER).next();
    let of_solver = |(word, name): &(&str, &str)| {
        let scores =
            || teacher.iter().flat_map(|run| &run.scores).filter(|score| score.sampler.contains(word));
        let mut at: Vec<u64> = scores().map(|score| score.evaluations).collect();
        at.sort_unstable();
        at.dedup();
        let of = |evaluations: &u64| {
            let same = scores().filter(|score| score.evaluations == *evaluations).map(|score| score.fcd);
            Some((*evaluations as f64, Spread::of(&same.collect::<Vec<_>>())?))
        };
        series(name, at.iter().filter_map(of).collect())
    };
    let of_student = |trial: &&str| {
        let spread = |steps: u64| {
            let of_steps = results.spread(sampled_in(trial, steps), steps, |score| score.fcd)?;
            Some((steps as f64, of_steps))
        };
        series(trial, [1, 2, 4].into_iter().filter_map(spread).collect())
    };
    SOLVERS.iter().filter_map(of_solver).chain(SHOWN.iter().filter_map(of_student)).collect()
}

fn series(name: &str, points: Vec<(f64, Spread)>) -> Option<Series> {
    let spread = points.iter().map(|(_, s)| s.sd.unwrap_or(0.0)).collect();
    let means: Vec<(f64, f64)> = points.iter().map(|(x, s)| (*x, s.mean)).collect();
    (!means.is_empty()).then(|| Series::new(name, means).with_spread(spread))
}

/// The file of a trial's model, and the options of its sampler for so many steps.
pub type ModelOf<'a> = dyn Fn(&str, u64) -> Option<(PathBuf, String)> + 'a;

/// Samples of all models with equal seeds, in one step and in two.
pub fn samples(results: &Results, data: &SourceSpec, out: &Path, model: &ModelOf<'_>) -> Result<Vec<Drawn>> {
    let trained = |trial: &&&str| results.of(trial).any(|run| run.failed.is_none());
    let mut drawn = Vec::new();
    for (name, what, steps) in SAMPLES {
        let mut columns = vec![("real".to_owned(), real(data)?)];
        for trial in [TEACHER].iter().chain(SHOWN.iter().filter(trained)) {
            let Some((file, words)) = model(trial, steps) else { continue };
            columns.push(((*trial).to_owned(), draw(&file, &words)?));
        }
        let picture = pictures::side_by_side(&columns)?;
        pictures::save_png(&picture, &out.join(format!("{name}.png")))?;
        drawn.push((name, what));
    }
    Ok(drawn)
}

fn real(data: &SourceSpec) -> Result<Tensor> {
    let mut spec = data.clone();
    (spec.split, spec.labels) = (Split::Test, LabelRule::None);
    let set = spec.open()?;
    Ok(Batch::gather(&*set, 0..set.len().min(GRID_SEEDS as usize) as u32)?.to_images(Device::Cpu)?)
}

fn draw(model: &Path, words: &str) -> Result<Tensor> {
    let name = model.display().to_string();
    let mut args = input::parse_sampling(&name, words)?;
    (args.seeds, args.batch) = (SeedRange((0..GRID_SEEDS).collect()), GRID_SEEDS as usize);
    let mut images = None;
    sample::each_batch(&args, &Ranks::alone(), &mut |batch| {
        images = Some(batch.to_device(Device::Cpu));
        Ok(())
    })?;
    images.with_context(|| format!("{name}: no samples"))
}
