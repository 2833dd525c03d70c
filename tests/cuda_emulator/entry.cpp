// The launchers as C functions for ctypes, and the emulator's switches.
#include "csrc/cuda/common.cuh"
#include "csrc/cuda/group_tile.cuh"
#include "csrc/cuda/int8_block_scaled_matmul.h"
#include "csrc/cuda/layout.cuh"

using namespace pykernels::cuda;

namespace {

// seen[row] += 1 for each row of each tile that a block of the grouped products finds, and expert[row] is its group.
template <int kM>
__global__ void count_group_tiles(Int8GroupedMatmul p, int32_t* seen, int32_t* expert) {
  const GroupTile group = find_group_tile<kM>(p, tile_of(blockIdx.x, p.row_tiles, p.n).m);
  if (threadIdx.x != 0) return;
  for (int64_t row = group.first; row < group.end && row < group.first + kM; ++row) {
    ++seen[row];
    expert[row] = static_cast<int32_t>(group.expert);
  }
}

template <int kM>
const char* launch_count(Int8GroupedMatmul p, int32_t* seen, int32_t* expert) {
  p.row_tiles = most_row_tiles(p.rows, p.experts, kM);
  return launch(count_group_tiles<kM>, p.row_tiles * p.n, 1, 32, 0, nullptr, p, seen, expert);
}

}  // namespace

extern "C" {

void emulator_configure(int deferred_copies, uint32_t seed, int multiprocessors) {
  emulator::deferred_copies = deferred_copies != 0;
  emulator::schedule_seed = seed;
  emulator::multiprocessors = multiprocessors;
}

const char* emulated_quantize_rowwise(const pykernels::QuantizeRowwise* p, int64_t rows) {
  return quantize_rowwise(*p, rows, nullptr);
}
const char* emulated_int8_matmul(const Int8Matmul* p) { return int8_matmul(*p, nullptr); }
const char* emulated_int8_matmul_tiled(const Int8Matmul* p) { return int8_matmul_tiled(*p, nullptr); }
const char* emulated_int8_weight_only_linear(const Int8WeightOnlyLinear* p) {
  return int8_weight_only_linear(*p, nullptr);
}
const char* emulated_int8_grouped_matmul(const Int8GroupedMatmul* p) { return int8_grouped_matmul(*p, nullptr); }
const char* emulated_int8_block_scaled_matmul(const pykernels::Int8BlockScaled* p) {
  return int8_block_scaled_matmul(*p, nullptr);
}
// The order of output tiles: seen[m * tiles_n + n] += 1.
void emulated_tile_order(int64_t tiles_m, int64_t tiles_n, int32_t* seen) {
  for (int64_t linear = 0; linear < tiles_m * tiles_n; ++linear) {
    const Tile tile = tile_of(linear, tiles_m, tiles_n);
    ++seen[tile.m * tiles_n + tile.n];
  }
}
// p.n counts the tiles across.
const char* emulated_group_tiles(const Int8GroupedMatmul* p, int rows, int32_t* seen, int32_t* expert) {
  return rows == 32    ? launch_count<32>(*p, seen, expert)
         : rows == 64  ? launch_count<64>(*p, seen, expert)
         : rows == 128 ? launch_count<128>(*p, seen, expert)
                       : "no kernel has tiles of so many rows";
}
const char* emulated_int8_row_sum(const int8_t* b, int64_t stride, int64_t n, int64_t k, int32_t* out) {
  return int8_row_sum(b, stride, n, k, out, nullptr);
}
}
