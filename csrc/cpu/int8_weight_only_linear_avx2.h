// The two shapes of the AVX2 weight-only product, and how both read x. Include after every other header and under
// #pragma GCC target.
#pragma once

#include "int8_weight_only_linear_kernels.h"
#include "simd_avx2.h"

namespace pykernels::cpu::avx2 {
namespace {

// x[m][k .. k + count) as float32.
template <class T>
void widen(const T* x, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + Avx2::kWidth <= count; k += Avx2::kWidth) Avx2::store(out + k, Avx2::load(x + k));
  if (k < count) Avx2::store_tail(out + k, Avx2::load_tail(x + k, count - k), count - k);
}

inline void widen_row(const Int8WeightOnly& args, int64_t m, int64_t k, int64_t count, float* out) {
  const int64_t index = m * args.x_stride + k;
  if (args.x_dtype == DType::f32) return widen(static_cast<const float*>(args.x) + index, count, out);
  if (args.x_dtype == DType::f16) return widen(static_cast<const f16*>(args.x) + index, count, out);
  widen(static_cast<const bf16*>(args.x) + index, count, out);
}

}  // namespace
}  // namespace pykernels::cpu::avx2
