#include "product.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_linear";

Tensor int8_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation,
                        const std::optional<Tensor>& x_scale, std::optional<ScalarType> out_dtype) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  check_dtype(kOp, "weight", weight, ScalarType::Char);
  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": expected weight to have 2 dimensions, got ", weight.dim());
  check_device(kOp, "weight", weight, "x", x);
  const DeviceGuard guard(x.get_device_index());
  const Rows rows(x);
  const int64_t k = rows.K, n = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == k, kOp, ": expected weight to have shape [N, ", k, "], with the K of x, got ",
                  shape_name(weight.sizes()));
  check_k(kOp, k);
  check_dtype(kOp, "weight_scale", weight_scale, ScalarType::Float);
  check_device(kOp, "weight_scale", weight_scale, "x", x);
  check_vector(kOp, "weight_scale", weight_scale, n, "row of weight");
  std::vector<int64_t> out_sizes(rows.sizes);
  out_sizes.back() = n;
  EpilogueArgs args;
  set_bias_residual(kOp, args, x, out_sizes, bias, residual, activation);
  if (x_scale.has_value()) {
    check_dtype(kOp, "x_scale", *x_scale, ScalarType::Float);
    check_device(kOp, "x_scale", *x_scale, "x", x);
    STD_TORCH_CHECK(x_scale->numel() == 1, kOp, ": expected x_scale to have 1 element, got shape ",
                    shape_name(x_scale->sizes()));
  }
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  STD_TORCH_CHECK(is_float16_or_32(out_type), kOp, ": expected out_dtype to be float32, bfloat16 or float16, got ",
                  dtype_name(out_type));

  Tensor out = empty_cuda(out_sizes, out_type, x);
  if (rows.M == 0 || n == 0) return out;
  void* stream = current_stream(x);
  Tensor q = empty_cuda({rows.M, k}, ScalarType::Char, x);
  Tensor scale = empty_cuda({rows.M}, ScalarType::Float, x);
  QuantizeRowwise quantize;
  quantize.x = rows.tensor.const_data_ptr();
  quantize.x_dtype = float_dtype(x.scalar_type());
  quantize.x_stride = rows.stride;
  quantize.K = k;
  quantize.q_stride = k;
  quantize.given_scale = x_scale.has_value() ? static_cast<const float*>(x_scale->const_data_ptr()) : nullptr;
  quantize.q = static_cast<int8_t*>(q.mutable_data_ptr());
  quantize.scale = static_cast<float*>(scale.mutable_data_ptr());
  check_launch(kOp, quantize_rowwise(quantize, rows.M, stream));

  const Rows rows_weight(weight);
  Int8Matmul p;
  p.a = quantize.q;
  p.a_stride = k;
  p.b = static_cast<const int8_t*>(rows_weight.tensor.const_data_ptr());
  p.b_stride = rows_weight.stride;
  p.m = rows.M;
  p.n = n;
  p.k = k;
  set_out(args, out, n);
  p.epilogue = args.epilogue;
  p.epilogue.a_scale = quantize.scale;
  p.epilogue.a_scale_stride = 1;
  p.epilogue.b_scale = static_cast<const float*>(args.hold(weight_scale));
  p.epilogue.b_scale_stride = 1;
  run_product(kOp, p, x, stream);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear_cuda)); }

}  // namespace pykernels::cuda
