// Few rows: the weight is read once, in place, and dequantised in registers. float32 throughout.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "int8_matmul_avx512.h"
#include "int8_weight_only_linear_kernels.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include "int8_matmul_math_avx512.h"

namespace pykernels::cpu::avx512 {
namespace {

inline __m512 dequantize(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }

inline float add_lanes(__m512 v) { return _mm512_reduce_add_ps(v); }

// Products of MR rows of x by NR rows of weight, each of `groups` groups of `size` columns. kGrouped multiplies by the
// group's scale as it dequantises. The weight `ahead` bytes further is fetched meanwhile.
template <int MR, int NR, bool kGrouped>
__attribute__((noinline)) void tile(const float* x, int64_t x_stride, const int8_t* w, int64_t w_stride, int64_t size,
                                    int64_t groups, const float* scale, int64_t ahead, float* out, int64_t out_stride) {
  __m512 acc[MR][NR];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) acc[i][j] = _mm512_setzero_ps();
  int64_t k = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t end = k + size;
#pragma GCC unroll 1
    for (; k + 16 <= end; k += 16) {
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        const int8_t* p = w + j * w_stride + k;
        _mm_prefetch(p + ahead, _MM_HINT_T1);
        __m512 v = dequantize(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        if constexpr (kGrouped) v = _mm512_mul_ps(v, _mm512_set1_ps(scale[j * groups + g]));
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) acc[i][j] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + i * x_stride + k), acc[i][j]);
      }
    }
    if (k < end) {
      const __mmask16 mask = lane_mask(end - k);
#pragma GCC unroll 8
      for (int j = 0; j < NR; ++j) {
        __m512 v = dequantize(_mm_maskz_loadu_epi8(mask, w + j * w_stride + k));
        if constexpr (kGrouped) v = _mm512_mul_ps(v, _mm512_set1_ps(scale[j * groups + g]));
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i)
          acc[i][j] = _mm512_fmadd_ps(v, _mm512_maskz_loadu_ps(mask, x + i * x_stride + k), acc[i][j]);
      }
      k = end;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) out[i * out_stride + j] = add_lanes(acc[i][j]);
}

using Tile = void (*)(const float*, int64_t, const int8_t*, int64_t, int64_t, int64_t, const float*, int64_t, float*,
                      int64_t);
template <bool G>
constexpr Tile kWide[kTileRows] = {tile<1, 8, G>, tile<2, 8, G>, tile<3, 4, G>,
                                   tile<4, 4, G>, tile<5, 4, G>, tile<6, 4, G>};
template <bool G>
constexpr Tile kNarrow[kTileRows] = {tile<1, 1, G>, tile<2, 1, G>, tile<3, 1, G>,
                                     tile<4, 1, G>, tile<5, 1, G>, tile<6, 1, G>};

}  // namespace

void weight_streaming_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                           int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    float* row = reinterpret_cast<float*>(workspace + m * plan.row_bytes);
    for (int64_t k = 0; k < args.K; k += 16) {
      const __mmask16 mask = lane_mask(args.K - k);
      _mm512_store_ps(row + k, load16(args.x, args.x_dtype, m * args.x_stride + k, mask));
    }
  }
}

void weight_streaming_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                            int64_t end) {
  constexpr int64_t kProducts = 2048;
  alignas(64) float products[kProducts];
  const float* x = reinterpret_cast<const float*>(workspace);
  const int64_t x_stride = plan.row_bytes / static_cast<int64_t>(sizeof(float));
  const bool grouped = args.group_scale != nullptr;
  const Tile* wide_tiles = grouped ? kWide<true> : kWide<false>;
  const Tile* narrow_tiles = grouped ? kNarrow<true> : kNarrow<false>;
  const int64_t tiles = (args.M + kTileRows - 1) / kTileRows, wide = args.M <= 2 ? 8 : 4;
  const int64_t width = plan.columns_per_item;
  constexpr int64_t kAheadBytes = 32 << 10;
  const int64_t wide_bytes = std::max<int64_t>(1, wide * args.weight_stride);
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / wide_bytes) * wide_bytes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item * width, columns = std::min(width, args.N - n0);
    int64_t step = 0;
    for (int64_t j = 0; j < columns; j += step) {
      const int64_t n = n0 + j;
      step = columns - j >= wide ? wide : 1;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t m = t * args.M / tiles, rows = (t + 1) * args.M / tiles - m;
        (step == 1 ? narrow_tiles : wide_tiles)[rows - 1](
            x + m * x_stride, x_stride, args.weight + n * args.weight_stride, args.weight_stride, args.K / args.groups,
            args.groups, grouped ? args.group_scale + n * args.groups : nullptr, t == 0 ? ahead : 0,
            products + m * width + j, width);
      }
    }
    kFloatEpilogueAvx512(args.epilogue, products, width, 0, args.M, n0, columns);
  }
}

}  // namespace pykernels::cpu::avx512

#endif
