// What this object was built from, and against which libtorch: it serves no other program.

#include <torch/headeronly/version.h>

extern "C" const char* cm_cuda_version() {
  return CM_CUDA_SOURCES " " TORCH_VERSION;
}
