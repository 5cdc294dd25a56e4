//! What a run on the CPU does and does not do to its process; in a process of its own, in one test.

use cm_torch::device::{DeviceSpec, memory, reset_peak_memory, resolve};
use cm_torch::rng::seed_dropout;
use cm_torch::tch::{Device, Kind, Tensor};

#[test]
fn a_cpu_run_counts_its_memory_and_opens_no_cuda() {
    const BYTES: u64 = 256 << 20;
    let device = resolve(&DeviceSpec::Cpu).unwrap();
    assert_eq!(device, Device::Cpu);
    seed_dropout(1);

    let before = memory(device).unwrap();
    let big = Tensor::ones([BYTES as i64 / 4], (Kind::Float, device));
    let with_big = memory(device).unwrap();
    assert!(with_big.current >= before.current + BYTES * 9 / 10, "{before:?} {with_big:?}");
    drop(big);
    let after = memory(device).unwrap();
    assert!(after.peak >= before.current + BYTES * 9 / 10, "{before:?} {after:?}");
    assert!(after.peak >= after.current && after.peak_reserved >= after.peak);

    reset_peak_memory(device).unwrap();
    let reset = memory(device).unwrap();
    assert!(reset.peak + BYTES / 2 < after.peak, "{after:?} {reset:?}");

    let error = memory(Device::Cuda(0)).unwrap_err().to_string();
    assert_eq!(error, "libtorch: CUDA is not open in this process: resolve a CUDA device first");

    if cfg!(target_os = "linux") {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(maps.contains("libtorch_cpu") && !maps.contains("libtorch_cuda"));
    }
}
