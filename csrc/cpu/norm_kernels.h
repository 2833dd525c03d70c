// The table of norm kernels that each instruction set fills in, one entry per dtype: f32, f16, bf16.
#pragma once

#include "../launchers/norm.h"

namespace pykernels::cpu {

// A row of floats and what whole vectors of any instruction set reach beyond it.
inline int64_t norm_line(int64_t K) { return (K + 31) / 32 * 32; }
inline constexpr int kNormLines = 4;

struct NormKernels {
  // scratch: room for kNormLines lines.
  void (*forward[3])(const NormForward&, int64_t begin, int64_t end, float* scratch);
  void (*backward[3])(const NormBackward&, int64_t begin, int64_t end, float* scratch);
  void (*column_sums[3])(const float* sums, int64_t chunks, int64_t K, void* out, int64_t begin, int64_t end);
};

extern const NormKernels kNormPortable;
#if defined(__x86_64__)
extern const NormKernels kNormAvx2;
extern const NormKernels kNormAvx512;
#endif

}  // namespace pykernels::cpu
