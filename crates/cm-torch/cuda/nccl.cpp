// Ranks that compute on GPUs: c10d's NCCL backend, which exchanges tensors that lie there.

#include "../shim/dist.h"
#include "../shim/shim.h"

#include <c10/cuda/CUDAFunctions.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <cstdlib>

namespace {

// c10d's own watch over NCCL ends the process, by its own limits and with its own words. Ranks are watched by
// cm_torch::dist, whose errors name one. What the user has set stays.
void leave_errors_to_us() {
  const char* const settings[][2] = {
      // 0: an error becomes one of the exchange, and nothing else happens.
      {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"},
      {"TORCH_NCCL_RETHROW_CUDA_ERRORS", "0"},
      {"TORCH_NCCL_ENABLE_MONITORING", "0"},
      // It would write files into the folder for temporary ones.
      {"TORCH_NCCL_DUMP_ON_TIMEOUT", "0"},
  };
  for (const auto& [name, value] : settings) {
    setenv(name, value, /*overwrite=*/0);
  }
}

} // namespace

// Makes this process the rank of a group whose tensors lie on GPUs, its own on that of index `device`. The ranks connect
// with the first exchange.
extern "C" char* cm_nccl_open(
    void* store,
    const char* prefix,
    int rank,
    int size,
    int device,
    int64_t timeout_ms,
    void** out) {
  return cm_guard([&] {
    leave_errors_to_us();
    // What does not name a device, such as a new stream, goes to the rank's own too.
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto options = c10d::ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/false);
    options->timeout = milliseconds(timeout_ms);
    StorePtr own = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<StorePtr*>(store));
    *out = new GroupPtr(c10::make_intrusive<c10d::ProcessGroupNCCL>(own, rank, size, options));
  });
}
