// One step of a product that streams b: codes widened to int16. vpmaddwd is exact; vpmaddubsw would saturate.
// Include after the standard headers and under #pragma GCC target.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pykernels::cpu::avx2 {
namespace {

constexpr int kCodes = 16;  // of one vector of int16

inline __m256i widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// acc += w . x. Assembly, because GCC adds products to one another before it adds them to acc, and spills.
inline __attribute__((always_inline)) void dot(__m256i& acc, __m256i w, __m256i x) {
  __m256i product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w), "x"(x));
}

// acc += MR rows of a against 16 codes of each of NR rows of b.
template <int MR, int NR>
inline __attribute__((always_inline)) void step(__m256i (&acc)[MR][NR], const int16_t* a, int64_t a_stride,
                                                const int8_t* b, int64_t b_stride) {
  __m256i w[NR];
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j) w[j] = widen(b + j * b_stride);
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(a + i * a_stride));
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) dot(acc[i][j], w[j], x);
  }
}

}  // namespace
}  // namespace pykernels::cpu::avx2
