// The packed panels of int8_matmul_avx512.cpp, whose int32 tiles go over into float32 sums after every block of K.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "int8_block_scaled_kernels.h"
#include "int8_matmul_avx512.h"
#include "scratch.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "int8_matmul_panel_avx512.h"

namespace pykernels::cpu {
namespace avx512 {
namespace {

constexpr int64_t kBlockSteps = kScaledBlock / 4;
constexpr int64_t kPanelBlocks = 64;  // 512 KiB: half of a second-level cache

void scaled_rows(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const ScaledWorkspace to(workspace, args, plan.row_bytes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = item * kTileRows;
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, args.M - m0));
    const int8_t* rows[16] = {};
    for (int i = 0; i < count; ++i) {
      rows[i] = args.a + (m0 + i) * args.a_stride;
      for (int64_t block = 0; block < args.blocks; ++block)
        to.sum[block * args.M + m0 + i] =
            row_sum(rows[i] + block * kScaledBlock, std::min(kScaledBlock, args.K - block * kScaledBlock));
    }
    interleave_rows(rows, count, args.K, reinterpret_cast<int32_t*>(to.rows + m0 * plan.row_bytes));
  }
}

// out[i][64] += the int32 tile times the scale of its row.
void promote(const int32_t* tile, const float* scale, int rows, int vectors, float* out) {
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = i * kPanelColumns + 16 * v;
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(tile + at));
      _mm512_store_ps(out + at, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale[i]), _mm512_load_ps(out + at)));
    }
}

void scaled_tiles(const Int8BlockScaled& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin,
                  int64_t end) {
  static thread_local Scratch scratch;
  const ScaledWorkspace from(workspace, args, plan.row_bytes);
  const int64_t panels = (args.N + kPanelColumns - 1) / kPanelColumns;
  const int64_t panel_bytes = std::min(args.blocks, kPanelBlocks) * kBlockSteps * kPanelColumns * 4;
  const bool several = args.blocks > kPanelBlocks;
  alignas(64) int32_t sums[kTileRows * kPanelColumns];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * kPanelColumns, first = item / panels * plan.rows_per_item;
    const int64_t last = std::min(args.M, first + plan.rows_per_item);
    const int64_t columns = std::min<int64_t>(kPanelColumns, args.N - n0);
    const int vectors = static_cast<int>((columns + 15) / 16);
    // Products kept between panels along K: all rows of the item, or one tile when there is a single panel.
    const int64_t kept_rows = several ? last - first : kTileRows;
    char* panel = scratch.get(panel_bytes + kept_rows * kPanelColumns * 4);
    float* products = reinterpret_cast<float*>(panel + panel_bytes);
    for (int64_t block0 = 0; block0 == 0 || block0 < args.blocks; block0 += kPanelBlocks) {
      const int64_t blocks = std::min(kPanelBlocks, args.blocks - block0);
      const int64_t k0 = block0 * kScaledBlock;
      pack_panel(args.b + n0 * args.b_stride + k0, args.b_stride, columns, std::min(blocks * kScaledBlock, args.K - k0),
                 vectors, panel);
      const Packed next = packed_next(args.b, args.b_stride, args.N, args.K, n0, k0 + blocks * kScaledBlock);
      const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
      for (int64_t m = first; m < last; m += kTileRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kTileRows, args.M - m));
        float* out = products + (several ? (m - first) * kPanelColumns : 0);
        if (block0 == 0) std::fill_n(out, rows * kPanelColumns, 0.0f);
        const int32_t* packed = reinterpret_cast<const int32_t*>(from.rows + m * plan.row_bytes);
        for (int64_t block = block0; block < block0 + blocks; ++block) {
          const int64_t steps = (std::min(kScaledBlock, args.K - block * kScaledBlock) + 3) / 4;
          float scale[kTileRows];
          for (int i = 0; i < rows; ++i) scale[i] = block_scale(args, m + i, n0, block);
          kTiles[rows - 1][vectors - 1](
              packed + block * kBlockSteps * rows, panel + (block - block0) * kBlockSteps * vectors * 64, steps,
              from.sum + block * args.M + m, sums,
              fetch_ahead(next, (block - block0) * kScaledBlock, (m - first) / kTileRows, tiles));
          promote(sums, scale, rows, vectors, out);
        }
        if (block0 + blocks == args.blocks)
          kFloatEpilogueAvx512(args.epilogue, out, kPanelColumns, m, rows, n0, columns);
      }
    }
  }
}

}  // namespace
}  // namespace avx512

namespace {

Int8MatmulPlan plan(const Int8BlockScaled& args) {
  Int8MatmulPlan plan;
  plan.row_bytes = (args.K + 3) / 4 * 4;
  plan.columns_per_item = avx512::kPanelColumns;
  const int64_t panels = (args.N + avx512::kPanelColumns - 1) / avx512::kPanelColumns;
  // With few panels the rows are split too, so that every thread finds work; each part packs its panel again.
  const int64_t parts = std::clamp<int64_t>(16 / panels, 1, (args.M + 191) / 192);
  const int64_t tiles = (args.M + avx512::kTileRows - 1) / avx512::kTileRows;
  plan.rows_per_item = (tiles + parts - 1) / parts * avx512::kTileRows;
  plan.row_items = tiles;
  plan.tile_items = panels * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  plan.workspace_bytes = ScaledWorkspace::bytes(args, plan.row_bytes);
  return plan;
}

}  // namespace

const Int8BlockScaledKernels kInt8BlockScaledAvx512 = {plan, avx512::scaled_rows, avx512::scaled_tiles};

}  // namespace pykernels::cpu

#endif
