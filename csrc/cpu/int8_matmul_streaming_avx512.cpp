// Few rows: b is read once, in place, 64 bytes of a row at a time against every row of a, so that decoding runs at the
// speed of memory. Lanes are added up at the end of a row.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_matmul_avx512.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "int8_matmul_tile_avx512.h"

namespace pykernels::cpu::avx512 {
namespace {

// [a, b, c, d]: the sum of the 16 lanes of each.
inline __m128i add_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i v = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Products of MR rows of a (padded with zeros to whole lines) by NR rows of b. Meanwhile each row of b that lies
// ahead[j] bytes further is fetched, to the second-level cache, which takes more lines in flight than the first: a
// hardware prefetcher would have to find every row anew.
template <int MR, int NR>
__attribute__((noinline)) void tile(const int8_t* a, int64_t a_stride, const int8_t* b, int64_t b_stride, int64_t K,
                                    const int64_t* ahead, const int32_t* sum, int32_t* out, int64_t out_stride) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i acc[MR][NR];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_si512();
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + 64 <= K; k += 64) {
    __m512i w[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      w[j] = _mm512_xor_si512(flip, _mm512_loadu_si512(b + j * b_stride + k));
      _mm_prefetch(b + j * b_stride + k + ahead[j], _MM_HINT_T1);
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m512i x = _mm512_load_si512(a + i * a_stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) dot<Dot::u8s8>(acc[i][j], w[j], x);
    }
  }
  if (k < K) {
    const __mmask64 mask = byte_mask(K - k);
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const __m512i w = _mm512_xor_si512(flip, _mm512_maskz_loadu_epi8(mask, b + j * b_stride + k));
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) dot<Dot::u8s8>(acc[i][j], w, _mm512_load_si512(a + i * a_stride + k));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    const __m128i start = _mm_set1_epi32(static_cast<int32_t>(-128u * static_cast<uint32_t>(sum[i])));
    int32_t* to = out + i * out_stride;
    if constexpr (NR == 1) {
      *to = _mm_cvtsi128_si32(start) + _mm512_reduce_add_epi32(acc[i][0]);
    } else {
#pragma GCC unroll 2
      for (int j = 0; j < NR; j += 4)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j),
                         _mm_add_epi32(start, add_lanes(acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3])));
    }
  }
}

using Tile = void (*)(const int8_t*, int64_t, const int8_t*, int64_t, int64_t, const int64_t*, const int32_t*, int32_t*,
                      int64_t);
constexpr Tile kWide[kTileRows] = {tile<1, 8>, tile<2, 8>, tile<3, 4>, tile<4, 4>, tile<5, 4>, tile<6, 4>};
constexpr Tile kNarrow[kTileRows] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>, tile<5, 1>, tile<6, 1>};

}  // namespace

void streaming_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  int8_t* first = to.rows + begin * plan.row_bytes;
  const Int8Codes codes = int8_matmul_codes(args, begin, end - begin, first, plan.row_bytes, to.scale);
  for (int64_t m = begin; m < end; ++m) {
    int8_t* row = to.rows + m * plan.row_bytes;
    if (codes.first != first) std::memcpy(row, codes.first + (m - begin) * codes.stride, static_cast<size_t>(args.K));
    std::memset(row + args.K, 0, static_cast<size_t>(plan.row_bytes - args.K));
    to.sum[m] = row_sum(row, plan.row_bytes);
  }
}

void streaming_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  constexpr int64_t kProducts = 1024;
  constexpr int64_t kAheadBytes = 32 << 10;
  constexpr int64_t kFirstLevelRows = 20 << 10;
  alignas(64) int32_t products[kProducts];
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  // Rows spread evenly over the tiles; columns at once so that their products stay in a few kilobytes.
  const int64_t tiles = (args.M + kTileRows - 1) / kTileRows;
  const int64_t width = args.M <= 16 ? 64 : 16;
  const int64_t wide = args.M <= 2 ? 8 : 4;
  // The smaller operand of a tile stays in the first-level cache: all rows of a while they fit, else one tile of them,
  // which then meets a whole item's rows of b in the second-level cache.
  const bool rows_fit = tiles == 1 || args.M * plan.row_bytes <= kFirstLevelRows;
  const int64_t block = rows_fit ? wide : width;
  // What is fetched ahead is spread over the tiles that share the rows of b; an offset of 0 fetches nothing new.
  const int64_t block_bytes = std::max<int64_t>(1, block * args.b_stride);
  const int64_t distance = rows_fit ? std::max<int64_t>(1, kAheadBytes / block_bytes) * block_bytes : block_bytes;
  const int64_t sharing = std::min<int64_t>(tiles, 4);
  int64_t ahead[5][8] = {};
  for (int64_t t = 0; t < sharing; ++t)
    for (int64_t j = 0; j < 8; ++j)
      if (j % sharing == t) ahead[t][j] = distance;
  const int64_t last = std::min(args.N, end * plan.columns_per_item);
  for (int64_t n0 = begin * plan.columns_per_item; n0 < last; n0 += width) {
    const int64_t columns = std::min(width, last - n0);
    for (int64_t j0 = 0; j0 < columns; j0 += block)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m = t * args.M / tiles, rows = (t + 1) * args.M / tiles - m;
        const int64_t stop = std::min(columns, j0 + block);
        int64_t step = 0;
        for (int64_t j = j0; j < stop; j += step) {
          step = stop - j >= wide ? wide : 1;
          const int64_t turn = (t + j / wide) % sharing;
          (step == 1 ? kNarrow : kWide)[rows - 1](
              from.rows + m * plan.row_bytes, plan.row_bytes, args.b + (n0 + j) * args.b_stride, args.b_stride, args.K,
              ahead[t < sharing ? turn : 4], from.sum + m, products + m * width + j, width);
        }
      }
    kEpilogueAvx512(epilogue, products, width, 0, args.M, n0, columns);
  }
}

}  // namespace pykernels::cpu::avx512

#endif
