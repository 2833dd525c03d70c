// Packing for the panels of int8_matmul_tile_avx2.h. Codes k .. k + 3 are a quad; a pair of int16 in one dword holds
// the even codes of a quad (0 and 2) or the odd ones (1 and 3). Include after the standard headers and #pragma GCC
// target.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pykernels::cpu::avx2 {
namespace {

constexpr int64_t kQuads = 8;  // of one vector of codes
constexpr int64_t kStripQuadBytes = 128;

inline __m256i even_codes(__m256i quads) { return _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8); }
inline __m256i odd_codes(__m256i quads) { return _mm256_srai_epi16(quads, 8); }

constexpr int64_t kMostQuads = 128;  // that interleave_rows takes

// R rows of codes, each padded with zeros to whole vectors, to [quads][R][even, odd] dwords. They go out through a copy
// that stays with the thread: every thread has read the lines of `out` before, and taking one back costs the same for a
// part of it as for the whole.
// sum[i] += the products of an even code with the odd one that follows.
template <int R>
void interleave_rows(const int8_t* codes, int64_t stride, int64_t quads, int32_t* out, int32_t* sum) {
  __m256i sums[R];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) sums[i] = _mm256_setzero_si256();
  alignas(64) int64_t kept[kMostQuads * R];
  for (int64_t q = 0; q < quads; q += kQuads) {
    alignas(32) int64_t pairs[R][kQuads];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * stride + 4 * q));
      const __m256i even = even_codes(v), odd = odd_codes(v);
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(even, odd));
      const __m256i low = _mm256_unpacklo_epi32(even, odd), high = _mm256_unpackhi_epi32(even, odd);
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[i]), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs[i] + 4), _mm256_permute2x128_si256(low, high, 0x31));
    }
    int64_t* to = kept + q * R;
#pragma GCC unroll 8
    for (int s = 0; s < kQuads; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) to[s * R + i] = pairs[i][s];
  }
  std::memcpy(out, kept, static_cast<size_t>(quads * R) * sizeof(int64_t));
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) {
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[i]);
    uint32_t total = static_cast<uint32_t>(sum[i]);
    for (const uint32_t lane : lanes) total += lane;
    sum[i] = static_cast<int32_t>(total);
  }
}

// 8 columns of 8 quads: out[q] holds quad q of each column.
inline __attribute__((always_inline)) void transpose_quads(const int8_t* p, int64_t stride, __m256i (&out)[8]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    __m256i r[4], t[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const int8_t* from = p + c * stride + 16 * half;
      r[c] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * stride)), 1);
    }
#pragma GCC unroll 2
    for (int c = 0; c < 4; c += 2) {
      t[c] = _mm256_unpacklo_epi32(r[c], r[c + 1]);
      t[c + 1] = _mm256_unpackhi_epi32(r[c], r[c + 1]);
    }
    out[4 * half] = _mm256_unpacklo_epi64(t[0], t[2]);
    out[4 * half + 1] = _mm256_unpackhi_epi64(t[0], t[2]);
    out[4 * half + 2] = _mm256_unpacklo_epi64(t[1], t[3]);
    out[4 * half + 3] = _mm256_unpackhi_epi64(t[1], t[3]);
  }
}

// b[c][0 .. count) of 16 columns to [quads][odd, even][16] dwords, zero beyond `columns` and `count`, whole vectors of
// quads. sum[c]: the products of an even code with the odd one that follows, added up.
inline void pack_strip(const int8_t* b, int64_t stride, int64_t columns, int64_t count, char* out, int32_t* sum) {
  for (int64_t c0 = 0; c0 < 16; c0 += 8) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 4 * kQuads) {
      __m256i quads[8];
      const int8_t* p = b + c0 * stride + k;
      const int64_t valid = columns - c0, bytes = count - k;
      if (valid >= 8 && bytes >= 4 * kQuads) {
        transpose_quads(p, stride, quads);
      } else {
        alignas(32) int8_t padded[8][4 * kQuads] = {};
        for (int64_t c = 0; c < 8 && c < valid; ++c)
          std::memcpy(padded[c], p + c * stride, static_cast<size_t>(bytes < 4 * kQuads ? bytes : 4 * kQuads));
        transpose_quads(padded[0], 4 * kQuads, quads);
      }
      char* to = out + k / 4 * kStripQuadBytes + 4 * c0;
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) {
        const __m256i even = even_codes(quads[q]), odd = odd_codes(quads[q]);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, odd));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * kStripQuadBytes), odd);
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * kStripQuadBytes + 64), even);
      }
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(sum + c0), sums);
  }
}

}  // namespace
}  // namespace pykernels::cpu::avx2
