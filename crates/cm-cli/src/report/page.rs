//! The page of a report: `results.md`.

use std::fmt::Write as _;

use super::claims::{Claim, Verdict};
use super::plan::{Settings, TEACHER};
use super::plots::Drawn;
use super::results::{Results, RunResult, Score, Spread};

/// Begins the part of a published page that people write, and that publishing keeps.
pub const NOTES: &str = "<!-- notes: these lines stay when the report is published again -->";
/// Ends it.
pub const END_OF_NOTES: &str = "<!-- end of notes -->";

/// The page; `picture` says where a picture lies, seen from it.
pub fn page(
    results: &Results,
    drawn: &[Drawn],
    notes: Option<&str>,
    picture: &dyn Fn(&str) -> String,
) -> String {
    let settings = &results.settings;
    let mut text = format!("# Report: {}\n\n", settings.data);
    text += &head(results);
    if let Some(notes) = notes {
        text += &format!("\n{NOTES}\n{notes}{END_OF_NOTES}\n");
    }
    text += "\n## Claims\n\nEach claim compares Fréchet distances (lower is better). It holds or fails if the means differ \
             by more than two standard deviations of their difference over the seeds; else it is unresolved. The teacher is one \
             training: its ± is over sets of seeds of its samples.\n\n";
    text += &claims(&results.claims);
    text += "\n## Trials\n\nPrecision and recall are those of the fewest steps in the row. A progressively distilled student is \
             made for one number of steps; each number is a training of its own, of all images.\n\n";
    text += &trials(results);
    text += "\n## The teacher\n\n";
    text += &teacher(results);
    text += "\n## Pictures\n";
    for (name, what) in drawn {
        let _ = write!(text, "\n{what}:\n\n![{what}]({})\n", picture(name));
    }
    text
}

fn head(results: &Results) -> String {
    let settings = &results.settings;
    let seeds = results.trials().iter().map(|trial| results.of(trial).count()).max().unwrap_or(0);
    let mut text = format!(
        "{} on {} ({} threads). One teacher and {} trials, {seeds} {} each; every student has the same network and sees {} \
         training images, the teacher {}.",
        results.date,
        results.device,
        results.threads,
        results.trials().len(),
        if seeds == 1 { "seed" } else { "seeds" },
        settings.budget,
        settings.teacher_budget,
    );
    if let Some(judge) = &results.judge {
        let _ = write!(
            text,
            " FCD is the Fréchet distance of {} samples to the training images on features of a classifier (by {}, {} images, \
             {:.1} % right on others): it compares the rows below with one another and with nothing else.",
            settings.measured,
            judge.task,
            judge.train_images,
            100.0 * judge.accuracy
        );
    }
    let floor = &results.floor;
    let _ = writeln!(
        text,
        " {} held-out real images get {}, precision {:.2} and recall {:.2} (a distance of fewer images comes out larger).",
        floor.images,
        number(floor.fcd),
        floor.precision,
        floor.recall
    );
    let _ = writeln!(text, "\nTo repeat it: `{}`.", command(settings, seeds, results));
    for (name, why) in &results.left_out {
        let _ = writeln!(text, "\nLeft out: {name}: {why}.");
    }
    text
}

/// The command that makes the report.
fn command(settings: &Settings, seeds: usize, results: &Results) -> String {
    let all = super::plan::TRIALS.len() - results.left_out.len();
    let trials = results.trials();
    let mut command = format!("cargo xtask report --data {}", settings.data);
    if settings.form != "full" {
        command += &format!(" --{}", settings.form);
    }
    command += &format!(" --budget {} --seeds {seeds}", settings.budget);
    if trials.len() != all {
        command += &format!(" --trials {}", trials.join(","));
    }
    if settings.data != "digits" && settings.data != "emoji" {
        command += " --images PATH";
    }
    if settings.device != "Cpu" {
        command += " --device cuda";
    }
    command
}

fn claims(claims: &[Claim]) -> String {
    let mut text =
        "| claim | this | | is better than | | verdict |\n| --- | --- | --- | --- | --- | --- |\n".to_owned();
    for claim in claims {
        let verdict = match (&claim.verdict, &claim.why) {
            (Verdict::Unresolved, Some(why)) => format!("unresolved: {why}"),
            (verdict, _) => format!("**{}**", verdict.name()),
        };
        let (better, worse) = (&claim.better, &claim.worse);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {verdict} |",
            claim.text,
            better.name,
            spread(Some(better.fcd)),
            worse.name,
            spread(Some(worse.fcd))
        );
    }
    text
}

fn trials(results: &Results) -> String {
    let mut text =
        "| trial | what | 1 step | 2 steps | 4 steps | precision | recall | evaluations an image | minutes \
                    | images/s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
            .to_owned();
    for trial in results.trials() {
        let runs: Vec<&RunResult> = results.of(trial).collect();
        let [what, evaluations] = runs
            .first()
            .map_or_else(Default::default, |run| [run.what.clone(), run.evaluations_per_image.to_string()]);
        let of = |steps: u64, figure: fn(&Score) -> f64| results.spread(trial, steps, figure);
        let fcd = |steps: u64| spread(of(steps, |score| score.fcd));
        let fewest = super::plan::distilled_to(trial).unwrap_or(1);
        let share = |figure: fn(&Score) -> f64| {
            of(fewest, figure).map_or("–".to_owned(), |s| format!("{:.2}", s.mean))
        };
        let mean = |of: fn(&RunResult) -> f64| {
            Spread::of(&runs.iter().map(|run| of(run)).collect::<Vec<_>>()).map_or(0.0, |s| s.mean)
        };
        let failed = runs.iter().filter(|run| run.failed.is_some()).count();
        let note = if failed > 0 { format!(" ({failed} of {} stopped)", runs.len()) } else { String::new() };
        let _ = writeln!(
            text,
            "| {trial} | {what}{note} | {} | {} | {} | {} | {} | {evaluations} | {:.1} | {:.0} |",
            fcd(1),
            fcd(2),
            fcd(4),
            share(|score| score.precision),
            share(|score| score.recall),
            mean(|run| run.minutes),
            mean(|run| run.images_per_second)
        );
    }
    text
}

fn teacher(results: &Results) -> String {
    let Some(run) = results.of(TEACHER).next() else { return "It was not trained.\n".to_owned() };
    if let Some(why) = &run.failed {
        return format!("Its training stopped: {why}\n");
    }
    let mut text = format!(
        "{}: {} parameters, {} steps in {:.1} minutes ({:.0} images/s).\n\n",
        run.what, run.parameters, run.steps, run.minutes, run.images_per_second
    );
    text += "One training; ± is over sets of seeds of its samples.\n\n";
    text += "| sampler | evaluations | FCD | precision | recall |\n| --- | --- | --- | --- | --- |\n";
    let mut seen: Vec<&str> = Vec::new();
    for score in &run.scores {
        if seen.contains(&score.sampler.as_str()) {
            continue;
        }
        seen.push(&score.sampler);
        let same = |figure: fn(&Score) -> f64| {
            let of = run.scores.iter().filter(|other| other.sampler == score.sampler).map(figure);
            Spread::of(&of.collect::<Vec<_>>())
        };
        let share =
            |figure: fn(&Score) -> f64| same(figure).map_or("–".to_owned(), |s| format!("{:.2}", s.mean));
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} |",
            score.sampler,
            score.evaluations,
            spread(same(|score| score.fcd)),
            share(|score| score.precision),
            share(|score| score.recall)
        );
    }
    text
}

fn spread(spread: Option<Spread>) -> String {
    match spread {
        None => "–".to_owned(),
        Some(Spread { mean, sd: None, .. }) => number(mean),
        Some(Spread { mean, sd: Some(sd), .. }) => format!("{} ± {}", number(mean), number(sd)),
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        a if a >= 100.0 => format!("{value:.0}"),
        a if a >= 10.0 => format!("{value:.1}"),
        a if a >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
