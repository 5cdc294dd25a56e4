//! Images through the networks, with progress and the cache.

use anyhow::{Context, Result, bail};
use cm_data::Dataset;
use cm_eval::{Collector, Measured, Parts};

use super::cache::{Cache, Key, PREPARED};
use super::input::{self, Input};
use super::judge::Judge;
use crate::ui::Bar;

/// What is wanted of the images by each network.
pub type Wanted<'a> = Vec<(&'a Judge, Parts)>;

/// Measures the images of an input for each network, in one pass.
fn pass(input: &Input, total: u64, wanted: &[(&Judge, Parts)], batch: usize) -> Result<Vec<Measured>> {
    let collector = |(_, parts): &(&Judge, Parts)| Collector::new(*parts, total);
    let mut collectors = wanted.iter().map(collector).collect::<cm_eval::Result<Vec<_>>>()?;
    let mut bar = Bar::new("eval", "images", 0, total);
    let (mut done, started) = (0u64, std::time::Instant::now());
    input::each_batch(input, batch, &mut |images| {
        for (collector, (judge, _)) in collectors.iter_mut().zip(wanted) {
            collector.add(&judge.net.see(images)?).with_context(|| judge.name)?;
        }
        done += images.size().first().copied().unwrap_or(0) as u64;
        bar.set(done, format!("{:.1} img/s", done as f64 / started.elapsed().as_secs_f64().max(1e-9)));
        Ok(())
    })?;
    bar.finish();
    Ok(collectors.into_iter().map(Collector::finish).collect::<cm_eval::Result<_>>()?)
}

/// What `wanted` asks of a set: out of the cache where it is there, else measured and kept.
pub fn of_set(
    input: &Input,
    set: &dyn Dataset,
    data: &str,
    wanted: &Wanted<'_>,
    cache: &Cache,
    batch: usize,
) -> Result<Vec<Measured>> {
    let key = |judge: &Judge| Key {
        data: data.to_owned(),
        weights: judge.weights.clone(),
        prepared: PREPARED.to_owned(),
    };
    let mut found: Vec<Option<Measured>> =
        wanted.iter().map(|(judge, parts)| cache.get(&key(judge), parts)).collect();
    let missing: Vec<usize> = (0..found.len()).filter(|&i| found[i].is_none()).collect();
    if !missing.is_empty() {
        let open: Vec<_> = missing.iter().map(|&i| wanted[i]).collect();
        for (&place, measured) in missing.iter().zip(pass(input, set.len() as u64, &open, batch)?) {
            let (judge, parts) = &wanted[place];
            cache.put(&key(judge), parts, &measured)?;
            found[place] = Some(measured);
        }
    }
    Ok(found.into_iter().flatten().collect())
}

/// What `wanted` asks of a model's images, `total` of them.
pub fn of_model(input: &Input, total: u64, wanted: &Wanted<'_>, batch: usize) -> Result<Vec<Measured>> {
    pass(input, total, wanted, batch)
}

/// What `wanted` asks of stored statistics: they have moments alone, of one network.
pub fn of_statistics(stored: input::Statistics, wanted: &Wanted<'_>) -> Result<Vec<Measured>> {
    let place = stored.path.display().to_string();
    let [(judge, parts)] = wanted[..] else {
        bail!("{place}: statistics are of one network; measure either fid and sfid or fcd");
    };
    if parts.features {
        bail!("{place}: statistics have no features of single images, which KID, precision and recall need");
    }
    if parts.score.is_some() {
        bail!("{place}: statistics have no classes, which the Inception score is made of");
    }
    if let Some(weights) = stored.weights.as_ref().filter(|weights| **weights != judge.weights) {
        let short = |digest: &str| digest.get(..8).unwrap_or(digest).to_owned();
        bail!(
            "{place}: measured with other weights ({}…) than those of the {} here ({}…)",
            short(weights),
            judge.name,
            short(&judge.weights)
        );
    }
    if judge.classifier.is_some() && stored.weights.is_none() {
        bail!("{place}: does not say which classifier it was measured with, and no two are alike");
    }
    let Measured { count, moments, spatial, .. } = stored.measured;
    let measured = Measured {
        count,
        moments: moments.filter(|_| parts.moments),
        spatial: spatial.filter(|_| parts.spatial),
        ..Measured::default()
    };
    if parts.spatial && measured.spatial.is_none() {
        bail!("{place}: no mu_s and sigma_s, which sfid compares");
    }
    Ok(vec![measured])
}
