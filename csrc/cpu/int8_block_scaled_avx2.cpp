// The packed panels of int8_matmul_avx2.cpp, whose int32 tiles go over into float32 sums after every block of K; for
// few rows b is read once, in place.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_block_scaled_kernels.h"
#include "int8_matmul_avx2.h"
#include "scratch.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_step_avx2.h"
#include "int8_matmul_tile_avx2.h"
#include "panel_plan_avx2.h"

namespace pykernels::cpu {
namespace avx2 {
namespace {

constexpr int64_t kBlockQuads = kScaledBlock / 4;
constexpr int64_t kStripBlocks = 4;  // of 16 columns: 16 KiB

using Interleave = void (*)(const int8_t*, int64_t, int64_t, int32_t*, int32_t*);
constexpr Interleave kInterleave[kTileRows] = {interleave_rows<1>, interleave_rows<2>, interleave_rows<3>,
                                               interleave_rows<4>};

using Tile = void (*)(const int32_t*, const char*, int64_t, const int32_t*, const int32_t*, int32_t*, int64_t, Ahead);
constexpr Tile kTiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>};

int64_t padded_codes(int64_t K) { return (K + 4 * kQuads - 1) / (4 * kQuads) * (4 * kQuads); }

// Prepared rows lie block by block along K, as a tile reads them.
int32_t* packed_rows(const ScaledWorkspace& workspace, const Int8BlockScaled& args, int64_t block, int64_t m) {
  const int64_t q0 = block * kBlockQuads, quads = std::min(kBlockQuads, padded_codes(args.K) / 4 - q0);
  return reinterpret_cast<int32_t*>(workspace.rows) + 2 * (args.M * q0 + m * quads);
}

void scaled_rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const ScaledWorkspace to(workspace, args, plan.row_bytes);
  const int64_t stride = padded_codes(args.K);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = item * kTileRows, count = std::min<int64_t>(kTileRows, args.M - m0);
    int8_t* rows = reinterpret_cast<int8_t*>(scratch.get(kTileRows * stride));
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(rows + i * stride, args.a + (m0 + i) * args.a_stride, static_cast<size_t>(args.K));
      std::memset(rows + i * stride + args.K, 0, static_cast<size_t>(stride - args.K));
    }
    for (int64_t block = 0; block < args.blocks; ++block) {
      const int64_t q0 = block * kBlockQuads;
      int32_t* sum = to.sum + block * args.M + m0;
      std::fill_n(sum, count, 0);
      kInterleave[count - 1](rows + 4 * q0, stride, std::min(kBlockQuads, stride / 4 - q0),
                             packed_rows(to, args, block, m0), sum);
    }
  }
}

// out[i][16] += the int32 tile times the scale of its row.
inline void promote(const int32_t (&tile)[kTileRows * kTileColumns], const float* scale, int64_t rows, float* out,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int64_t v = 0; v < kTileColumns; v += 8) {
      const __m256i* from = reinterpret_cast<const __m256i*>(tile + i * kTileColumns + v);
      float* to = out + i * stride + v;
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_load_si256(from)), _mm256_set1_ps(scale[i]),
                                           _mm256_loadu_ps(to)));
    }
}

void scaled_tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                  int64_t end) {
  static thread_local Scratch scratch;
  const ScaledWorkspace from(workspace, args, plan.row_bytes);
  const int64_t width = plan.columns_per_item, panels = (args.N + width - 1) / width;
  constexpr int64_t kBlockBytes = kBlockQuads * kStripQuadBytes;
  char* strip = scratch.get(kStripBlocks * kBlockBytes + plan.rows_per_item * width * 4);
  float* products = reinterpret_cast<float*>(strip + kStripBlocks * kBlockBytes);
  alignas(32) int32_t column_sum[kStripBlocks][kTileColumns], sums[kTileRows * kTileColumns];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * width, columns = std::min(width, args.N - n0);
    const int64_t first = item / panels * plan.rows_per_item, last = std::min(args.M, first + plan.rows_per_item);
    std::fill_n(products, (last - first) * width, 0.0f);
    for (int64_t block0 = 0; block0 < args.blocks; block0 += kStripBlocks) {
      const int64_t blocks = std::min(kStripBlocks, args.blocks - block0);
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int8_t* b = args.b + (n0 + j) * args.b_stride + block0 * kScaledBlock;
        for (int64_t s = 0; s < blocks; ++s)
          pack_strip(b + s * kScaledBlock, args.b_stride, columns - j,
                     std::min(kScaledBlock, args.K - (block0 + s) * kScaledBlock), strip + s * kBlockBytes,
                     column_sum[s]);
        for (int64_t m = first; m < last; m += kTileRows) {
          const int64_t rows = std::min<int64_t>(kTileRows, last - m);
          for (int64_t s = 0; s < blocks; ++s) {
            const int64_t block = block0 + s;
            const int64_t quads = (std::min(kScaledBlock, args.K - block * kScaledBlock) + 3) / 4;
            float scale[kTileRows];
            for (int64_t i = 0; i < rows; ++i) scale[i] = block_scale(args, m + i, n0 + j, block);
            kTiles[rows - 1](packed_rows(from, args, block, m), strip + s * kBlockBytes, quads,
                             from.sum + block * args.M + m, column_sum[s], sums, kTileColumns, {b, 0, 0});
            promote(sums, scale, rows, products + (m - first) * width + j, width);
          }
        }
      }
    }
    kFloatEpilogueAvx2(args.epilogue, products, width, first, last - first, n0, columns);
  }
}

// --- few rows -----------------------------------------------------------------------------------------------------

constexpr int64_t kAheadBytes = 8 << 10;
constexpr int64_t kWidth = 64;

inline float add_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Products of MR rows of a (padded with zeros to whole vectors) by NR rows of b, lane by lane in float32 between
// blocks.
template <int MR, int NR>
__attribute__((noinline)) void stream(const Int8BlockScaled& args, const int16_t* a, int64_t a_stride, int64_t n,
                                      int64_t ahead, float* out) {
  const int8_t* b = args.b + n * args.b_stride;
  __m256 total[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) total[i][j] = _mm256_setzero_ps();
#pragma GCC unroll 1
  for (int64_t block = 0; block < args.blocks; ++block) {
    __m256i acc[MR][NR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) acc[i][j] = _mm256_setzero_si256();
    int64_t k = block * kScaledBlock;
    const int64_t end = std::min(args.K, k + kScaledBlock);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      _mm_prefetch(b + j * args.b_stride + k + ahead, _MM_HINT_T0);
      _mm_prefetch(b + j * args.b_stride + k + ahead + 64, _MM_HINT_T0);
    }
#pragma GCC unroll 1
    for (; k + kCodes <= end; k += kCodes) step(acc, a + k, a_stride, b + k, args.b_stride);
    if (k < end) {
      alignas(16) int8_t padded[NR][kCodes] = {};
      for (int j = 0; j < NR; ++j) std::memcpy(padded[j], b + j * args.b_stride + k, static_cast<size_t>(end - k));
      step(acc, a + k, a_stride, padded[0], kCodes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const __m256 scale = _mm256_set1_ps(block_scale(args, i, n, block));
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) total[i][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[i][j]), scale, total[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) out[i * kWidth + j] = add_lanes(total[i][j]);
}

using Stream = void (*)(const Int8BlockScaled&, const int16_t*, int64_t, int64_t, int64_t, float*);
constexpr int kColumns[kMostStreamed] = {4, 2, 2, 1};
constexpr Stream kWide[kMostStreamed] = {stream<1, 4>, stream<2, 2>, stream<3, 2>, stream<4, 1>};
constexpr Stream kNarrow[kMostStreamed] = {stream<1, 1>, stream<2, 1>, stream<3, 1>, stream<4, 1>};

void stream_tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                  int64_t end) {
  float products[kMostStreamed * kWidth];
  const ScaledWorkspace from(workspace, args, plan.row_bytes);
  const int64_t wide = kColumns[args.M - 1], wide_bytes = std::max<int64_t>(1, wide * args.b_stride);
  const int64_t ahead = std::max<int64_t>(1, kAheadBytes / wide_bytes) * wide_bytes;
  const int64_t last = std::min(args.N, end * kWidth);
  for (int64_t n0 = begin * kWidth; n0 < last; n0 += kWidth) {
    const int64_t columns = std::min(kWidth, last - n0);
    for (int64_t j = 0, step = 0; j < columns; j += step) {
      step = columns - j >= wide ? wide : 1;
      (step == 1 ? kNarrow : kWide)[args.M - 1](args, reinterpret_cast<const int16_t*>(from.rows), plan.row_bytes / 2,
                                                n0 + j, ahead, products + j);
    }
    kFloatEpilogueAvx2(args.epilogue, products, kWidth, 0, args.M, n0, columns);
  }
}

void stream_rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  Int8Matmul widened;
  widened.a = args.a, widened.a_stride = args.a_stride;
  widened.M = args.M, widened.K = args.K;
  streaming_rows(widened, plan, workspace, begin, end);  // rows lie first in either workspace
}

}  // namespace
}  // namespace avx2

namespace {

Int8MatmulPlan plan(const Int8BlockScaled& args) {
  Int8MatmulPlan plan;
  plan.streaming = args.M <= avx2::kMostStreamed;
  if (plan.streaming) {
    plan.row_bytes = ((args.K + 15) / 16 * 16 + 32) * 2;  // an odd number of lines apart
    plan.row_items = args.M;
    plan.tile_items = (args.N + avx2::kWidth - 1) / avx2::kWidth;
  } else {
    plan.row_bytes = 2 * avx2::padded_codes(args.K);
    const int64_t tiles = (args.M + avx2::kTileRows - 1) / avx2::kTileRows;
    const auto found = avx2::plan_panels(plan, args.M, args.N, tiles, avx2::kTileRows, avx2::kTileColumns);
    plan.tile_items = found.panels * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  }
  plan.workspace_bytes = ScaledWorkspace::bytes(args, plan.row_bytes);
  return plan;
}

void rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx2::stream_rows : avx2::scaled_rows)(args, plan, workspace, begin, end);
}

void tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx2::stream_tiles : avx2::scaled_tiles)(args, plan, workspace, begin, end);
}

}  // namespace

const Int8BlockScaledKernels kInt8BlockScaledAvx2 = {plan, rows, tiles};

}  // namespace pykernels::cpu

#endif
