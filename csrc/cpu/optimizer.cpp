// The launchers of the optimizers and of the norms of many tensors: the table of the instruction set in force.
#include "isa.h"
#include "optimizer_kernels.h"
#include "scratch.h"

namespace pykernels::cpu {
namespace {

const OptimizerKernels& kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512_vnni:
      return kOptimizerAvx512;
    case Isa::avx2:
      return kOptimizerAvx2;
    case Isa::portable:
      break;
  }
#endif
  return kOptimizerPortable;
}

// float32 blocks of each state, where states are codes.
float* scratch_of(const OptimizerRule& rule) {
  static thread_local Scratch scratch;
  if (rule.state != StateKind::codes) return nullptr;
  return reinterpret_cast<float*>(
      scratch.get(kScratchBlocks * rule.slots * optimizer_scratch(rule) * static_cast<int64_t>(sizeof(float))));
}

}  // namespace

void optimizer_update(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end) {
  if (rule.param_dtype == DType::f64) return optimizer_update_f64(rule, tensor, begin, end);
  kernels().update[static_cast<int>(rule.algorithm)](rule, tensor, begin, end, scratch_of(rule));
}

void optimizer_norms(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                     double (&sums)[2]) {
  if (rule.param_dtype == DType::f64) return optimizer_norms_f64(rule, tensor, begin, end, sums);
  kernels().norms[static_cast<int>(rule.algorithm)](rule, tensor, begin, end, scratch_of(rule), sums);
}

double squared_norm(const void* x, DType dtype, int64_t n) {
  if (dtype != DType::f64) return kernels().squared_norm[static_cast<int>(dtype)](x, n);
  double sum = 0.0;
  for (int64_t k = 0; k < n; ++k) sum += static_cast<const double*>(x)[k] * static_cast<const double*>(x)[k];
  return sum;
}

void scale_tensor(void* x, DType dtype, int64_t n, double factor) {
  if (dtype != DType::f64) return kernels().scale[static_cast<int>(dtype)](x, n, static_cast<float>(factor));
  for (int64_t k = 0; k < n; ++k) static_cast<double*>(x)[k] *= factor;
}

}  // namespace pykernels::cpu
