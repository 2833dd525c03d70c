#include <tuple>

#include "quantize_colwise.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kTileRows = 64;

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_both_cpu(const Tensor& x, bool stochastic, int64_t seed) {
  constexpr const char* kOp = "quantize_both";
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": expected x to have 2 dimensions, got ", x.dim());
  const Rows rows(x);
  const int64_t M = rows.M, K = rows.K;

  Tensor q = empty_cpu({M, K}, ScalarType::Char), row_scale = empty_cpu({M}, ScalarType::Float);
  Tensor qt = empty_cpu({K, M}, ScalarType::Char), col_scale = empty_cpu({K}, ScalarType::Float);
  QuantizeColwise first;
  first.x = rows.tensor.const_data_ptr();
  first.x_dtype = float_dtype(x.scalar_type());
  first.x_stride = rows.stride;
  first.K = K;
  std::vector<uint32_t> row_absmax(M);
  std::vector<float> row_inv(M), col_inv(padded_columns(K));
  const std::vector<uint32_t> col_absmax = reduce_absmax(first, M, row_absmax.data());
  scales_of_absmax(row_absmax.data(), M, static_cast<float*>(row_scale.mutable_data_ptr()), row_inv.data());
  scales_of_absmax(col_absmax.data(), K, static_cast<float*>(col_scale.mutable_data_ptr()), col_inv.data());

  QuantizeBoth args;
  args.x = first.x;
  args.x_dtype = first.x_dtype;
  args.x_stride = first.x_stride;
  args.M = M;
  args.K = K;
  args.row_inv = row_inv.data();
  args.col_inv = col_inv.data();
  args.stochastic = stochastic;
  args.seed = static_cast<uint64_t>(seed);
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.qt = static_cast<int8_t*>(qt.mutable_data_ptr());
  const int64_t tiles = (M + kTileRows - 1) / kTileRows;
  torch::stable::parallel_for(0, tiles, grain_of(K * kTileRows), [&](int64_t begin, int64_t end) {
    quantize_both(args, begin * kTileRows, std::min(M, end * kTileRows));
  });
  return {q, row_scale, qt, col_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("quantize_both", TORCH_BOX(&quantize_both_cpu)); }

}  // namespace pykernels::cpu
