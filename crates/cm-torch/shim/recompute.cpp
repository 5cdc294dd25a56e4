// Parts of a network that keep their inputs alone and are computed again in the backward pass.

#include "shim.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <mutex>
#include <vector>

// Computes an output, which is the caller's to free, from inputs, which are the callee's. Returns false, with a text in
// `error`, if it panicked.
using cm_compute = bool (*)(void* data, cm_tensor* inputs, size_t n, cm_tensor* output, char* error, size_t room);
using cm_drop = void (*)(void* data);

namespace {

// A closure of Rust.
class Closure {
 public:
  Closure(void* data, cm_compute compute, cm_drop drop) : data_(data), compute_(compute), drop_(drop) {}
  Closure(const Closure&) = delete;
  Closure& operator=(const Closure&) = delete;
  ~Closure() {
    drop_(data_);
  }

  at::Tensor operator()(const std::vector<at::Tensor>& inputs) const {
    std::vector<cm_tensor> handles;
    for (const auto& input : inputs) {
      handles.push_back(new at::Tensor(input));
    }
    cm_tensor output = nullptr;
    char error[1024] = {};
    TORCH_CHECK(compute_(data_, handles.data(), handles.size(), &output, error, sizeof(error)), error);
    const std::unique_ptr<at::Tensor> owned(output);
    return *owned;
  }

 private:
  void* data_;
  cm_compute compute_;
  cm_drop drop_;
};

// What a computation depends on beside its inputs and weights: where the random generator stands, and autocast.
struct Setting {
  at::Device device;
  at::Tensor random;
  bool autocast;
  at::ScalarType dtype;

  static Setting now(at::Device device) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return {
        device,
        generator.get_state(),
        at::autocast::is_autocast_enabled(device.type()),
        at::autocast::get_autocast_dtype(device.type())};
  }

  void set() const {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    {
      const std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(random);
    }
    at::autocast::set_autocast_dtype(device.type(), dtype);
    at::autocast::set_autocast_enabled(device.type(), autocast);
  }
};

// Another setting until its end, which comes with an exception too.
class During {
 public:
  explicit During(const Setting& setting) : before_(Setting::now(setting.device)) {
    setting.set();
  }
  During(const During&) = delete;
  During& operator=(const During&) = delete;
  ~During() {
    before_.set();
  }

 private:
  Setting before_;
};

// Casts of weights that autocast keeps are those of one pass: without a graph from the first one, with a graph that is
// used up from the second.
class WithoutCache {
 public:
  WithoutCache() : before_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  WithoutCache(const WithoutCache&) = delete;
  WithoutCache& operator=(const WithoutCache&) = delete;
  ~WithoutCache() {
    at::autocast::set_autocast_cache_enabled(before_);
  }

 private:
  bool before_;
};

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The node of the graph that stands for the part. Gradients of weights go to the weights, as they do without it; those
// of the inputs go on from here.
struct Recomputed final : torch::autograd::Node {
  Recomputed(std::shared_ptr<Closure> part, Setting now, const std::vector<at::Tensor>& list)
      : closure(std::move(part)), setting(std::move(now)) {
    for (const auto& input : list) {
      inputs.emplace_back(input, /*is_output=*/false);
      needs.push_back(input.requires_grad());
    }
  }

  variable_list apply(variable_list&& grads) override {
    TORCH_CHECK(!at::GradMode::is_enabled(), "a part that is computed again cannot be differentiated twice");
    TORCH_CHECK(closure != nullptr, "a part that is computed again in the backward pass goes backward once");
    variable_list result(inputs.size());
    if (!grads.at(0).defined()) {
      return result;
    }
    std::vector<at::Tensor> leaves;
    for (size_t i = 0; i < inputs.size(); ++i) {
      leaves.push_back(inputs[i].unpack().detach());
      leaves.back().set_requires_grad(needs[i]);
    }
    at::Tensor output;
    {
      const During as_before(setting);
      const WithoutCache without_cache;
      const at::AutoGradMode with_graph(true);
      output = (*closure)(leaves);
    }
    torch::autograd::backward({output}, {grads[0]});
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (needs[i]) {
        result[i] = leaves[i].grad();
      }
    }
    return result;
  }

  void release_variables() override {
    closure.reset();
    for (auto& input : inputs) {
      input.reset_data();
    }
  }

  std::shared_ptr<Closure> closure;
  Setting setting;
  std::vector<SavedVariable> inputs;
  std::vector<bool> needs;
};

} // namespace

extern "C" {

bool cm_grad_enabled() {
  return at::GradMode::is_enabled();
}

// Computes an output without keeping anything but the inputs for the backward pass, which computes it again. `data` is
// given away: `drop` frees it, whatever happens.
char* cm_recompute(
    const cm_tensor* inputs,
    size_t n,
    void* data,
    cm_compute compute,
    cm_drop drop,
    cm_tensor* out) {
  return cm_guard([&] {
    auto closure = std::make_shared<Closure>(data, compute, drop);
    std::vector<at::Tensor> list;
    for (size_t i = 0; i < n; ++i) {
      list.push_back(*inputs[i]);
    }
    if (at::GradMode::is_enabled() && !torch::autograd::any_variable_requires_grad(list)) {
      // The graph has no place to begin at here: its weights keep what they need.
      *out = new at::Tensor((*closure)(list));
      return;
    }
    Setting setting = Setting::now(list.at(0).device());
    at::Tensor output;
    {
      const WithoutCache without_cache;
      const at::NoGradGuard without_graph;
      output = (*closure)(list);
    }
    if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(list)) {
      const std::shared_ptr<Recomputed> node(
          new Recomputed(std::move(closure), std::move(setting), list), torch::autograd::deleteNode);
      node->set_next_edges(torch::autograd::collect_next_edges(list));
      // A tensor of its own, should the output be a handle on an input or a weight.
      output = output.variable_data();
      torch::autograd::create_gradient_edge(output, node);
    }
    *out = new at::Tensor(output);
  });
}

} // extern "C"
