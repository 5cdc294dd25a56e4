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

  // The same tensor, at this moment or another.
  bool is_of(const at::Tensor& t) const {
    return storage._unsafe_get_target() == t.storage().unsafeGetStorageImpl() && offset == t.storage_offset();
  }

  bool is(const at::Tensor& t) const {
    return is_of(t) && version == t._version();
  }
};

struct PackedConv {
  Moment weight_at, bias_at;
  at::Tensor weight, bias;
  // The weights changed since they were last prepared: in training a target is prepared for one pass, and again for the
  // next, so that keeping it would cost memory and bring nothing.
  bool restless = false;
  // A dtype that could not be packed, as bfloat16 on processors without it: it is not tried again.
  std::optional<at::ScalarType> refused;

  bool holds(const at::Tensor& w, const at::Tensor& b, at::ScalarType type) const {
    return weight.defined() && weight.scalar_type() == type && weight_at.is(w) && bias_at.is(b);
  }

  void pack(
      const at::Tensor& w,
      const at::Tensor& b,
      at::ScalarType type,
      at::IntArrayRef padding,
      at::IntArrayRef stride,
      at::IntArrayRef input) {
    const int64_t one[] = {1, 1};
    restless = !weight_at.is(w) && weight_at.is_of(w);
    weight.reset();
    const auto dense = w.to(type).to_mkldnn();
    const auto packed = at::mkldnn_reorder_conv2d_weight(dense, padding, stride, one, 1, input);
    const auto packed_bias = b.to(type);
    // Behind all that can throw: nothing old is ever taken for new.
    weight_at.take(w);
    bias_at.take(b);
    weight = packed;
    bias = packed_bias;
  }
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

bool float_type(at::ScalarType type) {
  return type == at::kFloat || type == at::kBFloat16;
}

// An image that the kernel reads as it is.
bool readable(const at::Tensor& x) {
  return x.is_cpu() && float_type(x.scalar_type()) && x.numel() > 0 &&
      x.is_contiguous(at::MemoryFormat::ChannelsLast) && !x._fw_grad(/*level=*/0).defined();
}

bool of_cpu(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat && !t.is_inference() &&
      !t._fw_grad(/*level=*/0).defined();
}

} // namespace

extern "C" {

// Counts a change that libtorch has not seen.
void cm_bump_version(cm_tensor tensor) {
  tensor->unsafeGetTensorImpl()->bump_version();
}

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
    auto& p = *static_cast<PackedConv*>(packed);
    if (at::GradMode::is_enabled() || !at::hasMKLDNN() || !pointwise().has_value() || !float_type(type) ||
        p.refused == type || !readable(*x) || !of_cpu(*weight) || !of_cpu(*bias)) {
      return;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    const auto input = x->to(type);
    const int64_t pad[] = {padding, padding}, step[] = {stride, stride}, one[] = {1, 1};
    if (!p.holds(*weight, *bias, type)) {
      try {
        p.pack(*weight, *bias, type, pad, step, input.sizes());
      } catch (const c10::Error&) {
        p.refused = type;
        return;
      }
    }
    const c10::List<std::optional<at::Scalar>> no_scalars;
    *y = new at::Tensor(
        pointwise()->call(input, p.weight, p.bias, pad, step, one, 1, "none", no_scalars, std::nullopt));
    if (p.restless) {
      p.weight.reset();
    }
  });
}

} // extern "C"
