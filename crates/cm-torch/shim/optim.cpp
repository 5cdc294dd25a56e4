// Adam, AdamW and RAdam with any number of weight averages.
//
// On the CPU one pass over memory does everything (`one_pass`); elsewhere libtorch's fused and foreach kernels do
// (`by_lists`). Both compute the same formulas; the tests compare them on CPU tensors.

#include "chunks.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_lerp.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_sqrt.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/_fused_adam.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/nan_to_num.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Mirrors cm_torch::shim::OptimStep.
struct CmOptimStep {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double grad_scale;
  double nan_limit; // infinities become ± this and NaN becomes 0; 0 leaves the gradient as it is
  int64_t step; // 1 on the first call
  int32_t kind; // 0 Adam, 1 AdamW, 2 RAdam
  int32_t grads; // afterwards: 0 keep, 1 zero, 2 release
  int32_t by_lists; // 1 forces the list kernels on the CPU too
};

// Mirrors cm_torch::shim::EmaList: ema <- beta * ema + (1 - beta) * weight.
struct CmEma {
  double beta;
  const cm_tensor* tensors;
};

namespace {

enum Kind { kAdam = 0, kAdamW = 1, kRAdam = 2 };
enum Grads { kKeep = 0, kZero = 1, kRelease = 2 };

// The step as numbers: weight <- decay * weight - size * m / (sqrt(v) * root_scale + eps), or, where RAdam's variance
// is not trusted yet, weight <- weight - size * m.
struct Update {
  double size = 0.0;
  double decay = 1.0;
  double root_scale = 1.0;
  bool adaptive = true;
};

Update update_of(const CmOptimStep& s) {
  const auto t = static_cast<double>(s.step);
  const double correction1 = 1.0 - std::pow(s.beta1, t);
  const double correction2 = 1.0 - std::pow(s.beta2, t);
  Update u;
  u.size = s.lr / correction1;
  if (s.kind != kRAdam) {
    u.root_scale = 1.0 / std::sqrt(correction2);
    if (s.kind == kAdamW) {
      u.decay = 1.0 - s.lr * s.weight_decay;
    }
    return u;
  }
  // Liu et al. 2020, algorithm 2; torch.optim.RAdam trusts the variance where rho_t > 5.
  const double rho_inf = 2.0 / (1.0 - s.beta2) - 1.0;
  const double rho = rho_inf - 2.0 * t * std::pow(s.beta2, t) / correction2;
  u.adaptive = rho > 5.0;
  if (u.adaptive) {
    const double rectification = std::sqrt(
        (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho));
    u.size *= rectification * std::sqrt(correction2);
  }
  return u;
}

// ---- loops over one chunk ----

CM_CLONES void scale_gradient(float* out, const float* grad, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = grad[i] * scale;
  }
}

CM_CLONES void clean_gradient(float* grad, float limit, int64_t n) {
  const float inf = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) {
    float g = grad[i];
    g = g == inf ? limit : g;
    g = g == -inf ? -limit : g;
    grad[i] = g == g ? g : 0.0f;
  }
}

CM_CLONES void add_decay(float* grad, const float* weight, float decay, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    grad[i] += decay * weight[i];
  }
}

struct Scalars {
  float one_minus_beta1, beta2, one_minus_beta2, size, decay, root_scale, eps;
};

CM_CLONES void update_adaptive(
    float* __restrict w,
    float* __restrict m,
    float* __restrict v,
    const float* __restrict g,
    const Scalars& s,
    int64_t n) {
  const Scalars k = s;
  for (int64_t i = 0; i < n; ++i) {
    const float mi = m[i] + (g[i] - m[i]) * k.one_minus_beta1;
    const float vi = v[i] * k.beta2 + (k.one_minus_beta2 * g[i]) * g[i];
    m[i] = mi;
    v[i] = vi;
    w[i] = w[i] * k.decay - k.size * mi / (std::sqrt(vi) * k.root_scale + k.eps);
  }
}

CM_CLONES void update_plain(
    float* __restrict w,
    float* __restrict m,
    float* __restrict v,
    const float* __restrict g,
    const Scalars& s,
    int64_t n) {
  const Scalars k = s;
  for (int64_t i = 0; i < n; ++i) {
    const float mi = m[i] + (g[i] - m[i]) * k.one_minus_beta1;
    m[i] = mi;
    v[i] = v[i] * k.beta2 + (k.one_minus_beta2 * g[i]) * g[i];
    w[i] = w[i] - k.size * mi;
  }
}

CM_CLONES void average(float* __restrict ema, const float* __restrict w, float beta, float rest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    ema[i] = ema[i] * beta + rest * w[i];
  }
}

// ---- tensors in the memory order of their weight ----

bool same_order(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

// A tensor that another weight's memory order forced us to copy, and where the result goes back to.
struct Borrowed {
  at::Tensor original;
  at::Tensor copy;
};

// `t` itself, or a copy in the memory order of `like`; with `back`, the copy is noted to be written back.
at::Tensor in_order_of(const at::Tensor& like, const at::Tensor& t, std::vector<Borrowed>* back) {
  if (same_order(like, t)) {
    return t;
  }
  at::Tensor copy = at::empty_like(like);
  copy.copy_(t);
  if (back != nullptr) {
    back->push_back({t, copy});
  }
  return copy;
}

float* data_of(const at::Tensor& t) {
  return t.mutable_data_ptr<float>();
}

// All tensors of a step, index by index; where a weight has no gradient `grads` holds an undefined tensor.
struct Lists {
  std::vector<at::Tensor> weights, grads, exp_avg, exp_avg_sq;
  std::vector<std::vector<at::Tensor>> emas;
  std::vector<double> betas;
  std::vector<Borrowed> back;

  void add_emas(const CmEma* list, size_t n_emas) {
    for (size_t e = 0; e < n_emas; ++e) {
      betas.push_back(list[e].beta);
      emas.emplace_back();
      for (size_t i = 0; i < weights.size(); ++i) {
        emas[e].push_back(in_order_of(weights[i], *list[e].tensors[i], &back));
      }
    }
  }

  void write_back() {
    for (auto& b : back) {
      b.original.copy_(b.copy);
    }
  }
};

// Raw writes are invisible to libtorch: a backward through a graph of before them must fail, not lie, and packed weights
// must be known to be old.
void bump(const std::vector<at::Tensor>& tensors) {
  for (const auto& t : tensors) {
    t.unsafeGetTensorImpl()->bump_version();
  }
}

void bump_emas(const Lists& lists) {
  for (const auto& list : lists.emas) {
    bump(list);
  }
}

void one_pass(const CmOptimStep& s, Lists& lists) {
  const Update u = update_of(s);
  const Scalars k{
      static_cast<float>(1.0 - s.beta1),
      static_cast<float>(s.beta2),
      static_cast<float>(1.0 - s.beta2),
      static_cast<float>(u.size),
      static_cast<float>(u.decay),
      static_cast<float>(u.root_scale),
      static_cast<float>(s.eps)};
  const float scale = static_cast<float>(s.grad_scale);
  const float limit = static_cast<float>(s.nan_limit);
  const float l2 = s.kind == kAdamW ? 0.0f : static_cast<float>(s.weight_decay);
  const bool prepare = scale != 1.0f || limit != 0.0f || l2 != 0.0f;

  const size_t n = lists.weights.size();
  std::vector<int64_t> sizes(n);
  std::vector<float*> w(n), g(n, nullptr), m(n), v(n);
  for (size_t i = 0; i < n; ++i) {
    sizes[i] = lists.weights[i].numel();
    w[i] = data_of(lists.weights[i]);
    m[i] = data_of(lists.exp_avg[i]);
    v[i] = data_of(lists.exp_avg_sq[i]);
    if (lists.grads[i].defined()) {
      g[i] = data_of(lists.grads[i]);
    }
  }
  const size_t n_emas = lists.emas.size();
  std::vector<std::vector<float*>> ema(n_emas);
  for (size_t e = 0; e < n_emas; ++e) {
    for (const auto& t : lists.emas[e]) {
      ema[e].push_back(data_of(t));
    }
  }

  cm_for_chunks(cm_chunks(sizes), [&](int64_t, const CmChunk& c) {
    float* weight = w[c.tensor] + c.begin;
    if (g[c.tensor] != nullptr) {
      float* grad = g[c.tensor] + c.begin;
      float prepared[kCmChunk];
      const float* effective = grad;
      if (prepare) {
        scale_gradient(prepared, grad, scale, c.size);
        if (limit != 0.0f) {
          clean_gradient(prepared, limit, c.size);
        }
        if (l2 != 0.0f) {
          add_decay(prepared, weight, l2, c.size);
        }
        effective = prepared;
      }
      const auto update = u.adaptive ? update_adaptive : update_plain;
      update(weight, m[c.tensor] + c.begin, v[c.tensor] + c.begin, effective, k, c.size);
      if (s.grads == kZero) {
        std::memset(grad, 0, sizeof(float) * c.size);
      }
    }
    for (size_t e = 0; e < n_emas; ++e) {
      const double beta = lists.betas[e];
      average(
          ema[e][c.tensor] + c.begin, weight, static_cast<float>(beta), static_cast<float>(1.0 - beta), c.size);
    }
  });

  bump(lists.weights);
  bump_emas(lists);
}

void average_by_lists(const Lists& lists) {
  for (size_t e = 0; e < lists.emas.size(); ++e) {
    if (!lists.weights.empty()) {
      at::_foreach_lerp_(lists.emas[e], lists.weights, 1.0 - lists.betas[e]);
    }
  }
}

void by_lists(const CmOptimStep& s, Lists& lists) {
  std::vector<at::Tensor> w, g, m, v;
  for (size_t i = 0; i < lists.weights.size(); ++i) {
    if (lists.grads[i].defined()) {
      w.push_back(lists.weights[i]);
      g.push_back(lists.grads[i]);
      m.push_back(lists.exp_avg[i]);
      v.push_back(lists.exp_avg_sq[i]);
    }
  }
  if (!w.empty()) {
    const std::vector<at::Tensor> original = g;
    if (s.grad_scale != 1.0) {
      g = at::_foreach_mul(g, s.grad_scale);
    }
    if (s.nan_limit != 0.0) {
      for (auto& t : g) {
        t = at::nan_to_num(t, 0.0, s.nan_limit, -s.nan_limit);
      }
    }
    const Update u = update_of(s);
    if (s.kind == kRAdam) {
      if (s.weight_decay != 0.0) {
        g = at::_foreach_add(g, w, s.weight_decay);
      }
      at::_foreach_lerp_(m, g, 1.0 - s.beta1);
      at::_foreach_mul_(v, s.beta2);
      at::_foreach_addcmul_(v, g, g, 1.0 - s.beta2);
      if (u.adaptive) {
        auto root = at::_foreach_sqrt(v);
        at::_foreach_add_(root, s.eps);
        at::_foreach_addcdiv_(w, m, root, -u.size);
      } else {
        at::_foreach_add_(w, m, -u.size);
      }
    } else {
      // The kernels read one step count per weight; all of ours are the same number.
      const auto count = at::full({}, static_cast<double>(s.step), w[0].options().dtype(at::kFloat));
      const std::vector<at::Tensor> counts(w.size(), count);
      const auto fused = s.kind == kAdam
          ? [](at::TensorList a, at::TensorList b, at::TensorList c, at::TensorList d, at::TensorList e,
               const CmOptimStep& o) {
              at::_fused_adam_(
                  a, b, c, d, {}, e, o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, /*amsgrad=*/false,
                  /*maximize=*/false);
            }
          : [](at::TensorList a, at::TensorList b, at::TensorList c, at::TensorList d, at::TensorList e,
               const CmOptimStep& o) {
              at::_fused_adamw_(
                  a, b, c, d, {}, e, o.lr, o.beta1, o.beta2, o.weight_decay, o.eps, /*amsgrad=*/false,
                  /*maximize=*/false);
            };
      fused(w, g, m, v, counts, s);
    }
    if (s.grads == kZero) {
      at::_foreach_zero_(original);
    }
  }
  average_by_lists(lists);
}

} // namespace

extern "C" {

// without_grad[i] becomes 1 for each weight that has no gradient; its moments and weight stay as they are, its
// averages move on.
char* cm_optim_step(
    const CmOptimStep* step,
    size_t n,
    const cm_tensor* weights,
    const cm_tensor* exp_avg,
    const cm_tensor* exp_avg_sq,
    size_t n_emas,
    const CmEma* emas,
    uint8_t* without_grad) {
  return cm_guard([&] {
    at::NoGradGuard no_grad;
    Lists lists;
    std::vector<Borrowed> zero_later;
    for (size_t i = 0; i < n; ++i) {
      const at::Tensor& w = *weights[i];
      TORCH_CHECK(
          w.is_non_overlapping_and_dense(), "weight ", i, " of shape ", w.sizes(), " has gaps or overlaps in memory");
      lists.weights.push_back(w);
      lists.exp_avg.push_back(in_order_of(w, *exp_avg[i], &lists.back));
      lists.exp_avg_sq.push_back(in_order_of(w, *exp_avg_sq[i], &lists.back));
      const at::Tensor& grad = w.grad();
      without_grad[i] = grad.defined() ? 0 : 1;
      if (!grad.defined()) {
        lists.grads.emplace_back();
        continue;
      }
      TORCH_CHECK(grad.scalar_type() == at::kFloat, "the gradient of weight ", i, " is ", grad.scalar_type());
      const at::Tensor ordered = in_order_of(w, grad, nullptr);
      if (step->grads == kZero && !ordered.is_same(grad)) {
        zero_later.push_back({grad, ordered});
      }
      lists.grads.push_back(ordered);
    }
    lists.add_emas(emas, n_emas);

    const bool cpu = n == 0 || weights[0]->is_cpu();
    if (cpu && step->by_lists == 0) {
      one_pass(*step, lists);
    } else {
      by_lists(*step, lists);
    }
    lists.write_back();
    for (auto& z : zero_later) {
      z.original.zero_();
    }
    if (step->grads == kRelease) {
      for (size_t i = 0; i < n; ++i) {
        weights[i]->mutable_grad().reset();
      }
    }
  });
}

char* cm_ema_update(size_t n, const cm_tensor* weights, size_t n_emas, const CmEma* emas, bool by_lists) {
  return cm_guard([&] {
    at::NoGradGuard no_grad;
    Lists lists;
    for (size_t i = 0; i < n; ++i) {
      lists.weights.push_back(*weights[i]);
    }
    lists.add_emas(emas, n_emas);
    const bool cpu = n == 0 || weights[0]->is_cpu();
    if (!cpu || by_lists) {
      average_by_lists(lists);
    } else {
      std::vector<int64_t> sizes;
      for (const auto& w : lists.weights) {
        TORCH_CHECK(w.is_non_overlapping_and_dense(), "a weight of shape ", w.sizes(), " has gaps or overlaps");
        sizes.push_back(w.numel());
      }
      cm_for_chunks(cm_chunks(sizes), [&](int64_t, const CmChunk& c) {
        const float* weight = lists.weights[c.tensor].const_data_ptr<float>() + c.begin;
        for (size_t e = 0; e < lists.emas.size(); ++e) {
          const double beta = lists.betas[e];
          average(
              data_of(lists.emas[e][c.tensor]) + c.begin, weight, static_cast<float>(beta),
              static_cast<float>(1.0 - beta), c.size);
        }
      });
      bump_emas(lists);
    }
    lists.write_back();
  });
}

// Makes `grad` the gradient of `tensor`, or takes that away if `grad` is null.
char* cm_set_grad(cm_tensor tensor, cm_tensor grad) {
  return cm_guard([&] {
    if (grad == nullptr) {
      tensor->mutable_grad().reset();
    } else {
      tensor->mutable_grad() = grad->detach();
    }
  });
}

} // extern "C"
