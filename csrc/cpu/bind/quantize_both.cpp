#include <tuple>

#include "quantize_colwise.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kTileRows = 64;

// q [M, K] and row_scale [M] are null where only the transposed copy, qt [K, M] and col_scale [K], is asked for.
void quantize(const Rows& rows, DType x_dtype, bool stochastic, int64_t seed, int8_t* q, float* row_scale, Tensor& qt,
              Tensor& col_scale) {
  const int64_t M = rows.M, K = rows.K;
  QuantizeColwise first;
  first.x = rows.tensor.const_data_ptr();
  first.x_dtype = x_dtype;
  first.x_stride = rows.stride;
  first.K = K;
  const bool by_row = row_scale != nullptr;  // q is null also where it is empty
  std::vector<uint32_t> row_absmax(by_row ? M : 0);
  std::vector<float> row_inv(row_absmax.size()), col_inv(padded_columns(K));
  const std::vector<uint32_t> col_absmax = reduce_absmax(first, M, by_row ? row_absmax.data() : nullptr);
  if (by_row) scales_of_absmax(row_absmax.data(), M, row_scale, row_inv.data());
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
  args.q = q;
  args.qt = static_cast<int8_t*>(qt.mutable_data_ptr());
  const int64_t tiles = (M + kTileRows - 1) / kTileRows;
  torch::stable::parallel_for(0, tiles, grain_of(K * kTileRows), [&](int64_t begin, int64_t end) {
    quantize_both(args, begin * kTileRows, std::min(M, end * kTileRows));
  });
}

void check_matrix(const char* op, const Tensor& x) {
  check_float(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected x to have 2 dimensions, got ", x.dim());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_both_cpu(const Tensor& x, bool stochastic, int64_t seed) {
  check_matrix("quantize_both", x);
  const Rows rows(x);
  Tensor q = empty_cpu({rows.M, rows.K}, ScalarType::Char), row_scale = empty_cpu({rows.M}, ScalarType::Float);
  Tensor qt = empty_cpu({rows.K, rows.M}, ScalarType::Char), col_scale = empty_cpu({rows.K}, ScalarType::Float);
  quantize(rows, float_dtype(x.scalar_type()), stochastic, seed, static_cast<int8_t*>(q.mutable_data_ptr()),
           static_cast<float*>(row_scale.mutable_data_ptr()), qt, col_scale);
  return {q, row_scale, qt, col_scale};
}

std::tuple<Tensor, Tensor> quantize_transposed_cpu(const Tensor& x, bool stochastic, int64_t seed) {
  check_matrix("quantize_transposed", x);
  const Rows rows(x);
  Tensor qt = empty_cpu({rows.K, rows.M}, ScalarType::Char), scale = empty_cpu({rows.K}, ScalarType::Float);
  quantize(rows, float_dtype(x.scalar_type()), stochastic, seed, nullptr, nullptr, qt, scale);
  return {qt, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("quantize_both", TORCH_BOX(&quantize_both_cpu));
  m.impl("quantize_transposed", TORCH_BOX(&quantize_transposed_cpu));
}

}  // namespace pykernels::cpu
