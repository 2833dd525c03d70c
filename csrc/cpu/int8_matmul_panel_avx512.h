// Packing both operands of the panels of int8_matmul_tile_avx512.h, and the int8 tile over them.
// Include after the standard headers, int8_matmul_avx512.h and #pragma GCC target.
#pragma once

#include "int8_matmul_tile_avx512.h"

namespace pykernels::cpu::avx512 {
namespace {

// rows [count][K] to out [steps][count] dwords, zero past K.
void interleave_rows(const int8_t* const* rows, int count, int64_t K, int32_t* out) {
  const auto load = [&](int64_t s, __m512i(&r)[16]) {
    const __mmask64 mask = byte_mask(K - 4 * s);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = i < count ? _mm512_maskz_loadu_epi8(mask, rows[i] + 4 * s) : _mm512_setzero_si512();
  };
  interleave(load, count, (K + 3) / 4, out);
}

// b[n0 + c][k0 .. k0 + bytes) to [steps][NV][16][4] as unsigned bytes (value + 128); columns and bytes beyond are 0.
void pack_panel(const int8_t* b, int64_t stride, int64_t columns, int64_t bytes, int vectors, char* out) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const int64_t steps = (bytes + 3) / 4;
  for (int v = 0; v < vectors; ++v) {
    const int64_t valid_columns = columns - 16 * v;
    for (int64_t s = 0; s < steps; s += 16) {
      __m512i r[16];
      const __mmask64 mask = byte_mask(bytes - 4 * s);
      const int8_t* p = b + 16 * v * stride + 4 * s;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        r[i] = _mm512_xor_si512(flip, _mm512_maskz_loadu_epi8(i < valid_columns ? mask : 0, p + i * stride));
        _mm_prefetch(p + (i + 16) * stride, _MM_HINT_T1);  // the next 16 columns, when b is cold
      }
      transpose16(r);
      char* to = out + (s * vectors + v) * 64;
      const int64_t valid = std::min<int64_t>(16, steps - s);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < valid) _mm512_store_si512(to + i * vectors * 64, r[i]);
    }
  }
}

// Rows of b, which become columns of a panel.
struct Packed {
  const int8_t* first;
  int64_t stride, columns;
};

// What is packed after columns n0 .. of b up to k: their next block along K, or else the next columns.
inline Packed packed_next(const int8_t* b, int64_t stride, int64_t N, int64_t K, int64_t n0, int64_t k) {
  if (k >= K) k = 0, n0 = n0 + kPanelColumns < N ? n0 + kPanelColumns : n0;
  return {b + n0 * stride + k, stride, std::min<int64_t>(kPanelColumns, N - n0)};
}

// The share of tile t of `tiles` in fetching it, from byte k of its rows on, so that a cold b is read meanwhile.
inline Ahead fetch_ahead(const Packed& next, int64_t k, int64_t t, int64_t tiles) {
  Ahead ahead;
  ahead.next = reinterpret_cast<const char*>(next.first + k);
  const int64_t share = std::min<int64_t>(16, (next.columns + tiles - 1) / tiles);
  for (int64_t i = 0; i < 16; ++i) ahead.row[i] = std::min(t * share + i % share, next.columns - 1) * next.stride;
  return ahead;
}

// out[i][64] (=|+=) the tile; the first block along K starts at -128 * the row's sum, because b was packed as b + 128.
template <int MR, int NV>
__attribute__((noinline)) void tile(const int32_t* rows, const char* panel, int64_t steps, const int32_t* sum,
                                    int32_t* out, const Ahead& ahead) {
  __m512i acc[MR][NV];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      acc[i][v] = sum ? _mm512_set1_epi32(static_cast<int32_t>(-128u * static_cast<uint32_t>(sum[i])))
                      : _mm512_load_si512(out + i * kPanelColumns + 16 * v);
  accumulate<Dot::u8s8>(acc, rows, panel, steps, ahead);
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) _mm512_store_si512(out + i * kPanelColumns + 16 * v, acc[i][v]);
}

using Tile = void (*)(const int32_t*, const char*, int64_t, const int32_t*, int32_t*, const Ahead&);
constexpr Tile kTiles[kTileRows][4] = {
    {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>}, {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
    {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, {tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>},
    {tile<5, 1>, tile<5, 2>, tile<5, 3>, tile<5, 4>}, {tile<6, 1>, tile<6, 2>, tile<6, 3>, tile<6, 4>},
};

}  // namespace
}  // namespace pykernels::cpu::avx512
