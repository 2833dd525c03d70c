// The table of kernels that each instruction set fills in, by algorithm.
#pragma once

#include "../launchers/optimizer.h"

namespace pykernels::cpu {

struct OptimizerKernels {
  void (*update[6])(const OptimizerRule&, const OptimizerTensor&, int64_t begin, int64_t end, float* scratch);
  void (*norms[6])(const OptimizerRule&, const OptimizerTensor&, int64_t begin, int64_t end, float* scratch,
                   double (&sums)[2]);
  double (*squared_norm[3])(const void* x, int64_t n);
  void (*scale[3])(void* x, int64_t n, float factor);
};

// Floats of scratch that each state held in codes needs for a block: its values and a last vector. Two blocks are in
// work at once.
inline constexpr int kScratchBlocks = 2;
inline int64_t optimizer_scratch(const OptimizerRule& rule) { return rule.block + 16; }

extern const OptimizerKernels kOptimizerPortable;
#if defined(__x86_64__)
extern const OptimizerKernels kOptimizerAvx2;
extern const OptimizerKernels kOptimizerAvx512;
#endif

// float64 has one kernel for all.
void optimizer_update_f64(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end);
void optimizer_norms_f64(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t begin, int64_t end,
                         double (&sums)[2]);

}  // namespace pykernels::cpu
