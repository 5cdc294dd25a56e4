//! Whether an NVIDIA GPU can be used on this machine, found without libtorch.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::tools;

/// CUDA 13.0, which the wheel is built for, runs on drivers from this major version on.
pub const MIN_DRIVER: u32 = 580;

/// What the system shows of NVIDIA hardware.
#[derive(Debug, Default, PartialEq)]
pub struct Gpus {
    /// Device nodes such as `/dev/nvidia0`, or the lines of `nvidia-smi -L`.
    pub devices: Vec<String>,
    /// Version of the kernel driver.
    pub driver: Option<String>,
}

impl Gpus {
    /// Looks at this machine.
    pub fn probe() -> Self {
        let mut found = Self::probe_under(Path::new("/"));
        // The device nodes are made on first use, so a loaded driver without nodes is asked through its own tool.
        if found.devices.is_empty() && (found.driver.is_some() || cfg!(windows)) {
            found.devices = ask_nvidia_smi().unwrap_or_default();
        }
        found
    }

    /// The part that is files alone; `root` is `/` but in tests.
    fn probe_under(root: &Path) -> Self {
        let mut devices: Vec<String> = fs::read_dir(root.join("dev"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| {
                name.strip_prefix("nvidia")
                    .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
            })
            .map(|name| format!("/dev/{name}"))
            .collect();
        devices.sort();
        // WSL passes every maker's GPU through /dev/dxg; the CUDA library beside it means that it is NVIDIA's.
        if root.join("dev/dxg").exists() && root.join("usr/lib/wsl/lib/libcuda.so.1").exists() {
            devices.push("/dev/dxg (WSL)".to_owned());
        }
        let driver = fs::read_to_string(root.join("proc/driver/nvidia/version"))
            .ok()
            .and_then(|text| driver_version(&text));
        Self { devices, driver }
    }

    /// Whether a GPU can be opened, so that the CUDA set is worth its size.
    pub fn seen(&self) -> bool {
        !self.devices.is_empty()
    }

    /// The driver's version if it is too old for the wheel's CUDA.
    pub fn outdated_driver(&self) -> Option<&str> {
        let driver = self.driver.as_deref()?;
        let major: u32 = driver.split('.').next()?.parse().ok()?;
        (major < MIN_DRIVER).then_some(driver)
    }
}

/// Finds `580.65.06` in the first line of /proc/driver/nvidia/version.
fn driver_version(text: &str) -> Option<String> {
    text.lines()
        .next()?
        .split_whitespace()
        .find(|word| word.contains('.') && word.bytes().all(|b| b.is_ascii_digit() || b == b'.'))
        .map(str::to_owned)
}

fn ask_nvidia_smi() -> Option<Vec<String>> {
    let program = tools::find_program("nvidia-smi")?;
    let output = Command::new(program).arg("-L").output().ok().filter(|o| o.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout);
    Some(text.lines().filter(|line| line.starts_with("GPU ")).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn an_empty_machine_has_no_gpu() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Gpus::probe_under(root.path()), Gpus::default());
    }

    #[test]
    fn device_nodes_count_and_control_nodes_do_not() {
        let root = tempfile::tempdir().unwrap();
        for node in ["dev/nvidiactl", "dev/nvidia-uvm", "dev/nvidia1", "dev/nvidia0"] {
            touch(root.path(), node, "");
        }
        let banner =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 14 2025\nGCC version: 12\n";
        touch(root.path(), "proc/driver/nvidia/version", banner);
        let gpus = Gpus::probe_under(root.path());
        assert_eq!(gpus.devices, ["/dev/nvidia0", "/dev/nvidia1"]);
        assert_eq!(gpus.outdated_driver(), Some("570.86.15"));
        let newer = Gpus { driver: Some("580.65.06".to_owned()), ..gpus };
        assert_eq!(newer.outdated_driver(), None);
    }

    #[test]
    fn wsl_needs_the_cuda_library_beside_the_device() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), "dev/dxg", "");
        assert!(!Gpus::probe_under(root.path()).seen());
        touch(root.path(), "usr/lib/wsl/lib/libcuda.so.1", "");
        assert!(Gpus::probe_under(root.path()).seen());
    }
}
