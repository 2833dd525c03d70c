#include "product.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_matmul";

// One value, or one for each of `length`; sets the pointer and the stride.
template <typename T>
void set_one_or_each(const char* name, EpilogueArgs& args, const Tensor& a, const std::optional<Tensor>& value,
                     ScalarType dtype, int64_t length, const char* of, const T*& pointer, int64_t& stride) {
  if (!value.has_value()) return;
  check_dtype(kOp, name, *value, dtype);
  check_device(kOp, name, *value, "the input", a);
  STD_TORCH_CHECK(value->numel() == 1 || (value->dim() == 1 && value->numel() == length), kOp, ": expected ", name,
                  " to have 1 element or shape [", length, "], one for each ", of, ", got ",
                  shape_name(value->sizes()));
  pointer = static_cast<const T*>(args.hold(*value));
  stride = value->numel() == 1 ? 0 : 1;
}

Tensor int8_matmul_cuda(const Tensor& a, const Tensor& b, const std::optional<Tensor>& a_scale,
                        const std::optional<Tensor>& b_scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, int64_t activation,
                        const std::optional<Tensor>& a_zero_point, const std::optional<Tensor>& b_sum,
                        std::optional<ScalarType> out_dtype) {
  check_dtype(kOp, "a", a, ScalarType::Char);
  check_dtype(kOp, "b", b, ScalarType::Char);
  STD_TORCH_CHECK(a.dim() == 2, kOp, ": expected a to have 2 dimensions, got ", a.dim());
  STD_TORCH_CHECK(b.dim() == 2, kOp, ": expected b to have 2 dimensions, got ", b.dim());
  const int64_t m = a.size(0), k = a.size(1), n = b.size(0);
  check_device(kOp, "b", b, "a", a);
  STD_TORCH_CHECK(b.size(1) == k, kOp, ": expected b to have shape [N, ", k, "], with the K of a, got ",
                  shape_name(b.sizes()));
  check_k(kOp, k);

  const DeviceGuard guard(a.get_device_index());
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  EpilogueArgs args;
  Epilogue& e = args.epilogue;
  set_one_or_each("a_scale", args, a, a_scale, ScalarType::Float, m, "row", e.a_scale, e.a_scale_stride);
  set_one_or_each("b_scale", args, a, b_scale, ScalarType::Float, n, "output column", e.b_scale, e.b_scale_stride);
  set_bias_residual(kOp, args, a, {m, n}, bias, residual, activation);
  set_one_or_each("a_zero_point", args, a, a_zero_point, ScalarType::Int, m, "row", e.a_zero_point,
                  e.a_zero_point_stride);
  if (b_sum.has_value()) {
    STD_TORCH_CHECK(a_zero_point.has_value(), kOp, ": expected a_zero_point with b_sum, got None");
    check_dtype(kOp, "b_sum", *b_sum, ScalarType::Int);
    check_device(kOp, "b_sum", *b_sum, "a", a);
    check_vector(kOp, "b_sum", *b_sum, n, "output column");
    e.b_sum = static_cast<const int32_t*>(args.hold(*b_sum));
  }
  if (out_type == ScalarType::Int) {
    STD_TORCH_CHECK(args.held.empty() && activation == 0, kOp,
                    ": expected no scale, bias, residual, activation or zero point with out_dtype int32, the raw "
                    "accumulator");
  } else {
    STD_TORCH_CHECK(is_float16_or_32(out_type), kOp,
                    ": expected out_dtype to be float32, bfloat16 or float16 or int32, got ", dtype_name(out_type));
  }

  Tensor out = empty_cuda({m, n}, out_type, a);
  if (m == 0 || n == 0) return out;
  const Rows rows_a(a), rows_b(b);
  void* stream = current_stream(a);
  Int8Matmul p;
  p.a = static_cast<const int8_t*>(rows_a.tensor.const_data_ptr());
  p.a_stride = rows_a.stride;
  p.b = static_cast<const int8_t*>(rows_b.tensor.const_data_ptr());
  p.b_stride = rows_b.stride;
  p.m = m;
  p.n = n;
  p.k = k;
  if (a_zero_point.has_value() && !b_sum.has_value()) {
    args.held.push_back(empty_cuda({n}, ScalarType::Int, a));
    auto* sums = static_cast<int32_t*>(args.held.back().mutable_data_ptr());
    check_launch(kOp, int8_row_sum(p.b, p.b_stride, n, k, sums, stream));
    e.b_sum = sums;
  }
  set_out(args, out, n);
  p.epilogue = e;
  run_product(kOp, p, a, stream);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("int8_matmul", TORCH_BOX(&int8_matmul_cuda)); }

}  // namespace pykernels::cuda
