#include <tuple>

#include "checks.h"

namespace pykernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_asymmetric_cpu(const Tensor& x) {
  constexpr const char* kOp = "quantize_asymmetric";
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to have at least 1 dimension, got 0");
  const Rows rows(x);

  const std::vector<int64_t> leading(rows.sizes.begin(), rows.sizes.end() - 1);
  Tensor q = empty_result(rows.sizes, ScalarType::Char);
  Tensor scale = empty_cpu(leading, ScalarType::Float);
  Tensor zero_point = empty_cpu(leading, ScalarType::Int);
  QuantizeAsymmetric args;
  args.x = rows.tensor.const_data_ptr();
  args.x_dtype = float_dtype(x.scalar_type());
  args.x_stride = rows.stride;
  args.K = rows.K;
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.scale = static_cast<float*>(scale.mutable_data_ptr());
  args.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.M, grain_of(rows.K),
                              [&](int64_t begin, int64_t end) { quantize_asymmetric(args, begin, end); });
  return {q, scale, zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) { m.impl("quantize_asymmetric", TORCH_BOX(&quantize_asymmetric_cpu)); }

}  // namespace pykernels::cpu
