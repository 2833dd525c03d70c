// The int8 main loop of a tile, which the products of one matrix, of groups and of scaled blocks share: mma.m16n8k32,
// cp.async into shared-memory stages, ldmatrix.
#pragma once

#include "tile.cuh"

namespace pykernels::cuda {

constexpr int kTileK = 64;  // bytes of K in a stage, where nothing asks for more

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
  constexpr int kBytes = S::kBytesA;
  static_assert(S::kBytesB == kBytes);
  unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
  load_tile<S::kM, kBytes, S::kThreads, kAligned>(stage, p.a, p.a_stride, p.rows, step * kBytes, p.k);
  load_tile<S::kN, kBytes, S::kThreads, kAligned>(stage + S::kStageBytesA, p.b, p.b_stride, p.columns, step * kBytes,
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

// multiply(stage, step) for every stage of K in turn. Afterwards nobody reads or fills a stage any more.
template <typename S, bool kAligned, typename Multiply>
__device__ __forceinline__ void for_each_stage(const TileOperands& p, unsigned char* shared, Multiply multiply) {
  const int steps = (p.k + S::kBytesA - 1) / S::kBytesA;
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
    multiply(shared + step % S::kStages * S::kStageBytes, step);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// acc += the tile's products.
template <typename S, bool kAligned>
__device__ __forceinline__ void accumulate_tile(const TileOperands& p, unsigned char* shared, int warp_m, int warp_n,
                                                int32_t (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  static_assert(S::kBytesA == kTileK);
  for_each_stage<S, kAligned>(p, shared,
                              [&](const unsigned char* stage, int) { multiply_stage<S>(stage, warp_m, warp_n, acc); });
}

}  // namespace pykernels::cuda
