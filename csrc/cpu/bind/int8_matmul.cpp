#include "int8_matmul_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_matmul";

std::vector<int32_t> column_sums(const Int8Matmul& args) {
  std::vector<int32_t> sums(static_cast<size_t>(args.N));
  torch::stable::parallel_for(0, args.N, grain_of(args.K), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < args.K; ++k) sum += args.b[n * args.b_stride + k];
      sums[static_cast<size_t>(n)] = sum;
    }
  });
  return sums;
}

Tensor int8_matmul_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_scale,
                       const std::optional<Tensor>& b_scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, int64_t activation,
                       const std::optional<Tensor>& a_zero_point, const std::optional<Tensor>& b_sum,
                       std::optional<ScalarType> out_dtype) {
  const Tensor a_codes = check_codes(kOp, "a", a), b_codes = check_codes(kOp, "b", b);
  Int8Matmul args;
  args.M = a.size(0), args.N = b.size(0), args.K = a.size(1);
  check_same_k(kOp, "b", b, "a", args.K);
  check_k(kOp, args.K);
  args.a = a_codes.const_data_ptr();
  args.a_stride = a_codes.stride(0);
  args.b = static_cast<const int8_t*>(b_codes.const_data_ptr());
  args.b_stride = b_codes.stride(0);

  Epilogue& e = args.epilogue;
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  e.out_dtype = check_out_dtype(kOp, out_type, true);
  e.activation = check_activation(kOp, activation);
  if (e.out_dtype == DType::i32) {
    const char* given = a_scale                            ? "a_scale"
                        : b_scale                          ? "b_scale"
                        : bias                             ? "bias"
                        : residual                         ? "residual"
                        : a_zero_point                     ? "a_zero_point"
                        : e.activation != Activation::none ? "activation"
                                                           : nullptr;
    STD_TORCH_CHECK(given == nullptr, kOp, ": expected no ", given, " with out_dtype int32, the raw accumulator");
  }
  STD_TORCH_CHECK(a_zero_point || !b_sum, kOp, ": expected a_zero_point with b_sum, got None");

  std::optional<Tensor> kept[5];
  if (a_scale) {
    kept[0] = check_one_or_each(kOp, "a_scale", *a_scale, ScalarType::Float, args.M, "row", &e.a_scale_stride);
    e.a_scale = static_cast<const float*>(kept[0]->const_data_ptr());
  }
  if (b_scale) {
    kept[1] =
        check_one_or_each(kOp, "b_scale", *b_scale, ScalarType::Float, args.N, "output column", &e.b_scale_stride);
    e.b_scale = static_cast<const float*>(kept[1]->const_data_ptr());
  }
  if (bias) kept[2] = check_bias(kOp, *bias, args.N, &e);
  std::optional<Rows> kept_residual;
  if (residual) kept_residual.emplace(check_residual(kOp, *residual, {args.M, args.N}, &e));
  std::vector<int32_t> sums;
  if (a_zero_point) {
    kept[3] =
        check_one_or_each(kOp, "a_zero_point", *a_zero_point, ScalarType::Int, args.M, "row", &e.a_zero_point_stride);
    e.a_zero_point = static_cast<const int32_t*>(kept[3]->const_data_ptr());
    if (b_sum) {
      kept[4] = check_vector(kOp, "b_sum", *b_sum, ScalarType::Int, args.N, "output column");
      e.b_sum = static_cast<const int32_t*>(kept[4]->const_data_ptr());
    } else {
      sums = column_sums(args);
      e.b_sum = sums.data();
    }
  }

  Tensor out = empty_result({args.M, args.N}, out_type);
  e.out = out.mutable_data_ptr();
  e.out_stride = args.N;
  run_int8_matmul(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("int8_matmul", TORCH_BOX(&int8_matmul_cpu)); }

}  // namespace pykernels::cpu
