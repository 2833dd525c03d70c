// dropout: out[i] = residual[i] + (u[i] >= p ? x[i] / (1 - p) : 0), where u[i] is the number of element i (row-major)
// under the key (seed, offset): word i & 3 of the Philox counter offset + (i >> 2).
#pragma once

#include "../launchers.h"

namespace pykernels {

struct Dropout {
  const void* x = nullptr;
  DType x_dtype = DType::f32;
  int64_t x_stride = 0;            // between rows; 1 within a row
  const void* residual = nullptr;  // null: 0
  int64_t residual_stride = 0;
  int64_t K = 0;
  float p = 0.0f;       // a multiple of 2^-24, as u is
  float factor = 1.0f;  // of the elements that are kept
  uint64_t seed = 0;
  uint64_t offset = 0;
  void* out = nullptr;           // [M, K]
  DType out_dtype = DType::f32;  // of residual too: that of x, or f32
  bool stream = false;           // write past the caches; out then lies on lines of 64 bytes
};

namespace cpu {
void dropout(const Dropout& args, int64_t begin, int64_t end);  // elements [begin, end)
}

}  // namespace pykernels
