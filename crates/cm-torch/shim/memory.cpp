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
#include <array>
#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace {

// In front of every block, as far as tensors are aligned.
constexpr size_t kHead = 64;
constexpr size_t kLeastStep = 6; // 64 bytes
// Steps up to 2^57 bytes, with 64 sizes each: more than any machine addresses.
constexpr size_t kSteps = 52;
constexpr size_t kKinds = kSteps * 64;
constexpr size_t kMostBytes = size_t{1} << 57;

struct Head {
  size_t kind, size;
  // The next idle block of its size.
  Head* next;
};
static_assert(sizeof(Head) <= kHead);

// The sizes that blocks have: multiples of 2^step, 33 to 64 of them but for the smallest, so that rounding up costs a
// thirtieth at most.
Head head_of(size_t bytes) {
  size_t step = kLeastStep;
  while (bytes > (size_t{64} << step)) {
    ++step;
  }
  const size_t count = (bytes + (size_t{1} << step) - 1) >> step;
  return {(step - kLeastStep) * 64 + count - 1, count << step, nullptr};
}

class Keeper final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    TORCH_CHECK(bytes <= kMostBytes, "no machine has memory for a tensor of ", bytes, " bytes");
    void* data = bytes == 0 ? nullptr : take(head_of(bytes));
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }

  void copy_data(void* dest, const void* src, size_t count) const override {
    default_copy_data(dest, src, count);
  }

  // Bytes in tensors.
  size_t used() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_;
  }

 private:
  static void* data_of(Head* block) {
    return reinterpret_cast<char*>(block) + kHead;
  }

  void* take(const Head& head) {
    Head* block = idle(head);
    if (block == nullptr) {
      block = fresh(head);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += head.size;
    most_ = std::max(most_, used_);
    return data_of(block);
  }

  // A block that waits, or none, and then room for one more.
  Head* idle(const Head& head) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Head*& first = idle_.at(head.kind);
    if (first != nullptr) {
      Head* block = first;
      first = block->next;
      idle_bytes_ -= head.size;
      return block;
    }
    // What lies idle may cost an eighth more than tensors ever took at once.
    const size_t used = used_ + head.size, most = std::max(most_, used);
    release(most + most / 8 + (size_t{32} << 20) - used);
    return nullptr;
  }

  Head* fresh(const Head& head) {
    for (bool again = false;; again = true) {
      try {
        auto* block = static_cast<Head*>(c10::alloc_cpu(head.size + kHead));
        *block = head;
        return block;
      } catch (...) {
        if (again) {
          throw;
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        release(0);
      }
    }
  }

  // Gives idle blocks back to the C library, the largest first, until no more than `bytes` are left.
  void release(size_t bytes) {
    for (size_t kind = idle_.size(); kind-- > 0 && idle_bytes_ > bytes;) {
      while (idle_[kind] != nullptr && idle_bytes_ > bytes) {
        Head* block = idle_[kind];
        idle_[kind] = block->next;
        idle_bytes_ -= block->size;
        c10::free_cpu(block);
      }
    }
  }

  static void give_back(void* data);

  std::mutex mutex_;
  // Lists of idle blocks, by kind.
  std::array<Head*, kKinds> idle_{};
  size_t used_ = 0, most_ = 0, idle_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object.
Keeper& keeper() {
  static Keeper* const only = new Keeper;
  return *only;
}

std::atomic<bool> is_kept = false;

void Keeper::give_back(void* data) {
  if (data == nullptr) {
    return;
  }
  Keeper& all = keeper();
  auto* block = reinterpret_cast<Head*>(static_cast<char*>(data) - kHead);
  const std::lock_guard<std::mutex> lock(all.mutex_);
  block->next = all.idle_[block->kind];
  all.idle_[block->kind] = block;
  all.used_ -= block->size;
  all.idle_bytes_ += block->size;
}

} // namespace

extern "C" {

// Bytes in tensors that were made since memory is kept; -1 if it is not.
int64_t cm_kept_bytes() {
  return is_kept ? static_cast<int64_t>(keeper().used()) : -1;
}

// Has tensors keep what they give back, and glibc what kernels take beside them, up to 2 GB in pieces of up to 32 MB, the
// most that glibc allows: pages that return to the system are cleared when it hands them out again.
void cm_keep_memory() {
  c10::SetCPUAllocator(&keeper(), 1);
  is_kept = true;
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

} // extern "C"
