#if defined(__x86_64__)

#include <immintrin.h>

#include "ceiling.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

namespace pykernels::cpu {

int64_t ceiling_int8_avx512(int64_t iterations) {
  constexpr int kAccumulators = 16;  // more than latency times throughput on every core with the instruction
  __m512i acc[kAccumulators];
#pragma GCC unroll 16
  for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_set1_epi32(j);
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  asm volatile("" : "+v"(a), "+v"(b));
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAccumulators; ++j) asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(a), "v"(b));
  }
#pragma GCC unroll 16
  for (int j = 0; j < kAccumulators; ++j) asm volatile("" : : "v"(acc[j]));
  return iterations * kAccumulators * 64 * 2;
}

int64_t ceiling_float32_avx512(int64_t iterations) {
  constexpr int kAccumulators = 24;
  __m512 acc[kAccumulators];
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_set1_ps(static_cast<float>(j));
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 24
    for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_fmadd_ps(acc[j], a, b);
  }
#pragma GCC unroll 24
  for (int j = 0; j < kAccumulators; ++j) asm volatile("" : : "v"(acc[j]));
  return iterations * kAccumulators * 16 * 2;
}

uint64_t ceiling_read_avx512(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + 256 <= bytes; i += 256) {
    _mm_prefetch(p + i + 4096, _MM_HINT_T0);
    _mm_prefetch(p + i + 4160, _MM_HINT_T0);
    _mm_prefetch(p + i + 4224, _MM_HINT_T0);
    _mm_prefetch(p + i + 4288, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_xor_si512(acc[j], _mm512_loadu_si512(p + i + 64 * j));
  }
  const __m512i sum = _mm512_xor_si512(_mm512_xor_si512(acc[0], acc[1]), _mm512_xor_si512(acc[2], acc[3]));
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sum);
  uint64_t total = 0;
  for (uint64_t lane : lanes) total ^= lane;
  for (; i < bytes; ++i) total ^= static_cast<unsigned char>(p[i]);
  return total;
}

}  // namespace pykernels::cpu

#endif
