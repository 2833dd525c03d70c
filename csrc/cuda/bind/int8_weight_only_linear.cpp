#include "checks.h"

namespace pykernels::cuda {
namespace {

constexpr const char* kOp = "int8_weight_only_linear";

Tensor int8_weight_only_linear_cuda(const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                                    const std::optional<Tensor>& bias, int64_t activation) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  check_dtype(kOp, "weight", weight, ScalarType::Char);
  STD_TORCH_CHECK(weight.dim() == 2, kOp, ": expected weight to have 2 dimensions, got ", weight.dim());
  check_device(kOp, "weight", weight, "x", x);
  const std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t k = sizes.back(), n = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == k, kOp, ": expected weight to have shape [N, ", k, "], with the K of x, got ",
                  shape_name(weight.sizes()));
  STD_TORCH_CHECK(k < int64_t{1} << 29, kOp, ": expected K to be below 2^29, got ", k);
  check_dtype(kOp, "weight_scale", weight_scale, ScalarType::Float);
  check_device(kOp, "weight_scale", weight_scale, "x", x);
  int64_t groups = 1;
  if (weight_scale.dim() == 2) {
    groups = weight_scale.size(1);
    STD_TORCH_CHECK(weight_scale.size(0) == n && groups > 0 && k % groups == 0, kOp,
                    ": expected weight_scale to have shape [", n, ", groups] with groups a divisor of K = ", k,
                    ", got ", shape_name(weight_scale.sizes()));
  } else {
    check_vector(kOp, "weight_scale", weight_scale, n, "row of weight");
  }
  std::vector<int64_t> out_sizes(sizes);
  out_sizes.back() = n;
  const DeviceGuard guard(x.get_device_index());
  EpilogueArgs args;
  set_bias_residual(kOp, args, x, out_sizes, bias, std::nullopt, activation);

  Tensor out = empty_cuda(out_sizes, x.scalar_type(), x);
  if (out.numel() == 0) return out;
  const Tensor x_rows = torch::stable::contiguous(x);
  const Tensor weight_rows = torch::stable::contiguous(weight);
  Int8WeightOnlyLinear p;
  p.x = x_rows.const_data_ptr();
  p.x_dtype = float_dtype(x.scalar_type());
  p.weight = static_cast<const int8_t*>(weight_rows.const_data_ptr());
  p.weight_scale = static_cast<const float*>(args.hold(weight_scale));
  p.group_size = std::max<int64_t>(1, k / groups);
  p.m = out.numel() / n;
  p.n = n;
  p.k = k;
  set_out(args, out, n);
  p.epilogue = args.epilogue;
  check_launch(kOp, int8_weight_only_linear(p, current_stream(x)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CUDA, m) {
  m.impl("int8_weight_only_linear", TORCH_BOX(&int8_weight_only_linear_cuda));
}

}  // namespace pykernels::cuda
