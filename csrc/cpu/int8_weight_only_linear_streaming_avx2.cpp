// A row or a few: the weight is read once, in place, and dequantised in registers, so that decoding runs at the speed
// of memory.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "int8_weight_only_linear_kernels.h"
#include "philox.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_weight_only_linear_avx2.h"

namespace pykernels::cpu::avx2 {
namespace {

constexpr int kCodes = 8;
constexpr int kLine = 64;
constexpr int64_t kAheadBytes = 32 << 10;
constexpr int64_t kWidth = 64;  // columns of one call of the epilogue

inline __m256i lanes_below(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// acc += MR rows of x against 8 codes of each of NR rows of weight, times the scale of each where there is one. Of x
// and the weight, the side that fits the sixteen registers is held.
template <int MR, int NR, bool kGrouped, class LoadX>
inline __attribute__((always_inline)) void step(__m256 (&acc)[MR][NR], const LoadX& load_x, const int8_t* w,
                                                int64_t w_stride, const float* scale, int64_t groups) {
  const auto weight = [&](int j) __attribute__((always_inline)) {
    const __m256 v = Avx2::to_float(Avx2::load(w + j * w_stride));
    return kGrouped ? _mm256_mul_ps(v, _mm256_broadcast_ss(scale + j * groups)) : v;
  };
  if constexpr (MR * NR + MR < 16) {
    __m256 x[MR];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) x[i] = load_x(i);
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const __m256 v = weight(j);
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) acc[i][j] = _mm256_fmadd_ps(v, x[i], acc[i][j]);
    }
  } else {
    __m256 v[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) v[j] = weight(j);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m256 x = load_x(i);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_fmadd_ps(v[j], x, acc[i][j]);
    }
  }
}

// The sum of the lanes of each of four vectors.
inline __m128 add_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// Products of MR rows of x by NR rows of weight, each of `groups` groups of `size` columns. Meanwhile each row of
// weight that lies `ahead` bytes further is fetched: a hardware prefetcher would have to find every row anew.
template <int MR, int NR, bool kGrouped>
__attribute__((noinline)) void tile(const float* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t size,
                                    int64_t groups, const float* scale, int64_t ahead, float* out, int64_t out_stride) {
  __m256 acc[MR][NR];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_setzero_ps();
  const auto at = [&](int64_t k) __attribute__((always_inline)) {
    step<MR, NR, kGrouped>(
        acc, [&](int i) __attribute__((always_inline)) { return _mm256_loadu_ps(x + i * x_stride + k); }, w + k,
        w_stride, scale, groups);
  };
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g, ++scale) {
    const int64_t end = k + size;
    while (k + kCodes <= end) {
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) _mm_prefetch(w + j * w_stride + k + ahead, _MM_HINT_T0);
      if (k + kLine <= end) {
#pragma GCC unroll 8
        for (int u = 0; u < kLine; u += kCodes) at(k + u);
        k += kLine;
      } else {
        for (; k + kCodes <= end; k += kCodes) at(k);
      }
    }
    if (k < end) {
      alignas(8) int8_t padded[NR][kCodes] = {};
      for (int j = 0; j < NR; ++j) std::memcpy(padded[j], w + j * w_stride + k, static_cast<size_t>(end - k));
      const __m256i mask = lanes_below(end - k);
      step<MR, NR, kGrouped>(
          acc, [&](int i) __attribute__((always_inline)) { return _mm256_maskload_ps(x + i * x_stride + k, mask); },
          padded[0], kCodes, scale, groups);
      k = end;
    }
  }
  float sums[MR][NR + 3];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < NR; j += 4)
      _mm_storeu_ps(sums[i] + j, add_lanes(acc[i][j], acc[i][std::min(j + 1, NR - 1)], acc[i][std::min(j + 2, NR - 1)],
                                           acc[i][std::min(j + 3, NR - 1)]));
    std::memcpy(out + i * out_stride, sums[i], NR * sizeof(float));
  }
}

using Tile = void (*)(const float*, int64_t, const int8_t*, int64_t, int64_t, int64_t, const float*, int64_t, float*,
                      int64_t);
constexpr int kTileRows = 6;
constexpr int kColumns[kTileRows] = {8, 4, 3, 3, 2, 2};
template <bool G>
constexpr Tile kWide[kTileRows] = {tile<1, 8, G>, tile<2, 4, G>, tile<3, 3, G>,
                                   tile<4, 3, G>, tile<5, 2, G>, tile<6, 2, G>};
template <bool G>
constexpr Tile kNarrow[kTileRows] = {tile<1, 1, G>, tile<2, 1, G>, tile<3, 1, G>,
                                     tile<4, 1, G>, tile<5, 1, G>, tile<6, 1, G>};

}  // namespace

void weight_streaming_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end) {
  for (int64_t m = begin; m < end; ++m)
    widen_row(args, m, 0, args.K, reinterpret_cast<float*>(workspace + m * plan.row_bytes));
}

void weight_streaming_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end) {
  alignas(32) float products[kMostStreamed * kWidth];
  const float* x = reinterpret_cast<const float*>(workspace);
  const int64_t x_stride = plan.row_bytes / static_cast<int64_t>(sizeof(float));
  const bool grouped = args.group_scale != nullptr;
  const Tile* wide_tiles = grouped ? kWide<true> : kWide<false>;
  const Tile* narrow_tiles = grouped ? kNarrow<true> : kNarrow<false>;
  // Above 6 rows, tiles of 3 and 4, which take as many columns as one another.
  const int64_t tiles = args.M <= kTileRows ? 1 : (args.M + 3) / 4, wide = kColumns[(args.M - 1) / tiles];
  const int64_t wide_bytes = std::max<int64_t>(1, wide * args.weight_stride);
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / wide_bytes) * wide_bytes;
  const int64_t last = std::min(args.N, end * plan.columns_per_item);
  for (int64_t n0 = begin * plan.columns_per_item; n0 < last; n0 += kWidth) {
    const int64_t columns = std::min(kWidth, last - n0);
    for (int64_t j = 0, step = 0; j < columns; j += step) {
      const int64_t n = n0 + j;
      step = columns - j >= wide ? wide : 1;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m = t * args.M / tiles, rows = (t + 1) * args.M / tiles - m;
        (step == 1 ? narrow_tiles : wide_tiles)[rows - 1](
            x + m * x_stride, x_stride, args.weight + n * args.weight_stride, args.weight_stride, args.K / args.groups,
            args.groups, grouped ? args.group_scale + n * args.groups : nullptr, t == 0 ? ahead : 0,
            products + m * kWidth + j, kWidth);
      }
    }
    kFloatEpilogueAvx2(args.epilogue, products, kWidth, 0, args.M, n0, columns);
  }
}

}  // namespace pykernels::cpu::avx2

#endif
