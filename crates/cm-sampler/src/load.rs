use std::path::Path;

use cm_model::Compute;
use cm_net::{Model, import};
use tch::Device;

use crate::{Kind, Result};

/// Opens a model in any published form: a file of this project, a folder of diffusers, and those networks of EDM's
/// and OpenAI's that say what they are.
///
/// What it is stands in the variant that comes back, and [`ModelRef`](crate::ModelRef) takes either. A model of the
/// other kind than a sampler needs is one typed error, [`Error::NeedsConsistency`](crate::Error::NeedsConsistency) or
/// [`Error::NeedsDenoiser`](crate::Error::NeedsDenoiser), that says how such a model is sampled. It computes in float32;
/// for bfloat16, for channels-last memory and for what the file says about itself there is
/// [`nets::import::load_any`](crate::nets::import::load_any).
///
/// # Errors
/// [`Error::Model`](crate::Error::Model) for a file that cannot be read; [`Error::Nets`](crate::Error::Nets) for one that
/// holds no model, whose weights do not fit, or that does not say which kind of model it is: then [`load_as`] takes it.
///
/// ```
/// use cm_sampler::nets::{ModelSpec, NetSpec, PrecondSpec, Role, SongUnetSpec, build, save_model};
/// use cm_sampler::{Error, Model, Request, load, one_step, schedule::NoiseCond, tch::Device};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// # let net = NetSpec::SongUnet(SongUnetSpec {
/// #     image_size: 8, model_channels: 8, channel_mult: vec![1], num_blocks: 1, attn_resolutions: vec![],
/// #     ..SongUnetSpec::ddpmpp_cifar10(0)
/// # });
/// # let noise_cond = NoiseCond::QuarterLog;
/// # let precond = PrecondSpec { sigma_data: 0.5, noise_cond, sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 };
/// # let spec = ModelSpec::new(Role::Consistency, net.clone(), precond);
/// # save_model(&path, build(&net, 0, Device::Cpu)?.params(), &spec)?;
/// let model = load(&path, Device::Cpu)?;
/// assert!(matches!(model, Model::Consistency(_)));
/// let images = one_step(model.consistency()?, &Request::new(&[1, 2, 3]))?;
/// assert_eq!(images.size(), [3, 3, 8, 8]);
/// // It is no denoiser, and says what to do instead.
/// let error: Error = model.denoiser().map(drop).unwrap_err().into();
/// assert!(matches!(error, Error::NeedsDenoiser));
/// assert!(error.to_string().contains("sample in one step"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn load(path: impl AsRef<Path>, device: Device) -> Result<Model> {
    open(path.as_ref(), None, device)
}

/// [`load`] for weights that do not say what they are of, as OpenAI's `.pt` files and EDM's networks: `kind` does.
///
/// A kind is a published model, such as `openai-imagenet64-cd`, or spelled out; [`Kind`] lists them, and so does the
/// error of [`load`] for the file at hand. Given for a file that says of itself what it is, the two must agree.
///
/// # Errors
/// As [`load`], and for a kind that does not fit the weights.
///
/// ```no_run
/// use cm_sampler::{Request, Times, load_as, multistep, tch::Device};
/// let f = load_as("cd_imagenet64_lpips.pt", "openai-imagenet64-cd".parse()?, Device::Cpu)?.into_consistency()?;
/// let times = Times::Indices { ts: vec![0, 22, 39], steps: 40, rho: 7.0 };
/// let request = Request { labels: Some(&[207, 360]), ..Request::new(&[1, 2]) };
/// let images = multistep(f.as_ref(), &times, &request)?;
/// # Ok::<(), cm_sampler::Error>(())
/// ```
pub fn load_as(path: impl AsRef<Path>, kind: Kind, device: Device) -> Result<Model> {
    open(path.as_ref(), Some(kind), device)
}

fn open(path: &Path, kind: Option<Kind>, device: Device) -> Result<Model> {
    Ok(import::load_any(path, kind)?.into_model(device, Compute::default())?.1)
}
