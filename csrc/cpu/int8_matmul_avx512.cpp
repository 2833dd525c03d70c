// Many rows: a packed once into tiles of 6 rows, b packed a panel of 64 columns at a time, 6 x 64 accumulators.
#if defined(__x86_64__)
#include "int8_matmul_avx512.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "scratch.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "int8_matmul_panel_avx512.h"

namespace pykernels::cpu {
namespace avx512 {
namespace {

// A panel of this many dwords along K is 512 KiB: half of a second-level cache.
constexpr int64_t kPanelSteps = 2048;

}  // namespace

int32_t row_sum(const int8_t* p, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t k = 0; k < count; k += 64)
    dot<Dot::u8s8>(sum, ones, _mm512_maskz_loadu_epi8(byte_mask(count - k), p + k));
  return _mm512_reduce_add_epi32(sum);
}

void panel_rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Int8Workspace to(workspace, args.M, plan.row_bytes);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = item * kTileRows;
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, args.M - m0));
    const int8_t* rows[16] = {};
    int8_t* kept = reinterpret_cast<int8_t*>(scratch.get(kTileRows * plan.row_bytes));
    const Int8Codes codes = int8_matmul_codes(args, m0, count, kept, plan.row_bytes, to.scale);
    for (int i = 0; i < count; ++i) {
      rows[i] = codes.first + i * codes.stride;
      to.sum[m0 + i] = row_sum(rows[i], args.K);
    }
    interleave_rows(rows, count, args.K, reinterpret_cast<int32_t*>(to.rows + m0 * plan.row_bytes));
  }
}

void panel_tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Int8Workspace from(workspace, args.M, plan.row_bytes);
  const Epilogue epilogue = int8_matmul_epilogue(args, from);
  const int64_t steps = plan.row_bytes / 4;
  const bool blocked = steps > kPanelSteps;
  const int64_t panels = (args.N + kPanelColumns - 1) / kPanelColumns;
  const int64_t panel_bytes = std::min(steps, kPanelSteps) * kPanelColumns * 4;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * kPanelColumns, first = item / panels * plan.rows_per_item;
    const int64_t last = std::min(args.M, first + plan.rows_per_item);
    const int64_t columns = std::min<int64_t>(kPanelColumns, args.N - n0);
    const int vectors = static_cast<int>((columns + 15) / 16);
    // Products kept between blocks along K: all rows of the item, or one tile when there is a single block.
    const int64_t kept_rows = blocked ? last - first : kTileRows;
    char* panel = scratch.get(panel_bytes + kept_rows * kPanelColumns * 4);
    int32_t* products = reinterpret_cast<int32_t*>(panel + panel_bytes);
    for (int64_t s0 = 0; s0 == 0 || s0 < steps; s0 += kPanelSteps) {
      const int64_t count = std::min(kPanelSteps, steps - s0);
      const bool final_block = s0 + count == steps;
      pack_panel(args.b + n0 * args.b_stride + 4 * s0, args.b_stride, columns, std::min(4 * count, args.K - 4 * s0),
                 vectors, panel);
      const Packed next = packed_next(args.b, args.b_stride, args.N, args.K, n0, 4 * (s0 + count));
      const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
      for (int64_t m = first; m < last; m += kTileRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kTileRows, args.M - m));
        int32_t* out = products + (blocked ? (m - first) * kPanelColumns : 0);
        const int32_t* packed = reinterpret_cast<const int32_t*>(from.rows + m * plan.row_bytes) + s0 * rows;
        kTiles[rows - 1][vectors - 1](packed, panel, count, s0 == 0 ? from.sum + m : nullptr, out,
                                      fetch_ahead(next, 0, (m - first) / kTileRows, tiles));
        if (final_block) kEpilogueAvx512(epilogue, out, kPanelColumns, m, rows, n0, columns);
      }
    }
  }
}

}  // namespace avx512

namespace {

constexpr int64_t kPartRows = 512;  // packing for them costs 1 % of their products

Int8MatmulPlan plan(const Int8Matmul& args) {
  Int8MatmulPlan plan;
  // Packing costs about 5 cycles per 64 bytes of b whatever M; streaming costs about 3 per product to add up its lanes.
  plan.streaming = args.M <= std::max<int64_t>(16, std::min<int64_t>(64, args.K / 64));
  if (plan.streaming) {
    plan.row_bytes = (args.K + 63) / 64 * 64 + 64;  // an odd number of lines apart
    plan.rows_per_item = args.M;
    plan.columns_per_item = 64;
    plan.row_items = args.M;
    plan.tile_items = (args.N + 63) / 64;
  } else {
    plan.row_bytes = (args.K + 3) / 4 * 4;
    plan.columns_per_item = avx512::kPanelColumns;
    const int64_t panels = (args.N + avx512::kPanelColumns - 1) / avx512::kPanelColumns;
    // Parts along M each pack the panels again. With few panels they find every thread work; of many rows they are what
    // one thread prepares and then meets, which no other need fetch.
    const int64_t parts =
        std::max(std::clamp<int64_t>(16 / panels, 1, (args.M + 191) / 192), (args.M + kPartRows - 1) / kPartRows);
    const int64_t tiles = (args.M + avx512::kTileRows - 1) / avx512::kTileRows;
    plan.rows_per_item = (tiles + parts - 1) / parts * avx512::kTileRows;
    plan.row_items = tiles;
    plan.tile_items = panels * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  }
  plan.workspace_bytes = Int8Workspace::bytes(args.M, plan.row_bytes);
  return plan;
}

void rows(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx512::streaming_rows : avx512::panel_rows)(args, plan, workspace, begin, end);
}

void tiles(const Int8Matmul& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? avx512::streaming_tiles : avx512::panel_tiles)(args, plan, workspace, begin, end);
}

}  // namespace

const Int8MatmulKernels kInt8MatmulAvx512 = {plan, rows, tiles};

}  // namespace pykernels::cpu

#endif
