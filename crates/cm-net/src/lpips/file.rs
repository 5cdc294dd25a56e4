//! Files of weights of LPIPS, and what is made of torchvision's.

use std::collections::BTreeMap;
use std::path::Path;

use cm_model::{Bundle, Cast, LpipsNet, LpipsReading, LpipsSpec, ParamsBuilder, TensorMap, short};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::Lpips;
use super::features::tap_channels;
use crate::model::{FORMAT, KEY};
use crate::{Error, Result};

/// The heads of all networks, `<net>.lin<i>`.
const LINS: &[u8] = include_bytes!("../../assets/lpips-lins-v0.1.safetensors");
/// Their version.
const VERSION: &str = "0.1";
/// What the description of such a file calls it.
pub(crate) const KIND: &str = "lpips";

/// What a file of weights says about itself, under the metadata key of all our files.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    format: u32,
    kind: String,
    net: LpipsNet,
    version: String,
}

/// The heads of version 0.1, `lin0`, `lin1` …, each `[1, C, 1, 1]` float32 on the CPU.
///
/// # Errors
/// None but a fault in the bundled bytes.
pub fn bundled_lins(net: LpipsNet) -> Result<TensorMap> {
    let mut all = Bundle::from_bytes(LINS, Path::new("the bundled heads of LPIPS"))?.tensors;
    let lin = |layer: usize| {
        let name = format!("lin{layer}");
        let missing = || cm_model::Error::Weights { differences: vec![format!("'{net}.{name}' is missing")] };
        let tensor = all.remove(&format!("{net}.{name}")).ok_or_else(missing)?;
        Ok((name, tensor))
    };
    (0..tap_channels(net).len()).map(lin).collect()
}

/// Makes a file of weights for LPIPS of a state dict of torchvision's `vgg16`, `alexnet` or `squeezenet1_1`, with the
/// heads of version 0.1.
///
/// The classifier (`classifier.*`) is left out: LPIPS does not use it.
///
/// # Errors
/// [`cm_model::Error::Weights`] with every difference to the network's feature part.
pub fn convert(tensors: TensorMap, net: LpipsNet) -> Result<Bundle> {
    let mut own = tensors;
    own.retain(|name, _| !name.starts_with("classifier."));
    let mut differences: Vec<String> = Vec::new();
    for (name, lin) in bundled_lins(net)? {
        if own.insert(name.clone(), lin).is_some() {
            differences.push(format!("'{name}' is there already: the file is no state dict of torchvision"));
        }
    }
    // The reading is no part of a file.
    let spec = LpipsSpec { net, reading: LpipsReading::Package };
    let lpips = Lpips::build(spec, ParamsBuilder::unset(Device::Cpu))?;
    match lpips.params.load(&own, Cast::Floats) {
        Ok(()) if differences.is_empty() => {}
        Ok(()) => return Err(cm_model::Error::Weights { differences }.into()),
        Err(cm_model::Error::Weights { differences: more }) => {
            differences.extend(more);
            return Err(cm_model::Error::Weights { differences }.into());
        }
        Err(error) => return Err(error.into()),
    }
    let description = Description { format: FORMAT, kind: KIND.into(), net, version: VERSION.into() };
    let json = serde_json::to_string(&description).expect("plain data has a JSON form");
    Ok(Bundle { tensors: lpips.params.snapshot(), metadata: BTreeMap::from([(KEY.to_owned(), json)]) })
}

impl Lpips {
    /// Reads a file that [`convert`] made.
    ///
    /// # Errors
    /// [`Error::NotAModel`] for a file of anything else or of another network, [`Error::Weights`] with every
    /// difference to the network, and [`cm_model::Error`] for a file that is missing or torn.
    pub fn load(path: &Path, spec: LpipsSpec, device: Device) -> Result<Self> {
        let Bundle { tensors, metadata } = Bundle::read(path)?;
        check_description(path, &metadata, spec.net)?;
        Self::from_tensors(&tensors, spec, device).map_err(|error| match error {
            Error::Model(source @ cm_model::Error::Weights { .. }) => {
                Error::Weights { path: path.into(), source }
            }
            error => error,
        })
    }
}

fn check_description(path: &Path, metadata: &BTreeMap<String, String>, net: LpipsNet) -> Result<()> {
    let refuse = |problem: String| Err(Error::NotAModel { path: path.into(), problem });
    let make = format!("make one with `cm model import FILE --as {} -o PATH`", net.file_stem());
    let Some(json) = metadata.get(KEY) else {
        return refuse(format!(
            "no file of weights of LPIPS: it has no description (metadata key '{KEY}'); {make}"
        ));
    };
    let Ok(description) = serde_json::from_str::<Description>(json) else {
        return refuse(format!("it holds something else than weights of LPIPS; {make}"));
    };
    let Description { format, kind, net: found, version } = description;
    if (format, kind.as_str(), version.as_str()) != (FORMAT, KIND, VERSION) {
        return refuse(format!(
            "it holds {} {} in format {format}, this version reads {KIND} {VERSION} in format {FORMAT}",
            short(&kind),
            short(&version)
        ));
    }
    if found != net {
        return refuse(format!("it holds LPIPS with {found}, and {net} was asked for; {make}"));
    }
    Ok(())
}
