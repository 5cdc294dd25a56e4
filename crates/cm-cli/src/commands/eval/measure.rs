//! Images through the networks, with progress and the cache.

use anyhow::{Context, Result, bail};
use cm_data::Dataset;
use cm_eval::{Collector, Measured, Parts, Seen};
use tch::Tensor;

use super::cache::{Cache, Key, PREPARED};
use super::input::{self, Input};
use super::judge::Judge;
use crate::ranks::Ranks;
use crate::ui::{self, Bar};

/// What is wanted of the images by each network.
pub type Wanted<'a> = Vec<(&'a Judge, Parts)>;

/// Measures `total` images of an input for each network, in one pass: on rank 0, with the help of the others, which get
/// nothing.
pub fn pass(
    input: &Input,
    total: u64,
    wanted: &[(&Judge, Parts)],
    batch: usize,
    ranks: &Ranks,
) -> Result<Vec<Measured>> {
    let collector = |(_, parts): &(&Judge, Parts)| Collector::new(*parts, total);
    let mut collectors = wanted.iter().map(collector).collect::<cm_eval::Result<Vec<_>>>()?;
    let mut bar = (!ui::is_quiet()).then(|| Bar::new("eval", "images", 0, total));
    let (mut done, started) = (0u64, std::time::Instant::now());
    let mut take = |made: Vec<Tensor>| -> Result<()> {
        let (mut made, mut images) = (made.into_iter(), 0);
        for (collector, (judge, _)) in collectors.iter_mut().zip(wanted) {
            let seen = unpacked(&mut made).context("a batch of too few tensors")?;
            images = rows(&seen.features);
            collector.add(&seen).with_context(|| judge.name)?;
        }
        done += images;
        if let Some(bar) = &mut bar {
            let rate = done as f64 / started.elapsed().as_secs_f64().max(1e-9);
            bar.set(done, format!("{rate:.1} img/s"));
        }
        Ok(())
    };
    let mut turns = ranks.turns(total as usize, batch);
    input::each_batch(input, batch, ranks, &mut |images| {
        let mut made = Vec::new();
        for (judge, _) in wanted {
            made.extend(packed(judge.net.see(images)?));
        }
        turns.hand_on(&made, &mut take)
    })?;
    turns.finish(&mut take)?;
    if let Some(bar) = bar {
        bar.finish();
    }
    if !ranks.group.is_first() {
        return Ok(wanted.iter().map(|_| Measured::default()).collect());
    }
    Ok(collectors.into_iter().map(Collector::finish).collect::<cm_eval::Result<_>>()?)
}

fn rows(features: &Tensor) -> u64 {
    features.size().first().copied().unwrap_or(0) as u64
}

/// What a network saw as tensors for another rank; nothing stands for spatial features that it has none of.
fn packed(seen: Seen) -> [Tensor; 3] {
    let nothing = || Tensor::from_slice::<f32>(&[]);
    [seen.features, seen.spatial.unwrap_or_else(nothing), seen.logits]
}

fn unpacked(tensors: &mut impl Iterator<Item = Tensor>) -> Option<Seen> {
    let (features, spatial, logits) = (tensors.next()?, tensors.next()?, tensors.next()?);
    Some(Seen { features, spatial: (spatial.numel() > 0).then_some(spatial), logits })
}

/// What `wanted` asks of a set: out of the cache where it is there, else measured and kept. The cache is rank 0's.
pub fn of_set(
    input: &Input,
    set: &dyn Dataset,
    data: &str,
    wanted: &Wanted<'_>,
    cache: &Cache,
    batch: usize,
    ranks: &Ranks,
) -> Result<Vec<Measured>> {
    let key = |judge: &Judge| Key {
        data: data.to_owned(),
        weights: judge.weights.clone(),
        prepared: PREPARED.to_owned(),
    };
    let kept = |(judge, parts): &(&Judge, Parts)| cache.get(&key(judge), parts);
    let mut found: Vec<Option<Measured>> = match ranks.group.is_first() {
        true => wanted.iter().map(kept).collect(),
        false => wanted.iter().map(|_| None).collect(),
    };
    let own: Vec<i64> = found.iter().map(|found| i64::from(found.is_none())).collect();
    let told = ranks.group.hand_on("what is to be measured", &[Tensor::f_from_slice(&own)?], 0)?;
    let missing = told.first().map(Vec::<i64>::try_from).transpose()?.unwrap_or_default();
    let missing: Vec<usize> = (0..found.len()).filter(|&i| missing.get(i) == Some(&1)).collect();
    if !missing.is_empty() {
        let open: Vec<_> = missing.iter().map(|&i| wanted[i]).collect();
        for (&place, measured) in missing.iter().zip(pass(input, set.len() as u64, &open, batch, ranks)?) {
            let (judge, parts) = &wanted[place];
            if ranks.group.is_first() {
                cache.put(&key(judge), parts, &measured)?;
            }
            found[place] = Some(measured);
        }
    }
    Ok(found.into_iter().map(Option::unwrap_or_default).collect())
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
