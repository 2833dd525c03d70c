#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "quantize_rowwise";

// The given scale as contiguous float32 values, one or as many as there are rows.
Tensor check_scale(const Tensor& scale, const Rows& x) {
  check_cpu(kOp, "scale", scale);
  check_dtype(kOp, "scale", scale, ScalarType::Float);
  STD_TORCH_CHECK(scale.numel() == 1 || (scale.numel() == x.M && scale.dim() <= static_cast<int64_t>(x.sizes.size())),
                  kOp, ": expected scale to have 1 element or one for each of the ", x.M, " rows of x, got shape ",
                  shape_name(scale.sizes()));
  const Tensor values = torch::stable::contiguous(scale);
  const float* value = static_cast<const float*>(values.const_data_ptr());
  for (int64_t m = 0; m < values.numel(); ++m)
    STD_TORCH_CHECK(std::isfinite(value[m]), kOp, ": expected scale to be finite, got ", value[m], " at row ", m);
  return values;
}

std::tuple<Tensor, Tensor> quantize_rowwise_cpu(const Tensor& x, bool stochastic, int64_t seed,
                                                const std::optional<Tensor>& scale) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  const Rows rows(x);
  std::optional<Tensor> given;
  if (scale.has_value()) given = check_scale(*scale, rows);

  Tensor q = empty_result(rows.sizes, ScalarType::Char);
  Tensor scale_out = empty_cpu({rows.sizes.begin(), rows.sizes.end() - 1}, ScalarType::Float);
  QuantizeRowwise args;
  args.x = rows.tensor.const_data_ptr();
  args.x_dtype = float_dtype(x.scalar_type());
  args.x_stride = rows.stride;
  args.K = rows.K;
  if (given.has_value()) {
    args.given_scale = static_cast<const float*>(given->const_data_ptr());
    args.given_scale_stride = given->numel() == 1 ? 0 : 1;
  }
  args.stochastic = stochastic;
  args.seed = static_cast<uint64_t>(seed);
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.q_stride = rows.K;
  args.scale = static_cast<float*>(scale_out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.M, grain_of(rows.K),
                              [&](int64_t begin, int64_t end) { quantize_rowwise(args, begin, end); });
  return {q, scale_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("quantize_rowwise", TORCH_BOX(&quantize_rowwise_cpu)); }

}  // namespace pykernels::cpu
