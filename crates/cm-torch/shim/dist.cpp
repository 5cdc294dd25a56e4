// Processes that train together: c10d's store, where they meet, and its Gloo backend, by which they exchange tensors.

#include "shim.h"

#define USE_C10D_GLOO
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

using StorePtr = c10::intrusive_ptr<c10d::Store>;
using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroupGloo>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

std::chrono::milliseconds milliseconds(int64_t count) {
  return std::chrono::milliseconds(count);
}

// c10d writes to standard error what it throws as well, with a backtrace. What is thrown becomes an error that names a
// rank; TORCH_CPP_LOG_LEVEL brings the lines back.
void quieten() {
  if (std::getenv("TORCH_CPP_LOG_LEVEL") == nullptr) {
    FLAGS_caffe2_log_level = c10::GLOG_FATAL;
  }
}

// One list of handles on the equal parts of `all`, or none if there is no `all`.
std::vector<std::vector<at::Tensor>> by_rank(cm_tensor all, int ranks) {
  if (all == nullptr) {
    return {};
  }
  return {all->detach().chunk(ranks, 0)};
}

} // namespace

extern "C" {

// A client of the store at host:port, and with `server` the store itself.
char* cm_store_open(const char* host, uint16_t port, bool server, int64_t timeout_ms, void** out) {
  return cm_guard([&] {
    quieten();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout_ms);
    *out = new StorePtr(c10::make_intrusive<c10d::TCPStore>(host, options));
  });
}

void cm_store_close(void* store) {
  delete static_cast<StorePtr*>(store);
}

char* cm_store_set(void* store, const char* key, const uint8_t* data, size_t size) {
  return cm_guard([&] {
    (*static_cast<StorePtr*>(store))->set(key, std::vector<uint8_t>(data, data + size));
  });
}

char* cm_store_check(void* store, const char* key, bool* there) {
  return cm_guard([&] { *there = (*static_cast<StorePtr*>(store))->check({key}); });
}

// Adds 1 to a counter, which begins at 0, and says what it is then.
char* cm_store_count(void* store, const char* key, int64_t* count) {
  return cm_guard([&] { *count = (*static_cast<StorePtr*>(store))->add(key, 1); });
}

// The texts of keys that are there, in one request, each with a line break behind it; cm_free frees them.
char* cm_store_get(void* store, const char* const* keys, size_t n, char** text) {
  return cm_guard([&] {
    std::string all;
    for (const auto& value : (*static_cast<StorePtr*>(store))->multiGet({keys, keys + n})) {
      all.append(value.begin(), value.end());
      all.push_back('\n');
    }
    *text = strdup(all.c_str());
  });
}

// Connects the ranks 0 .. size - 1 with one another, each listening on `address`, on the network interface
// `card`, or on what this machine's name stands for, whichever of the two is not null.
char* cm_group_open(
    void* store,
    const char* prefix,
    int rank,
    int size,
    const char* address,
    const char* card,
    int64_t connect_ms,
    int64_t timeout_ms,
    void** out) {
  return cm_guard([&] {
    using Gloo = c10d::ProcessGroupGloo;
    auto options = Gloo::Options::create(milliseconds(connect_ms));
    options->devices.push_back(
        card != nullptr          ? Gloo::createDeviceForInterface(card)
            : address != nullptr ? Gloo::createDeviceForHostname(address)
                                 : Gloo::createDefaultDevice());
    StorePtr own = c10::make_intrusive<c10d::PrefixStore>(prefix, *static_cast<StorePtr*>(store));
    auto group = c10::make_intrusive<Gloo>(own, rank, size, options);
    group->setTimeout(milliseconds(timeout_ms));
    *out = new GroupPtr(std::move(group));
  });
}

void cm_group_close(void* group) {
  delete static_cast<GroupPtr*>(group);
}

// Starts adding up `tensor` over all ranks, in place.
char* cm_group_all_reduce(void* group, cm_tensor tensor, void** work) {
  return cm_guard([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    *work = new WorkPtr((*static_cast<GroupPtr*>(group))->allreduce(tensors));
  });
}

// Starts copying `tensor` of rank `root` to all others.
char* cm_group_broadcast(void* group, cm_tensor tensor, int root, void** work) {
  return cm_guard([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    *work = new WorkPtr((*static_cast<GroupPtr*>(group))->broadcast(tensors, options));
  });
}

// Starts collecting `own` of every rank, rank by rank, in `all` of every rank.
char* cm_group_all_gather(void* group, cm_tensor own, cm_tensor all, void** work) {
  return cm_guard([&] {
    at::Tensor input = own->detach();
    at::Tensor output = all->detach();
    *work = new WorkPtr((*static_cast<GroupPtr*>(group))->_allgather_base(output, input));
  });
}

// Starts collecting `own` of every rank in `all` of rank `root`; elsewhere `all` is null.
char* cm_group_gather(void* group, cm_tensor own, cm_tensor all, int root, void** work) {
  return cm_guard([&] {
    auto& gloo = *static_cast<GroupPtr*>(group);
    std::vector<at::Tensor> inputs{own->detach()};
    auto outputs = by_rank(all, gloo->getSize());
    c10d::GatherOptions options;
    options.rootRank = root;
    *work = new WorkPtr(gloo->gather(outputs, inputs, options));
  });
}

// Starts handing every rank its part of `all` of rank `root` in `own`; elsewhere `all` is null.
char* cm_group_scatter(void* group, cm_tensor own, cm_tensor all, int root, void** work) {
  return cm_guard([&] {
    auto& gloo = *static_cast<GroupPtr*>(group);
    std::vector<at::Tensor> outputs{own->detach()};
    auto inputs = by_rank(all, gloo->getSize());
    c10d::ScatterOptions options;
    options.rootRank = root;
    *work = new WorkPtr(gloo->scatter(outputs, inputs, options));
  });
}

// Waits for an exchange, `wait_ms` at most; `done` says whether it has come to its end.
char* cm_work_wait(void* work, int64_t wait_ms, bool* done) {
  return cm_guard([&] {
    auto& exchange = *static_cast<WorkPtr*>(work);
    *done = false;
    if (!exchange->isCompleted()) {
      try {
        exchange->wait(milliseconds(wait_ms));
      } catch (...) {
        // Time that ran out is an exception as well, and the exchange goes on.
        if (!exchange->isCompleted()) {
          return;
        }
      }
    }
    // Throws what made it fail, if anything did.
    exchange->wait();
    *done = true;
  });
}

void cm_work_free(void* work) {
  delete static_cast<WorkPtr*>(work);
}

} // extern "C"
