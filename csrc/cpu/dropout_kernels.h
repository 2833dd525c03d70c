// The table of kernels that each instruction set fills in, by the dtype of x (f32, f16, bf16).
#pragma once

#include "../launchers/dropout.h"

namespace pykernels::cpu {

struct DropoutKernels {
  void (*same[3])(const Dropout&, int64_t begin, int64_t end);  // out has the dtype of x
  void (*wide[3])(const Dropout&, int64_t begin, int64_t end);  // out is f32
};

extern const DropoutKernels kDropoutPortable;
#if defined(__x86_64__)
extern const DropoutKernels kDropoutAvx2;
extern const DropoutKernels kDropoutAvx512;
#endif

}  // namespace pykernels::cpu
