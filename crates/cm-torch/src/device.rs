//! Where to compute: devices by name, CUDA opened at run time, switches and memory statistics.
//!
//! Programs link libtorch's CPU half alone; [`resolve`] opens `libtorch_cuda.so` beside it when a CUDA device is
//! asked for, so one program serves machines with and without a GPU and a CPU run never pays for CUDA. libtorch looks
//! for CUDA once per process, so call [`resolve`] before anything that may ask (seeding does).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tch::{Cuda, Device};

use crate::{Error, Result, shim};

mod open;

pub(crate) use open::open_library;
use open::{CUDA, open_cuda};

/// A device as a user names it: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// ```
/// use cm_torch::device::DeviceSpec;
/// assert_eq!("cuda:1".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(1));
/// assert_eq!(DeviceSpec::Cuda(0).to_string(), "cuda:0");
/// assert!("gpu".parse::<DeviceSpec>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceSpec {
    /// The first CUDA device where one can be used, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index; its absence is an error.
    Cuda(usize),
}

impl FromStr for DeviceSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let unknown = || Error::DeviceName(text.to_owned());
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            // libtorch counts devices in 8 bits.
            _ => match text.strip_prefix("cuda:").map(str::parse::<u8>) {
                Some(Ok(index)) if index < 128 => Ok(Self::Cuda(index.into())),
                _ => Err(unknown()),
            },
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl Serialize for DeviceSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A device that can be used, and how it was chosen, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The device.
    pub device: Device,
    /// For `auto`: why it is this one.
    pub note: Option<String>,
}

/// The device that a name stands for on this machine.
///
/// A CUDA device that was asked for and cannot be used is an error that says why; `auto` tries CUDA only where the
/// system shows a GPU, and its caller logs the result (see [`resolve_with_note`]).
pub fn resolve(spec: &DeviceSpec) -> Result<Device> {
    resolve_with_note(spec).map(|resolved| resolved.device)
}

/// [`resolve`], with the reason for what `auto` chose.
pub fn resolve_with_note(spec: &DeviceSpec) -> Result<Resolved> {
    match *spec {
        DeviceSpec::Cpu => Ok(Resolved { device: Device::Cpu, note: None }),
        DeviceSpec::Cuda(index) => {
            let missing = |reason| Error::DeviceMissing { wanted: *spec, reason };
            let count = open_cuda().map_err(missing)?;
            if index >= count {
                let last = count - 1;
                return Err(missing(format!(
                    "this machine has {count} CUDA device(s), cuda:0 to cuda:{last}"
                )));
            }
            Ok(Resolved { device: Device::Cuda(index), note: None })
        }
        DeviceSpec::Auto => Ok(match gpu_node() {
            None => Resolved { device: Device::Cpu, note: Some("no GPU is seen on this machine".to_owned()) },
            Some(node) => match open_cuda() {
                Ok(count) => {
                    Resolved { device: Device::Cuda(0), note: Some(format!("{count} CUDA device(s)")) }
                }
                Err(reason) => Resolved {
                    device: Device::Cpu,
                    note: Some(format!("{} is there, but CUDA cannot be used: {reason}", node.display())),
                },
            },
        }),
    }
}

/// The device of one of several ranks. `cuda` (and `cuda:0`) gives each rank of a machine a GPU of its own, that of
/// number `local_rank`; `auto` is the CPU, since machines may differ in what they have.
///
/// # Errors
/// [`Error::DeviceMissing`] for another GPU by number, which several ranks would share, and where there is none for
/// this rank.
pub fn resolve_for_rank(spec: &DeviceSpec, local_rank: usize) -> Result<Resolved> {
    let missing = |reason| Error::DeviceMissing { wanted: *spec, reason };
    match *spec {
        DeviceSpec::Cpu => Ok(Resolved { device: Device::Cpu, note: None }),
        DeviceSpec::Auto => {
            let note = "several ranks compute on CPUs unless --device cuda is given";
            Ok(Resolved { device: Device::Cpu, note: Some(note.to_owned()) })
        }
        DeviceSpec::Cuda(0) => {
            let index = open_cuda().and_then(|count| gpu_of_rank(local_rank, count)).map_err(missing)?;
            let note = format!("LOCAL_RANK={local_rank}");
            Ok(Resolved { device: Device::Cuda(index), note: Some(note) })
        }
        DeviceSpec::Cuda(_) => Err(missing(
            "each of several ranks computes on the GPU of its LOCAL_RANK; use cuda, and choose among GPUs by \
             CUDA_VISIBLE_DEVICES"
                .to_owned(),
        )),
    }
}

fn gpu_of_rank(local_rank: usize, count: usize) -> std::result::Result<usize, String> {
    if local_rank < count {
        return Ok(local_rank);
    }
    Err(format!(
        "LOCAL_RANK={local_rank}, and this machine shows {count} CUDA device(s): start no more ranks on it than that \
         (where a scheduler shows each rank its own GPU alone, set LOCAL_RANK=0)"
    ))
}

/// How many CUDA devices can be used, opening CUDA; or why none can.
///
/// For `cm doctor`; programs that compute call [`resolve`].
pub fn cuda_devices() -> std::result::Result<usize, String> {
    open_cuda()
}

/// The device file of a GPU that the system shows, without opening CUDA: NVIDIA's driver on Linux, or that of
/// Windows' subsystem for Linux.
#[must_use]
pub fn gpu_node() -> Option<PathBuf> {
    let numbered = (0..16).map(|i| PathBuf::from(format!("/dev/nvidia{i}")));
    numbered.chain([PathBuf::from("/dev/dxg")]).find(|node| node.exists())
}

/// What computes here, for a log or a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Version of the libtorch that was compiled against.
    pub libtorch: String,
    /// The instruction set that libtorch's CPU kernels use.
    pub cpu_capability: String,
    /// Threads inside one operation.
    pub threads: usize,
    /// CUDA devices, if CUDA has been opened in this process.
    pub cuda_devices: Option<usize>,
    /// Models of the GPUs that the driver lists, whether or not CUDA is open.
    pub gpus: Vec<String>,
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "libtorch {}, {} threads, {}", self.libtorch, self.threads, self.cpu_capability)?;
        if let Some(count) = self.cuda_devices {
            write!(f, ", {count} CUDA device(s)")?;
        }
        if !self.gpus.is_empty() {
            write!(f, " ({})", self.gpus.join(", "))?;
        }
        Ok(())
    }
}

/// Describes this process; opens nothing.
#[must_use]
pub fn describe() -> Description {
    let opened = CUDA.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    Description {
        libtorch: shim::torch_version(),
        cpu_capability: shim::cpu_capability(),
        threads: threads(),
        cuda_devices: opened.and_then(std::result::Result::ok),
        gpus: driver_models(Path::new("/proc/driver/nvidia/gpus")),
    }
}

/// The `Model:` lines of the driver's folder of GPUs.
fn driver_models(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut gpus: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    gpus.sort();
    gpus.iter()
        .filter_map(|gpu| std::fs::read_to_string(gpu.join("information")).ok())
        .filter_map(|text| text.lines().find_map(|l| Some(l.strip_prefix("Model:")?.trim().to_owned())))
        .collect()
}

/// Keeps memory that tensors on the CPU gave back for the next of their size, instead of asking the C library each time;
/// with glibc, what kernels take beside them stays in the process too.
///
/// For programs that compute again and again, as in a training loop or a sampling service. What lies idle is given back
/// when idle and used memory together would exceed by a quarter and 32 MB what tensors took at the most, and where there
/// is no memory for a tensor; else the process stays as large as it was. It concerns the whole process, so no library
/// calls it, and a program does before other threads use tensors. Tensors from before are freed as they would have been.
pub fn keep_memory() {
    shim::keep_memory();
}

/// Bytes in tensors on the CPU that were made since [`keep_memory`], which counts them; `None` without it.
#[must_use]
pub fn tensor_bytes() -> Option<u64> {
    u64::try_from(shim::kept_bytes()).ok()
}

/// Threads that one libtorch operation uses on the CPU.
#[must_use]
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// Sets the threads that one libtorch operation uses on the CPU.
///
/// Sums are split by thread, so results can differ in their last bits between thread counts.
pub fn set_threads(count: usize) -> Result<()> {
    match i32::try_from(count) {
        Ok(count) if count > 0 => {
            tch::set_num_threads(count);
            Ok(())
        }
        _ => Err(Error::value("number of threads", "at least 1", count)),
    }
}

/// Lets CUDA matrix products and convolutions round their float32 inputs to TF32 (10 bits of mantissa).
///
/// libtorch's own default lets convolutions and not matrix products; call this to have it one way.
pub fn set_tf32(on: bool) -> Result<()> {
    shim::set_tf32(on)
}

/// Whether both matrix products and convolutions may use TF32.
#[must_use]
pub fn tf32() -> bool {
    shim::tf32()
}

/// Restricts libtorch to operations that give the same bits on every run, on the same machine and thread count; one
/// that has no such form becomes an error.
///
/// Call it before the first CUDA operation: cuBLAS reads its workspace setting when it starts, and this sets it in
/// the environment where the user has not.
pub fn set_deterministic(on: bool) -> Result<()> {
    shim::set_deterministic(on)
}

/// Whether libtorch is restricted to deterministic operations.
#[must_use]
pub fn deterministic() -> bool {
    shim::deterministic()
}

/// Lets cuDNN time its convolution algorithms on each new shape and keep the fastest; runs may then differ in their
/// last bits.
pub fn set_cudnn_benchmark(on: bool) {
    Cuda::cudnn_set_benchmark(on);
}

/// Whether cuDNN times its algorithms.
#[must_use]
pub fn cudnn_benchmark() -> bool {
    shim::cudnn_benchmark()
}

/// Memory in use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Now. On the CPU the resident memory of the whole process, on CUDA the bytes in live tensors.
    pub current: u64,
    /// The most since the start or since [`reset_peak_memory`].
    pub peak: u64,
    /// The most that was reserved from the system, as other programs see it; on the CPU equal to `peak`.
    pub peak_reserved: u64,
}

/// Memory statistics of a device: Linux' count of resident memory, or libtorch's CUDA allocator.
pub fn memory(device: Device) -> Result<Memory> {
    match device {
        Device::Cuda(index) => {
            let [current, peak, _, reserved] = shim::cuda_memory(index)?.map(|bytes| bytes as u64);
            Ok(Memory { current, peak, peak_reserved: reserved })
        }
        _ => {
            let path = "/proc/self/status";
            let text = std::fs::read_to_string(path)
                .map_err(|source| Error::Io { what: format!("reading {path}"), source })?;
            let field = |name| {
                status_bytes(&text, name).ok_or_else(|| Error::value(path, format!("a line {name}"), "none"))
            };
            let peak = field("VmHWM:")?;
            Ok(Memory { current: field("VmRSS:")?, peak, peak_reserved: peak })
        }
    }
}

/// Starts the peak of [`memory`] anew from what is in use now.
pub fn reset_peak_memory(device: Device) -> Result<()> {
    match device {
        Device::Cuda(index) => shim::cuda_reset_peak(index),
        // 5 resets the high-water mark (man 5 proc).
        _ => std::fs::write("/proc/self/clear_refs", "5")
            .map_err(|source| Error::Io { what: "resetting the peak of resident memory".into(), source }),
    }
}

/// The bytes of a line such as `VmHWM:     1234 kB`.
fn status_bytes(text: &str, field: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Kind, Tensor};

    #[test]
    fn names_round_trip() {
        for spec in [DeviceSpec::Auto, DeviceSpec::Cpu, DeviceSpec::Cuda(0), DeviceSpec::Cuda(12)] {
            assert_eq!(spec.to_string().parse::<DeviceSpec>().unwrap(), spec);
            let json = serde_json::to_string(&spec).unwrap();
            assert_eq!(json, format!("\"{spec}\""));
            assert_eq!(serde_json::from_str::<DeviceSpec>(&json).unwrap(), spec);
        }
        assert_eq!("cuda".parse::<DeviceSpec>().unwrap(), DeviceSpec::Cuda(0));
        for wrong in ["", "gpu", "CPU", "cuda:", "cuda:x", "cuda:-1", "cuda:128", "cpu:0"] {
            let error = wrong.parse::<DeviceSpec>().unwrap_err().to_string();
            assert!(error.contains("auto, cpu, cuda or cuda:N"), "{error}");
        }
    }

    #[test]
    fn a_missing_cuda_device_says_why() {
        // No machine has this many devices, so this fails everywhere; where there is no CUDA at all, earlier.
        let error = resolve(&DeviceSpec::Cuda(127)).unwrap_err().to_string();
        assert!(error.starts_with("device cuda:127 is not available: "), "{error}");
        let reasons = ["cargo xtask setup --cuda", "nvidia-smi", "CUDA device(s)", "CUDA_VISIBLE_DEVICES"];
        assert!(reasons.iter().any(|r| error.contains(r)), "{error}");
        assert!(!error.contains('\n'));
    }

    #[test]
    fn each_of_several_ranks_has_a_gpu_of_its_own_or_says_why_not() {
        assert_eq!((gpu_of_rank(0, 1), gpu_of_rank(3, 4)), (Ok(0), Ok(3)));
        let error = gpu_of_rank(2, 2).unwrap_err();
        assert!(error.starts_with("LOCAL_RANK=2, and this machine shows 2 CUDA device(s)"), "{error}");
        let of_rank = |spec| resolve_for_rank(&spec, 1);
        for spec in [DeviceSpec::Cpu, DeviceSpec::Auto] {
            assert_eq!(of_rank(spec).unwrap().device, Device::Cpu);
        }
        let error = of_rank(DeviceSpec::Cuda(1)).unwrap_err().to_string();
        let words =
            "device cuda:1 is not available: each of several ranks computes on the GPU of its LOCAL_RANK";
        assert!(error.starts_with(words) && !error.contains('\n'), "{error}");
        // No machine has this many GPUs, and on most there is none.
        let error = resolve_for_rank(&DeviceSpec::Cuda(0), 4000).unwrap_err().to_string();
        assert!(error.starts_with("device cuda:0 is not available: "), "{error}");
    }

    #[test]
    fn auto_gives_a_usable_device_and_a_reason() {
        let resolved = resolve_with_note(&DeviceSpec::Auto).unwrap();
        assert!(resolved.note.is_some());
        assert!(resolved.device == Device::Cpu || gpu_node().is_some());
        let sum = Tensor::ones([3], (Kind::Float, resolved.device)).sum(Kind::Float);
        assert_eq!(sum.double_value(&[]), 3.0);
    }

    #[test]
    fn description_names_the_version() {
        let description = describe();
        assert_eq!(description.libtorch, "2.11.0");
        assert!(description.to_string().starts_with("libtorch 2.11.0, "), "{description}");
    }

    #[test]
    fn status_lines_are_read() {
        let text = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 12 kB\n";
        assert_eq!(status_bytes(text, "VmHWM:"), Some(2048 * 1024));
        assert_eq!(status_bytes(text, "VmRSS:"), Some(12 * 1024));
        assert_eq!(status_bytes(text, "VmSwap:"), None);
    }

    #[test]
    fn switches_switch() {
        for on in [true, false] {
            set_tf32(on).unwrap();
            assert_eq!(tf32(), on);
            set_deterministic(on).unwrap();
            assert_eq!(deterministic(), on);
            set_cudnn_benchmark(on);
            assert_eq!(cudnn_benchmark(), on);
        }
        assert!(set_threads(0).is_err());
    }

    #[test]
    fn driver_models_are_read_from_its_folder() {
        let folder = std::env::temp_dir().join(format!("cm-torch-gpus-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("0000:01:00.0")).unwrap();
        std::fs::write(folder.join("0000:01:00.0/information"), "Model: \t\t NVIDIA X1\nIRQ: 3\n").unwrap();
        let models = driver_models(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(models, ["NVIDIA X1"]);
        assert!(driver_models(&folder).is_empty());
    }
}
