// The int8 main loop of a tile, which the products of one matrix and of groups share: mma.m16n8k32, cp.async into
// shared-memory stages, ldmatrix.
#pragma once

#include "tile.cuh"

namespace pykernels::cuda {

constexpr int kTileK = 64;  // bytes of K in a stage

// The rows of both operands that a tile needs, from its first on, and how many exist.
struct TileOperands {
  const int8_t* a;
  int64_t a_stride;
  int rows;
  const int8_t* b;
  int64_t b_stride;
  int columns;
  int k;
};

template <typename S, bool kAligned>
__device__ __forceinline__ void load_stage(const TileOperands& p, unsigned char* shared, int step) {
  unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
  load_tile<S::kM, kTileK, S::kThreads, kAligned>(stage, p.a, p.a_stride, p.rows, step * kTileK, p.k);
  load_tile<S::kN, kTileK, S::kThreads, kAligned>(stage + S::kStageBytesA, p.b, p.b_stride, p.columns, step * kTileK,
                                                  p.k);
}

template <typename S>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int warp_m, int warp_n,
                                               int32_t (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  const int lane = threadIdx.x % 32;
  const unsigned char* stage_b = stage + S::kStageBytesA;
#pragma unroll
  for (int chunk = 0; chunk < kTileK / 16; chunk += 2) {
    uint32_t a[S::kFragmentsM][4];
    uint32_t b[S::kFragmentsN / 2][4];
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
      ldmatrix_x4(a[i],
                  stage + tile_offset_from<kTileK>(warp_m + i * 16, a_lane_row(lane), chunk + a_lane_chunk(lane)));
    }
#pragma unroll
    for (int j = 0; j < S::kFragmentsN / 2; ++j) {
      ldmatrix_x4(b[j],
                  stage_b + tile_offset_from<kTileK>(warp_n + j * 16, b_lane_row(lane), chunk + b_lane_chunk(lane)));
    }
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
      const uint32_t fragment[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
#pragma unroll
      for (int i = 0; i < S::kFragmentsM; ++i) mma_s8(acc[i][j], a[i], fragment);
    }
  }
}

// acc += the tile's products. Afterwards nobody reads or fills a stage any more.
template <typename S, bool kAligned>
__device__ __forceinline__ void accumulate_tile(const TileOperands& p, unsigned char* shared, int warp_m, int warp_n,
                                                int32_t (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  const int steps = (p.k + kTileK - 1) / kTileK;
  // One group a step, empty or not, so that "all but the newest S::kStages - 2" always names the step about to be used.
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load_stage<S, kAligned>(p, shared, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's bytes are everyone's, and the stage refilled below is no longer read
    if (step + S::kStages - 1 < steps) load_stage<S, kAligned>(p, shared, step + S::kStages - 1);
    cp_async_commit();
    multiply_stage<S>(shared + step % S::kStages * S::kStageBytes, warp_m, warp_n, acc);
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace pykernels::cuda
