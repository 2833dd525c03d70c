// The table of kernels that each instruction set fills in, by activation (from 1) and dtype: f32, f16, bf16.
#pragma once

#include "../launchers/gated_activation.h"

namespace pykernels::cpu {

struct GatedKernels {
  struct Entry {
    void (*forward)(const GatedForward&, int64_t begin, int64_t end);
    void (*backward)(const GatedBackward&, int64_t begin, int64_t end);
    // row: K elements of scratch
    void (*quantized)(const GatedQuantized&, void* row, int64_t begin, int64_t end);
  };
  Entry entry[kGatedActivations][3];
};

extern const GatedKernels kGatedPortable;
#if defined(__x86_64__)
extern const GatedKernels kGatedAvx2;
extern const GatedKernels kGatedAvx512;
#endif

}  // namespace pykernels::cpu
