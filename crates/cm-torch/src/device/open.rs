//! libtorch's CUDA half, opened at run time.

#[cfg(target_os = "linux")]
use std::path::{Path, PathBuf};
use std::sync::Mutex;

#[cfg(target_os = "linux")]
use tch::Cuda;

#[cfg(target_os = "linux")]
use super::gpu_node;

/// What opening CUDA gave; it is tried once, because libtorch decides once.
pub(super) static CUDA: Mutex<Option<std::result::Result<usize, String>>> = Mutex::new(None);

pub(super) fn open_cuda() -> std::result::Result<usize, String> {
    let mut state = CUDA.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    state.get_or_insert_with(open_cuda_once).clone()
}

#[cfg(target_os = "linux")]
fn open_cuda_once() -> std::result::Result<usize, String> {
    open_library()?;
    if !tch::utils::has_cudart() {
        return Err(
            "something asked libtorch for CUDA before its CUDA half was opened, and libtorch looks once; \
                    resolve the device first (a bug of the calling program)"
                .into(),
        );
    }
    match usize::try_from(Cuda::device_count()) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(explain_no_device()),
    }
}

/// Opens libtorch's CUDA half, which needs neither a driver nor a GPU.
#[cfg(target_os = "linux")]
pub(crate) fn open_library() -> std::result::Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    let Some(cpu_half) = loaded_library("libtorch_cpu.so") else {
        return Err(
            "libtorch_cpu.so is not among this program's libraries, so its CUDA half cannot be found".into(),
        );
    };
    let path = cpu_half.with_file_name("libtorch_cuda.so");
    if !path.exists() {
        return Err(format!(
            "the libtorch in {} is built for CPUs alone; `cargo xtask setup --cuda` installs one with CUDA",
            folder(&path)
        ));
    }
    // SAFETY: opening runs the library's initialisers; this one was built together with the libtorch that this
    // process already runs, whose registries they fill in.
    match unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) } {
        // libtorch holds pointers into the library from now on: it must never be closed.
        Ok(library) => std::mem::forget(library),
        Err(error) => return Err(explain_open_failure(&error)),
    }
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn open_cuda_once() -> std::result::Result<usize, String> {
    open_library().map(|()| 0)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn open_library() -> std::result::Result<(), String> {
    Err("CUDA is supported on Linux alone".into())
}

#[cfg(target_os = "linux")]
fn explain_open_failure(error: &libloading::Error) -> String {
    // The loader's own sentence is the cause of this error: "libcudnn.so.9: cannot open shared object file: …".
    let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    match cause.split_once(": cannot open shared object file") {
        Some((library, _)) => format!(
            "the CUDA library {library} is not installed (the lean set serves CPUs alone); `cargo xtask setup --cuda` installs it"
        ),
        None => format!("libtorch_cuda.so does not load: {}", cause.lines().next().unwrap_or_default()),
    }
}

#[cfg(target_os = "linux")]
fn explain_no_device() -> String {
    let problem = if gpu_node().is_none() && !Path::new("/proc/driver/nvidia/version").exists() {
        "no NVIDIA driver is loaded on this machine"
    } else if std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() {
        "the driver is loaded, but no device is usable; CUDA_VISIBLE_DEVICES may hide it"
    } else {
        "the driver is loaded, but no device is usable; it may be older than this libtorch's CUDA"
    };
    format!("{problem} (see `nvidia-smi`)")
}

#[cfg(target_os = "linux")]
fn folder(path: &Path) -> String {
    path.parent().unwrap_or(path).display().to_string()
}

/// Where a library that this process has loaded lies, from the list of its memory maps.
#[cfg(target_os = "linux")]
fn loaded_library(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let path = Path::new(&line[line.find('/')?..]);
        (path.file_name()? == name).then(|| path.to_owned())
    })
}
