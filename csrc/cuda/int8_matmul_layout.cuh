// Where things lie: shared-memory tiles, mma fragments, and the order in which output tiles are visited.
// Index arithmetic alone, constexpr, so that a host test can prove each map is a bijection.
#pragma once

#include <cstdint>

namespace pykernels::cuda {

// Bytes of K in one shared-memory tile row, and 16-byte chunks of it.
constexpr int kTileK = 64;
constexpr int kTileChunks = kTileK / 16;

// Byte offset of 16-byte chunk `chunk` of row `row`. The exclusive or spreads the eight rows that one ldmatrix phase
// reads over all 32 banks.
constexpr int tile_offset(int row, int chunk) { return row * kTileK + ((chunk ^ ((row >> 1) & 3)) << 4); }

// ldmatrix.x4: the row and the chunk (of the two that hold 32 bytes of K) whose address a lane supplies.
// For A: 16 rows, registers a0..a3 = (rows 0-7, k 0-15), (8-15, 0-15), (0-7, 16-31), (8-15, 16-31).
constexpr int a_lane_row(int lane) { return lane & 15; }
constexpr int a_lane_chunk(int lane) { return lane >> 4; }
// For B: 16 rows as two n-tiles of 8, registers = tile 0 (k 0-15), (16-31), tile 1 (0-15), (16-31).
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
