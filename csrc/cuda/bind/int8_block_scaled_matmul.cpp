#include "../int8_block_scaled_matmul.h"

#include <limits>

#include "checks.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_block_scaled_matmul";

int64_t blocks_of(int64_t size) { return (size + kScaledBlock - 1) / kScaledBlock; }

const float* hold_block_scale(EpilogueArgs& args, const char* name, const Tensor& scale, int64_t rows, int64_t columns,
                              const char* of, const Tensor& a) {
  check_dtype(kOp, name, scale, ScalarType::Float);
  check_device(kOp, name, scale, "a", a);
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == columns, kOp, ": expected ", name,
                  " to have shape [", rows, ", ", columns, "], one element for each ", of, ", got ",
                  shape_name(scale.sizes()));
  return static_cast<const float*>(args.hold(scale));
}

Tensor int8_block_scaled_matmul_cuda(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                                     const std::optional<Tensor>& bias, std::optional<ScalarType> out_dtype) {
  check_dtype(kOp, "a", a, ScalarType::Char);
  check_dtype(kOp, "b", b, ScalarType::Char);
  STD_TORCH_CHECK(a.dim() == 2, kOp, ": expected a to have 2 dimensions, got ", a.dim());
  STD_TORCH_CHECK(b.dim() == 2, kOp, ": expected b to have 2 dimensions, got ", b.dim());
  check_device(kOp, "b", b, "a", a);
  Int8BlockScaled p;
  p.M = a.size(0), p.N = b.size(0), p.K = a.size(1);
  STD_TORCH_CHECK(b.size(1) == p.K, kOp, ": expected b to have shape [N, ", p.K, "], with the K of a, got ",
                  shape_name(b.sizes()));
  STD_TORCH_CHECK(p.K <= std::numeric_limits<int32_t>::max() - kScaledBlock, kOp,
                  ": expected K to be at most 2147483519 on a GPU, got ", p.K);
  const DeviceGuard guard(a.get_device_index());
  p.blocks = blocks_of(p.K);
  EpilogueArgs args;
  p.a_scale = hold_block_scale(args, "a_scale", a_scale, p.M, p.blocks, "row's block of 128", a);
  p.b_scale = hold_block_scale(args, "b_scale", b_scale, blocks_of(p.N), p.blocks, "tile of 128 x 128", a);
  set_bias_residual(kOp, args, a, {p.M, p.N}, bias, std::nullopt, 0);
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  STD_TORCH_CHECK(is_float16_or_32(out_type), kOp, ": expected out_dtype to be float32, bfloat16 or float16, got ",
                  dtype_name(out_type));

  Tensor out = empty_cuda({p.M, p.N}, out_type, a);
  if (p.M == 0 || p.N == 0) return out;
  const Rows rows_a(a), rows_b(b);
  p.a = static_cast<const int8_t*>(rows_a.tensor.const_data_ptr());
  p.a_stride = rows_a.stride;
  p.b = static_cast<const int8_t*>(rows_b.tensor.const_data_ptr());
  p.b_stride = rows_b.stride;
  set_out(args, out, p.N);
  p.epilogue = args.epilogue;
  check_launch(kOp, int8_block_scaled_matmul(p, current_stream(a)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("int8_block_scaled_matmul", TORCH_BOX(&int8_block_scaled_matmul_cuda));
}

}  // namespace pykernels::cuda
