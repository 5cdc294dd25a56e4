// Group normalisation with everything that U-Nets do beside it, and the scaled sum of two branches, on the CPU.
//
// libtorch reads and writes an image once for each of: adding the embedding, normalising, scaling and shifting, SiLU.
// Here all of it is one sum over the image and one pass, and its backward the same again. What the backward needs is
// recomputed from the input, so that neither the normalised image nor anything behind it is kept.

#include "fused_norm.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cstdint>
#include <optional>
#include <type_traits>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- for autograd ----

// [N, C] or absent.
const float* optional(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

at::MemoryFormat format_of(const at::Tensor& x) {
  return x.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast;
}

bool dense(const at::Tensor& x) {
  return x.dim() == 4 && (x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast));
}

bool computable(const at::Tensor& x) {
  const auto type = x.scalar_type();
  // Forward-mode tangents would be lost.
  return x.is_cpu() && dense(x) && x.numel() > 0 && (type == at::kFloat || type == at::kBFloat16) &&
      !x._fw_grad(/*level=*/0).defined();
}

template <typename F>
void with_type(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kFloat) {
    f(static_cast<float*>(nullptr));
  } else {
    f(static_cast<Bf16*>(nullptr));
  }
}

Norm norm_of(const at::Tensor& x, const variable_list& parts, int64_t groups, double eps, bool silu) {
  const bool last = !x.is_contiguous();
  const bool pairs = last && x.scalar_type() == at::kBFloat16 && x.size(1) % 2 == 0;
  return Norm{
      ImageOrder{x.size(0), x.size(1), x.size(2) * x.size(3), last, pairs},
      groups,
      eps,
      silu,
      parts[0].const_data_ptr<float>(),
      parts[1].const_data_ptr<float>(),
      optional(parts[2]),
      optional(parts[3]),
      optional(parts[4])};
}

struct FusedNorm : public torch::autograd::Function<FusedNorm> {
  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& x,
      const at::Tensor& weight,
      const at::Tensor& bias,
      const std::optional<at::Tensor>& added,
      const std::optional<at::Tensor>& scaled,
      const std::optional<at::Tensor>& shifted,
      int64_t groups,
      double eps,
      bool silu) {
    const auto add = added.value_or(at::Tensor()), scale = scaled.value_or(at::Tensor());
    const auto shift = shifted.value_or(at::Tensor());
    const auto norm = norm_of(x, {weight, bias, add, scale, shift}, groups, eps, silu);
    const auto f32 = x.options().dtype(at::kFloat);
    auto mean = at::empty({x.size(0), groups}, f32), rstd = at::empty({x.size(0), groups}, f32);
    auto channel = at::empty({x.size(0), x.size(1)}, f32);
    auto y = at::empty_like(x);
    const Moments m{mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), channel.mutable_data_ptr<float>()};
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      norm_forward<T>(
          norm, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), m);
    });
    ctx->save_for_backward({x, weight, bias, add, scale, shift, mean, rstd, channel});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["silu"] = silu;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "the fused normalisation cannot be differentiated twice");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& x = saved[0];
    const auto norm = norm_of(
        x, {saved[1], saved[2], saved[3], saved[4], saved[5]}, ctx->saved_data["groups"].toInt(),
        ctx->saved_data["eps"].toDouble(), ctx->saved_data["silu"].toBool());
    const auto dy = outputs[0].to(x.scalar_type()).contiguous(format_of(x));
    const auto like = [](const at::Tensor& t) { return t.defined() ? at::empty_like(t) : at::Tensor(); };
    const auto data = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; };
    variable_list grads{
        at::empty_like(x), like(saved[1]), like(saved[2]), like(saved[3]), like(saved[4]), like(saved[5])};
    const Moments m{
        saved[6].mutable_data_ptr<float>(), saved[7].mutable_data_ptr<float>(), saved[8].mutable_data_ptr<float>()};
    with_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      norm_backward<T>(
          norm, static_cast<const T*>(x.const_data_ptr()), static_cast<const T*>(dy.const_data_ptr()),
          static_cast<T*>(grads[0].mutable_data_ptr()), m,
          Grads{data(grads[1]), data(grads[2]), data(grads[3]), data(grads[4]), data(grads[5])});
    });
    grads.resize(9);
    return grads;
  }
};

// ---- (a + b) * s ----

template <typename T>
CM_CLONES void scaled_sum(const T* __restrict a, const T* __restrict b, T* __restrict y, float s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    store(y + i, (load(a + i) + load(b + i)) * s);
  }
}

struct ScaledSum : public torch::autograd::Function<ScaledSum> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& b, double scale) {
    ctx->saved_data["scale"] = scale;
    auto y = at::empty_like(a);
    with_type(a, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto *x = static_cast<const T*>(a.const_data_ptr()), *z = static_cast<const T*>(b.const_data_ptr());
      auto* out = static_cast<T*>(y.mutable_data_ptr());
      at::parallel_for(0, a.numel(), 16384, [&](int64_t begin, int64_t end) {
        scaled_sum<T>(x + begin, z + begin, out + begin, static_cast<float>(scale), end - begin);
      });
    });
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    const auto grad = at::mul(outputs[0], ctx->saved_data["scale"].toDouble());
    return variable_list{grad, grad, at::Tensor()};
  }
};

bool one_per_channel(const at::Tensor& t, const at::Tensor& x) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.dim() == 1 && t.size(0) == x.size(1) &&
      !t._fw_grad(/*level=*/0).defined();
}

// [N, C], made contiguous; none if null.
bool one_per_image(cm_tensor from, const at::Tensor& x, std::optional<at::Tensor>& to) {
  if (from == nullptr) {
    return true;
  }
  to = from->contiguous();
  return to->is_cpu() && to->scalar_type() == at::kFloat && to->dim() == 2 && to->size(0) == x.size(0) &&
      to->size(1) == x.size(1) && !to->_fw_grad(/*level=*/0).defined();
}

} // namespace

extern "C" {

// *y stays null where this is none for the fused form: another device, dtype or memory order.
char* cm_fused_norm(
    cm_tensor x,
    cm_tensor weight,
    cm_tensor bias,
    cm_tensor add,
    cm_tensor scale,
    cm_tensor shift,
    int64_t groups,
    double eps,
    bool silu,
    cm_tensor* y) {
  return cm_guard([&] {
    *y = nullptr;
    std::optional<at::Tensor> added, scaled, shifted;
    if (!computable(*x) || !one_per_channel(*weight, *x) || !one_per_channel(*bias, *x) ||
        !one_per_image(add, *x, added) || !one_per_image(scale, *x, scaled) || !one_per_image(shift, *x, shifted) ||
        groups < 1 || x->size(1) % groups != 0) {
      return;
    }
    *y = new at::Tensor(FusedNorm::apply(*x, *weight, *bias, added, scaled, shifted, groups, eps, silu));
  });
}

// The same for (a + b) * scale.
char* cm_scaled_sum(cm_tensor a, cm_tensor b, double scale, cm_tensor* y) {
  return cm_guard([&] {
    *y = nullptr;
    if (!computable(*a) || !computable(*b) || a->scalar_type() != b->scalar_type() || a->sizes() != b->sizes() ||
        a->strides() != b->strides()) {
      return;
    }
    *y = new at::Tensor(ScaledSum::apply(*a, *b, scale));
  });
}

} // extern "C"
