// The kernels that serve int8_matmul on sm_90, and which of them a shape gets. Arithmetic on integers alone: no torch,
// no CUDA. The launcher chooses with it, and Python through pykernels._host (pykernels.ops.heuristics).
#pragma once

#include <cstdint>

namespace pykernels::cuda::hopper {

// Each Hopper member costs a compile of about half a minute for each width of result; what it is for:
enum class Schedule : int {
  small_m = 0,         // up to 16 rows: csrc/cuda/int8_matmul_small_m.cu reads b once, straight into mma fragments
  mma_sync = 1,        // what TMA cannot address: csrc/cuda/int8_matmul.cu
  tile_64x64 = 2,      // up to 64 rows: as many tiles as b has columns for; a travels once to two SMs
  tile_64x128 = 3,     // two or more tiles of 64 rows: b, the larger operand, travels once to two SMs
  tile_128x128 = 4,    // the middle: two warpgroups alternate, one stores while the other multiplies
  tile_128x256 = 5,    // large products: most operations for each byte from L2, both warpgroups on one tile
  stream_128x128 = 6,  // too few tiles for the SMs, or just more than a wave: K is cut so that every SM has the same
};
inline constexpr int kSchedules = 7;

struct Shape {
  const char* name;
  int m, n, k;  // of a tile; 0 for the kernels that are not Hopper's
  int cluster_m, cluster_n;
  bool pingpong;
  bool stream_k;
};

constexpr Shape shape_of(Schedule schedule) {
  switch (schedule) {
    case Schedule::small_m:
      return {"small_m", 0, 0, 0, 1, 1, false, false};
    case Schedule::mma_sync:
      return {"mma_sync", 0, 0, 0, 1, 1, false, false};
    case Schedule::tile_64x64:
      return {"tile_64x64", 64, 64, 256, 1, 2, true, false};
    case Schedule::tile_64x128:
      return {"tile_64x128", 64, 128, 128, 2, 1, true, false};
    case Schedule::tile_128x128:
      return {"tile_128x128", 128, 128, 128, 2, 1, true, false};
    case Schedule::tile_128x256:
      return {"tile_128x256", 128, 256, 128, 2, 1, false, false};
    default:
      return {"stream_128x128", 128, 128, 128, 2, 1, false, true};
  }
}

inline constexpr int kSharedLimit = 227 * 1024;  // of a block on sm_90
inline constexpr int kSmallM = 16;
inline constexpr int kSwizzle = 8;  // clusters in a band of tiles, at most

constexpr int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Clusters in a band. CUTLASS rounds the grid up to whole bands in both directions and computes the tiles that this
// adds: the widest band that adds none is taken.
constexpr int swizzle(const Shape& s, int64_t m, int64_t n) {
  const int64_t clusters_m = ceil_of(ceil_of(m, s.m), s.cluster_m), clusters_n = ceil_of(ceil_of(n, s.n), s.cluster_n);
  int band = kSwizzle;
  while (clusters_m % band != 0 || clusters_n % band != 0) band /= 2;
  return band;
}

}  // namespace pykernels::cuda::hopper
