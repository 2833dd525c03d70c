#include "int8_grouped_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_grouped_linear";

Tensor int8_grouped_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& counts,
                               const std::optional<Tensor>& bias, int64_t activation,
                               std::optional<ScalarType> out_dtype) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": expected x to have 2 dimensions, got ", x.dim());
  const Rows rows(x);
  Int8Grouped grouped;
  const Tensor codes = check_experts(kOp, "weight", weight, "x", rows.K, rows.M, counts, &grouped);
  grouped.whole.a = rows.tensor.const_data_ptr();
  grouped.whole.a_dtype = float_dtype(x.scalar_type());
  grouped.whole.a_stride = rows.stride;

  Epilogue& e = grouped.whole.epilogue;
  const Tensor scale = check_expert_scale(kOp, "weight_scale", weight_scale, weight, &e);
  std::optional<Tensor> kept_bias;
  if (bias) kept_bias = check_expert_bias(kOp, *bias, weight, &e);
  e.activation = check_activation(kOp, activation);
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  e.out_dtype = check_out_dtype(kOp, out_type, false);

  Tensor out = empty_result({rows.M, grouped.whole.N}, out_type);
  e.out = out.mutable_data_ptr();
  e.out_stride = grouped.whole.N;
  run_int8_grouped(grouped);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("int8_grouped_linear", TORCH_BOX(&int8_grouped_linear_cpu)); }

}  // namespace pykernels::cpu
