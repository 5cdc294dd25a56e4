// Convolutions whose weights stay in the order and the dtype that the CPU's kernels read.
//
// libtorch casts and reorders the weights of a convolution each time. For one image at a time that takes longer than the
// convolution itself. A sampler's weights do not change, so here it is done once; what shows that they did change is
// the storage (held weakly, so that its address cannot be given to another) and autograd's version counter.

#include "shim.h"

#include <ATen/Config.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/mkldnn_reorder_conv2d_weight.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace {

// One tensor at one moment.
struct Moment {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage{c10::intrusive_ptr<c10::StorageImpl>()};
  int64_t offset = 0;
  uint32_t version = 0;

  void take(const at::Tensor& t) {
    const c10::Storage& s = t.storage();
    storage = c10::weak_intrusive_ptr<c10::StorageImpl>(
        c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(s.unsafeGetStorageImpl()));
    offset = t.storage_offset();
    version = t._version();
  }

  bool is(const at::Tensor& t) const {
    return storage._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && offset == t.storage_offset() &&
        version == t._version();
  }
};

struct PackedConv {
  Moment weight_at, bias_at;
  at::Tensor weight, bias;
};

using Pointwise = at::Tensor(
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>&,
    at::IntArrayRef,
    at::IntArrayRef,
    at::IntArrayRef,
    int64_t,
    std::string_view,
    c10::List<std::optional<at::Scalar>>,
    std::optional<std::string_view>);

// None where libtorch was built without oneDNN.
std::optional<c10::TypedOperatorHandle<Pointwise>> pointwise() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<Pointwise>> {
    const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_convolution_pointwise", ""});
    if (!handle.has_value()) {
      return std::nullopt;
    }
    return handle->typed<Pointwise>();
  }();
  return found;
}

bool of_cpu(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat && !t.is_inference() &&
      !t._fw_grad(/*level=*/0).defined();
}

} // namespace

extern "C" {

void* cm_packed_conv_new() {
  return new PackedConv;
}

void cm_packed_conv_free(void* packed) {
  delete static_cast<PackedConv*>(packed);
}

// *y stays null where this is none for it. `dtype` is that of the result, bfloat16 or float.
char* cm_packed_conv(
    void* packed,
    cm_tensor x,
    cm_tensor weight,
    cm_tensor bias,
    int64_t stride,
    int64_t padding,
    int dtype,
    cm_tensor* y) {
  return cm_guard([&] {
    *y = nullptr;
    const auto type = static_cast<at::ScalarType>(dtype);
    if (at::GradMode::is_enabled() || !at::hasMKLDNN() || !pointwise().has_value() || !x->is_cpu() ||
        (type != at::kFloat && type != at::kBFloat16) || x->_fw_grad(/*level=*/0).defined() || x->numel() == 0 || !x->is_contiguous(at::MemoryFormat::ChannelsLast) || !of_cpu(*weight) || !of_cpu(*bias) ||
        (x->scalar_type() != at::kFloat && x->scalar_type() != at::kBFloat16)) {
      return;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    const auto input = x->to(type);
    const int64_t pad[] = {padding, padding}, step[] = {stride, stride}, one[] = {1, 1};
    auto& p = *static_cast<PackedConv*>(packed);
    const bool known = p.weight.defined() && p.weight.scalar_type() == type;
    if (!known || !p.weight_at.is(*weight) || !p.bias_at.is(*bias)) {
      const auto dense = weight->to(type).to_mkldnn();
      const auto packed = at::mkldnn_reorder_conv2d_weight(dense, pad, step, one, 1, input.sizes());
      const auto packed_bias = bias->to(type);
      // Behind all that can throw: nothing old is ever taken for new.
      p.weight_at.take(*weight);
      p.bias_at.take(*bias);
      p.weight = packed;
      p.bias = packed_bias;
    }
    *y = new at::Tensor(
        pointwise()->call(input, p.weight, p.bias, pad, step, one, 1, "none", c10::List<std::optional<at::Scalar>>(), std::nullopt));
  });
}

} // extern "C"
