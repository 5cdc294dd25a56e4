//! `downstream-picture OUT.ppm [MODEL]`: loads a model file on a thread of its own and writes what it samples.
//! Without MODEL it first makes one, of a small network with random weights.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};

use cm_sampler::nets::{ModelSpec, NetSpec, PrecondSpec, SongUnetSpec, build, save_model};
use cm_sampler::schedule::NoiseCond;
use cm_sampler::tch::{Device, Kind, Tensor};
use cm_sampler::{Request, Role, Times, load, multistep};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let out = args.next().ok_or("usage: downstream-picture OUT.ppm [MODEL]")?;
    let path = match args.next() {
        Some(path) => path,
        None => make_model(&out.with_extension("safetensors"))?,
    };
    let model = load(&path, Device::Cpu)?;
    let worker = std::thread::spawn(move || -> cm_sampler::Result<Tensor> {
        let f = model.into_consistency()?;
        multistep(f.as_ref(), &Times::Sigmas(vec![80.0, 0.8]), &Request::new(&[7]))
    });
    let image = worker.join().map_err(|_| "the worker panicked")??;
    write_ppm(&image.get(0), &out)
}

fn make_model(path: &Path) -> cm_sampler::Result<PathBuf> {
    let net = NetSpec::SongUnet(SongUnetSpec {
        image_size: 16,
        augment_dim: 0,
        model_channels: 16,
        channel_mult: vec![1, 2],
        num_blocks: 1,
        attn_resolutions: vec![8],
        ..SongUnetSpec::ddpmpp_cifar10(0)
    });
    let precond = PrecondSpec {
        sigma_data: 0.5,
        noise_cond: NoiseCond::QuarterLog,
        sigma_min: 0.002,
        sigma_max: 80.0,
        rho: 7.0,
    };
    let weights = build(&net, 1, Device::Cpu)?;
    save_model(path, weights.params(), &ModelSpec::new(Role::Consistency, net, precond))?;
    Ok(path.to_owned())
}

/// Writes `[C, H, W]` in [-1, 1] in the simplest of formats.
fn write_ppm(image: &Tensor, path: &Path) -> Result<(), Box<dyn Error>> {
    let size = image.size();
    let rgb = image.expand([3, size[1], size[2]], false).permute([1, 2, 0]);
    let bytes = ((rgb + 1.0) * 127.5).clamp(0.0, 255.0).round().to_kind(Kind::Uint8).contiguous();
    let mut file = std::fs::File::create(path)?;
    write!(file, "P6 {} {} 255\n", size[2], size[1])?;
    file.write_all(&Vec::<u8>::try_from(bytes.view([-1]))?)?;
    println!("{}: {} × {} pixels", path.display(), size[2], size[1]);
    Ok(())
}
