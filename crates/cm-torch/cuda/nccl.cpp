// Ranks that compute on GPUs: c10d's NCCL backend, which exchanges tensors that lie there.

#include "../shim/dist.h"
#include "../shim/shim.h"

#include <c10/cuda/CUDAFunctions.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

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
    // What does not name a device, such as a new stream, goes to the rank's own too.
    c10::cuda::set_device(static_cast<c10::DeviceIndex>(device));
    auto options = c10d::ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/false);
    options->timeout = milliseconds(timeout_ms);
    StorePtr own = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<StorePtr*>(store));
    *out = new GroupPtr(c10::make_intrusive<c10d::ProcessGroupNCCL>(own, rank, size, options));
  });
}
