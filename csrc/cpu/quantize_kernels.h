// The table of kernels that each instruction set fills in, one entry per input dtype: f32, f16, bf16.
#pragma once

#include "../launchers.h"

namespace pykernels::cpu {

struct QuantizeKernels {
  void (*rowwise[3])(const QuantizeRowwise&, int64_t begin, int64_t end);
};

extern const QuantizeKernels kQuantizePortable;
#if defined(__x86_64__)
extern const QuantizeKernels kQuantizeAvx2;
extern const QuantizeKernels kQuantizeAvx512;
#endif

}  // namespace pykernels::cpu
