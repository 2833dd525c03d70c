// Register tiles of MR rows by NV * 16 columns that accumulate a row-major dword of `a` against a packed panel of `b`.
// One dword holds four int8 (u8s8), two bfloat16 (bf16) or one float32 (f32) along K.
// Include after the standard headers and under `#pragma GCC target("avx512f,...")`.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "int8_matmul_avx512.h"

namespace pykernels::cpu::avx512 {

enum class Dot { u8s8, bf16, f32 };

// acc += b . broadcast(*a). Assembly, because GCC 12 copies the accumulator around its intrinsic and spills the tile.
template <Dot D>
inline __attribute__((always_inline)) void dot_broadcast(__m512i& acc, __m512i b, const int32_t* a) {
  if constexpr (D == Dot::u8s8)
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
  else if constexpr (D == Dot::bf16)
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
  else
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(b), "m"(*a));
}

template <Dot D>
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i b, __m512i a) {
  if constexpr (D == Dot::u8s8)
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
  else if constexpr (D == Dot::bf16)
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
  else
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(b), "v"(a));
}

// A line of memory that is wanted soon, at each step of a product: 16 steps fetch one line of each of up to 16 rows.
struct Ahead {
  const char* next;
  int64_t row[16];  // where its rows begin

  void operator()(int64_t s) {
    _mm_prefetch(next + row[s % 16], _MM_HINT_T1);
    if (s % 16 == 15) next += 64;
  }
};

struct NothingAhead {
  void operator()(int64_t) {}
};

// acc[i][v] += sum over `steps` dwords of rows [steps][MR] against panel [steps][NV][16]; both are packed, because rows
// that lie a power of two apart would evict one another from the first-level cache. Unrolling makes GCC spill.
template <Dot D, int MR, int NV, class Fetch>
inline __attribute__((always_inline)) void accumulate(__m512i (&acc)[MR][NV], const int32_t* rows, const char* panel,
                                                      int64_t steps, Fetch fetch) {
#pragma GCC unroll 1
  for (int64_t s = 0; s < steps; ++s) {
    __m512i b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) b[v] = _mm512_load_si512(panel + 64 * v);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) dot_broadcast<D>(acc[i][v], b[v], rows + i);
    // Past the second-level cache, which the panel needs whole.
    _mm_prefetch(rows + 256, _MM_HINT_NTA);
    fetch(s);
    panel += 64 * NV, rows += MR;
  }
}

// In place: 16 rows of 16 dwords become 16 columns of 16 dwords.
inline __attribute__((always_inline)) void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Bytes [0, count) of 64 as a mask.
inline __mmask64 byte_mask(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : ~0ull >> (64 - count); }
inline __mmask16 lane_mask(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Interleaved rows go out through a copy that stays with the thread. Every thread has read the workspace's lines
// before, and taking one back costs the same for a part of it as for the whole: in place this took 8 times as long on 2
// cores.
constexpr int64_t kInterleavedSteps = 256;

// 16 dwords of each of `count` rows at a time, which load(step, r) puts into r, to out [steps][count] dwords.
template <class Load>
inline void interleave(const Load& load, int count, int64_t steps, int32_t* out) {
  alignas(64) int32_t kept[kInterleavedSteps * kTileRows + 16];
  const __mmask16 lanes = lane_mask(count);
  for (int64_t s0 = 0; s0 < steps; s0 += kInterleavedSteps) {
    const int64_t valid = std::min(kInterleavedSteps, steps - s0);
    for (int64_t s = 0; s < valid; s += 16) {
      __m512i r[16];
      load(s0 + s, r);
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(kept + (s + i) * count, lanes, r[i]);
    }
    std::memcpy(out + s0 * count, kept, static_cast<size_t>(valid * count * 4));
  }
}

}  // namespace pykernels::cpu::avx512
