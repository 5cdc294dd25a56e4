//! What needs CUDA's headers: NCCL, and graphs. It lies in one shared object, `libcm_cuda.so`, so that a program which
//! was built without them serves machines with and without GPUs.
//!
//! `cargo xtask cuda-object` builds the object where libtorch's CUDA set is. It is opened when it is needed, behind
//! `libtorch_cuda.so`: the file that `CM_CUDA_OBJECT` names, or else the one beside the program. Its sources and its
//! libtorch must be those of the program.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tch::Device;

use crate::device::{self, DeviceSpec};
use crate::shim::cuda::Object;
use crate::{Error, Result, shim};

/// Name of the object beside the program.
pub const FILE: &str = "libcm_cuda.so";
/// The variable of the environment that names an object elsewhere.
pub const VARIABLE: &str = "CM_CUDA_OBJECT";

/// Where the object of this program is looked for.
#[must_use]
pub fn object_path() -> PathBuf {
    place(std::env::var_os(VARIABLE), std::env::current_exe().ok().as_deref())
}

fn place(named: Option<OsString>, program: Option<&Path>) -> PathBuf {
    match named.filter(|name| !name.is_empty()) {
        Some(name) => name.into(),
        None => program.map_or_else(|| FILE.into(), |program| program.with_file_name(FILE)),
    }
}

/// Opens the object, for `cm doctor`. It needs libtorch's CUDA half, but neither a driver nor a GPU.
///
/// # Errors
/// [`Error::CudaObject`] with the reason, if it does not serve this program; [`Error::DeviceMissing`] if libtorch's
/// CUDA half cannot be opened.
pub fn check_object() -> Result<()> {
    object().map(|_| ())
}

/// How often work is done before it is recorded: libraries choose their algorithms and take their memory then.
const TRIALS: usize = 3;

/// Work on a GPU that was recorded, and is done again by one call: a CUDA graph.
///
/// It is done again on the same memory, with the shapes and the host's numbers of the first time. Not yet run on a GPU.
#[derive(Debug)]
pub struct Graph(shim::cuda::Graph);

impl Graph {
    /// Records what `work` has the GPU of `device` do, and returns it with what `work` returned: tensors that hold the
    /// results of the newest [`replay`](Self::replay), and nothing before the first.
    ///
    /// `work` is called several times, the last time to be recorded. It must neither wait for the GPU nor copy from the
    /// host; tensors that it reads have to be there as long as the graph, and new inputs are copied into them.
    ///
    /// # Errors
    /// [`Error::CudaObject`] without the object, [`Error::Value`] for a device that is no GPU, what `work` returns, and
    /// [`Error::Cpp`] if it did what cannot be recorded.
    pub fn record<T, E: From<Error>>(
        device: Device,
        mut work: impl FnMut() -> std::result::Result<T, E>,
    ) -> std::result::Result<(Self, T), E> {
        let graph = shim::cuda::Graph::enter(object_for(device)?, gpu(device)?)?;
        for _ in 0..TRIALS {
            work()?;
        }
        graph.begin()?;
        let result = work()?;
        graph.end()?;
        Ok((Self(graph), result))
    }

    /// Does the work again, behind what the GPU has to do for this thread.
    ///
    /// # Errors
    /// [`Error::Cpp`] if the GPU refuses.
    pub fn replay(&self) -> Result<()> {
        self.0.replay()
    }
}

/// Checks that graphs can be recorded on `device`.
///
/// # Errors
/// As [`Graph::record`].
pub fn check_graphs(device: Device) -> Result<()> {
    object_for(device).map(|_| ())
}

fn object_for(device: Device) -> Result<&'static Object> {
    gpu(device)?;
    object()
}

fn gpu(device: Device) -> Result<usize> {
    match device {
        Device::Cuda(index) => Ok(index),
        other => Err(Error::value("a CUDA graph", "a CUDA device", format!("{other:?}"))),
    }
}

/// The object, which is looked for and opened once; a failure stays one.
pub(crate) fn object() -> Result<&'static Object> {
    static OBJECT: OnceLock<(PathBuf, std::result::Result<Object, Refusal>)> = OnceLock::new();
    let (path, object) = OBJECT.get_or_init(|| {
        let path = object_path();
        let object = open(&path);
        (path, object)
    });
    object.as_ref().map_err(|refusal| match refusal {
        Refusal::Object(reason) => Error::CudaObject { path: path.clone(), reason: reason.clone() },
        Refusal::Cuda(reason) => Error::DeviceMissing { wanted: DeviceSpec::Cuda(0), reason: reason.clone() },
    })
}

/// What does not serve: the object, or libtorch's CUDA half.
#[derive(Debug)]
enum Refusal {
    Object(String),
    Cuda(String),
}

fn open(path: &Path) -> std::result::Result<Object, Refusal> {
    present(path).map_err(Refusal::Object)?;
    device::open_library().map_err(Refusal::Cuda)?;
    Object::open(path).map_err(Refusal::Object)
}

fn present(path: &Path) -> std::result::Result<(), String> {
    path.is_file().then_some(()).ok_or_else(|| "there is no such file".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_lies_beside_the_program_or_where_the_variable_says() {
        let program = Path::new("/opt/cm/bin/cm");
        assert_eq!(place(None, Some(program)), Path::new("/opt/cm/bin/libcm_cuda.so"));
        assert_eq!(place(Some("".into()), Some(program)), Path::new("/opt/cm/bin/libcm_cuda.so"));
        assert_eq!(place(Some("/x/own.so".into()), Some(program)), Path::new("/x/own.so"));
    }

    #[test]
    fn graphs_are_refused_where_there_is_no_gpu() {
        let error = check_graphs(Device::Cpu).unwrap_err().to_string();
        assert_eq!(error, "a CUDA graph: expected a CUDA device, got Cpu");
        let mut calls = 0;
        let work = || {
            calls += 1;
            Ok::<(), Error>(())
        };
        assert!(Graph::record(Device::Cpu, work).is_err());
        assert_eq!(calls, 0);
        // No machine has this GPU; without the object, that is said first.
        let error = Graph::record(Device::Cuda(100), || Ok::<(), Error>(())).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn an_object_that_is_not_there_is_named_with_what_to_do() {
        let missing = Path::new("/nonexistent/libcm_cuda.so");
        let reason = present(missing).unwrap_err();
        let error = Error::CudaObject { path: missing.to_owned(), reason }.to_string();
        assert_eq!(
            error,
            "/nonexistent/libcm_cuda.so: there is no such file; `cargo xtask cuda-object` builds it, and \
             CM_CUDA_OBJECT names one that lies elsewhere"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_no_object_of_this_program_is_refused() {
        let file = std::env::temp_dir().join(format!("cm-cuda-object-{}", std::process::id()));
        std::fs::write(&file, "no library\n").unwrap();
        let text = Object::open(&file).unwrap_err();
        std::fs::remove_file(&file).unwrap();
        assert!(text.starts_with("it does not load: ") && !text.contains('\n'), "{text}");
        assert!(!text.contains(file.to_str().unwrap()), "named twice: {text}");
        // A library, but another one.
        let text = Object::open(Path::new("libm.so.6")).unwrap_err();
        assert_eq!(text, "it is another library: it has no cm_cuda_version");
    }
}
