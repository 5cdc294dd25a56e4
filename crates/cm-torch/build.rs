//! Compiles the C++ shim against libtorch's headers and tells dependents where libtorch lies.

use std::path::{Path, PathBuf};
use std::{env, fs};

#[path = "cuda/fingerprint.rs"]
mod fingerprint;

/// What `tch` 0.24.0 is written for. torch-sys checks it only where a `build-version` file exists, which the
/// PyPI wheel lacks; a wheel says its version in `torch/version.py`.
const TORCH_VERSION: &str = "2.11.0";

fn main() {
    if let Err(message) = build() {
        println!("cargo::error={message}");
    }
}

fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=shim");
    // The object itself is built by `cargo xtask cuda-object`, where the headers of CUDA are.
    println!("cargo::rerun-if-changed=cuda");
    let sources = fingerprint::fingerprint(Path::new("."))
        .map_err(|error| format!("cannot read the sources of the CUDA object: {error}"))?;
    println!("cargo::rustc-env=CM_CUDA_SOURCES={sources}");
    // Published by torch-sys, whichever of LIBTORCH, LIBTORCH_LIB, LIBTORCH_USE_PYTORCH and a system-wide
    // install led to it.
    let lib = env::var_os("DEP_TCH_LIBTORCH_LIB")
        .map(PathBuf::from)
        .ok_or("torch-sys published no libtorch folder; only Linux and macOS builds are supported")?;
    let root = lib.parent().ok_or_else(|| format!("{} has no parent folder", lib.display()))?;
    check_version(root)?;

    println!("cargo::metadata=LIBDIR={}", lib.display());
    println!("cargo::rustc-link-search=native={}", lib.display());
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());

    let include_root = env_rerun("LIBTORCH_INCLUDE").map_or_else(|| root.to_owned(), PathBuf::from);
    compile_shim(&include_root.join("include"))?;
    for name in ["torch_cpu", "torch", "c10"] {
        println!("cargo::rustc-link-lib={name}");
    }
    if is_linux() {
        println!("cargo::rustc-link-lib=gomp");
    }
    Ok(())
}

fn compile_shim(include: &Path) -> Result<(), String> {
    let header = include.join("ATen/ATen.h");
    if !header.exists() {
        return Err(format!(
            "libtorch's headers are not at {}; point LIBTORCH at a folder with include/ and lib/, or run `cargo xtask setup`",
            include.display()
        ));
    }
    let mut sources: Vec<PathBuf> = fs::read_dir("shim")
        .map_err(|e| format!("cannot list the shim folder: {e}"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cpp"))
        .collect();
    sources.sort();

    let abi = env_rerun("LIBTORCH_CXX11_ABI").unwrap_or_else(|| "1".to_owned());
    let mut cc = cc::Build::new();
    cc.cpp(true)
        .pic(true)
        .std("c++17")
        // The optimiser's loops are the point of this file, in debug builds too.
        .opt_level(3)
        .warnings(true)
        .extra_warnings(true)
        .flag(format!("-D_GLIBCXX_USE_CXX11_ABI={abi}"))
        // What libtorch's headers name of Gloo, whose own headers its wheel lacks.
        .include("shim")
        // -isystem keeps warnings in libtorch's own headers out of our build.
        .flag("-isystem")
        .flag(include.as_os_str())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").as_os_str())
        // No contraction: an element's result must not depend on whether it fell into the vector body or the
        // tail of a loop, nor on the instruction set that the loader picked.
        .flag("-ffp-contract=off")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .files(&sources);
    if is_linux() {
        // at::parallel_for is an OpenMP region in the header: without the flag it runs on one thread.
        cc.flag("-fopenmp");
    }
    cc.try_compile("cm_torch_shim").map_err(|e| e.to_string().replace('\n', " "))
}

fn check_version(root: &Path) -> Result<(), String> {
    let path = root.join("version.py");
    if env_rerun("LIBTORCH_BYPASS_VERSION_CHECK").is_some() {
        return Ok(());
    }
    // Archives from elsewhere than PyPI have no version.py; torch-sys reads their build-version.
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    // Only for a file that is there: cargo takes a missing one for changed, every time.
    println!("cargo::rerun-if-changed={}", path.display());
    let found = text
        .lines()
        .find_map(|line| line.strip_prefix("__version__"))
        .map(|rest| rest.trim_matches(|c: char| c.is_whitespace() || "='\"".contains(c)))
        .ok_or_else(|| format!("{} states no __version__", path.display()))?;
    if found.split('+').next() == Some(TORCH_VERSION) {
        return Ok(());
    }
    Err(format!(
        "libtorch {TORCH_VERSION} is needed, {} is {found}; run `cargo xtask setup`, or point LIBTORCH at a {TORCH_VERSION} install",
        root.display()
    ))
}

fn env_rerun(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok()
}

fn is_linux() -> bool {
    env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux")
}
