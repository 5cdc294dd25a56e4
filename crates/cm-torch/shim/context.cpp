// libtorch's process-wide and thread-wide switches, memory statistics and memory formats.

#include "shim.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <cstdlib>

namespace {

// The numbers of cm_torch::shim::DeviceCode.
at::DeviceType device_type(int code) {
  switch (code) {
    case 0:
      return at::kCPU;
    case 1:
      return at::kCUDA;
    case 2:
      return at::kMPS;
    default:
      return at::kVulkan;
  }
}

// Null before CUDA's first allocation.
c10::DeviceAllocator* cuda_allocator() {
  auto* allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(at::kCUDA));
  TORCH_CHECK(allocator != nullptr, "CUDA is not open in this process: resolve a CUDA device first");
  return allocator->initialized() ? allocator : nullptr;
}

} // namespace

extern "C" {

void cm_free(char* text) {
  std::free(text);
}

// ---- versions ----

const char* cm_torch_version() {
  return TORCH_VERSION;
}

char* cm_cpu_capability() {
  return strdup(at::get_cpu_capability().c_str());
}

// ---- switches ----

char* cm_set_tf32(bool on) {
  return cm_guard([&] {
    at::globalContext().setAllowTF32CuBLAS(on);
    at::globalContext().setAllowTF32CuDNN(on);
  });
}

bool cm_tf32() {
  return at::globalContext().allowTF32CuBLAS() && at::globalContext().allowTF32CuDNN();
}

char* cm_set_deterministic(bool on) {
  return cm_guard([&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(on, /*warn_only=*/false);
    // Filling fresh memory with NaN would only cost time: nothing here reads what it has not written.
    context.setDeterministicFillUninitializedMemory(false);
    context.setDeterministicCuDNN(on);
    context.setDeterministicMkldnn(on);
    if (on) {
      // cuBLAS reads this when its first handle is made.
      setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    }
  });
}

bool cm_deterministic() {
  return at::globalContext().deterministicAlgorithms();
}

bool cm_cudnn_benchmark() {
  return at::globalContext().benchmarkCuDNN();
}

// ---- autocast ----

bool cm_autocast_enabled(int device) {
  return at::autocast::is_autocast_enabled(device_type(device));
}

int cm_autocast_dtype(int device) {
  return static_cast<int>(at::autocast::get_autocast_dtype(device_type(device)));
}

char* cm_autocast_enter(int device, bool enabled, int dtype) {
  return cm_guard([&] {
    const auto type = device_type(device);
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(dtype));
    at::autocast::set_autocast_enabled(type, enabled);
    at::autocast::increment_nesting();
  });
}

char* cm_autocast_leave(int device, bool enabled, int dtype) {
  return cm_guard([&] {
    const auto type = device_type(device);
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
    at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(dtype));
    at::autocast::set_autocast_enabled(type, enabled);
  });
}

// ---- memory format ----

char* cm_channels_last(cm_tensor input, cm_tensor* output) {
  return cm_guard([&] { *output = new at::Tensor(input->contiguous(at::MemoryFormat::ChannelsLast)); });
}

// Whether the tensor fills its memory and nobody else holds either of them.
bool cm_is_alone(cm_tensor input) {
  const auto& t = *input;
  return t.use_count() == 1 && t.has_storage() && t.storage().use_count() == 1 && t.is_non_overlapping_and_dense() &&
      t.storage_offset() == 0 && t.storage().nbytes() == t.nbytes();
}

bool cm_is_channels_last(cm_tensor input) {
  return input->dim() == 4 && input->is_contiguous(at::MemoryFormat::ChannelsLast);
}

// ---- memory of a CUDA device ----

// out: bytes in tensors now, peak bytes in tensors, bytes reserved from the driver now, peak bytes reserved.
char* cm_cuda_memory(int index, int64_t* out) {
  return cm_guard([&] {
    auto* allocator = cuda_allocator();
    for (int i = 0; i < 4; ++i) {
      out[i] = 0;
    }
    if (allocator == nullptr) {
      return;
    }
    const auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(index));
    const auto total = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    out[0] = stats.allocated_bytes[total].current;
    out[1] = stats.allocated_bytes[total].peak;
    out[2] = stats.reserved_bytes[total].current;
    out[3] = stats.reserved_bytes[total].peak;
  });
}

char* cm_cuda_reset_peak(int index) {
  return cm_guard([&] {
    auto* allocator = cuda_allocator();
    if (allocator != nullptr) {
      allocator->resetPeakStats(static_cast<c10::DeviceIndex>(index));
    }
  });
}

} // extern "C"
