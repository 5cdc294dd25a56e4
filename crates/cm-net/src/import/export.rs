//! Models in the forms that other programs read.

use std::io::Write;
use std::path::Path;

use cm_model::files::{FailsOnce, write_atomic};
use cm_model::{Bundle, TensorMap};
use tch::Tensor;
use zip::result::ZipError;
use zip::write::SimpleFileOptions;

use super::diffusers;
use super::{NUM_SCALES, problem, torch};
use crate::spec::OpenaiUnetSpec;
use crate::{ModelFile, NetSpec, Result, Role};

/// Points of the grid of a consistency model that does not say how many its training had: those of consistency
/// distillation in Song et al. 2023.
const DEFAULT_SCALES: u32 = 40;
/// Sizes from which on a zip needs 64-bit fields.
const LARGE: u64 = 4_000_000_000;

/// Writes the weights under OpenAI's names: to `….pt` as `torch.save` writes a state dict, which their code loads,
/// or to `….safetensors`.
///
/// # Errors
/// [`crate::Error::Import`] for another network than OpenAI's or another ending; [`crate::Error::Weights`] if the
/// weights do not fit; [`cm_model::Error::Io`] if the file cannot be written.
pub fn export_openai(file: &ModelFile, path: &Path) -> Result<()> {
    openai_net(file)?;
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("pt" | "pth") => write_torch(path, &file.tensors),
        Some("safetensors") => write_safetensors(path, copies(&file.tensors)),
        _ => Err(problem(path, "expected a name that ends in .pt or .safetensors".to_owned())),
    }
}

/// Writes a folder of diffusers: `unet/config.json`, its weights and, for a consistency function, the scheduler and
/// the index that make it a `ConsistencyModelPipeline`. (diffusers has no pipeline for the denoiser.)
///
/// # Errors
/// As [`export_openai`], for a network that `UNet2DModel` cannot express, and for a folder that is not empty.
pub fn export_diffusers(file: &ModelFile, folder: &Path) -> Result<()> {
    let net = openai_net(file)?;
    let config = diffusers::write_config(net).map_err(|e| problem(file.path(), e))?;
    if folder.exists() && std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(problem(folder, "this folder is not empty; name a new one".to_owned()));
    }
    let weights = diffusers::to_theirs(net, &file.tensors)?;
    let unet = folder.join("unet");
    write_safetensors(&unet.join(diffusers::WEIGHTS), weights)?;
    write_json(&unet.join(diffusers::CONFIG), &config)?;
    if file.spec.role == Role::Consistency {
        let scales = file.spec.about.get(NUM_SCALES).and_then(|scales| scales.parse().ok());
        let scheduler = diffusers::write_scheduler(&file.spec.precond, scales.unwrap_or(DEFAULT_SCALES));
        write_json(&folder.join(diffusers::SCHEDULER), &scheduler)?;
        let index = serde_json::json!({
            "_class_name": "ConsistencyModelPipeline",
            "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        });
        write_json(&folder.join("model_index.json"), &index)?;
    }
    Ok(())
}

/// The network, if it is OpenAI's and the weights fit it.
fn openai_net(file: &ModelFile) -> Result<&OpenaiUnetSpec> {
    let NetSpec::OpenaiUnet(net) = &file.spec.net else {
        let text = "its network is one of EDM's, and OpenAI's and diffusers' names are for OpenAI's U-Net; the \
                    file itself has EDM's names already";
        return Err(problem(file.path(), text.to_owned()));
    };
    super::check(file.path(), &file.spec.net, &file.tensors)?;
    Ok(net)
}

fn copies(tensors: &TensorMap) -> TensorMap {
    tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// With the metadata that safetensors' own writer for PyTorch adds.
fn write_safetensors(path: &Path, tensors: TensorMap) -> Result<()> {
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    Ok(Bundle { tensors, metadata }.write(path)?)
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    Ok(write_atomic(path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })?)
}

/// A state dict as `torch.save` writes it, in its zip form.
fn write_torch(path: &Path, tensors: &TensorMap) -> Result<()> {
    let kinds = tensors.values().map(Tensor::kind);
    if let Some(kind) = kinds.into_iter().find(|kind| torch::storage_name(*kind).is_none()) {
        return Err(problem(path, format!("torch.save's form has no name for the dtype {kind:?}")));
    }
    Ok(write_atomic(path, |file| {
        let mut archive = zip::ZipWriter::new(FailsOnce::new(file));
        // As torch does it, so that the storages of a file that is mapped into memory lie even.
        let plain = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .with_alignment(64);
        let mut write = |name: &str, bytes: &[u8]| {
            let options = plain.large_file(bytes.len() as u64 > LARGE);
            archive.start_file(format!("archive/{name}"), options).map_err(cause)?;
            archive.write_all(bytes)
        };
        write("data.pkl", &pickle_of(tensors))?;
        write("byteorder", b"little")?;
        for (key, tensor) in tensors.values().enumerate() {
            write(&format!("data/{key}"), &cm_model::tensor_bytes(tensor))?;
        }
        write("version", b"3\n")?;
        archive.finish().map(drop).map_err(cause)
    })?)
}

/// The file's own error, which an archive's shows as `i/o error` alone.
fn cause(error: ZipError) -> std::io::Error {
    match error {
        ZipError::Io(cause) => cause,
        other => other.into(),
    }
}

/// `OrderedDict` of calls of `_rebuild_tensor_v2`, each with a storage of its own.
fn pickle_of(tensors: &TensorMap) -> Vec<u8> {
    const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let mut out = vec![0x80, 2];
    out.extend(ORDERED_DICT);
    out.push(b'(');
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(
            format!("ctorch\n{}\n", torch::storage_name(tensor.kind()).unwrap_or_default()).as_bytes(),
        );
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        integer(&mut out, tensor.numel() as i64);
        out.extend(b"tQK\x00");
        let size = tensor.size();
        let mut strides = vec![1; size.len()];
        for axis in (1..size.len()).rev() {
            strides[axis - 1] = strides[axis] * size[axis].max(1);
        }
        for values in [size, strides] {
            out.push(b'(');
            values.iter().for_each(|value| integer(&mut out, *value));
            out.push(b't');
        }
        out.push(0x89);
        out.extend(ORDERED_DICT);
        out.extend(b"tR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: i64) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend(value.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend(value.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::import::read_torch;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("written.pt");
        let dtypes = [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double, Kind::Int64, Kind::Bool];
        let mut tensors = TensorMap::new();
        for kind in dtypes {
            let values = Tensor::arange(24, (Kind::Float, tch::Device::Cpu)).view([2, 3, 4]).to_kind(kind);
            tensors.insert(format!("{kind:?}"), values.transpose(0, 2));
        }
        tensors.insert("none".into(), Tensor::zeros([0, 3], (Kind::Float, tch::Device::Cpu)));
        tensors.insert("one".into(), Tensor::from(2.5f32));
        write_torch(&path, &tensors).unwrap();
        let read = read_torch(&path).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), tensors.keys().collect::<Vec<_>>());
        for (name, tensor) in &tensors {
            assert!(read[name].equal(tensor) && read[name].kind() == tensor.kind(), "{name}");
        }
    }
}
