//! Weights that the golden files state by a rule instead of holding them.
//!
//! For a parameter's name k and the place i of a value in it (row-major), `h` is a hash of i + fnv1a(k) + seed·φ and
//! `u = h/2³¹ − 1` lies in [-1, 1). A weight of a convolution is `u·√(6/fan_in)`, a bias `0.05·u`, computed in f64
//! and rounded to float32.

use cm_model::Params;
use cm_net::Lpips;
use cm_net::lpips::{LpipsNet, LpipsReading, LpipsSpec};
use tch::{Device, Tensor};

use crate::close::Tolerance;
use crate::golden::{Golden, Result, problem};
use crate::report::Checks;

/// FNV-1a in 32 bits.
fn fnv1a(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// u of the value at place `index` of a parameter.
fn unit(offset: u32, index: u32) -> f64 {
    let mut hash = index.wrapping_add(offset);
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x7feb_352d);
    hash ^= hash >> 15;
    hash = hash.wrapping_mul(0x846c_a68b);
    hash ^= hash >> 16;
    f64::from(hash) / 2_147_483_648.0 - 1.0
}

/// The parameter `name` of a network whose weights are stated by `seed`: of rank 2 or more a weight, else a bias.
pub fn parameter(name: &str, shape: &[i64], seed: u32) -> Tensor {
    let fan_in: i64 = shape.iter().skip(1).product();
    let scale = if shape.len() > 1 { (6.0 / fan_in as f64).sqrt() } else { 0.05 };
    filled(name, shape, seed, [0.0, scale])
}

/// The parameter `name` of Inception: as [`parameter`], but for normalisations, whose scale is `1 + 0.1·u`, whose shift
/// and mean are `0.1·u`, and whose variance is `1 + 0.5·u`.
pub fn inception(name: &str, shape: &[i64], seed: u32) -> Tensor {
    let normalisation = match name.rsplit_once(".bn.") {
        Some((_, "weight")) => [1.0, 0.1],
        Some((_, "bias" | "running_mean")) => [0.0, 0.1],
        Some((_, "running_var")) => [1.0, 0.5],
        _ => return parameter(name, shape, seed),
    };
    filled(name, shape, seed, normalisation)
}

/// `centre + scale·u`.
fn filled(name: &str, shape: &[i64], seed: u32, [centre, scale]: [f64; 2]) -> Tensor {
    let offset = fnv1a(name).wrapping_add(seed.wrapping_mul(0x9e37_79b9));
    let numel: i64 = shape.iter().product();
    let value = |index| (centre + unit(offset, index) * scale) as f32;
    Tensor::from_slice(&(0..numel as u32).map(value).collect::<Vec<f32>>()).view(shape)
}

/// Compares the first values of parameters with those that the file holds as `check.<name>`.
///
/// # Errors
/// [`crate::Problem`] if the network has no such parameter.
pub fn check_first_values(checks: &mut Checks<'_>, params: &Params) -> Result<()> {
    let golden = checks.golden;
    for name in golden.names_after("check.").map(String::from).collect::<Vec<_>>() {
        let Some(parameter) = params.get(&name) else {
            return problem(format!("the network has no parameter '{name}'"));
        };
        let recorded = format!("check.{name}");
        let first = parameter.view(-1).narrow(0, 0, golden.want(&recorded)?.numel() as i64);
        checks.tensor(&recorded, &first, Tolerance::Exact)?;
    }
    Ok(())
}

/// LPIPS with a backbone by the rule and the heads of a golden file: the bundled ones, or those that it holds.
///
/// The file names its seed in `hash_seed`, and its network in `net` unless it is VGG-16.
///
/// # Errors
/// [`crate::Problem`] for a network or heads that are not known here.
pub fn lpips(golden: &Golden, reading: LpipsReading) -> Result<Lpips> {
    let net = match golden.meta_text("net").unwrap_or("vgg16") {
        "vgg" | "vgg16" => LpipsNet::Vgg16,
        "alex" => LpipsNet::Alex,
        "squeeze" => LpipsNet::Squeeze,
        other => return problem(format!("LPIPS with '{other}' is not known here")),
    };
    let seed: u32 = golden.meta("hash_seed")?;
    let spec = LpipsSpec { net, reading };
    // Any weights do: every one is replaced.
    let mut tensors = Lpips::random(spec, 0, Device::Cpu)?.params().snapshot();
    for (name, tensor) in &mut tensors {
        *tensor = match golden.has(name) {
            true => golden.input(name)?,
            false if name.starts_with("lin") => continue,
            false => parameter(name, &tensor.size(), seed),
        };
    }
    Ok(Lpips::from_tensors(&tensors, spec, Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hashed_as_published() {
        // The published test vectors of FNV-1a.
        assert_eq!([fnv1a(""), fnv1a("a"), fnv1a("foobar")], [0x811c_9dc5, 0xe40c_292c, 0xbf9c_f968]);
    }

    #[test]
    fn values_stay_in_the_stated_range() {
        let weight = parameter("features.0.weight", &[8, 3, 4, 4], 1);
        let largest = weight.abs().max().double_value(&[]);
        assert!(largest <= (6.0f64 / 48.0).sqrt() && largest > 0.3, "{largest}");
        assert!(parameter("features.0.bias", &[64], 1).abs().max().double_value(&[]) <= 0.05);
    }
}
