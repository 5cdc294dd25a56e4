// Norm over many tensors, and the search for the tensor that spoils it.

#include "chunks.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <vector>

namespace {

// The tensors themselves, or their gradients; undefined ones are left out of `index` too.
struct Selection {
  std::vector<at::Tensor> tensors;
  std::vector<size_t> index;
};

Selection select(size_t n, const cm_tensor* tensors, bool grads) {
  Selection s;
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& t = grads ? tensors[i]->grad() : *tensors[i];
    if (t.defined() && t.numel() > 0) {
      s.tensors.push_back(t);
      s.index.push_back(i);
    }
  }
  return s;
}

// 16 running sums: the order of additions is fixed, and the loop fills a vector register.
CM_CLONES double square_sum(const float* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t j = 0; j < 16; ++j) {
      const double value = x[i + j];
      lanes[j] += value * value;
    }
  }
  double sum = 0.0;
  for (; i < n; ++i) {
    const double value = x[i];
    sum += value * value;
  }
  for (double lane : lanes) {
    sum += lane;
  }
  return sum;
}

bool dense_float_on_cpu(const at::Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && t.is_non_overlapping_and_dense();
}

// One partial sum per chunk, added in order: the same bits for any number of threads.
double norm_on_cpu(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> sizes;
  std::vector<const float*> data;
  for (const auto& t : tensors) {
    sizes.push_back(t.numel());
    data.push_back(t.const_data_ptr<float>());
  }
  const auto chunks = cm_chunks(sizes);
  std::vector<double> partial(chunks.size());
  cm_for_chunks(chunks, [&](int64_t i, const CmChunk& c) {
    partial[i] = square_sum(data[c.tensor] + c.begin, c.size);
  });
  double sum = 0.0;
  for (double p : partial) {
    sum += p;
  }
  return std::sqrt(sum);
}

// Any device and dtype, with one wait for the device.
double norm_by_lists(const std::vector<at::Tensor>& tensors) {
  const auto norms = at::stack(at::_foreach_norm(tensors, 2.0));
  return at::linalg_vector_norm(norms, 2.0, c10::nullopt, false, at::kDouble).item<double>();
}

} // namespace

extern "C" {

char* cm_norm(size_t n, const cm_tensor* tensors, bool grads, bool by_lists, double* out) {
  return cm_guard([&] {
    at::NoGradGuard no_grad;
    const auto s = select(n, tensors, grads);
    bool direct = !by_lists;
    for (const auto& t : s.tensors) {
      direct = direct && dense_float_on_cpu(t);
    }
    if (s.tensors.empty()) {
      *out = 0.0;
    } else {
      *out = direct ? norm_on_cpu(s.tensors) : norm_by_lists(s.tensors);
    }
  });
}

// The index of the first tensor (or gradient) that holds NaN or an infinity, else -1.
char* cm_first_non_finite(size_t n, const cm_tensor* tensors, bool grads, int64_t* out) {
  return cm_guard([&] {
    at::NoGradGuard no_grad;
    const auto s = select(n, tensors, grads);
    *out = -1;
    for (size_t i = 0; i < s.tensors.size(); ++i) {
      if (!at::isfinite(s.tensors[i]).all().item<bool>()) {
        *out = static_cast<int64_t>(s.index[i]);
        return;
      }
    }
  });
}

} // extern "C"
