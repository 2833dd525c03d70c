#include "../../launchers/int8_block_scaled.h"

#include "int8_matmul_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_block_scaled_matmul";

int64_t blocks_of(int64_t size) { return (size + kScaledBlock - 1) / kScaledBlock; }

Tensor check_block_scale(const char* name, const Tensor& scale, int64_t rows, int64_t columns, const char* of) {
  check_dtype(kOp, name, scale, ScalarType::Float);
  check_cpu(kOp, name, scale);
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == columns, kOp, ": expected ", name,
                  " to have shape [", rows, ", ", columns, "], one element for each ", of, ", got ",
                  shape_name(scale.sizes()));
  return torch::stable::contiguous(scale);
}

void run(const Int8BlockScaled& args) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t at_most = int8_matmul_block_rows(args.K);
  for (int64_t m0 = 0; m0 < args.M; m0 += at_most) {
    Int8BlockScaled part = args;
    part.M = std::min(at_most, args.M - m0);
    part.a += m0 * args.a_stride;
    part.a_scale += m0 * args.blocks;
    part.epilogue = epilogue_from(args.epilogue, m0);
    const Int8MatmulPlan plan = plan_int8_block_scaled(part);
    run_stages(
        plan, part.M, part.N, part.K,
        [&](char* workspace, int64_t begin, int64_t end) { int8_block_scaled_rows(part, plan, workspace, begin, end); },
        [&](char* workspace, int64_t begin, int64_t end) {
          int8_block_scaled_tiles(part, plan, workspace, begin, end);
        });
  }
}

Tensor int8_block_scaled_matmul_cpu(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                                    const std::optional<Tensor>& bias, std::optional<ScalarType> out_dtype) {
  const Tensor a_codes = check_codes(kOp, "a", a), b_codes = check_codes(kOp, "b", b);
  Int8BlockScaled args;
  args.M = a.size(0), args.N = b.size(0), args.K = a.size(1);
  check_same_k(kOp, "b", b, "a", args.K);
  args.a = static_cast<const int8_t*>(a_codes.const_data_ptr());
  args.a_stride = a_codes.stride(0);
  args.b = static_cast<const int8_t*>(b_codes.const_data_ptr());
  args.b_stride = b_codes.stride(0);
  args.blocks = blocks_of(args.K);
  const Tensor a_held = check_block_scale("a_scale", a_scale, args.M, args.blocks, "row's block of 128");
  const Tensor b_held = check_block_scale("b_scale", b_scale, blocks_of(args.N), args.blocks, "tile of 128 x 128");
  args.a_scale = static_cast<const float*>(a_held.const_data_ptr());
  args.b_scale = static_cast<const float*>(b_held.const_data_ptr());

  Epilogue& e = args.epilogue;
  std::optional<Tensor> kept_bias;
  if (bias) kept_bias = check_bias(kOp, *bias, args.N, &e);
  const ScalarType out_type = out_dtype.value_or(ScalarType::Float);
  e.out_dtype = check_out_dtype(kOp, out_type, false);
  Tensor out = empty_result({args.M, args.N}, out_type);
  e.out = out.mutable_data_ptr();
  e.out_stride = args.N;
  run(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("int8_block_scaled_matmul", TORCH_BOX(&int8_block_scaled_matmul_cpu));
}

}  // namespace pykernels::cpu
