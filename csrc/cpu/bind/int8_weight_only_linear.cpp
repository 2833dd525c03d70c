#include "int8_matmul_run.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "int8_weight_only_linear";

// weight_scale [N], or [N, groups] with groups a divisor of K; contiguous.
Tensor check_weight_scale(const Tensor& scale, Int8WeightOnly* args) {
  if (scale.dim() != 2) {
    const Tensor values = check_vector(kOp, "weight_scale", scale, ScalarType::Float, args->N, "row of weight");
    args->epilogue.b_scale = static_cast<const float*>(values.const_data_ptr());
    args->epilogue.b_scale_stride = 1;
    return values;
  }
  check_dtype(kOp, "weight_scale", scale, ScalarType::Float);
  check_cpu(kOp, "weight_scale", scale);
  const int64_t groups = scale.size(1);
  STD_TORCH_CHECK(scale.size(0) == args->N && groups > 0 && args->K % groups == 0, kOp,
                  ": expected weight_scale to have shape [", args->N,
                  ", groups] with groups a divisor of K = ", args->K, ", got ", shape_name(scale.sizes()));
  Tensor values = scale.is_contiguous() ? scale : torch::stable::contiguous(scale);
  const float* data = static_cast<const float*>(values.const_data_ptr());
  if (groups == 1) {
    args->epilogue.b_scale = data;
    args->epilogue.b_scale_stride = 1;
  } else if (args->K > 0) {
    args->group_scale = data;
    args->groups = groups;
  }
  return values;
}

void run(const Int8WeightOnly& args) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t at_most = int8_weight_only_block_rows(args.K);
  for (int64_t m0 = 0; m0 < args.M; m0 += at_most) {
    Int8WeightOnly block = args;
    block.M = std::min(at_most, args.M - m0);
    block.x = offset_by(args.x, args.x_dtype, m0 * args.x_stride);
    block.epilogue = epilogue_from(args.epilogue, m0);
    const Int8MatmulPlan plan = plan_int8_weight_only(block);
    run_stages(
        plan, block.M, block.N, block.K,
        [&](char* workspace, int64_t begin, int64_t end) { int8_weight_only_rows(block, plan, workspace, begin, end); },
        [&](char* workspace, int64_t begin, int64_t end) {
          int8_weight_only_tiles(block, plan, workspace, begin, end);
        });
  }
}

Tensor int8_weight_only_linear_cpu(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                   const std::optional<Tensor>& bias, int64_t activation) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  const Tensor codes = check_codes(kOp, "weight", weight);
  const Rows rows(x);
  check_same_k(kOp, "weight", weight, "x", rows.K);

  Int8WeightOnly args;
  args.x = rows.tensor.const_data_ptr();
  args.x_dtype = float_dtype(x.scalar_type());
  args.x_stride = rows.stride;
  args.weight = static_cast<const int8_t*>(codes.const_data_ptr());
  args.weight_stride = codes.stride(0);
  args.M = rows.M, args.N = weight.size(0), args.K = rows.K;
  const Tensor scale = check_weight_scale(weight_scale, &args);
  std::optional<Tensor> kept_bias;
  if (bias) kept_bias = check_bias(kOp, *bias, args.N, &args.epilogue);
  args.epilogue.activation = check_activation(kOp, activation);

  std::vector<int64_t> sizes = rows.sizes;
  sizes.back() = args.N;
  Tensor out = empty_result(sizes, x.scalar_type());
  args.epilogue.out = out.mutable_data_ptr();
  args.epilogue.out_stride = args.N;
  args.epilogue.out_dtype = args.x_dtype;
  run(args);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("int8_weight_only_linear", TORCH_BOX(&int8_weight_only_linear_cpu));
}

}  // namespace pykernels::cpu
