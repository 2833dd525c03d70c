// Which rows a row tile of a grouped product has, found on the device among the counts.
#pragma once

#include "common.cuh"
#include "int8_grouped_matmul.h"

namespace pykernels::cuda {

// Rows [first, end) of a group from the tile's first on; expert p.experts has those that none counts. first == end: the
// grid has more tiles than these counts make.
struct GroupTile {
  int64_t expert;
  int64_t first;
  int64_t end;
};

// Row tiles of kM that the groups and the uncounted rows make at most: each that is not empty may end in a part of one.
inline int64_t most_row_tiles(int64_t rows, int64_t experts, int64_t kM) {
  const int64_t most = (rows + (experts + 1) * (kM - 1)) / kM;
  return rows < most ? rows : most;
}

// Every warp finds it for itself, 32 experts at a time.
template <int kM>
__device__ __forceinline__ GroupTile find_group_tile(const Int8GroupedMatmul& p, int64_t tile) {
  const int lane = threadIdx.x % 32;
  int64_t rows_before = 0, tiles_before = 0;
  for (int64_t base = 0; base <= p.experts; base += 32) {
    const int64_t e = base + lane;
    int64_t count = 0;
    if (e < p.experts) {
      count = p.counts_are_wide ? static_cast<const int64_t*>(p.counts)[e] : static_cast<const int32_t*>(p.counts)[e];
      // At most p.rows each, so that sums stay far inside int64 whatever the counts are.
      count = count < 0 ? 0 : count < p.rows ? count : p.rows;
    }
    const int64_t sum = rows_before + warp_scan(count);
    const int64_t first = sum - count < p.rows ? sum - count : p.rows;
    const int64_t end = e < p.experts && sum < p.rows ? sum : p.rows;
    const int64_t tiles = e <= p.experts ? (end - first + kM - 1) / kM : 0;
    const int64_t tiles_end = tiles_before + warp_scan(tiles);
    const bool here = tile < tiles_end && tile >= tiles_end - tiles;
    if (warp_max(here ? 1u : 0u) != 0) {
      return {warp_sum(here ? e : 0), warp_sum(here ? first + (tile - (tiles_end - tiles)) * kM : 0),
              warp_sum(here ? end : 0)};
    }
    rows_before += warp_sum(count);
    tiles_before += warp_sum(tiles);
  }
  return {0, 0, 0};
}

}  // namespace pykernels::cuda
