// The table of kernels that each instruction set fills in, by dtype of the student and of the teacher: f32, f16, bf16.
#pragma once

#include "../launchers/distillation.h"

namespace pykernels::cpu {

struct DistillationKernels {
  void (*rows[3][3])(const DistillationRows&, int64_t begin, int64_t end);
};

extern const DistillationKernels kDistillationPortable;
#if defined(__x86_64__)
extern const DistillationKernels kDistillationAvx2;
extern const DistillationKernels kDistillationAvx512;
#endif

}  // namespace pykernels::cpu
