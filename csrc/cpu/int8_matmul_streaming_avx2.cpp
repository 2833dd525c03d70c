// A row or a few: b is read once, in place, and widened to int16, so that decoding runs at the speed of memory.
// Lanes are added up at the end of a row.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_matmul_avx2.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_step_avx2.h"

namespace pykernels::cpu::avx2 {
namespace {

constexpr int kLine = 64;
constexpr int64_t kAheadBytes = 8 << 10;

inline int32_t add_lanes(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

// Products of MR rows of a (padded with zeros to whole vectors) by NR rows of b. Meanwhile each row of b that lies
// `ahead` bytes further is fetched: a hardware prefetcher would have to find every row anew.
template <int MR, int NR>
__attribute__((noinline)) void tile(const int16_t* a, int64_t a_stride, const int8_t* b, int64_t b_stride, int64_t K,
                                    int64_t ahead, int32_t* out, int64_t out_stride) {
  __m256i acc[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_setzero_si256();
  int64_t k = 0;
#pragma GCC unroll 1
  for (; k + kLine <= K; k += kLine) {
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) _mm_prefetch(b + j * b_stride + k + ahead, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int u = 0; u < kLine; u += kCodes) step(acc, a + k + u, a_stride, b + k + u, b_stride);
  }
#pragma GCC unroll 1
  for (; k + kCodes <= K; k += kCodes) step(acc, a + k, a_stride, b + k, b_stride);
  if (k < K) {
    alignas(16) int8_t padded[NR][kCodes] = {};
    for (int j = 0; j < NR; ++j) std::memcpy(padded[j], b + j * b_stride + k, static_cast<size_t>(K - k));
    step(acc, a + k, a_stride, padded[0], kCodes);
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) out[i * out_stride + j] = add_lanes(acc[i][j]);
}

using Tile = void (*)(const int16_t*, int64_t, const int8_t*, int64_t, int64_t, int64_t, int32_t*, int64_t);
constexpr int kColumns[kMostStreamed] = {8, 4, 3, 2};
constexpr Tile kWide[kMostStreamed] = {tile<1, 8>, tile<2, 4>, tile<3, 3>, tile<4, 2>};
constexpr Tile kNarrow[kMostStreamed] = {tile<1, 1>, tile<2, 1>, tile<3, 1>, tile<4, 1>};

}  // namespace

void streaming_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  for (int64_t m = begin; m < end; ++m) {
    int16_t* row = reinterpret_cast<int16_t*>(to.rows + m * plan.row_bytes);
    // Codes quantised here land in the upper half of their own row and are widened upwards into it: byte k is read
    // before word k is written over it.
    int8_t* upper = reinterpret_cast<int8_t*>(row) + plan.row_bytes - args.K;
    const int8_t* codes = int8_matmul_codes(args, m, 1, upper, args.K, to.scale).first;
    int64_t k = 0;
    for (; k + kCodes <= args.K; k += kCodes) _mm256_store_si256(reinterpret_cast<__m256i*>(row + k), widen(codes + k));
    for (; k < args.K; ++k) {
      const int16_t wide = codes[k];
      std::memcpy(row + k, &wide, sizeof(wide));
    }
    std::memset(row + args.K, 0, static_cast<size_t>(plan.row_bytes - 2 * args.K));
  }
}

void streaming_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 64;
  int32_t products[kMostStreamed * kWidth];
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  const int64_t wide = kColumns[args.M - 1];
  const int64_t wide_bytes = std::max<int64_t>(1, wide * args.b_stride);
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / wide_bytes) * wide_bytes;
  const int64_t last = std::min(args.N, end * plan.columns_per_item);
  for (int64_t n0 = begin * plan.columns_per_item; n0 < last; n0 += kWidth) {
    const int64_t columns = std::min(kWidth, last - n0);
    for (int64_t j = 0, step = 0; j < columns; j += step) {
      step = columns - j >= wide ? wide : 1;
      (step == 1 ? kNarrow : kWide)[args.M - 1](reinterpret_cast<const int16_t*>(from.rows), plan.row_bytes / 2,
                                                args.b + (n0 + j) * args.b_stride, args.b_stride, args.K, ahead,
                                                products + j, kWidth);
    }
    kEpilogueAvx2(epilogue, products, kWidth, 0, args.M, n0, columns);
  }
}

}  // namespace pykernels::cpu::avx2

#endif
