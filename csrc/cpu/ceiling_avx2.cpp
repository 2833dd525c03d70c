#if defined(__x86_64__)

#include <immintrin.h>

#include "ceiling.h"

#pragma GCC target("avx2,fma,f16c")

namespace pykernels::cpu {

int64_t ceiling_int8_avx2(int64_t iterations) {
  constexpr int kAccumulators = 12;
  __m256i acc[kAccumulators];
#pragma GCC unroll 12
  for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm256_set1_epi32(j);
  __m256i a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(-5);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a), "+x"(b));  // the operands may have changed: no product is hoisted
#pragma GCC unroll 12
    for (int j = 0; j < kAccumulators; ++j) {
      __m256i product;
      asm volatile("vpmaddwd %1, %2, %0" : "=x"(product) : "x"(a), "x"(b));
      acc[j] = _mm256_add_epi32(acc[j], product);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < kAccumulators; ++j) asm volatile("" : : "x"(acc[j]));
  return iterations * kAccumulators * 16 * 2;
}

int64_t ceiling_float32_avx2(int64_t iterations) {
  constexpr int kAccumulators = 12;
  __m256 acc[kAccumulators];
#pragma GCC unroll 12
  for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm256_set1_ps(static_cast<float>(j));
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 12
    for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm256_fmadd_ps(acc[j], a, b);
  }
#pragma GCC unroll 12
  for (int j = 0; j < kAccumulators; ++j) asm volatile("" : : "x"(acc[j]));
  return iterations * kAccumulators * 8 * 2;
}

uint64_t ceiling_read_avx2(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m256i acc[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 128 <= bytes; i += 128) {
    _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    _mm_prefetch(p + i + 4160, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      acc[j] = _mm256_xor_si256(acc[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
    }
  }
  const __m256i sum = _mm256_xor_si256(_mm256_xor_si256(acc[0], acc[1]), _mm256_xor_si256(acc[2], acc[3]));
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum);
  uint64_t total = lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
  for (; i < bytes; ++i) total ^= static_cast<unsigned char>(p[i]);
  return total;
}

}  // namespace pykernels::cpu

#endif
