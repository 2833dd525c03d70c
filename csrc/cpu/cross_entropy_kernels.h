// The kernels of cross_entropy for one instruction set: one entry for f32, f16 and bf16, without and with a softcap.
#pragma once

#include "../launchers/cross_entropy.h"

namespace pykernels::cpu {

struct CrossEntropyKernels {
  void (*losses[3][2])(const CrossEntropy&, const CrossEntropyLosses&, int64_t begin, int64_t end);
  void (*update[3][2])(const CrossEntropy&, float* state, int64_t begin, int64_t end);
  void (*backward[3][2])(const CrossEntropy&, const CrossEntropyBackward&, int64_t begin, int64_t end);
};

extern const CrossEntropyKernels kCrossEntropyPortable;
#if defined(__x86_64__)
extern const CrossEntropyKernels kCrossEntropyAvx2;
extern const CrossEntropyKernels kCrossEntropyAvx512;
#endif

}  // namespace pykernels::cpu
