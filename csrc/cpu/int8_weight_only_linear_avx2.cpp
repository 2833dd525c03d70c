// Many rows: strips of 16 columns of weight are dequantised to float32 in the first-level cache, 256 of K at a time,
// and met by 6 x 16 tiles.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "float_types.h"
#include "int8_weight_only_linear_kernels.h"
#include "philox.h"
#include "scratch.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_weight_only_linear_avx2.h"
#include "panel_plan_avx2.h"

namespace pykernels::cpu {
namespace avx2 {
namespace {

constexpr int kTileRows = 6;
constexpr int kTileColumns = 16;
// A strip of this many steps along K is 16 KiB: half of a first-level cache.
constexpr int64_t kBlock = 256;
constexpr int64_t kChunk = 16;  // codes of a column expanded at a time

// M rows in tiles of almost equal height, because short tiles wait for their sums; parts are whole tiles.
struct Tiling {
  int64_t rows, tiles;
  explicit Tiling(int64_t M) : rows(M), tiles((M + kTileRows - 1) / kTileRows) {}
  int64_t row(int64_t tile) const { return tile * rows / tiles; }
};

// Rows of weight to fetch into the cache during a tile: those the next strip expands.
struct Ahead {
  const int8_t* p;
  int64_t stride;
  int64_t columns;
};

// 8 columns of 16 codes: out[q] holds codes 4 q .. 4 q + 3 of each column.
inline __attribute__((always_inline)) void transpose_quads(const int8_t* p, int64_t stride, __m256i (&out)[4]) {
  __m256i r[4], t[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int8_t* from = p + c * stride;
    r[c] = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 4 * stride)), 1);
  }
#pragma GCC unroll 2
  for (int c = 0; c < 4; c += 2) {
    t[c] = _mm256_unpacklo_epi32(r[c], r[c + 1]);
    t[c + 1] = _mm256_unpackhi_epi32(r[c], r[c + 1]);
  }
  out[0] = _mm256_unpacklo_epi64(t[0], t[2]);
  out[1] = _mm256_unpackhi_epi64(t[0], t[2]);
  out[2] = _mm256_unpacklo_epi64(t[1], t[3]);
  out[3] = _mm256_unpackhi_epi64(t[1], t[3]);
}

template <int kByte>
inline __m256 byte_of(__m256i quads, __m256 scale) {
  const __m256i top = kByte < 3 ? _mm256_slli_epi32(quads, 24 - 8 * kByte) : quads;
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24)), scale);
}

inline __attribute__((always_inline)) void expand(const int8_t* p, int64_t stride, __m256 scale, float* out) {
  __m256i quads[4];
  transpose_quads(p, stride, quads);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q, out += 4 * kTileColumns) {
    _mm256_store_ps(out, byte_of<0>(quads[q], scale));
    _mm256_store_ps(out + kTileColumns, byte_of<1>(quads[q], scale));
    _mm256_store_ps(out + 2 * kTileColumns, byte_of<2>(quads[q], scale));
    _mm256_store_ps(out + 3 * kTileColumns, byte_of<3>(quads[q], scale));
  }
}

// weight[n0 + c][k0 .. k0 + count) of 16 columns to [count][16] float32 times the scales of their groups, zero beyond
// `columns`. Writes as many as kChunk - 1 rows more.
void expand_strip(const Int8WeightOnly& args, int64_t n0, int64_t columns, int64_t k0, int64_t count, float* out) {
  const int64_t size = args.K / args.groups;
  for (int64_t c0 = 0; c0 < kTileColumns; c0 += Avx2::kWidth) {
    const int64_t valid = std::min<int64_t>(Avx2::kWidth, columns - c0);
    const int8_t* p = args.weight + (n0 + c0) * args.weight_stride + k0;
    __m256 scale = _mm256_set1_ps(1.0f);
    for (int64_t k = 0; k < count;) {
      int64_t end = count;
      if (args.group_scale != nullptr) {
        const int64_t g = (k0 + k) / size;
        alignas(32) float scales[Avx2::kWidth] = {};
        for (int64_t c = 0; c < valid; ++c) scales[c] = args.group_scale[(n0 + c0 + c) * args.groups + g];
        scale = _mm256_load_ps(scales);
        end = std::min(count, (g + 1) * size - k0);
      }
      if (valid == Avx2::kWidth)
        for (; k + kChunk <= end; k += kChunk) expand(p + k, args.weight_stride, scale, out + k * kTileColumns + c0);
      for (; k < end; k = std::min(end, k + kChunk)) {
        int8_t padded[Avx2::kWidth][kChunk] = {};
        for (int64_t c = 0; c < valid; ++c)
          std::memcpy(padded[c], p + c * args.weight_stride + k, static_cast<size_t>(std::min(kChunk, end - k)));
        expand(padded[0], kChunk, scale, out + k * kTileColumns + c0);
      }
    }
  }
}

// out[i][16] (=|+=) the tile of rows [steps][MR] and strip [steps][16].
template <int MR>
__attribute__((noinline)) void tile(const float* rows, const float* strip, int64_t steps, bool first, float* out,
                                    int64_t out_stride, Ahead ahead) {
  __m256 acc[MR][2];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
  while (steps > 0) {
    for (int64_t c = 0; c < ahead.columns; ++c) _mm_prefetch(ahead.p + c * ahead.stride, _MM_HINT_T1);
    ahead.p += 64;
    const int64_t line = std::min<int64_t>(steps, 64);
#pragma GCC unroll 4
    for (int64_t k = 0; k < line; ++k) {
      const __m256 w[2] = {_mm256_load_ps(strip), _mm256_load_ps(strip + 8)};
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) {
        const __m256 x = _mm256_broadcast_ss(rows + i);
        acc[i][0] = _mm256_fmadd_ps(x, w[0], acc[i][0]);
        acc[i][1] = _mm256_fmadd_ps(x, w[1], acc[i][1]);
      }
      rows += MR, strip += kTileColumns;
    }
    steps -= line;
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = out + i * out_stride + 8 * v;
      _mm256_storeu_ps(to, first ? acc[i][v] : _mm256_add_ps(acc[i][v], _mm256_loadu_ps(to)));
    }
}

using Tile = void (*)(const float*, const float*, int64_t, bool, float*, int64_t, Ahead);
constexpr Tile kTiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// Through a copy that stays with the thread, as int8_matmul_pack_avx2.h says.
template <int MR>
void interleave(const float* rows, int64_t count, float* out) {
  alignas(64) float kept[kBlock * MR];
  for (int64_t k = 0; k < count; ++k)
    for (int i = 0; i < MR; ++i) kept[k * MR + i] = rows[i * kBlock + k];
  std::memcpy(out, kept, static_cast<size_t>(count * MR) * sizeof(float));
}

using Interleave = void (*)(const float*, int64_t, float*);
constexpr Interleave kInterleave[kTileRows] = {interleave<1>, interleave<2>, interleave<3>,
                                               interleave<4>, interleave<5>, interleave<6>};

// Prepared rows lie block by block along K, so that the rows of a block, which an item keeps, are one piece of memory.
float* prepared(char* workspace, const Int8WeightOnly& args, int64_t k0, int64_t m) {
  return reinterpret_cast<float*>(workspace) + args.M * k0 + m * std::min(kBlock, args.K - k0);
}

void panel_rows(const Int8WeightOnly& args, char* workspace, int64_t begin, int64_t end) {
  const Tiling tiling(args.M);
  alignas(32) float rows[kTileRows * kBlock];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m0 = tiling.row(t), height = tiling.row(t + 1) - m0;
    for (int64_t k0 = 0; k0 < args.K; k0 += kBlock) {
      const int64_t count = std::min(kBlock, args.K - k0);
      for (int64_t i = 0; i < height; ++i) widen_row(args, m0 + i, k0, count, rows + i * kBlock);
      kInterleave[height - 1](rows, count, prepared(workspace, args, k0, m0));
    }
  }
}

void panel_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Tiling tiling(args.M);
  const int64_t width = plan.columns_per_item, panels = (args.N + width - 1) / width;
  const int64_t parts = plan.tile_items / panels;
  constexpr int64_t kStripFloats = (kBlock + kChunk) * kTileColumns;
  float* strip = reinterpret_cast<float*>(scratch.get((kStripFloats + plan.rows_per_item * width) * 4));
  float* products = strip + kStripFloats;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * width, columns = std::min(width, args.N - n0), part = item / panels;
    const int64_t first_tile = part * tiling.tiles / parts, last_tile = (part + 1) * tiling.tiles / parts;
    const int64_t first = tiling.row(first_tile), tiles = last_tile - first_tile;
    const int64_t ahead_columns = (kTileColumns + tiles - 1) / tiles;
    for (int64_t k0 = 0; k0 == 0 || k0 < args.K; k0 += kBlock) {
      const int64_t count = std::min(kBlock, args.K - k0);
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        expand_strip(args, n0 + j, std::min<int64_t>(kTileColumns, columns - j), k0, count, strip);
        const bool last_strip = j + kTileColumns >= columns;
        const int8_t* next = args.weight + (last_strip ? n0 : n0 + j + kTileColumns) * args.weight_stride + k0 +
                             (last_strip ? count : 0);
        for (int64_t t = 0, fetched = 0; t < tiles; ++t, fetched += ahead_columns) {
          const int64_t m = tiling.row(first_tile + t), height = tiling.row(first_tile + t + 1) - m;
          const int64_t fetch = std::clamp<int64_t>(kTileColumns - fetched, 0, ahead_columns);
          kTiles[height - 1](prepared(workspace, args, k0, m), strip, count, k0 == 0,
                             products + (m - first) * width + j, width,
                             {next + fetched * args.weight_stride, args.weight_stride, fetch});
        }
      }
    }
    kFloatEpilogueAvx2(args.epilogue, products, width, first, tiling.row(last_tile) - first, n0, columns);
  }
}

Int8MatmulPlan plan(const Int8WeightOnly& args) {
  Int8MatmulPlan plan;
  plan.streaming = args.M <= kMostStreamed;
  if (plan.streaming) {
    plan.row_bytes = (args.K + 15) / 16 * 64 + 64;  // an odd number of lines apart
    plan.rows_per_item = args.M;
    plan.columns_per_item = 64;
    plan.row_items = args.M;
    plan.tile_items = (args.N + plan.columns_per_item - 1) / plan.columns_per_item;
  } else {
    const Tiling tiling(args.M);
    plan.row_bytes = args.K * 4;
    const Panels found = plan_panels(plan, args.M, args.N, tiling.tiles, kTileRows, kTileColumns);
    plan.tile_items = found.panels * found.parts;
  }
  plan.workspace_bytes = args.M * plan.row_bytes;
  return plan;
}

void rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  if (plan.streaming) return weight_streaming_rows(args, plan, workspace, begin, end);
  panel_rows(args, workspace, begin, end);
}

void tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? weight_streaming_tiles : panel_tiles)(args, plan, workspace, begin, end);
}

}  // namespace
}  // namespace avx2

const Int8WeightOnlyKernels kInt8WeightOnlyAvx2 = {avx2::plan, avx2::rows, avx2::tiles};

}  // namespace pykernels::cpu

#endif
