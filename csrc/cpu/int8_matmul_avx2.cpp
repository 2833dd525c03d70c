// AVX2: codes widened to int16, pairs multiplied and added by vpmaddwd. That is exact; vpmaddubsw would saturate.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "float_types.h"
#include "int8_matmul_kernels.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_epilogue.h"

namespace pykernels::cpu {
namespace {

constexpr int64_t kTileRows = 3;
constexpr int64_t kTileColumns = 4;
constexpr int64_t kColumns = 64;
constexpr int64_t kCacheBytes = 256 << 10;  // rows of a that an item keeps in the second-level cache

Int8MatmulPlan plan(const Int8Matmul& args) {
  Int8MatmulPlan plan;
  plan.row_bytes = ((args.K + 15) / 16 * 16 + 32) * 2;  // int16, padded with zeros, an odd number of lines apart
  plan.rows_per_item = std::max<int64_t>(48, kCacheBytes / plan.row_bytes / kTileRows * kTileRows);
  plan.columns_per_item = kColumns;
  plan.row_items = args.M;
  plan.tile_items = ((args.N + kColumns - 1) / kColumns) * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  plan.workspace_bytes = Int8Workspace::bytes(args.M, plan.row_bytes);
  return plan;
}

void rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  for (int64_t m = begin; m < end; ++m) {
    int16_t* row = reinterpret_cast<int16_t*>(to.rows + m * plan.row_bytes);
    // Codes quantised here land in the upper half of their own row and are widened upwards into it: byte k is read
    // before word k is written over it.
    int8_t* upper = reinterpret_cast<int8_t*>(row) + plan.row_bytes - args.K;
    const int8_t* codes = int8_matmul_codes(args, m, upper, to.scale);
    for (int64_t k = 0; k < args.K; ++k) {
      const int16_t wide = codes[k];
      std::memcpy(row + k, &wide, sizeof(wide));
    }
    std::memset(row + args.K, 0, static_cast<size_t>(plan.row_bytes - 2 * args.K));
  }
}

inline __m256i widen(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline int32_t add_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

template <int MR, int NR>
void tile(const char* a, int64_t a_stride, const int8_t* b, int64_t b_stride, int64_t K, int32_t* out) {
  __m256i acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_setzero_si256();
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + 16 <= K; k += 16) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const __m256i w = widen(b + j * b_stride + k);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * a_stride + 2 * k));
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(w, x));
      }
    }
  }
  if (k < K) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      int8_t padded[16] = {};
      std::memcpy(padded, b + j * b_stride + k, static_cast<size_t>(K - k));
      const __m256i w = widen(padded);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i * a_stride + 2 * k));
        acc[i][j] = _mm256_add_epi32(acc[i][j], _mm256_madd_epi16(w, x));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) out[i * kColumns + j] = add_lanes(acc[i][j]);
}

using Tile = void (*)(const char*, int64_t, const int8_t*, int64_t, int64_t, int32_t*);
constexpr Tile kTiles[kTileRows][kTileColumns] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},
    {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>},
};

void tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  const int64_t blocks = (args.N + kColumns - 1) / kColumns;
  int32_t products[kTileRows * kColumns];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % blocks * kColumns, columns = std::min(kColumns, args.N - n0);
    const int64_t first = item / blocks * plan.rows_per_item, last = std::min(args.M, first + plan.rows_per_item);
    for (int64_t m = first; m < last; m += kTileRows) {
      const int64_t rows = std::min(kTileRows, last - m);
      for (int64_t j = 0; j < columns; j += kTileColumns)
        kTiles[rows - 1][std::min(kTileColumns, columns - j) - 1](
            reinterpret_cast<const char*>(from.rows) + m * plan.row_bytes, plan.row_bytes,
            args.b + (n0 + j) * args.b_stride, args.b_stride, args.K, products + j);
      epilogue_int32(epilogue, products, kColumns, m, rows, n0, columns);
    }
  }
}

}  // namespace

const Int8MatmulKernels kInt8MatmulAvx2 = {plan, rows, tiles};

}  // namespace pykernels::cpu

#endif
