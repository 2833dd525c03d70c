// Where things lie: shared-memory tiles, mma fragments, and the order in which output tiles are visited.
// Index arithmetic alone, constexpr.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile whose rows hold 64 or 128 bytes. The exclusive or spreads
// the eight rows that one ldmatrix phase reads over all 32 banks.
template <int kRowBytes>
constexpr int tile_offset(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes == 128);
  return row * kRowBytes + ((chunk ^ (kRowBytes == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}

// The same for row first + row where first is a multiple of 8, which leaves the swizzle to row alone: one address a
// lane serves every fragment, at constant distances.
template <int kRowBytes>
constexpr int tile_offset_from(int first, int row, int chunk) {
  return first * kRowBytes + tile_offset<kRowBytes>(row, chunk);
}

// Whether chunk c of rows r to r + 7 lies in eight different groups of four banks, for every c and every such r.
template <int kRowBytes>
constexpr bool is_conflict_free() {
  for (int first = 0; first < 16; first += 8) {
    for (int chunk = 0; chunk < kRowBytes / 16; ++chunk) {
      int seen = 0;
      for (int row = first; row < first + 8; ++row) seen |= 1 << (tile_offset<kRowBytes>(row, chunk) / 16 % 8);
      if (seen != 0xff) return false;
    }
  }
  return true;
}
static_assert(is_conflict_free<64>() && is_conflict_free<128>());

// ldmatrix.x4: the row and the chunk (of two neighbours) whose address a lane supplies.
// For A: 16 rows, registers a0..a3 = (rows 0-7, first chunk), (8-15, first), (0-7, second), (8-15, second).
constexpr int a_lane_row(int lane) { return lane & 15; }
constexpr int a_lane_chunk(int lane) { return lane >> 4; }
// For B: 16 rows as two n-tiles of 8, registers = tile 0 (first chunk), (second), tile 1 (first), (second).
constexpr int b_lane_row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
constexpr int b_lane_chunk(int lane) { return (lane >> 3) & 1; }

// Row and column, in the 16 x 8 result of one mma, of accumulator register i of a lane.
constexpr int acc_row(int lane, int i) { return (lane >> 2) + ((i >> 1) << 3); }
constexpr int acc_col(int lane, int i) { return ((lane & 3) << 1) + (i & 1); }

// Output tiles in bands of kBand rows of tiles, down each column of a band first: neighbours in time share rows of
// both operands in L2.
struct Tile {
  int64_t m;
  int64_t n;
};

constexpr int64_t kBand = 8;

constexpr Tile tile_of(int64_t linear, int64_t tiles_m, int64_t tiles_n) {
  const int64_t band = linear / (kBand * tiles_n);
  const int64_t first = band * kBand;
  const int64_t rows = tiles_m - first < kBand ? tiles_m - first : kBand;
  const int64_t within = linear - first * tiles_n;
  return {first + within % rows, within / rows};
}

}  // namespace pykernels::cuda
