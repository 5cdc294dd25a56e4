//! Group 08: the network that FID compares images by, on weights that are stated by a rule.

use std::collections::BTreeMap;

use cm_net::Inception;
use tch::{Device, Kind, Tensor};

use crate::close::Tolerance;
use crate::golden::{Result, problem};
use crate::hashed;
use crate::report::Checks;

/// 08: pooled features, blocks and logits at several sizes.
pub fn check(checks: &mut Checks<'_>) -> Result<()> {
    let golden = checks.golden;
    if !(golden.meta::<bool>("resize_input")? && golden.meta::<bool>("normalize_input")?) {
        return problem("images that are not resized and normalised are not known here");
    }
    let tolerance = Tolerance::Rel(golden.tolerance("fp32 rel")?);
    let seed: u32 = golden.meta("hash_seed")?;
    let keys: BTreeMap<String, Vec<i64>> = golden.meta_json("keys")?;
    let tensors = keys.iter().map(|(name, shape)| (name.clone(), hashed::inception(name, shape, seed)));
    let inception = Inception::from_tensors(&tensors.collect(), Device::Cpu)?;
    hashed::check_first_values(checks, inception.params())?;
    for side in golden.meta_json::<Vec<i64>>("resolutions")? {
        // Ours takes images in [-1, 1].
        let images = golden.input(&format!("x.{side}"))? * 2.0 - 1.0;
        let mut means = Vec::new();
        let mut probe = |name: &str, x: &Tensor| {
            let mean = x.mean_dim([2, 3].as_slice(), false, Kind::Float);
            means.push((format!("{name}_mean.{side}"), mean));
        };
        let found = inception.forward_probed(&images, Some(&mut probe))?;
        for (name, mean) in means {
            checks.tensor(&name, &mean, tolerance)?;
        }
        checks.tensor(&format!("pool3.{side}"), &found.pooled, tolerance)?;
        checks.tensor(&format!("logits.{side}"), &found.logits, tolerance)?;
    }
    Ok(())
}
