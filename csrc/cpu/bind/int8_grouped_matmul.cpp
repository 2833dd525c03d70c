#include "int8_grouped_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_grouped_matmul";

Tensor int8_grouped_matmul_cpu(const Tensor& a, const Tensor& b, const Tensor& counts,
                               const std::optional<Tensor>& a_scale, const std::optional<Tensor>& b_scale,
                               const std::optional<Tensor>& bias, int64_t activation,
                               std::optional<ScalarType> out_dtype) {
  const Tensor a_codes = check_codes(kOp, "a", a);
  const int64_t T = a.size(0), N = b.dim() == 3 ? b.size(1) : 0;
  Int8Grouped grouped;
  const Tensor b_codes = check_experts(kOp, "b", b, "a", a.size(1), T, counts, &grouped);
  grouped.whole.a = a_codes.const_data_ptr();
  grouped.whole.a_stride = a_codes.stride(0);

  Epilogue& e = grouped.whole.epilogue;
  std::optional<Tensor> kept[3];
  if (a_scale) {
    kept[0] = check_one_or_each(kOp, "a_scale", *a_scale, ScalarType::Float, T, "row", &e.a_scale_stride);
    e.a_scale = static_cast<const float*>(kept[0]->const_data_ptr());
  }
  if (b_scale) kept[1] = check_expert_scale(kOp, "b_scale", *b_scale, b, &e);
  if (bias) kept[2] = check_expert_bias(kOp, *bias, b, &e);
  e.activation = check_activation(kOp, activation);
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  e.out_dtype = check_out_dtype(kOp, out_type, true);
  if (e.out_dtype == DType::i32) {
    const char* given = a_scale                            ? "a_scale"
                        : b_scale                          ? "b_scale"
                        : bias                             ? "bias"
                        : e.activation != Activation::none ? "activation"
                                                           : nullptr;
    STD_TORCH_CHECK(given == nullptr, kOp, ": expected no ", given, " with out_dtype int32, the raw accumulator");
  }

  Tensor out = empty_result({T, N}, out_type);
  e.out = out.mutable_data_ptr();
  e.out_stride = N;
  run_int8_grouped(grouped);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("int8_grouped_matmul", TORCH_BOX(&int8_grouped_matmul_cpu)); }

}  // namespace pykernels::cpu
