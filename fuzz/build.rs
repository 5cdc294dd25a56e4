//! Writes libtorch's folder into the tests and programs of this crate, so that they run without LD_LIBRARY_PATH.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // cm-torch's build script publishes the folder; cargo shows it to direct dependents only.
    let Ok(dir) = std::env::var("DEP_CM_TORCH_LIBDIR") else {
        println!(
            "cargo::error=cm-torch published no libtorch folder: this crate must depend on cm-torch directly"
        );
        return;
    };
    if std::env::var("CARGO_CFG_TARGET_FAMILY").is_ok_and(|family| family == "unix") {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{dir}");
    }
}
