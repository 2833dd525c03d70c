#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

std::tuple<Tensor, Tensor> quantize_blockwise_cpu(const Tensor& x, const std::vector<int64_t>& block_size) {
  constexpr const char* kOp = "quantize_blockwise";
  check_float(kOp, "x", x);
  const Blocks block(kOp, "x", x, block_size);
  const Rows rows(x);

  Tensor q = empty_result(rows.sizes, ScalarType::Char);
  Tensor scale = empty_cpu(block.grid(rows.sizes), ScalarType::Float);
  QuantizeBlockwise args;
  args.x = rows.tensor.const_data_ptr();
  args.x_dtype = float_dtype(x.scalar_type());
  args.x_stride = rows.stride;
  args.M = rows.M;
  args.K = rows.K;
  args.block_rows = block.rows;
  args.block_cols = block.cols;
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  const int64_t block_rows = (rows.M + block.rows - 1) / block.rows;
  torch::stable::parallel_for(0, block_rows, grain_of(rows.K * std::min(block.rows, rows.M)),
                              [&](int64_t begin, int64_t end) { quantize_blockwise(args, begin, end); });
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("quantize_blockwise", TORCH_BOX(&quantize_blockwise_cpu)); }

}  // namespace pykernels::cpu
