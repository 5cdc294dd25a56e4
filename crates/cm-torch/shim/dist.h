// What crosses the border to c10d, as handles that Rust holds and gives back. Shared by the shim and by the object in
// ../cuda, which makes groups of its own kind.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <cstdint>

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using GroupPtr = c10::intrusive_ptr<c10d::Backend>;

inline std::chrono::milliseconds milliseconds(int64_t count) {
  return std::chrono::milliseconds(count);
}
