//! Files of weights, and what is made of the published one.

use std::collections::BTreeMap;
use std::path::Path;

use cm_model::{Bundle, Cast, ParamsBuilder, TensorMap, short};
use serde::{Deserialize, Serialize};
use tch::Device;

use super::Inception;
use crate::model::{FORMAT, KEY};
use crate::{Error, Result};

/// What the description of such a file calls it, and what `cm model import` calls the kind.
pub const KIND: &str = "inception";
/// What such a file is called.
pub const FILE_NAME: &str = "inception.safetensors";
/// The version of the weights.
const VERSION: &str = "2015-12-05";
/// Counters of training steps, which newer versions of PyTorch keep beside the moments and which nothing reads.
const COUNTER: &str = ".num_batches_tracked";

/// What a file of weights says about itself, under the metadata key of all our files.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    format: u32,
    kind: String,
    version: String,
}

/// Makes a file of weights of the state dict in `pt_inception-2015-12-05-6726825d.pth`, as `pytorch-fid` publishes it.
///
/// # Errors
/// [`cm_model::Error::Weights`] with every difference to the network.
pub fn convert(mut tensors: TensorMap) -> Result<Bundle> {
    tensors.retain(|name, _| !name.ends_with(COUNTER));
    let inception = Inception::build(ParamsBuilder::unset(Device::Cpu))?;
    inception.params.load(&tensors, Cast::Floats)?;
    let description = Description { format: FORMAT, kind: KIND.into(), version: VERSION.into() };
    let json = serde_json::to_string(&description).expect("plain data has a JSON form");
    Ok(Bundle { tensors: inception.params.snapshot(), metadata: BTreeMap::from([(KEY.to_owned(), json)]) })
}

impl Inception {
    /// Reads a file that [`convert`] made.
    ///
    /// # Errors
    /// [`Error::NotAModel`] for a file of anything else, [`Error::Weights`] with every difference to the network, and
    /// [`cm_model::Error`] for a file that is missing or torn.
    pub fn load(path: &Path, device: Device) -> Result<Self> {
        let Bundle { tensors, metadata } = Bundle::read(path)?;
        check_description(path, &metadata)?;
        Self::from_tensors(&tensors, device).map_err(|error| match error {
            Error::Model(source @ cm_model::Error::Weights { .. }) => {
                Error::Weights { path: path.into(), source }
            }
            error => error,
        })
    }
}

fn check_description(path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
    let refuse = |problem: String| {
        let problem = format!("{problem}; make one with `cm model import FILE --as {KIND} -o PATH`");
        Err(Error::NotAModel { path: path.into(), problem })
    };
    let Some(json) = metadata.get(KEY) else {
        return refuse(format!("no file of Inception's weights: no description (metadata key '{KEY}')"));
    };
    match serde_json::from_str::<Description>(json) {
        Ok(Description { format: FORMAT, kind, version }) if kind == KIND && version == VERSION => Ok(()),
        Ok(Description { format, kind, version }) => refuse(format!(
            "it holds {} {} in format {format}, this version reads {KIND} {VERSION} in format {FORMAT}",
            short(&kind),
            short(&version)
        )),
        Err(_) => refuse("it holds something else than Inception's weights".to_owned()),
    }
}
