//! `--recipe all`: every recipe on the same data, its samples beside the others' with equal seeds.

use anyhow::{Context, Result};
use cm_train::RunLock;
use tch::Tensor;

use super::measure::Sets;
use super::plan::{ALL, Plan};
use super::publish;
use super::summary::{SUMMARY_FILE, Summary};
use super::{Shared, one};
use crate::args::{DemoArgs, DemoRecipe};
use crate::commands::session;
use crate::exit::{Failure, OrUsage, Outcome};
use crate::pictures;

/// The picture of all recipes.
pub const PICTURE: &str = "recipes.png";

/// What stands for all recipes in docs/results.md.
fn block_of(args: &DemoArgs) -> String {
    format!("{}-recipes", args.data.name())
}

/// Runs every recipe into a folder of its own below `--out`.
pub fn all(args: &DemoArgs) -> Outcome {
    let plans = ALL.iter().map(|&recipe| Ok((recipe, Plan::of(args.data, recipe)?)));
    let plans = plans.collect::<Result<Vec<_>>>().or_usage()?;
    if args.publish || args.publish_only {
        for preset in plans.iter().map(|(_, plan)| plan.preset).chain([block_of(args).as_str()]) {
            publish::check(preset).or_usage()?;
        }
    }
    if args.publish_only {
        return publish_all(&plans, args).or_usage();
    }
    let _lock = RunLock::take(&args.out).or_usage()?;
    let stop = session::stop_on_signal()?;
    let mut columns = vec![("real".to_owned(), real(args, &plans)?)];
    let (mut summaries, mut shared) = (Vec::new(), Shared::default());
    for (recipe, plan) in &plans {
        eprintln!("recipe {}", recipe.name());
        let (summary, images) = one(args, plan, &args.out.join(recipe.name()), &stop, &mut shared)?;
        columns.push((recipe.name().to_uppercase(), images));
        summaries.push((recipe.name(), summary));
    }
    let picture = args.out.join(PICTURE);
    pictures::save_png(&pictures::side_by_side(&columns)?, &picture)?;
    println!("\nsamples in one step, with equal seeds: {}", picture.display());
    println!(
        "{:<6} {:>10} {:>12} {:>9} {:>9} {:>9}",
        "", "confident", "near data", "entropy", "nearest", "steps"
    );
    for (name, summary) in &summaries {
        println!("{name:<6} {}", summary.line());
    }
    judge(args, &summaries)?;
    match args.publish {
        true => Ok(publish_all(&plans, args)?),
        false => Ok(()),
    }
}

/// Held-out images, to look at beside the samples.
fn real(args: &DemoArgs, plans: &[(DemoRecipe, Plan)]) -> Result<Tensor> {
    let (_, plan) = plans.first().context("there are recipes")?;
    Ok(Sets::open(&super::experiment(plan.preset, args)?)?.held_out().shallow_clone())
}

fn judge(args: &DemoArgs, summaries: &[(&str, Summary)]) -> Outcome {
    let Some(bar) = args.check else { return Ok(()) };
    let missed = |(name, summary): &(&str, Summary)| summary.check(bar).err().map(|e| format!("{name}: {e}"));
    let misses: Vec<String> = summaries.iter().filter_map(missed).collect();
    match misses.is_empty() {
        true => Ok(()),
        false => Err(Failure::Run(anyhow::anyhow!("{}", misses.join("; ")))),
    }
}

/// Publishes each recipe's block, and the picture of all with a table.
fn publish_all(plans: &[(DemoRecipe, Plan)], args: &DemoArgs) -> Result<()> {
    let out = &args.out;
    let mut rows = String::from("| | confident | near data | class entropy | nearest | steps |\n");
    rows += "| --- | --- | --- | --- | --- | --- |\n";
    for (recipe, plan) in plans {
        let folder = out.join(recipe.name());
        let summary = Summary::read(&folder.join(SUMMARY_FILE))?;
        summary.is_of(plan.preset, &folder)?;
        publish::publish(&summary, &folder)?;
        let cells: Vec<String> = summary.line().split_whitespace().map(str::to_owned).collect();
        rows += &format!("| {} | {} |\n", recipe.name().to_uppercase(), cells.join(" | "));
    }
    publish::publish_block(
        &block_of(args),
        &rows,
        &[(out.join(PICTURE), "recipes", "All recipes, equal seeds")],
    )
}
