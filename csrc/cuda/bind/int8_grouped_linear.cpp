#include "int8_grouped.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_grouped_linear";

Tensor int8_grouped_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& counts,
                                const std::optional<Tensor>& bias, int64_t activation,
                                std::optional<ScalarType> out_dtype) {
  check_float(kOp, "x", x);
  const DeviceGuard guard(x.get_device_index());
  Int8GroupedMatmul p;
  EpilogueArgs args;
  set_experts(kOp, p, args, "x", x, "weight", weight, counts);
  set_expert_scale(kOp, args, "weight_scale", weight_scale, "weight", weight);
  set_expert_bias(kOp, args, bias, "weight", weight, activation);
  const ScalarType out_type = out_dtype.value_or(x.scalar_type());
  STD_TORCH_CHECK(is_float16_or_32(out_type), kOp, ": expected out_dtype to be float32, bfloat16 or float16, got ",
                  dtype_name(out_type));

  Tensor out = empty_cuda({p.rows, p.n}, out_type, x);
  if (p.rows == 0 || p.n == 0) return out;
  void* stream = current_stream(x);
  const Rows rows(x);
  Tensor q = empty_cuda({p.rows, p.k}, ScalarType::Char, x);
  Tensor scale = empty_cuda({p.rows}, ScalarType::Float, x);
  QuantizeRowwise quantize;
  quantize.x = rows.tensor.const_data_ptr();
  quantize.x_dtype = float_dtype(x.scalar_type());
  quantize.x_stride = rows.stride;
  quantize.K = p.k;
  quantize.q = static_cast<int8_t*>(q.mutable_data_ptr());
  quantize.q_stride = p.k;
  quantize.scale = static_cast<float*>(scale.mutable_data_ptr());
  check_launch(kOp, quantize_rowwise(quantize, p.rows, stream));

  p.a = quantize.q;
  p.a_stride = p.k;
  set_out(args, out, p.n);
  p.epilogue = args.epilogue;
  p.epilogue.a_scale = quantize.scale;
  p.epilogue.a_scale_stride = 1;
  check_launch(kOp, int8_grouped_matmul(p, stream));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) { m.impl("int8_grouped_linear", TORCH_BOX(&int8_grouped_linear_cuda)); }

}  // namespace pykernels::cuda
