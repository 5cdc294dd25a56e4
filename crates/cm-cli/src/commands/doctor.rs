//! `cm doctor`: what the running program finds on the machine.

use cm_torch::{cuda, device};
use tch::Device;

use crate::exit::Outcome;

/// Runs `cm doctor`.
pub fn doctor() -> Outcome {
    let devices = match device::cuda_devices() {
        Ok(0) => "CUDA libraries opened, no device".to_owned(),
        Ok(count) => format!("{count} CUDA device(s)"),
        Err(reason) => format!("none: {reason}"),
    };
    let description = device::describe();
    println!("cm {}", env!("CARGO_PKG_VERSION"));
    println!("libtorch        {}", description.libtorch);
    println!("CPU kernels     {}", description.cpu_capability);
    println!("CPU threads     {}", device::threads());
    println!("CUDA            {devices}");
    if cuda::object_path().exists() || device::gpu_node().is_some() {
        let object = match cuda::check_object() {
            Ok(()) => format!("{} serves this program", cuda::object_path().display()),
            Err(error) => format!("none: {error}"),
        };
        println!("CUDA object     {object}");
    }
    let chosen = device::resolve_with_note(&device::DeviceSpec::Auto)?;
    let note = chosen.note.map(|note| format!(" ({note})")).unwrap_or_default();
    println!("--device auto   {:?}{note}", chosen.device);
    let memory = device::memory(Device::Cpu)?;
    println!("memory in use   {}", cm_train::gigabytes(memory.current));
    Ok(())
}
