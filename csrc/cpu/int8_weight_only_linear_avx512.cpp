// Many rows: panels of 64 columns of weight are dequantised into the second-level cache, to float32 or, for bfloat16
// activations on a machine with vdpbf16ps, to bfloat16 (which holds every int8 exactly), and met by 6 x 64 tiles.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_matmul_avx512.h"
#include "int8_weight_only_linear_kernels.h"
#include "scratch.h"

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")
#include "int8_matmul_math_avx512.h"

namespace pykernels::cpu {
namespace avx512 {
namespace {

// A panel of this many dwords along K is 512 KiB: half of a second-level cache.
constexpr int64_t kPanelSteps = 2048;

int64_t group_size(const Int8WeightOnly& args) { return args.K / args.groups; }

// Pairs along K must not straddle groups, and a block along K must hold whole groups.
bool uses_bf16(const Int8WeightOnly& args) {
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  if (!supported || args.x_dtype != DType::bf16) return false;
  return args.group_scale == nullptr || (group_size(args) % 2 == 0 && group_size(args) <= 2 * kPanelSteps);
}

struct Block {
  int64_t per_step;    // elements of K in a dword
  int64_t steps;       // dwords along K
  int64_t at_most;     // dwords of one block
  bool scaled_groups;  // sums of groups are scaled, not their weights
};

Block block_of(const Int8WeightOnly& args) {
  const bool bf16 = uses_bf16(args);
  const int64_t per_step = bf16 ? 2 : 1;
  const bool scaled_groups = bf16 && args.group_scale != nullptr;
  const int64_t whole = scaled_groups ? std::max<int64_t>(1, group_size(args) / per_step) : 1;
  return {per_step, (args.K + per_step - 1) / per_step, kPanelSteps / whole * whole, scaled_groups};
}

// Four int8 of each of 16 columns to float32: byte 0, 1, 2 or 3 of every lane.
template <int kByte>
inline __m512 byte_of(__m512i codes) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * kByte), 24));
}

// Two floats that bfloat16 holds exactly, as a pair.
inline __m512i pair(__m512 low, __m512 high) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                 _mm512_castps_si512(high));
}

// 16 columns by 4 of K to two dwords of bfloat16 pairs, `pitch` bytes apart.
inline __attribute__((always_inline)) void expand_bf16(__m512i codes, char* out, int64_t pitch, bool both) {
  _mm512_store_si512(out, pair(byte_of<0>(codes), byte_of<1>(codes)));
  if (both) _mm512_store_si512(out + pitch, pair(byte_of<2>(codes), byte_of<3>(codes)));
}

// The same to as many as four dwords of float32, times the scale of their group when there is one.
inline void expand_f32(__m512i codes, char* out, int64_t pitch, int64_t count, const float* scale, int64_t k,
                       int64_t size) {
  const __m512 w[4] = {byte_of<0>(codes), byte_of<1>(codes), byte_of<2>(codes), byte_of<3>(codes)};
  for (int64_t i = 0; i < std::min<int64_t>(4, count); ++i) {
    const __m512 value = scale ? _mm512_mul_ps(w[i], _mm512_load_ps(scale + (k + i) / size * kPanelColumns)) : w[i];
    _mm512_store_ps(reinterpret_cast<float*>(out + i * pitch), value);
  }
}

// weight[n0 + c][k0 .. k0 + count) to [steps][NV][16] dwords. scale [groups][64] multiplies float32 weights.
void pack_weight(const Int8WeightOnly& args, const Block& block, int64_t n0, int64_t columns, int64_t k0, int64_t count,
                 int vectors, const float* scale, char* out) {
  const int64_t size = group_size(args), pitch = 64 * vectors, quad_pitch = 4 / block.per_step * pitch;
  for (int v = 0; v < vectors; ++v) {
    const int64_t valid_columns = columns - 16 * v;
    const int8_t* p = args.weight + (n0 + 16 * v) * args.weight_stride + k0;
    for (int64_t k = 0; k < count; k += 64) {
      __m512i r[16];
      const __mmask64 mask = byte_mask(count - k);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = _mm512_maskz_loadu_epi8(i < valid_columns ? mask : 0, p + i * args.weight_stride + k);
      transpose16(r);
      char* to = out + k / block.per_step * pitch + 64 * v;
      const int64_t valid = std::min<int64_t>(64, count - k);
      if (block.per_step == 1) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          expand_f32(r[i], to + i * quad_pitch, pitch, valid - 4 * i, scale ? scale + 16 * v : nullptr, k0 + k + 4 * i,
                     size);
      } else if (valid == 64) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) expand_bf16(r[i], to + i * quad_pitch, pitch, true);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          if (4 * i < valid) expand_bf16(r[i], to + i * quad_pitch, pitch, 4 * i + 2 < valid);
      }
    }
  }
}

// out[i][64] (=|+=) the tile over `groups` runs of `steps`; with a scale [groups][64] each run is scaled as it is
// added.
template <Dot D, int MR, int NV>
__attribute__((noinline)) void tile(const int32_t* rows, const char* panel, int64_t steps, int64_t groups,
                                    const float* scale, bool first, float* out) {
  for (int64_t g = 0; g < groups; ++g) {
    const bool fresh = first && g == 0;
    __m512i acc[MR][NV];
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
        acc[i][v] = fresh || scale ? _mm512_setzero_si512() : _mm512_load_si512(out + i * kPanelColumns + 16 * v);
    accumulate<D>(acc, rows, panel, steps, NothingAhead{});
    rows += steps * MR, panel += steps * NV * 64;
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* to = out + i * kPanelColumns + 16 * v;
        __m512 sum = _mm512_castsi512_ps(acc[i][v]);
        if (scale) {
          sum = _mm512_mul_ps(sum, _mm512_load_ps(scale + g * kPanelColumns + 16 * v));
          if (!fresh) sum = _mm512_add_ps(sum, _mm512_load_ps(to));
        }
        _mm512_store_ps(to, sum);
      }
  }
}

using Tile = void (*)(const int32_t*, const char*, int64_t, int64_t, const float*, bool, float*);
template <Dot D>
constexpr Tile kTiles[kTileRows][4] = {
    {tile<D, 1, 1>, tile<D, 1, 2>, tile<D, 1, 3>, tile<D, 1, 4>},
    {tile<D, 2, 1>, tile<D, 2, 2>, tile<D, 2, 3>, tile<D, 2, 4>},
    {tile<D, 3, 1>, tile<D, 3, 2>, tile<D, 3, 3>, tile<D, 3, 4>},
    {tile<D, 4, 1>, tile<D, 4, 2>, tile<D, 4, 3>, tile<D, 4, 4>},
    {tile<D, 5, 1>, tile<D, 5, 2>, tile<D, 5, 3>, tile<D, 5, 4>},
    {tile<D, 6, 1>, tile<D, 6, 2>, tile<D, 6, 3>, tile<D, 6, 4>},
};

// 16 dwords of row m from dword s on: float32, or pairs of bfloat16.
__m512i load_row(const Int8WeightOnly& args, const Block& block, int64_t m, int64_t s) {
  const int64_t k = s * block.per_step, index = m * args.x_stride + k;
  if (block.per_step == 1) return _mm512_castps_si512(load16(args.x, args.x_dtype, index, lane_mask(args.K - k)));
  return _mm512_maskz_loadu_epi8(byte_mask(2 * (args.K - k)), static_cast<const uint16_t*>(args.x) + index);
}

void panel_rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  const Block block = block_of(args);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m0 = item * kTileRows;
    const int64_t count = std::min<int64_t>(kTileRows, args.M - m0);
    int32_t* out = reinterpret_cast<int32_t*>(workspace + m0 * plan.row_bytes);
    const auto load = [&](int64_t s, __m512i(&r)[16]) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = i < count ? load_row(args, block, m0 + i, s) : _mm512_setzero_si512();
    };
    interleave(load, static_cast<int>(count), block.steps, out);
  }
}

void panel_tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  static thread_local Scratch scratch;
  const Block block = block_of(args);
  const bool blocked = block.steps > block.at_most;
  const int64_t panels = (args.N + kPanelColumns - 1) / kPanelColumns;
  const int64_t panel_bytes = std::min(block.steps, block.at_most) * kPanelColumns * 4;
  const int64_t scale_bytes = args.group_scale ? args.groups * kPanelColumns * 4 : 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n0 = item % panels * kPanelColumns, first = item / panels * plan.rows_per_item;
    const int64_t last = std::min(args.M, first + plan.rows_per_item);
    const int64_t columns = std::min<int64_t>(kPanelColumns, args.N - n0);
    const int vectors = static_cast<int>((columns + 15) / 16);
    const int64_t kept_rows = blocked ? last - first : kTileRows;
    char* panel = scratch.get(panel_bytes + scale_bytes + kept_rows * kPanelColumns * 4);
    float* scale = args.group_scale ? reinterpret_cast<float*>(panel + panel_bytes) : nullptr;
    float* products = reinterpret_cast<float*>(panel + panel_bytes + scale_bytes);
    if (scale)
      for (int64_t g = 0; g < args.groups; ++g)
        for (int64_t c = 0; c < kPanelColumns; ++c)
          scale[g * kPanelColumns + c] = c < columns ? args.group_scale[(n0 + c) * args.groups + g] : 0.0f;
    for (int64_t s0 = 0; s0 == 0 || s0 < block.steps; s0 += block.at_most) {
      const int64_t steps = std::min(block.at_most, block.steps - s0), k0 = s0 * block.per_step;
      pack_weight(args, block, n0, columns, k0, std::min(steps * block.per_step, args.K - k0), vectors,
                  block.scaled_groups ? nullptr : scale, panel);
      const int64_t run = block.scaled_groups ? group_size(args) / block.per_step : steps;
      const float* run_scale = block.scaled_groups ? scale + k0 / group_size(args) * kPanelColumns : nullptr;
      for (int64_t m = first; m < last; m += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, args.M - m);
        float* out = products + (blocked ? (m - first) * kPanelColumns : 0);
        const int32_t* packed = reinterpret_cast<const int32_t*>(workspace + m * plan.row_bytes) + s0 * rows;
        (block.per_step == 2 ? kTiles<Dot::bf16> : kTiles<Dot::f32>)[rows - 1][vectors - 1](
            packed, panel, run, run == 0 ? 1 : steps / run, run_scale, s0 == 0, out);
        if (s0 + steps == block.steps) kFloatEpilogueAvx512(args.epilogue, out, kPanelColumns, m, rows, n0, columns);
      }
    }
  }
}

Int8MatmulPlan plan(const Int8WeightOnly& args) {
  Int8MatmulPlan plan;
  // Streaming dequantises once for every 6 rows, packing once for all but through memory.
  plan.streaming = args.M <= (uses_bf16(args) ? 6 : 24);
  if (plan.streaming) {
    plan.row_bytes = (args.K + 15) / 16 * 64 + 64;
    plan.columns_per_item = 64;
    plan.row_items = args.M;
    plan.tile_items = (args.N + 63) / 64;
  } else {
    plan.row_bytes = block_of(args).steps * 4;
    const int64_t panels = (args.N + kPanelColumns - 1) / kPanelColumns;
    const int64_t parts = std::clamp<int64_t>(16 / panels, 1, (args.M + 191) / 192);
    plan.row_items = (args.M + kTileRows - 1) / kTileRows;
    plan.rows_per_item = (plan.row_items + parts - 1) / parts * kTileRows;
    plan.tile_items = panels * ((args.M + plan.rows_per_item - 1) / plan.rows_per_item);
  }
  plan.workspace_bytes = args.M * plan.row_bytes;
  return plan;
}

void rows(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? weight_streaming_rows : panel_rows)(args, plan, workspace, begin, end);
}

void tiles(const Int8WeightOnly& args, const Int8MatmulPlan& plan, char* workspace, int64_t begin, int64_t end) {
  (plan.streaming ? weight_streaming_tiles : panel_tiles)(args, plan, workspace, begin, end);
}

}  // namespace
}  // namespace avx512

const Int8WeightOnlyKernels kInt8WeightOnlyAvx512 = {avx512::plan, avx512::rows, avx512::tiles};

}  // namespace pykernels::cpu

#endif
