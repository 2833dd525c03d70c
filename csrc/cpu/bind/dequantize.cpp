#include <optional>

#include "checks.h"

namespace pykernels::cpu {
namespace {

constexpr const char* kOp = "dequantize";

Tensor check_grid(const char* name, const Tensor& values, ScalarType dtype, const std::vector<int64_t>& grid) {
  check_cpu(kOp, name, values);
  check_dtype(kOp, name, values, dtype);
  const auto sizes = values.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == grid, kOp, ": expected ", name, " to have shape ",
                  shape_name(grid), ", one for each block of q, got ", shape_name(sizes));
  return torch::stable::contiguous(values);
}

Tensor dequantize_cpu(const Tensor& q, const Tensor& scale, const std::vector<int64_t>& block_size,
                      const std::optional<Tensor>& zero_point, ScalarType out_dtype) {
  check_dtype(kOp, "q", q, ScalarType::Char);
  STD_TORCH_CHECK(is_float16_or_32(out_dtype), kOp, ": expected out_dtype to be float32, bfloat16 or float16, got ",
                  dtype_name(out_dtype));
  const Blocks block(kOp, "q", q, block_size);
  const Rows rows(q);
  const std::vector<int64_t> grid = block.grid(rows.sizes);
  const Tensor scales = check_grid("scale", scale, ScalarType::Float, grid);
  std::optional<Tensor> zero_points;
  if (zero_point.has_value()) zero_points = check_grid("zero_point", *zero_point, ScalarType::Int, grid);

  Tensor out = empty_result(rows.sizes, out_dtype);
  Dequantize args;
  args.q = static_cast<const int8_t*>(rows.tensor.const_data_ptr());
  args.q_stride = rows.stride;
  args.K = rows.K;
  args.block_rows = block.rows;
  args.block_cols = block.cols;
  args.scale = static_cast<const float*>(scales.const_data_ptr());
  if (zero_points.has_value()) args.zero_point = static_cast<const int32_t*>(zero_points->const_data_ptr());
  args.out = out.mutable_data_ptr();
  args.out_dtype = float_dtype(out_dtype);
  args.stream = worth_streaming(out, rows.K);
  torch::stable::parallel_for(0, rows.M, grain_of(rows.K),
                              [&](int64_t begin, int64_t end) { dequantize(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("dequantize", TORCH_BOX(&dequantize_cpu)); }

}  // namespace pykernels::cpu
