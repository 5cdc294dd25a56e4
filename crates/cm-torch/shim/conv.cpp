// Convolutions in bfloat16 whose weights' gradient is computed on AMX's tiles, and the rest of them by libtorch.

#include "fused_loops.h"
#include "shim.h"
#include "weight_grad.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Sums over images and pixels `[C]` of a channels-last image in bfloat16, in float32 within 64 pixels.
at::Tensor channel_sums(const at::Tensor& dy) {
  const int64_t channels = dy.size(1), pixels = dy.numel() / channels;
  const auto* from = static_cast<const Bf16*>(dy.const_data_ptr());
  const int64_t pieces = (pixels + kPixels - 1) / kPixels;
  std::vector<float> partial(pieces * channels, 0.0f);
  at::parallel_for(0, pieces, 8, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * kPixels; p < std::min(end * kPixels, pixels); ++p) {
      mean_last<Bf16>(from + p * channels, partial.data() + p / kPixels * channels, 1.0f, channels, false);
    }
  });
  std::vector<double> sums(channels, 0.0);
  for (int64_t i = 0; i < pieces * channels; ++i) {
    sums[i % channels] += partial[i];
  }
  auto result = at::empty({channels}, dy.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<float>());
  return result;
}

struct TileConv : public torch::autograd::Function<TileConv> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
    const int64_t pad = weight.size(2) / 2;
    const auto w = weight.to(at::kBFloat16), b = bias.to(at::kBFloat16);
    ctx->save_for_backward({x, w});
    return at::convolution(x, w, b, {1, 1}, {pad, pad}, {1, 1}, false, {0, 0}, 1);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& outputs) {
    TORCH_CHECK(!at::GradMode::is_enabled(), "this convolution cannot be differentiated twice");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const int64_t k = weight.size(2), pad = k / 2;
    const auto dy = outputs[0].to(at::kBFloat16).contiguous(at::MemoryFormat::ChannelsLast);
    variable_list grads(3);
    if (ctx->needs_input_grad(0)) {
      const std::array<bool, 3> input_alone{true, false, false};
      grads[0] = std::get<0>(at::convolution_backward(
          dy, x, weight, c10::nullopt, {1, 1}, {pad, pad}, {1, 1}, false, {0, 0}, 1, input_alone));
    }
    grads[1] = cm_weight_grad(x, dy, k);
    grads[2] = channel_sums(dy);
    return grads;
  }
};

// A weight `[O, C, k, k]` or bias `[O]` that is trained.
bool is_trained(const at::Tensor& t, int64_t axes) {
  return t.dim() == axes && t.numel() > 0 && t.is_cpu() && t.scalar_type() == at::kFloat && t.requires_grad() && !t._fw_grad(/*level=*/0).defined();
}

bool computes_in_bfloat16() {
  return at::autocast::is_autocast_enabled(at::kCPU) && at::autocast::get_autocast_dtype(at::kCPU) == at::kBFloat16;
}

} // namespace

extern "C" {

// The convolution of x with k / 2 zeros around it, for training. *y stays null where this is none for the tiles.
char* cm_tile_conv(cm_tensor x, cm_tensor weight, cm_tensor bias, cm_tensor* y) {
  return cm_guard([&] {
    *y = nullptr;
    if (!at::GradMode::is_enabled() || !is_trained(*weight, 4) || !is_trained(*bias, 1) || !computes_in_bfloat16() ||
        !x->is_cpu() || x->dim() != 4 || x->scalar_type() != at::kBFloat16 || x->_fw_grad(/*level=*/0).defined() ||
        x->numel() == 0 || weight->size(1) != x->size(1) || weight->size(2) != weight->size(3) ||
        bias->size(0) != weight->size(0) || !cm_fits_tiles(*x, weight->size(0), weight->size(2))) {
      return;
    }
    *y = new at::Tensor(TileConv::apply(*x, *weight, *bias));
  });
}

} // extern "C"
