// CUDA graphs: work on a GPU that is recorded once and done again by one call.

#include "../shim/shim.h"

#include <ATen/autocast_mode.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

namespace {

// Work is recorded on a stream of its own, which is the thread's current one from entering to leaving.
struct Recording {
  explicit Recording(c10::DeviceIndex device)
      : device_before(c10::cuda::current_device()),
        side(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)),
        before(c10::cuda::getCurrentCUDAStream(device)),
        keeps_casts(at::autocast::is_autocast_cache_enabled()) {}

  void leave() {
    if (!is_entered) {
      return;
    }
    is_entered = false;
    c10::cuda::setCurrentCUDAStream(before);
    c10::cuda::set_device(device_before);
    at::autocast::set_autocast_cache_enabled(keeps_casts);
  }

  c10::DeviceIndex device_before;
  at::cuda::CUDAGraph graph;
  c10::cuda::CUDAStream side;
  c10::cuda::CUDAStream before;
  bool keeps_casts;
  bool is_entered = false;
  bool is_recording = false;
};

} // namespace

extern "C" {

// Enters the stream on which work is to be tried and recorded.
char* cm_graph_enter(int device, void** out) {
  return cm_guard([&] {
    const auto index = static_cast<c10::DeviceIndex>(device);
    auto* recording = new Recording(index);
    *out = recording;
    recording->is_entered = true;
    c10::cuda::set_device(index);
    // What the work reads was made on other streams.
    c10::cuda::device_synchronize();
    c10::cuda::setCurrentCUDAStream(recording->side);
    // Weights that autocast has cast and keeps would go at the end of its region, and the graph would read them still.
    at::autocast::set_autocast_cache_enabled(false);
  });
}

// From here on work is recorded, and not done.
char* cm_graph_begin(void* handle) {
  return cm_guard([&] {
    auto& recording = *static_cast<Recording*>(handle);
    c10::cuda::device_synchronize();
    // Other threads go on as they like.
    recording.graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    recording.is_recording = true;
  });
}

// Ends recording, and goes back to the stream from before.
char* cm_graph_end(void* handle) {
  return cm_guard([&] {
    auto& recording = *static_cast<Recording*>(handle);
    recording.is_recording = false;
    recording.graph.capture_end();
    recording.leave();
  });
}

// Does what was recorded, behind what the current stream has to do.
char* cm_graph_replay(void* handle) {
  return cm_guard([&] { static_cast<Recording*>(handle)->graph.replay(); });
}

// Frees the graph and its memory; a recording that did not come to its end is left first.
void cm_graph_free(void* handle) {
  auto* recording = static_cast<Recording*>(handle);
  try {
    if (recording->is_recording) {
      recording->graph.capture_end();
    }
  } catch (...) {
    // It says that the recording failed, which was said before.
  }
  try {
    recording->leave();
    delete recording;
  } catch (...) {
    // The device is lost, and its memory with it.
  }
}

} // extern "C"
