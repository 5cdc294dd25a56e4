//! The border to `cuda/*.cpp`, which lie in an object that is opened at run time.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::ptr::NonNull;

use super::check;
use crate::{Error, Result};

/// `cm_nccl_open` of `cuda/nccl.cpp`: store, prefix, rank, ranks, device, limit of an exchange, the group.
type NcclOpen = unsafe extern "C" fn(
    *mut c_void,
    *const c_char,
    c_int,
    c_int,
    c_int,
    i64,
    *mut *mut c_void,
) -> *mut c_char;

/// `cm_graph_enter` of `cuda/graph.cpp`: device, the recording.
type GraphEnter = unsafe extern "C" fn(c_int, *mut *mut c_void) -> *mut c_char;
/// Other functions of `cuda/graph.cpp`.
type GraphDo = unsafe extern "C" fn(*mut c_void) -> *mut c_char;

/// The functions of the object; they stay there as long as the process.
#[derive(Debug)]
pub(crate) struct Object {
    pub(super) nccl_open: NcclOpen,
    graph_enter: GraphEnter,
    graph_begin: GraphDo,
    graph_end: GraphDo,
    graph_replay: GraphDo,
    graph_free: unsafe extern "C" fn(*mut c_void),
}

/// A graph, or one that is being recorded.
#[derive(Debug)]
pub(crate) struct Graph {
    handle: NonNull<c_void>,
    object: &'static Object,
}

// SAFETY: the handle is this value's alone, and a graph may be replayed on any thread.
unsafe impl Send for Graph {}

impl Graph {
    /// Enters a stream of its own on the GPU of index `device`.
    pub(crate) fn enter(object: &'static Object, device: usize) -> Result<Self> {
        let mut out = std::ptr::null_mut();
        // SAFETY: plain values; the call writes one pointer on success.
        check(unsafe { (object.graph_enter)(device as c_int, &mut out) })?;
        let handle = NonNull::new(out).ok_or_else(|| Error::Cpp { text: "no graph was made".to_owned() })?;
        Ok(Self { handle, object })
    }

    /// From here on, what this thread has the GPU do is recorded.
    pub(crate) fn begin(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        check(unsafe { (self.object.graph_begin)(self.handle.as_ptr()) })
    }

    /// Ends the recording and leaves its stream.
    pub(crate) fn end(&self) -> Result<()> {
        // SAFETY: the handle is alive.
        check(unsafe { (self.object.graph_end)(self.handle.as_ptr()) })
    }

    pub(crate) fn replay(&self) -> Result<()> {
        // SAFETY: the handle is alive. What is recorded reads and writes memory of the GPU alone.
        check(unsafe { (self.object.graph_replay)(self.handle.as_ptr()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle came from `enter` and is not used again.
        unsafe { (self.object.graph_free)(self.handle.as_ptr()) }
    }
}

/// What the object must say of itself.
fn wanted() -> String {
    format!("{} {}", env!("CM_CUDA_SOURCES"), super::torch_version())
}

/// Whether an object that says `found` of itself serves a program that wants `wanted`.
fn check_version(found: &str, wanted: &str) -> std::result::Result<(), String> {
    if found == wanted {
        return Ok(());
    }
    let parts = |text: &str| {
        let (sources, torch) = text.split_once(' ').unwrap_or((text, "?"));
        format!("sources {sources} and libtorch {torch}")
    };
    Err(format!("it was built from {}, this program from {}", parts(found), parts(wanted)))
}

impl Object {
    /// Opens the object at `path`, behind libtorch's CUDA half.
    #[cfg(target_os = "linux")]
    pub(crate) fn open(path: &Path) -> std::result::Result<Self, String> {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
        use std::ffi::CStr;

        // SAFETY: opening runs the file's initialisers. It is the one that was built for this program, or a user's
        // choice, as any program that a user starts.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| explain(&error, path))?;
        let version: unsafe extern "C" fn() -> *const c_char = function(&library, "cm_cuda_version")?;
        // SAFETY: what has a function of this name is an object of some version, and gives a literal.
        let found = unsafe { CStr::from_ptr(version()) }.to_string_lossy().into_owned();
        check_version(&found, &wanted())?;
        let object = Self {
            nccl_open: function(&library, "cm_nccl_open")?,
            graph_enter: function(&library, "cm_graph_enter")?,
            graph_begin: function(&library, "cm_graph_begin")?,
            graph_end: function(&library, "cm_graph_end")?,
            graph_replay: function(&library, "cm_graph_replay")?,
            graph_free: function(&library, "cm_graph_free")?,
        };
        // libtorch holds pointers into the object from now on: it must never be closed.
        std::mem::forget(library);
        Ok(object)
    }

    /// There are GPUs on Linux alone.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn open(_: &Path) -> std::result::Result<Self, String> {
        Err("CUDA is supported on Linux alone".to_owned())
    }
}

/// A function of the object, whose type is that of the caller's place for it.
#[cfg(target_os = "linux")]
fn function<F: Copy>(library: &libloading::os::unix::Library, name: &str) -> std::result::Result<F, String> {
    // SAFETY: every function but the version is asked for behind a check that the sources are those of this program,
    // which declare it so; all types here are those of functions.
    unsafe { library.get::<F>(name.as_bytes()) }
        .map(|symbol| *symbol)
        .map_err(|_| format!("it is another library: it has no {name}"))
}

/// The loader's sentence without the path, which errors name anyway.
#[cfg(target_os = "linux")]
fn explain(error: &libloading::Error, path: &Path) -> String {
    let cause = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    let line = cause.lines().next().unwrap_or_default();
    let line = line.strip_prefix(&format!("{}: ", path.display())).unwrap_or(line);
    match line.strip_prefix("undefined symbol: ") {
        Some(symbol) => format!("it was built for another libtorch, this one has no {symbol}"),
        None => format!("it does not load: {line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_of_other_sources_or_another_libtorch_is_refused() {
        let own = wanted();
        let (sources, torch) = own.split_once(' ').unwrap();
        assert!(sources.len() == 16 && torch == "2.11.0", "{own}");
        assert_eq!(check_version(&own, &own), Ok(()));
        for other in [format!("0123456789abcdef {torch}"), format!("{sources} 2.10.0"), "odd".to_owned()] {
            let error = check_version(&other, &own).unwrap_err();
            assert!(error.starts_with("it was built from sources ") && error.contains(&own[..16]), "{error}");
        }
    }
}
