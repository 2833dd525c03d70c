// Many rows: a packed once into tiles of 4 rows, b packed 16 columns by 512 codes at a time into the first-level cache.
#if defined(__x86_64__)
#include "int8_matmul_avx2.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "scratch.h"

#pragma GCC target("avx2,fma,f16c")
#include "int8_matmul_tile_avx2.h"
#include "panel_plan_avx2.h"

namespace pykernels::cpu {
namespace avx2 {
namespace {

// 16 columns of this many quads are 16 KiB: half of a first-level cache.
constexpr int64_t kBlockQuads = kMostQuads;

using Interleave = void (*)(const int8_t*, int64_t, int64_t, int32_t*, int32_t*);
constexpr Interleave kInterleave[kTileRows] = {interleave_rows<1>, interleave_rows<2>, interleave_rows<3>,
                                               interleave_rows<4>};

using Tile = void (*)(const int32_t*, const char*, int64_t, const int32_t*, const int32_t*, int32_t*, int64_t, Ahead);
constexpr Tile kTiles[kTileRows] = {tile<1>, tile<2>, tile<3>, tile<4>};

// Prepared rows lie block by block along K, so that the rows of a block, which an item keeps, are one piece of memory:
// whole rows lie a power of two apart and would evict one another.
int32_t* packed_rows(const Int8Workspace& workspace, int64_t M, int64_t padded_quads, int64_t q0, int64_t m) {
  const int64_t quads = std::min(kBlockQuads, padded_quads - q0);
  return reinterpret_cast<int32_t*>(workspace.rows) + 2 * (M * q0 + m * quads);
}

int64_t padded_codes(int64_t K) { return (K + 4 * kQuads - 1) / (4 * kQuads) * (4 * kQuads); }

}  // namespace

void panel_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  const int64_t stride = padded_codes(args.K);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = item * kTileRows, count = std::min<int64_t>(kTileRows, args.M - m0);
    int8_t* rows = reinterpret_cast<int8_t*>(scratch.get(kTileRows * stride));
    const Int8Codes codes = int8_matmul_codes(args, m0, count, rows, stride, to.scale);
    for (int64_t i = 0; i < count; ++i) {
      int8_t* row = rows + i * stride;
      if (codes.first != rows) std::memcpy(row, codes.first + i * codes.stride, static_cast<size_t>(args.K));
      std::memset(row + args.K, 0, static_cast<size_t>(stride - args.K));
    }
    std::fill_n(to.sum + m0, count, 0);
    for (int64_t q0 = 0; q0 < stride / 4; q0 += kBlockQuads)
      kInterleave[count - 1](rows + 4 * q0, stride, std::min(kBlockQuads, stride / 4 - q0),
                             packed_rows(to, args.M, stride / 4, q0, m0), to.sum + m0);
  }
}

void panel_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  const int64_t quads = (args.K + 3) / 4, padded_quads = padded_codes(args.K) / 4;
  const int64_t width = plan.columns_per_item;
  const int64_t panels = (args.N + width - 1) / width;
  constexpr int64_t kStripBytes = kBlockQuads * kStripQuadBytes;
  char* strip = scratch.get(kStripBytes + plan.rows_per_item * width * 4);
  int32_t* products = reinterpret_cast<int32_t*>(strip + kStripBytes);
  alignas(32) int32_t column_sum[kTileColumns];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * width, columns = std::min(width, args.N - n0);
    const int64_t first = item / panels * plan.rows_per_item, last = std::min(args.M, first + plan.rows_per_item);
    const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
    const int64_t ahead_columns = (kTileColumns + tiles - 1) / tiles;
    for (int64_t q0 = 0; q0 == 0 || q0 < quads; q0 += kBlockQuads) {
      const int64_t count = std::min(kBlockQuads, quads - q0);
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int8_t* b = args.b + (n0 + j) * args.b_stride + 4 * q0;
        pack_strip(b, args.b_stride, columns - j, std::min(4 * count, args.K - 4 * q0), strip, column_sum);
        const bool last_strip = j + kTileColumns >= columns;
        const int8_t* next =
            last_strip ? args.b + n0 * args.b_stride + 4 * (q0 + count) : b + kTileColumns * args.b_stride;
        for (int64_t m = first, fetched = 0; m < last; m += kTileRows, fetched += ahead_columns) {
          const int64_t rows = std::min<int64_t>(kTileRows, last - m);
          const int64_t fetch = std::clamp<int64_t>(kTileColumns - fetched, 0, ahead_columns);
          kTiles[rows - 1](packed_rows(from, args.M, padded_quads, q0, m), strip, count,
                           q0 == 0 ? from.sum + m : nullptr, column_sum, products + (m - first) * width + j, width,
                           {next + fetched * args.b_stride, args.b_stride, fetch});
        }
      }
    }
    kEpilogueAvx2(epilogue, products, width, first, last - first, n0, columns);
  }
}

}  // namespace avx2

namespace {

Int8MatmulPlan plan(const Int8Matmul& args) {
  Int8MatmulPlan plan;
  plan.streaming = args.M <= avx2::kMostStreamed;
  if (plan.streaming) {
    plan.row_bytes = ((args.K + 15) / 16 * 16 + 32) * 2;  // an odd number of lines apart
    plan.rows_per_item = args.M;
    plan.columns_per_item = 64;
    plan.row_items = args.M;
    plan.tile_items = (args.N + 63) / 64;
  } else {
    plan.row_bytes = 2 * avx2::padded_codes(args.K);
    const int64_t tiles = (args.M + avx2::kTileRows - 1) / avx2::kTileRows;
    const auto found = avx2::plan_panels(plan, args.M, args.N, tiles, avx2::kTileRows, avx2::kTileColumns);
    plan.tile_items = found.panels * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  }
  plan.workspace_bytes = Int8Workspace::bytes(args.M, plan.row_bytes);
  return plan;
}

void rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx2::streaming_rows : avx2::panel_rows)(args, plan, workspace, begin, end);
}

void tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx2::streaming_tiles : avx2::panel_tiles)(args, plan, workspace, begin, end);
}

}  // namespace

const Int8MatmulKernels kInt8MatmulAvx2 = {plan, rows, tiles};

}  // namespace pykernels::cpu

#endif
