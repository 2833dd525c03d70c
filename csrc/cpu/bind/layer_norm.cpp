#include "norm.h"

namespace pykernels::cpu {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, double weight_offset,
                                                          bool keep_h) {
  const NormResult out = run_norm("layer_norm", x, weight, bias, residual, eps, weight_offset, keep_h, true, false);
  return {out.y, out.h, out.rstd, out.mean};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_quantized_cpu(const Tensor& x, const Optional& weight,
                                                            const Optional& bias, const Optional& residual, double eps,
                                                            double weight_offset, bool keep_h) {
  const NormResult out =
      run_norm("layer_norm_quantized", x, weight, bias, residual, eps, weight_offset, keep_h, true, true);
  return {out.y, out.rstd, out.h};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(const Tensor& grad, const Optional& grad_h, const Tensor& h,
                                                           const Optional& weight, const Tensor& rstd,
                                                           const Tensor& mean, double weight_offset, bool weight_grad,
                                                           std::optional<ScalarType> bias_dtype) {
  return run_norm_backward("layer_norm_backward", grad, grad_h, h, weight, rstd, mean, weight_offset, weight_grad,
                           bias_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm_cpu));
  m.impl("layer_norm_quantized", TORCH_BOX(&layer_norm_quantized_cpu));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward_cpu));
}

}  // namespace pykernels::cpu
