//! The border to `cuda/*.cpp`, which lie in an object that is opened at run time.

use std::ffi::{c_char, c_int, c_void};
use std::path::Path;

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

/// The functions of the object; they stay there as long as the process.
#[derive(Debug)]
pub(crate) struct Object {
    pub(super) nccl_open: NcclOpen,
}

/// What the object must say of itself.
fn wanted() -> String {
    format!("{} {}", env!("CM_CUDA_SOURCES"), super::torch_version())
}

/// Whether an object that says `found` of itself serves a program that wants `wanted`.
fn check_version(found: &str, wanted: &str) -> Result<(), String> {
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
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
        use std::ffi::CStr;

        // SAFETY: opening runs the file's initialisers. It is the one that was built for this program, or a user's
        // choice, as any program that a user starts.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| explain(&error, path))?;
        let missing = |name: &str| format!("it is another library: it has no {name}");
        // SAFETY: of all that has a function of this name, none takes an argument; the text is a literal in the object.
        let found = unsafe {
            let version: Symbol<unsafe extern "C" fn() -> *const c_char> =
                library.get(b"cm_cuda_version\0").map_err(|_| missing("cm_cuda_version"))?;
            CStr::from_ptr(version()).to_string_lossy().into_owned()
        };
        check_version(&found, &wanted())?;
        // SAFETY: the sources, which are those of this program, declare the function so.
        let nccl_open: Symbol<NcclOpen> =
            unsafe { library.get(b"cm_nccl_open\0") }.map_err(|_| missing("cm_nccl_open"))?;
        let object = Self { nccl_open: *nccl_open };
        // libtorch holds pointers into the object from now on: it must never be closed.
        std::mem::forget(library);
        Ok(object)
    }

    /// There are GPUs on Linux alone.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn open(_: &Path) -> Result<Self, String> {
        Err("CUDA is supported on Linux alone".to_owned())
    }
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
