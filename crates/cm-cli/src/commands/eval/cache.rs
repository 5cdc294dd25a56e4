//! What was measured of a data set, kept for the next time.
//!
//! A file's name is a digest of what its content depends on: the images, the network's weights, and how images are
//! prepared. The file says all of it again, and holds a digest of its own numbers, so that one which was renamed, cut or
//! changed is measured anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cm_data::digest;
use cm_eval::{Measured, Moments, Parts};
use cm_model::{Bundle, TensorMap};
use serde::{Deserialize, Serialize};

use crate::ui;

/// What the numbers of a cache depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// SHA-256 of the images.
    pub data: String,
    /// SHA-256 of the weights.
    pub weights: String,
    /// How images are prepared and what is read of the network; see [`PREPARED`].
    pub prepared: String,
}

/// How images are prepared. It changes whenever numbers would.
pub const PREPARED: &str = "uint8 to [-1, 1]; network's own resizing; features as read in version 1";

/// The metadata key of a cache.
const META: &str = "cm-eval";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    key: Key,
    parts: Parts,
    count: u64,
    score: Option<cm_eval::InceptionScore>,
    digest: String,
}

/// A folder of caches, or none.
pub struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    /// The folder, or a cache that keeps nothing.
    pub fn new(folder: Option<&Path>) -> Self {
        Self { folder: folder.map(Path::to_owned) }
    }

    fn file(&self, key: &Key) -> Option<PathBuf> {
        let name = digest::of_bytes([key.data.as_bytes(), key.weights.as_bytes(), key.prepared.as_bytes()]);
        let name = format!("statistics-{}.safetensors", name.get(..16).unwrap_or(&name));
        self.folder.as_ref().map(|folder| folder.join(name))
    }

    /// What is kept for `key`, if it is whole and has all `parts`. Says on stderr why a file is passed over.
    pub fn get(&self, key: &Key, parts: &Parts) -> Option<Measured> {
        let file = self.file(key).filter(|file| file.is_file())?;
        match read(&file, key, parts) {
            Ok(measured) => Some(measured),
            Err(error) => {
                ui::say(&format!("{}: {error:#}; measuring again", file.display()));
                None
            }
        }
    }

    /// Keeps what was measured, together with the other parts that are there: whoever asks for one figure and then for
    /// another has both.
    pub fn put(&self, key: &Key, parts: &Parts, measured: &Measured) -> Result<()> {
        let Some(file) = self.file(key) else { return Ok(()) };
        let (mut parts, mut score, mut tensors) = (*parts, measured.score, tensors_of(measured));
        let count = measured.count.unwrap_or(0);
        if let Some((old, kept)) = whole(&file, key).ok().filter(|(old, _)| old.count == count) {
            (parts, score) = (parts.and(&old.parts), score.or(old.score));
            for (name, tensor) in kept {
                tensors.entry(name).or_insert(tensor);
            }
        }
        let digest = digest_of(&tensors);
        let meta = Meta { key: key.clone(), parts, count, score, digest };
        let metadata = BTreeMap::from([(META.to_owned(), serde_json::to_string(&meta)?)]);
        Ok(Bundle { tensors, metadata }.write(&file)?)
    }
}

fn tensors_of(measured: &Measured) -> TensorMap {
    let mut tensors = TensorMap::new();
    for (moments, [mu, sigma]) in
        [(&measured.moments, ["mu", "sigma"]), (&measured.spatial, ["mu_s", "sigma_s"])]
    {
        if let Some(moments) = moments {
            tensors.insert(mu.to_owned(), moments.mean().shallow_clone());
            tensors.insert(sigma.to_owned(), moments.covariance().shallow_clone());
        }
    }
    if let Some(features) = &measured.features {
        tensors.insert("features".to_owned(), features.shallow_clone());
    }
    tensors
}

/// A digest of names, shapes and numbers.
pub fn digest_of(tensors: &TensorMap) -> String {
    let mut pieces = Vec::new();
    for (name, tensor) in tensors {
        pieces.push(format!("{name} {:?} {:?}\n", tensor.kind(), tensor.size()).into_bytes());
        pieces.push(cm_model::tensor_bytes(tensor));
    }
    digest::of_bytes(pieces.iter().map(Vec::as_slice))
}

/// Everything in a file that is of `key` and is as it was written.
fn whole(file: &Path, key: &Key) -> Result<(Meta, TensorMap)> {
    let Bundle { tensors, metadata } = Bundle::read(file)?;
    let meta = metadata.get(META).context("no cache of `cm eval`")?;
    let meta: Meta = serde_json::from_str(meta).context("its description cannot be read")?;
    if meta.key != *key {
        bail!("it was measured of other images or with other weights");
    }
    if meta.digest != digest_of(&tensors) {
        bail!("its numbers are not those that were written");
    }
    Ok((meta, tensors))
}

fn read(file: &Path, key: &Key, parts: &Parts) -> Result<Measured> {
    let (meta, mut tensors) = whole(file, key)?;
    if !meta.parts.hold(parts) {
        bail!("it lacks a part of what is measured now");
    }
    let mut moments = |mu: &str, sigma: &str| -> Result<Option<Moments>> {
        match (tensors.remove(mu), tensors.remove(sigma)) {
            (Some(mean), Some(covariance)) => {
                Ok(Some(Moments::from_parts(&mean, &covariance, Some(meta.count))?))
            }
            _ => Ok(None),
        }
    };
    let of = |wanted: bool, mu, sigma, moments: &mut dyn FnMut(&str, &str) -> Result<Option<Moments>>| {
        if wanted { moments(mu, sigma) } else { Ok(None) }
    };
    let measured = Measured {
        count: Some(meta.count),
        moments: of(parts.moments, "mu", "sigma", &mut moments)?,
        spatial: of(parts.spatial, "mu_s", "sigma_s", &mut moments)?,
        score: meta.score.filter(|_| parts.score.is_some()),
        features: tensors.remove("features").filter(|_| parts.features),
    };
    let whole = measured.moments.is_some() == parts.moments
        && measured.spatial.is_some() == parts.spatial
        && measured.score.is_some() == parts.score.is_some()
        && measured.features.is_some() == parts.features;
    match whole {
        true => Ok(measured),
        false => bail!("it is incomplete"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    const PARTS: Parts = Parts { moments: true, spatial: false, score: None, features: true };

    fn key(data: &str) -> Key {
        Key { data: data.into(), weights: "w".into(), prepared: PREPARED.into() }
    }

    fn measured() -> Measured {
        let features = Tensor::from_slice(&[0.0f32, 1.0, 4.0, 2.0, 2.0, 7.0]).view([3, 2]);
        let moments = Some(Moments::of(&features).unwrap());
        Measured { count: Some(3), moments, features: Some(features), ..Measured::default() }
    }

    #[test]
    fn what_was_kept_comes_back_for_the_same_key_and_parts_alone() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path()));
        assert!(cache.get(&key("d"), &PARTS).is_none());
        cache.put(&key("d"), &PARTS, &measured()).unwrap();
        let found = cache.get(&key("d"), &PARTS).unwrap();
        assert!(found.features.unwrap().equal(&measured().features.unwrap()));
        assert!(found.moments.unwrap().covariance().equal(measured().moments.unwrap().covariance()));
        let less = cache.get(&key("d"), &Parts { features: false, ..PARTS }).unwrap();
        assert!(less.features.is_none() && less.moments.is_some());
        assert!(cache.get(&key("d"), &Parts { spatial: true, ..PARTS }).is_none());
        assert!(cache.get(&key("e"), &PARTS).is_none());
        let none = Cache::new(None);
        none.put(&key("d"), &PARTS, &measured()).unwrap();
        assert!(none.get(&key("d"), &PARTS).is_none());
    }

    #[test]
    fn parts_that_are_measured_in_turn_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path()));
        let moments = Parts { features: false, ..PARTS };
        let features = Parts { moments: false, ..PARTS };
        cache.put(&key("d"), &moments, &Measured { features: None, ..measured() }).unwrap();
        assert!(cache.get(&key("d"), &features).is_none());
        cache.put(&key("d"), &features, &Measured { moments: None, ..measured() }).unwrap();
        let both = cache.get(&key("d"), &PARTS).unwrap();
        assert!(both.moments.is_some() && both.features.unwrap().equal(&measured().features.unwrap()));
        // What is of other images, or of another number of them, or torn, is not joined with.
        let other = Measured { count: Some(4), moments: None, ..measured() };
        cache.put(&key("d"), &features, &other).unwrap();
        assert!(cache.get(&key("d"), &moments).is_none() && cache.get(&key("d"), &features).is_some());
        std::fs::write(cache.file(&key("d")).unwrap(), "torn").unwrap();
        cache.put(&key("d"), &moments, &Measured { features: None, ..measured() }).unwrap();
        assert!(cache.get(&key("d"), &moments).is_some() && cache.get(&key("d"), &features).is_none());
    }

    #[test]
    fn wrong_and_incomplete_files_are_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path()));
        cache.put(&key("d"), &PARTS, &measured()).unwrap();
        let file = cache.file(&key("d")).unwrap();
        let whole = std::fs::read(&file).unwrap();
        let problem = || format!("{:#}", read(&file, &key("d"), &PARTS).err().unwrap());

        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert!(problem().contains("not a whole safetensors file"));
        // The file of other data under this name.
        std::fs::write(&file, &whole).unwrap();
        std::fs::rename(&file, cache.file(&key("e")).unwrap()).unwrap();
        assert!(cache.get(&key("e"), &PARTS).is_none());
        std::fs::write(&file, &whole).unwrap();
        let mut bundle = Bundle::read(&file).unwrap();
        let _ = bundle.tensors.get_mut("features").unwrap().g_add_scalar_(1.0);
        bundle.write(&file).unwrap();
        assert!(problem().contains("not those that were written"));
        bundle.tensors.remove("features");
        bundle.write(&file).unwrap();
        assert!(problem().contains("not those that were written"));
        bundle.metadata.clear();
        bundle.write(&file).unwrap();
        assert!(problem().contains("no cache"));
    }
}
