// Register tiles of MR rows by 16 columns by Winograd's inner product (1968), two products for one multiplication:
//   a0 b0 + a1 b1 = (a0 + b1) (a1 + b0) - a0 a1 - b0 b1.
// The sums of two codes fit int16, so vpmaddwd adds up 32 products of codes, not 16, and the last two terms belong to
// a row and a column alone. All modulo 2^32, where the result is exact. Four operations for 32 products, as with plain
// vpmaddwd and vpaddd, but one of them multiplies, not two: measured on Zen 3, whose multipliers the additions
// crowd, 1.14 times. Include after the standard headers and under #pragma GCC target.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "int8_matmul_pack_avx2.h"

namespace pykernels::cpu::avx2 {
namespace {

// Columns of b to fetch into the cache during a tile: those the next strip packs.
struct Ahead {
  const int8_t* p;
  int64_t stride;
  int64_t columns;
};

// acc[v] += a quad of one row against two vectors of columns. Assembly, so that GCC keeps to the sixteen registers.
inline __attribute__((always_inline)) void dot_quad(__m256i (&acc)[2], const __m256i (&odd)[2],
                                                    const __m256i (&even)[2], const int32_t* a) {
  __m256i x, y, s, t;
  asm("vpbroadcastd %6, %2\n\t"
      "vpbroadcastd %7, %3\n\t"
      "vpaddw %8, %2, %4\n\t"
      "vpaddw %10, %3, %5\n\t"
      "vpmaddwd %4, %5, %4\n\t"
      "vpaddd %4, %0, %0\n\t"
      "vpaddw %9, %2, %2\n\t"
      "vpaddw %11, %3, %3\n\t"
      "vpmaddwd %2, %3, %2\n\t"
      "vpaddd %2, %1, %1"
      : "+x"(acc[0]), "+x"(acc[1]), "=&x"(x), "=&x"(y), "=&x"(s), "=&x"(t)
      : "m"(a[0]), "m"(a[1]), "x"(odd[0]), "x"(odd[1]), "x"(even[0]), "x"(even[1]));
}

// out[i][16] (=|+=) the tile of rows [quads][MR][even, odd] and panel [quads][odd, even][16] dwords. row_sum is given
// for the first block along K, where out holds nothing yet.
template <int MR>
__attribute__((noinline)) void tile(const int32_t* rows, const char* panel, int64_t quads, const int32_t* row_sum,
                                    const int32_t* column_sum, int32_t* out, int64_t out_stride, Ahead ahead) {
  __m256i acc[MR][2];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const __m256i* to = reinterpret_cast<const __m256i*>(out + i * out_stride + 8 * v);
      const __m256i start =
          row_sum ? _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_set1_epi32(row_sum[i])) : _mm256_loadu_si256(to);
      acc[i][v] = _mm256_sub_epi32(start, _mm256_load_si256(reinterpret_cast<const __m256i*>(column_sum + 8 * v)));
    }
  while (quads > 0) {
    for (int64_t c = 0; c < ahead.columns; ++c) _mm_prefetch(ahead.p + c * ahead.stride, _MM_HINT_T1);
    ahead.p += 64;
    const int64_t line = quads < 16 ? quads : 16;
#pragma GCC unroll 2
    for (int64_t q = 0; q < line; ++q) {
      __m256i odd[2], even[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        odd[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel) + v);
        even[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel) + 2 + v);
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) dot_quad(acc[i], odd, even, rows + 2 * i);
      panel += kStripQuadBytes, rows += 2 * MR;
    }
    quads -= line;
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride + 8 * v), acc[i][v]);
}

}  // namespace
}  // namespace pykernels::cpu::avx2
