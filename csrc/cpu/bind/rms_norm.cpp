#include "norm.h"

namespace pykernels::cpu {
namespace {

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> rms_norm_cpu(const Tensor& x, const Optional& weight, const Optional& bias,
                                                const Optional& residual, double eps, double weight_offset,
                                                bool keep_h) {
  const NormResult out = run_norm("rms_norm", x, weight, bias, residual, eps, weight_offset, keep_h, false, false);
  return {out.y, out.h, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_quantized_cpu(const Tensor& x, const Optional& weight, const Optional& bias,
                                                          const Optional& residual, double eps, double weight_offset,
                                                          bool keep_h) {
  const NormResult out =
      run_norm("rms_norm_quantized", x, weight, bias, residual, eps, weight_offset, keep_h, false, true);
  return {out.y, out.rstd, out.h};
}

std::tuple<Tensor, Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad, const Optional& grad_h, const Tensor& h,
                                                         const Optional& weight, const Tensor& rstd,
                                                         double weight_offset, bool weight_grad,
                                                         std::optional<ScalarType> bias_dtype) {
  return run_norm_backward("rms_norm_backward", grad, grad_h, h, weight, rstd, std::nullopt, weight_offset, weight_grad,
                           bias_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_quantized", TORCH_BOX(&rms_norm_quantized_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
}

}  // namespace pykernels::cpu
