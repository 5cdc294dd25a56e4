// Group normalisation with everything that U-Nets do beside it, and the scaled sum of two branches, on the CPU.
//
// libtorch reads and writes an image once for each of: adding the embedding, normalising, scaling and shifting, SiLU.
// Here all of it is one sum over the image and one pass, and its backward the same again. What the backward needs is
// recomputed from the input, so that neither the normalised image nor anything behind it is kept.

#include "chunks.h"
#include "fused_loops.h"
#include "shim.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- over the whole batch ----

// Calls f(image, piece, first pixel, pixels) for all pieces of all images, in parallel.
template <typename F>
void for_pieces(const ImageOrder& l, const F& f) {
  const int64_t pieces = (l.p + kPixels - 1) / kPixels;
  // Waking the other thread costs as much as some ten thousand numbers.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, l.c * kPixels));
  at::parallel_for(0, l.n * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % pieces * kPixels;
      f(i / pieces, i % pieces, start, std::min(kPixels, l.p - start));
    }
  });
}

// sums[2 * i + which], for i of `ImageOrder::at`, over all pixels: in float within a piece, in double over pieces, in
// their order.
template <typename T, Sums kind, bool silu>
std::vector<double> sums_of(const ImageOrder& l, const T* x, const T* dy, const float* k, const float* a, const float* b) {
  const int64_t pieces = (l.p + kPixels - 1) / kPixels;
  std::vector<float> partial(l.n * pieces * l.c * 2);
  for_pieces(l, [&](int64_t n, int64_t piece, int64_t start, int64_t pixels) {
    float* first = partial.data() + (n * pieces + piece) * l.c * 2;
    float* second = first + l.c;
    const auto at = [&](const float* values) { return values == nullptr ? nullptr : values + n * l.c; };
    if (l.last) {
      const int64_t from = (n * l.p + start) * l.c;
      const T* grad = dy == nullptr ? nullptr : dy + from;
      if constexpr (std::is_same_v<T, Bf16>) {
        if (l.pairs) {
          sums_pairs<kind, silu>(x + from, grad, at(k), at(a), at(b), first, second, l.c, pixels);
          return;
        }
      }
      sums_last<T, kind, silu>(x + from, grad, at(k), at(a), at(b), first, second, l.c, pixels);
      return;
    }
    for (int64_t c = 0; c < l.c; ++c) {
      const int64_t from = (n * l.c + c) * l.p + start, i = n * l.c + c;
      sums_plane<T, kind, silu>(
          x + from, dy == nullptr ? nullptr : dy + from, k[i], a == nullptr ? 0.0f : a[i],
          b == nullptr ? 0.0f : b[i], first + c, second + c, pixels);
    }
  });
  std::vector<double> sums(l.n * l.c * 2, 0.0);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const float* from = partial.data() + (n * pieces + piece) * l.c * 2;
      for (int64_t c = 0; c < l.c; ++c) {
        sums[(n * l.c + c) * 2] += from[c];
        sums[(n * l.c + c) * 2 + 1] += from[l.c + c];
      }
    }
  }
  return sums;
}

template <typename T, bool backward, bool silu>
void apply(const ImageOrder& l, const T* x, const T* dy, T* y, const Affine& affine) {
  for_pieces(l, [&](int64_t n, int64_t, int64_t start, int64_t pixels) {
    const auto at = [&](int64_t i) {
      const auto from = [&](const float* values) { return values == nullptr ? nullptr : values + i; };
      return Affine{from(affine.a), from(affine.b), from(affine.e), from(affine.f)};
    };
    if (l.last) {
      const int64_t from = (n * l.p + start) * l.c;
      const T* grad = backward ? dy + from : nullptr;
      if constexpr (std::is_same_v<T, Bf16>) {
        if (l.pairs) {
          apply_pairs<backward, silu>(x + from, grad, y + from, at(n * l.c), l.c, pixels);
          return;
        }
      }
      apply_last<T, backward, silu>(x + from, grad, y + from, at(n * l.c), l.c, pixels);
      return;
    }
    for (int64_t c = 0; c < l.c; ++c) {
      const int64_t from = (n * l.c + c) * l.p + start;
      apply_plane<T, backward, silu>(x + from, backward ? dy + from : nullptr, y + from, at(n * l.c + c), pixels);
    }
  });
}

// ---- normalisation ----

// [N, C] or absent.
const float* optional(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<float>() : nullptr;
}

struct Norm {
  ImageOrder layout;
  int64_t groups;
  double eps;
  bool silu;
  // [C], [C], and for each image [N, C]: what is added in front, and scale (of 1 + scale) and shift behind.
  const float *weight, *bias, *add, *scale, *shift;

  int64_t per_group() const {
    return layout.c / groups;
  }
  double gain(int64_t n, int64_t c) const {
    return weight[c] * (scale == nullptr ? 1.0 : 1.0 + scale[n * layout.c + c]);
  }
  double offset(int64_t n, int64_t c) const {
    const int64_t i = n * layout.c + c;
    const double scaled = bias[c] * (scale == nullptr ? 1.0 : 1.0 + scale[i]);
    return scaled + (shift == nullptr ? 0.0 : shift[i]);
  }
  double added(int64_t n, int64_t c) const {
    return add == nullptr ? 0.0 : add[n * layout.c + c];
  }
};

// Means and 1/standard deviations of groups `[N, G]`, means of channels `[N, C]` (without what is added).
struct Moments {
  float *mean, *rstd, *channel;
};

template <typename T>
void moments(const Norm& norm, const T* x, const Moments& out) {
  const ImageOrder& l = norm.layout;
  // Sums of differences to the mean of a few pixels: no digits are lost where the mean is far from 0.
  std::vector<float> k(l.n * l.c);
  const int64_t few = std::min<int64_t>(l.p, 8);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t c = 0; c < l.c; ++c) {
      float sum = 0.0f;
      for (int64_t i = 0; i < few; ++i) {
        const int64_t p = (2 * i + 1) * l.p / (2 * few);
        sum += load(x + n * l.c * l.p + (l.last ? p * l.c + c : c * l.p + p));
      }
      k[l.at(n, c)] = sum / static_cast<float>(few);
    }
  }
  const auto sums = sums_of<T, kMoments, false>(l, x, nullptr, k.data(), nullptr, nullptr);
  const int64_t d = norm.per_group();
  const double pixels = static_cast<double>(l.p);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t g = 0; g < norm.groups; ++g) {
      double mean = 0.0, square = 0.0;
      for (int64_t c = g * d; c < (g + 1) * d; ++c) {
        const int64_t i = l.at(n, c);
        const double own = k[i] + sums[2 * i] / pixels;
        out.channel[n * l.c + c] = static_cast<float>(own);
        mean += (own + norm.added(n, c)) / static_cast<double>(d);
      }
      for (int64_t c = g * d; c < (g + 1) * d; ++c) {
        const int64_t i = l.at(n, c);
        const double apart = k[i] + sums[2 * i] / pixels + norm.added(n, c) - mean;
        square += sums[2 * i + 1] - sums[2 * i] * sums[2 * i] / pixels + pixels * apart * apart;
      }
      // Rounding can leave a little less than 0; NaN is no less, and stays.
      const double variance = (square < 0.0 ? 0.0 : square) / (pixels * static_cast<double>(d));
      out.mean[n * norm.groups + g] = static_cast<float>(mean);
      out.rstd[n * norm.groups + g] = static_cast<float>(1.0 / std::sqrt(variance + norm.eps));
    }
  }
}

// z = a * x + b for each image and channel.
void affine_of(const Norm& norm, const Moments& m, std::vector<float>& a, std::vector<float>& b) {
  const ImageOrder& l = norm.layout;
  a.resize(l.n * l.c);
  b.resize(l.n * l.c);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t c = 0; c < l.c; ++c) {
      const int64_t group = n * norm.groups + c / norm.per_group();
      const double slope = m.rstd[group] * norm.gain(n, c);
      a[l.at(n, c)] = static_cast<float>(slope);
      b[l.at(n, c)] = static_cast<float>(norm.offset(n, c) + (norm.added(n, c) - m.mean[group]) * slope);
    }
  }
}

template <typename T>
void norm_forward(const Norm& norm, const T* x, T* y, const Moments& m) {
  moments(norm, x, m);
  std::vector<float> a, b;
  affine_of(norm, m, a, b);
  const Affine affine{a.data(), b.data(), nullptr, nullptr};
  if (norm.silu) {
    apply<T, false, true>(norm.layout, x, nullptr, y, affine);
  } else {
    apply<T, false, false>(norm.layout, x, nullptr, y, affine);
  }
}

// Where gradients go; those of absent inputs are null.
struct Grads {
  float *weight, *bias, *add, *scale, *shift;
};

template <typename T>
void norm_backward(const Norm& norm, const T* x, const T* dy, T* dx, const Moments& m, const Grads& grads) {
  const ImageOrder& l = norm.layout;
  std::vector<float> a, b, k(l.n * l.c), e(l.n * l.c), f(l.n * l.c);
  affine_of(norm, m, a, b);
  const int64_t d = norm.per_group();
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t c = 0; c < l.c; ++c) {
      k[l.at(n, c)] = static_cast<float>(m.mean[n * norm.groups + c / d] - norm.added(n, c));
    }
  }
  const auto sums = norm.silu
      ? sums_of<T, kBackward, true>(l, x, dy, k.data(), a.data(), b.data())
      : sums_of<T, kBackward, false>(l, x, dy, k.data(), a.data(), b.data());
  const double pixels = static_cast<double>(l.p), count = pixels * static_cast<double>(d);
  std::vector<double> weight(l.c, 0.0), bias(l.c, 0.0);
  for (int64_t n = 0; n < l.n; ++n) {
    for (int64_t g = 0; g < norm.groups; ++g) {
      const double mean = m.mean[n * norm.groups + g], rstd = m.rstd[n * norm.groups + g];
      double all = 0.0, along = 0.0;
      for (int64_t c = g * d; c < (g + 1) * d; ++c) {
        const int64_t i = l.at(n, c);
        all += norm.gain(n, c) * sums[2 * i];
        along += norm.gain(n, c) * sums[2 * i + 1] * rstd;
      }
      for (int64_t c = g * d; c < (g + 1) * d; ++c) {
        const int64_t i = n * l.c + c, at = l.at(n, c);
        const double slope = -rstd * rstd * along / count;
        const double rest = -rstd * all / count - slope * (mean - norm.added(n, c));
        e[at] = static_cast<float>(slope);
        f[at] = static_cast<float>(rest);
        const double by_gain = rstd * sums[2 * at + 1], by_offset = sums[2 * at];
        const double scaled = norm.scale == nullptr ? 1.0 : 1.0 + norm.scale[i];
        weight[c] += by_gain * scaled;
        bias[c] += by_offset * scaled;
        if (grads.add != nullptr) {
          grads.add[i] = static_cast<float>(
              rstd * norm.gain(n, c) * by_offset + pixels * (slope * m.channel[i] + rest));
        }
        if (grads.scale != nullptr) {
          grads.scale[i] = static_cast<float>(by_gain * norm.weight[c] + by_offset * norm.bias[c]);
        }
        if (grads.shift != nullptr) {
          grads.shift[i] = static_cast<float>(by_offset);
        }
      }
    }
  }
  for (int64_t c = 0; c < l.c; ++c) {
    grads.weight[c] = static_cast<float>(weight[c]);
    grads.bias[c] = static_cast<float>(bias[c]);
  }
  const Affine affine{a.data(), b.data(), e.data(), f.data()};
  if (norm.silu) {
    apply<T, true, true>(l, x, dy, dx, affine);
  } else {
    apply<T, true, false>(l, x, dy, dx, affine);
  }
}

// ---- for autograd ----

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
