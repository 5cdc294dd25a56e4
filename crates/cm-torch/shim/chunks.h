// Splits a list of tensors into pieces that fit a core's cache, over which all threads work.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// A piece of one tensor: elements [begin, begin + size) in memory order.
struct CmChunk {
  size_t tensor;
  int64_t begin;
  int64_t size;
};

// 2048 floats are 8 KiB: the gradient, both moments and the weight of a chunk stay in the first-level cache while
// the averages are brought up to date one after another, so that few streams run to memory at a time.
constexpr int64_t kCmChunk = 2048;

// Chunks below which waking the other threads costs more than it brings.
constexpr int64_t kCmGrain = 16;

inline std::vector<CmChunk> cm_chunks(const std::vector<int64_t>& sizes) {
  std::vector<CmChunk> chunks;
  for (size_t t = 0; t < sizes.size(); ++t) {
    for (int64_t begin = 0; begin < sizes[t]; begin += kCmChunk) {
      chunks.push_back({t, begin, std::min(kCmChunk, sizes[t] - begin)});
    }
  }
  return chunks;
}

// Calls `f(index, chunk)` for every chunk, in parallel; each thread gets one contiguous run of chunks.
template <typename F>
void cm_for_chunks(const std::vector<CmChunk>& chunks, const F& f) {
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), kCmGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i, chunks[i]);
    }
  });
}

// One version of a loop per instruction set, picked by the loader.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CM_CLONES
#endif
