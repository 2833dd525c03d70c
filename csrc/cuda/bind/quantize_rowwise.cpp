#include <tuple>

#include "checks.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "quantize_rowwise";

std::tuple<Tensor, Tensor> quantize_rowwise_cuda(const Tensor& x, bool stochastic, int64_t seed,
                                                 const std::optional<Tensor>& scale) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  const DeviceGuard guard(x.get_device_index());
  const Rows rows(x);
  std::optional<Tensor> given;
  if (scale.has_value()) {
    // Its values stay on the device: a look at them here would wait for the GPU.
    check_dtype(kOp, "scale", *scale, ScalarType::Float);
    check_device(kOp, "scale", *scale, "x", x);
    STD_TORCH_CHECK(scale->numel() == 1 || (scale->numel() == rows.M && scale->dim() <= x.dim()), kOp,
                    ": expected scale to have 1 element or one for each of the ", rows.M, " rows of x, got shape ",
                    shape_name(scale->sizes()));
    given = torch::stable::contiguous(*scale);
  }
  Tensor q = empty_cuda(rows.sizes, ScalarType::Char, x);
  Tensor scale_out = empty_cuda({rows.sizes.begin(), rows.sizes.end() - 1}, ScalarType::Float, x);
  if (rows.M == 0) return {q, scale_out};
  QuantizeRowwise p;
  p.x = rows.tensor.const_data_ptr();
  p.x_dtype = float_dtype(x.scalar_type());
  p.x_stride = rows.stride;
  p.K = rows.K;
  p.q_stride = rows.K;
  if (given.has_value()) {
    p.given_scale = static_cast<const float*>(given->const_data_ptr());
    p.given_scale_stride = given->numel() == 1 ? 0 : 1;
  }
  p.stochastic = stochastic;
  p.seed = static_cast<uint64_t>(seed);
  p.q = static_cast<int8_t*>(q.mutable_data_ptr());
  p.scale = static_cast<float*>(scale_out.mutable_data_ptr());
  check_launch(kOp, quantize_rowwise(p, rows.M, current_stream(x)));
  return {q, scale_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("quantize_rowwise", TORCH_BOX(&quantize_rowwise_cuda)); }

}  // namespace pykernels::cuda
