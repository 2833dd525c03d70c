#include "quantize_colwise.h"

#include <tuple>

namespace pykernels::cpu {
namespace {

std::tuple<Tensor, Tensor> quantize_colwise_cpu(const Tensor& x, bool stochastic, int64_t seed) {
  constexpr const char* kOp = "quantize_colwise";
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": expected x to have 2 dimensions, got ", x.dim());
  const Rows rows(x);

  Tensor q = empty_result(rows.sizes, ScalarType::Char);
  Tensor scale = empty_cpu({rows.K}, ScalarType::Float);
  std::vector<float> inv(padded_columns(rows.K));
  QuantizeColwise args;
  args.x = rows.tensor.const_data_ptr();
  args.x_dtype = float_dtype(x.scalar_type());
  args.x_stride = rows.stride;
  args.K = rows.K;
  args.inv = inv.data();
  args.stochastic = stochastic;
  args.seed = static_cast<uint64_t>(seed);
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  const std::vector<uint32_t> absmax = reduce_absmax(args, rows.M, nullptr);
  scales_of_absmax(absmax.data(), rows.K, static_cast<float*>(scale.mutable_data_ptr()), inv.data());
  torch::stable::parallel_for(0, rows.M, grain_of(rows.K),
                              [&](int64_t begin, int64_t end) { quantize_colwise(args, begin, end); });
  return {q, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("quantize_colwise", TORCH_BOX(&quantize_colwise_cpu)); }

}  // namespace pykernels::cpu
