//! `cargo xtask cuda-object`: builds `libcm_cuda.so`, the part of the library that needs CUDA's headers, and puts it
//! beside the programs, which open it at run time. It needs neither a GPU nor a driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cli::CudaObjectArgs;
use crate::install::Home;
use crate::libtorch::{self, Source};
use crate::tools::{self, Python};
use crate::{pip, runner, wheels};

#[path = "../../crates/cm-torch/cuda/fingerprint.rs"]
mod fingerprint;

/// Name of the object; `cm_torch::cuda` looks for it beside the program.
pub const FILE: &str = "libcm_cuda.so";
/// The variable by which programs are told of an object elsewhere.
pub const VARIABLE: &str = "CM_CUDA_OBJECT";

/// One header of each wheel that is needed, from the folder of wheels.
const CUDA: &str = "nvidia/cu13/include/cuda_runtime_api.h";
const NCCL: &str = "nvidia/nccl/include/nccl.h";
const SPARSE: &str = "nvidia/cu13/include/cusparse.h";
/// One of each of headers.txt.
const RUNTIME: [&str; 2] = ["crt/host_config.h", "nv/target"];

/// The command.
pub fn run(args: &CudaObjectArgs) -> Result<u8> {
    if !cfg!(target_os = "linux") {
        bail!("CUDA is supported on Linux alone, and this is {}", std::env::consts::OS);
    }
    let home = Home::of_workspace();
    let torch = match &args.torch {
        Some(torch) => {
            let torch = fs::canonicalize(torch).with_context(|| format!("--torch {}", torch.display()))?;
            check(&torch).map_err(anyhow::Error::msg)?;
            torch
        }
        None => first_that_serves(&candidates(&home)?)?,
    };
    let site = torch.parent().context("the libtorch lies in no folder")?;
    let runtime = runtime_headers(&home, site)?;
    let out = match &args.out {
        Some(out) => std::path::absolute(out).context("--out")?,
        None => runner::built(FILE)?.with_file_name(FILE),
    };
    compile(&torch, site, &runtime, &out)?;
    println!("built {} against {}", out.display(), torch.display());
    Ok(0)
}

/// The libtorchs of this checkout, and the user's.
fn candidates(home: &Home) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    if let Source::Own(torch) = libtorch::source(home)? {
        all.push(torch);
    }
    all.push(home.torch());
    // The environment of Python, whose version names a folder.
    let folders = fs::read_dir(home.python().join("lib")).into_iter().flatten().flatten();
    all.extend(
        folders.map(|folder| folder.path().join("site-packages/torch")).filter(|torch| torch.is_dir()),
    );
    Ok(all)
}

fn first_that_serves(candidates: &[PathBuf]) -> Result<PathBuf> {
    let mut reasons = Vec::new();
    for torch in candidates {
        match check(torch) {
            Ok(()) => return Ok(torch.clone()),
            Err(reason) => reasons.push(reason),
        }
    }
    bail!(
        "no libtorch with CUDA's headers: {}; install one with `cargo xtask setup --cuda`",
        reasons.join("; ")
    )
}

/// Whether a libtorch has CUDA's headers beside it; else one line with what is missing.
fn check(torch: &Path) -> std::result::Result<(), String> {
    let shown = torch.display();
    let site = torch.parent().unwrap_or(torch);
    let own = ["lib/libtorch_cuda.so", "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"];
    let missing = own
        .iter()
        .map(|file| torch.join(file))
        .chain([CUDA, SPARSE, NCCL].iter().map(|file| site.join(file)))
        .find(|file| !file.exists());
    if let Some(missing) = missing {
        return Err(format!("{} is not there", missing.display()));
    }
    let text = fs::read_to_string(torch.join("version.py")).unwrap_or_default();
    let version = wheels::parse_version_py(&text).ok_or_else(|| format!("{shown} states no version"))?;
    wheels::check_version(&version, &shown.to_string()).map_err(|why| why.to_string())
}

/// The folder of the compiler's own CUDA headers: those of the wheels, or a few megabytes that are fetched once.
fn runtime_headers(home: &Home, site: &Path) -> Result<PathBuf> {
    let whole = |folder: &Path| RUNTIME.iter().all(|file| folder.join(file).exists());
    let include = |folder: &Path| folder.join("nvidia/cu13/include");
    let fetched = home.base.join("cuda-headers");
    for folder in [site, fetched.as_path()].map(include) {
        if whole(&folder) {
            return Ok(folder);
        }
    }
    let python = Python::find()?;
    let _lock = home.lock()?;
    let scratch = home.scratch();
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    eprintln!("fetching headers of CUDA 13.0 (3 MB) into {}", fetched.display());
    let staged = scratch.join("headers");
    let lists = [("headers.txt", wheels::HEADER_REQUIREMENTS)];
    let failure = pip::install_lists(&python, &lists, &staged, &scratch)?;
    if let Some(failure) = failure {
        bail!("CUDA's headers could not be fetched: {}", failure.message);
    }
    if fetched.exists() {
        fs::remove_dir_all(&fetched).with_context(|| format!("cannot remove {}", fetched.display()))?;
    }
    fs::rename(&staged, &fetched).with_context(|| format!("cannot make {}", fetched.display()))?;
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {}", scratch.display()))?;
    let folder = include(&fetched);
    if !whole(&folder) {
        bail!("{} lacks {} or {}", folder.display(), RUNTIME[0], RUNTIME[1]);
    }
    Ok(folder)
}

/// Compiles and links the object, and puts it into place when it is whole.
fn compile(torch: &Path, site: &Path, runtime: &Path, out: &Path) -> Result<()> {
    let package = tools::workspace_root().join("crates/cm-torch");
    let sources = fingerprint::fingerprint(&package).context("the sources of the object")?;
    let partial = out.with_extension("so.partial");
    let mut command = compiler()?;
    command.args(["-shared", "-fPIC", "-O2", "-std=c++17", "-Wall", "-Wextra", "-DUSE_C10D_NCCL"]);
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    command.arg(format!("-D_GLIBCXX_USE_CXX11_ABI={abi}"));
    command.arg(format!("-DCM_CUDA_SOURCES=\"{sources}\""));
    let includes =
        [torch.join("include"), torch.join("include/torch/csrc/api/include"), runtime.to_path_buf()];
    let of_wheels = ["nvidia/cu13/include", "nvidia/nccl/include"].map(|folder| site.join(folder));
    for folder in includes.iter().chain(&of_wheels) {
        command.arg("-isystem").arg(folder);
    }
    command.args(fingerprint::SOURCES.map(|source| package.join(source)));
    // What is missing in libtorch is to show here, not when the object is opened.
    command.args(["-Wl,-z,defs", "-Wl,--as-needed"]);
    command.arg("-L").arg(torch.join("lib"));
    command.args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"]);
    command.arg("-L").arg(site.join("nvidia/cu13/lib")).arg("-l:libcudart.so.13");
    command.arg("-o").arg(&partial);
    let status = runner::status_of(&mut command)?;
    if !status.success() {
        // The compiler has said why; it may have left a part.
        let _ = fs::remove_file(&partial);
        bail!("the object could not be built ({status}): see above");
    }
    fs::rename(&partial, out).with_context(|| format!("cannot make {}", out.display()))
}

/// The compiler that the build scripts use too.
fn compiler() -> Result<Command> {
    let chosen = tools::check_cxx(false)?;
    let mut words = chosen.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("c++"));
    command.args(words);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_libtorch_without_the_headers_is_named_with_what_it_lacks() {
        let site = tempfile::tempdir().unwrap();
        let torch = site.path().join("torch");
        touch(&torch.join("lib/libtorch_cuda.so"), "");
        touch(&torch.join("include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"), "");
        touch(&site.path().join(CUDA), "");
        touch(&site.path().join(SPARSE), "");
        let error = first_that_serves(std::slice::from_ref(&torch)).unwrap_err().to_string();
        assert!(error.contains("nccl.h is not there; install"), "{error}");
        assert!(error.ends_with("`cargo xtask setup --cuda`") && !error.contains('\n'), "{error}");
        touch(&site.path().join(NCCL), "");
        touch(&torch.join("version.py"), "__version__ = '2.10.0+cu130'\n");
        assert!(check(&torch).unwrap_err().contains("2.10.0"));
        touch(&torch.join("version.py"), "__version__ = '2.11.0+cu130'\n");
        let none = site.path().join("none");
        assert_eq!(first_that_serves(&[none, torch.clone()]).unwrap(), torch);
    }

    #[test]
    fn the_fingerprint_follows_every_source_of_the_object() {
        let package = tools::workspace_root().join("crates/cm-torch");
        let own = fingerprint::fingerprint(&package).unwrap();
        let copy = tempfile::tempdir().unwrap();
        for folder in ["cuda", "shim"] {
            for entry in fs::read_dir(package.join(folder)).unwrap().flatten() {
                if entry.path().is_file() {
                    let bytes = fs::read(entry.path()).unwrap();
                    touch(&copy.path().join(folder).join(entry.file_name()), "");
                    fs::write(copy.path().join(folder).join(entry.file_name()), bytes).unwrap();
                }
            }
        }
        assert_eq!(fingerprint::fingerprint(copy.path()).unwrap(), own);
        let listed: Vec<PathBuf> =
            fingerprint::SOURCES.iter().map(|source| copy.path().join(source)).collect();
        for entry in fs::read_dir(copy.path().join("cuda")).unwrap().flatten() {
            let is_source = entry.path().extension().is_some_and(|end| end == "cpp");
            assert!(!is_source || listed.contains(&entry.path()), "{entry:?} is in no list");
        }
        for file in listed.into_iter().chain([copy.path().join("shim/dist.h")]) {
            let before = fingerprint::fingerprint(copy.path()).unwrap();
            let text = fs::read_to_string(&file).unwrap();
            fs::write(&file, format!("{text}\n")).unwrap();
            assert_ne!(fingerprint::fingerprint(copy.path()).unwrap(), before, "{file:?}");
        }
        fs::remove_file(copy.path().join("shim/dist.h")).unwrap();
        assert!(fingerprint::fingerprint(copy.path()).unwrap_err().to_string().contains("shim/dist.h"));
    }
}
