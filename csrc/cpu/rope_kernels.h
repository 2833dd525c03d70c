// The table of kernels that each instruction set fills in, one entry per dtype of q and k: f32, f16, bf16.
#pragma once

#include "../launchers/rope.h"

namespace pykernels::cpu {

// Positions whose cosines and sines are made ready at once.
inline constexpr int64_t kRopeTile = 32;

// Floats of a position's cosines, padded to whole vectors of any instruction set.
inline int64_t rope_line(int64_t pairs) { return (2 * pairs + 31) / 32 * 32; }

struct RopeKernels {
  // scratch: 2 * kRopeTile + 2 lines and D floats, aligned to 64 bytes.
  void (*rotate[3])(const Rope&, int64_t begin, int64_t end, float* scratch);
};

extern const RopeKernels kRopePortable;
#if defined(__x86_64__)
extern const RopeKernels kRopeAvx2;
extern const RopeKernels kRopeAvx512;
#endif

}  // namespace pykernels::cpu
