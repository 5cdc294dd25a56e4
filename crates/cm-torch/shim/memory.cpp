// Memory of a process that computes the same again and again.
//
// libtorch asks the C library for every tensor, which takes as long as a small operation: a request of more than a few
// hundred bytes has it join and split what lies around. Here what a tensor gives back waits for the next of its size.

#include "shim.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <climits>
#include <cstddef>
#include <mutex>
#include <vector>

namespace {

// In front of every block, as far as tensors are aligned.
constexpr size_t kHead = 64;
constexpr size_t kLeastStep = 6; // 64 bytes

struct Head {
  size_t kind, size;
};

// The sizes that blocks have: multiples of 2^step, 33 to 64 of them but for the smallest, so that rounding up costs a
// thirtieth at most.
Head head_of(size_t bytes) {
  size_t step = kLeastStep;
  while (bytes > (size_t{64} << step)) {
    ++step;
  }
  const size_t count = (bytes + (size_t{1} << step) - 1) >> step;
  return {(step - kLeastStep) * 64 + count - 1, count << step};
}

class Keeper final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : take(head_of(bytes));
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }

  void copy_data(void* dest, const void* src, size_t count) const override {
    default_copy_data(dest, src, count);
  }

 private:
  void* take(Head head) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ += head.size;
      most_ = std::max(most_, used_);
      if (head.kind < idle_.size() && !idle_[head.kind].empty()) {
        void* data = idle_[head.kind].back();
        idle_[head.kind].pop_back();
        idle_bytes_ -= head.size;
        return data;
      }
      // What lies idle may cost a quarter more than tensors ever took at once.
      const size_t limit = most_ + most_ / 4 + (size_t{32} << 20);
      release(limit > used_ ? limit - used_ : 0);
    }
    return fresh(head);
  }

  void* fresh(Head head) {
    for (bool again = false;; again = true) {
      try {
        void* block = c10::alloc_cpu(head.size + kHead);
        *static_cast<Head*>(block) = head;
        return static_cast<char*>(block) + kHead;
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (again) {
          used_ -= head.size;
          throw;
        }
        release(0);
      }
    }
  }

  // Gives idle blocks back to the C library, the largest first, until no more than `bytes` are left.
  void release(size_t bytes) {
    for (size_t kind = idle_.size(); kind-- > 0 && idle_bytes_ > bytes;) {
      auto& blocks = idle_[kind];
      while (!blocks.empty() && idle_bytes_ > bytes) {
        idle_bytes_ -= head_at(blocks.back()).size;
        c10::free_cpu(static_cast<char*>(blocks.back()) - kHead);
        blocks.pop_back();
      }
    }
  }

  static Head head_at(void* data) {
    return *reinterpret_cast<Head*>(static_cast<char*>(data) - kHead);
  }

  static void give_back(void* data);

  std::mutex mutex_;
  std::vector<std::vector<void*>> idle_;
  size_t used_ = 0, most_ = 0, idle_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Keeper& keeper() {
  static Keeper* const only = new Keeper;
  return *only;
}

void Keeper::give_back(void* data) {
  if (data == nullptr) {
    return;
  }
  Keeper& all = keeper();
  const Head head = head_at(data);
  const std::lock_guard<std::mutex> lock(all.mutex_);
  if (all.idle_.size() <= head.kind) {
    all.idle_.resize(head.kind + 1);
  }
  all.idle_[head.kind].push_back(data);
  all.used_ -= head.size;
  all.idle_bytes_ += head.size;
}

} // namespace

extern "C" {

// Has tensors keep what they give back, and glibc what kernels take beside them, up to 2 GB in pieces of up to 32 MB, the
// most that glibc allows: pages that return to the system are cleared when it hands them out again.
void cm_keep_memory() {
  c10::SetCPUAllocator(&keeper(), 1);
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

} // extern "C"
