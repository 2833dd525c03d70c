#include "int8_matmul_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_linear";

Tensor int8_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation,
                       const std::optional<Tensor>& x_scale, std::optional<ScalarType> out_dtype) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  const Tensor codes = check_codes(kOp, "weight", weight);
  const Rows rows(x);
  check_same_k(kOp, "weight", weight, "x", rows.K);
  check_k(kOp, rows.K);

  Int8Matmul args;
  args.M = rows.M, args.N = weight.size(0), args.K = rows.K;
  args.a = rows.tensor.const_data_ptr();
  args.a_dtype = float_dtype(x.scalar_type());
  args.a_stride = rows.stride;
  args.b = static_cast<const int8_t*>(codes.const_data_ptr());
  args.b_stride = codes.stride(0);

  Epilogue& e = args.epilogue;
  const Tensor scale = check_vector(kOp, "weight_scale", weight_scale, ScalarType::Float, args.N, "row of weight");
  e.b_scale_stride = 1;
  e.b_scale = static_cast<const float*>(scale.const_data_ptr());
  e.activation = check_activation(kOp, activation);
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  e.out_dtype = check_out_dtype(kOp, out_type, false);
  if (x_scale) {
    check_dtype(kOp, "x_scale", *x_scale, ScalarType::Float);
    check_cpu(kOp, "x_scale", *x_scale);
    STD_TORCH_CHECK(x_scale->numel() == 1, kOp, ": expected x_scale to have 1 element, got shape ",
                    shape_name(x_scale->sizes()));
    args.a_given_scale = static_cast<const float*>(x_scale->const_data_ptr());
  }
  std::optional<Tensor> kept_bias;
  if (bias) kept_bias = check_bias(kOp, *bias, args.N, &e);
  std::vector<int64_t> sizes = rows.sizes;
  sizes.back() = args.N;
  std::optional<Rows> kept_residual;
  if (residual) kept_residual.emplace(check_residual(kOp, *residual, sizes, &e));

  Tensor out = empty_result(sizes, out_type);
  e.out = out.mutable_data_ptr();
  e.out_stride = args.N;
  run_int8_matmul(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear_cpu)); }

}  // namespace pykernels::cpu
