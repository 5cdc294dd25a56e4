// Processes that train together: c10d's store, where they meet, and the backends by which they exchange tensors. Gloo,
// for tensors on the CPU, is made here; NCCL is made by the object in ../cuda.

#include "dist.h"
#include "shim.h"

#define USE_C10D_GLOO
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// c10d's own watch over NCCL ends the process, by its own limits and with its own words. Ranks are watched by
// cm_torch::dist, whose errors name one. What the user has set stays. It is done before there are threads that read the
// environment.
void leave_errors_to_us() {
  const char* const settings[][2] = {
      // 0: an error becomes one of the exchange, and nothing else happens.
      {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"},
      {"TORCH_NCCL_RETHROW_CUDA_ERRORS", "0"},
      {"TORCH_NCCL_ENABLE_MONITORING", "0"},
      // It would write files into the folder for temporary ones.
      {"TORCH_NCCL_DUMP_ON_TIMEOUT", "0"},
      // Its record of the last exchanges, of whose group it keeps note without a lock: two groups of one process that
      // begin at the same time destroyed it.
      {"TORCH_FR_BUFFER_SIZE", "0"},
  };
  for (const auto& [name, value] : settings) {
    setenv(name, value, /*overwrite=*/0);
  }
}

// An exchange that is under way.
struct Exchange {
  WorkPtr work;
  // Whether it goes on behind the calls that wait for it: NCCL's only has the caller's stream wait, or, with a limit,
  // gives the connections up when that has passed.
  bool is_asked;
};

void* started(const GroupPtr& group, WorkPtr work) {
  return new Exchange{std::move(work), group->getBackendName() == "nccl"};
}

// Asks again and again whether the exchange is over, at ever longer intervals, for `wait_ms` at most.
bool ask(c10d::Work& work, int64_t wait_ms) {
  const auto end = std::chrono::steady_clock::now() + milliseconds(wait_ms);
  auto pause = std::chrono::microseconds(20);
  while (!work.isCompleted()) {
    if (std::chrono::steady_clock::now() > end) {
      return false;
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(500));
  }
  return true;
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
    leave_errors_to_us();
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

// Ends what the group holds of the device and of connections, when all ranks are done with it.
void cm_group_close(void* group) {
  auto* own = static_cast<GroupPtr*>(group);
  try {
    (*own)->shutdown();
    delete own;
  } catch (...) {
    // The process is about to end, and nothing is exchanged any more.
  }
}

// Gives up the exchanges that are under way.
char* cm_group_abort(void* group) {
  return cm_guard([&] { (*static_cast<GroupPtr*>(group))->abort(); });
}

// Starts adding up `tensor` over all ranks, in place.
char* cm_group_all_reduce(void* group, cm_tensor tensor, void** work) {
  return cm_guard([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    auto& ranks = *static_cast<GroupPtr*>(group);
    *work = started(ranks, ranks->allreduce(tensors));
  });
}

// Starts copying `tensor` of rank `root` to all others.
char* cm_group_broadcast(void* group, cm_tensor tensor, int root, void** work) {
  return cm_guard([&] {
    std::vector<at::Tensor> tensors{tensor->detach()};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    auto& ranks = *static_cast<GroupPtr*>(group);
    *work = started(ranks, ranks->broadcast(tensors, options));
  });
}

// Starts collecting `own` of every rank, rank by rank, in `all` of every rank.
char* cm_group_all_gather(void* group, cm_tensor own, cm_tensor all, void** work) {
  return cm_guard([&] {
    at::Tensor input = own->detach();
    at::Tensor output = all->detach();
    auto& ranks = *static_cast<GroupPtr*>(group);
    *work = started(ranks, ranks->_allgather_base(output, input));
  });
}

// Starts collecting `own` of every rank in `all` of rank `root`; elsewhere `all` is null.
char* cm_group_gather(void* group, cm_tensor own, cm_tensor all, int root, void** work) {
  return cm_guard([&] {
    auto& ranks = *static_cast<GroupPtr*>(group);
    std::vector<at::Tensor> inputs{own->detach()};
    auto outputs = by_rank(all, ranks->getSize());
    c10d::GatherOptions options;
    options.rootRank = root;
    *work = started(ranks, ranks->gather(outputs, inputs, options));
  });
}

// Starts handing every rank its part of `all` of rank `root` in `own`; elsewhere `all` is null.
char* cm_group_scatter(void* group, cm_tensor own, cm_tensor all, int root, void** work) {
  return cm_guard([&] {
    auto& ranks = *static_cast<GroupPtr*>(group);
    std::vector<at::Tensor> outputs{own->detach()};
    auto inputs = by_rank(all, ranks->getSize());
    c10d::ScatterOptions options;
    options.rootRank = root;
    *work = started(ranks, ranks->scatter(outputs, inputs, options));
  });
}

// Waits for an exchange, `wait_ms` at most; `done` says whether it has come to its end.
char* cm_work_wait(void* work, int64_t wait_ms, bool* done) {
  return cm_guard([&] {
    auto& [exchange, is_asked] = *static_cast<Exchange*>(work);
    *done = false;
    if (is_asked) {
      if (!ask(*exchange, wait_ms)) {
        return;
      }
      if (const auto failure = exchange->exception()) {
        std::rethrow_exception(failure);
      }
    } else if (!exchange->isCompleted()) {
      try {
        exchange->wait(milliseconds(wait_ms));
      } catch (...) {
        // Time that ran out is an exception as well, and the exchange goes on.
        if (!exchange->isCompleted()) {
          return;
        }
      }
    }
    // Throws what made it fail, if anything did; on a GPU, what is computed from now on comes behind the exchange.
    exchange->wait();
    *done = true;
  });
}

void cm_work_free(void* work) {
  delete static_cast<Exchange*>(work);
}

} // extern "C"
