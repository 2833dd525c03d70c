// int8_matmul on the sm_80 tensor cores: mma.m16n8k32, cp.async into four shared-memory stages, ldmatrix.
#include "tile.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kTileK = 64;  // bytes of K in a stage

template <typename S, bool kAligned>
__device__ __forceinline__ void load_stage(const Int8Matmul& p, unsigned char* shared, Tile tile, int step) {
  const int k = static_cast<int>(p.k);
  unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
  const int64_t m = tile.m * S::kM, n = tile.n * S::kN;
  load_tile<S::kM, kTileK, S::kThreads, kAligned>(stage, p.a + m * p.a_stride, p.a_stride, rows_left<S::kM>(p.m, m),
                                                  step * kTileK, k);
  load_tile<S::kN, kTileK, S::kThreads, kAligned>(stage + S::kStageBytesA, p.b + n * p.b_stride, p.b_stride,
                                                  rows_left<S::kN>(p.n, n), step * kTileK, k);
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

template <typename S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, 2) int8_matmul_kernel(Int8Matmul p) {
  unsigned char* shared = shared_memory();
  const Tile tile = tile_of(blockIdx.x, (p.m + S::kM - 1) / S::kM, (p.n + S::kN - 1) / S::kN);
  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const int steps = (static_cast<int>(p.k) + kTileK - 1) / kTileK;

  int32_t acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  // One group a step, empty or not, so that "all but the newest S::kStages - 2" always names the step about to be used.
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load_stage<S, kAligned>(p, shared, tile, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's bytes are everyone's, and the stage refilled below is no longer read
    if (step + S::kStages - 1 < steps) load_stage<S, kAligned>(p, shared, tile, step + S::kStages - 1);
    cp_async_commit();
    multiply_stage<S>(shared + step % S::kStages * S::kStageBytes, warp_m, warp_n, acc);
  }
  cp_async_wait<0>();
  __syncthreads();

  int32_t* sums = reinterpret_cast<int32_t*>(shared);
  store_fragments<S>(sums, acc, warp_m, warp_n);
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < S::kM * S::kN; index += S::kThreads) {
    const int64_t m = tile.m * S::kM + index / S::kN;
    const int64_t n = tile.n * S::kN + index % S::kN;
    if (m < p.m && n < p.n) finish_int32(p.epilogue, m, n, sums[index / S::kN * S::kOutStride + index % S::kN]);
  }
}

template <typename S>
const char* launch_shape(const Int8Matmul& p, void* stream) {
  const int64_t tiles = ceil_div(p.m, S::kM) * ceil_div(p.n, S::kN);
  const bool aligned = is_aligned(p.a, 16) && is_aligned(p.b, 16) && (p.a_stride % 16 == 0 || p.m == 1) &&
                       (p.b_stride % 16 == 0 || p.n == 1);
  return aligned ? launch(int8_matmul_kernel<S, true>, tiles, 1, S::kThreads, S::kSharedBytes, stream, p)
                 : launch(int8_matmul_kernel<S, false>, tiles, 1, S::kThreads, S::kSharedBytes, stream, p);
}

using Large = Shape<128, 128, 2, 4, kTileK, kTileK, 4>;
using Small = Shape<64, 64, 2, 2, kTileK, kTileK, 4>;  // when large tiles would leave multiprocessors idle

}  // namespace

const char* int8_matmul_tiled(const Int8Matmul& p, void* stream) {
  const bool fills = ceil_div(p.m, Large::kM) * ceil_div(p.n, Large::kN) >= multiprocessor_count();
  return fills && p.m > Small::kM ? launch_shape<Large>(p, stream) : launch_shape<Small>(p, stream);
}

const char* int8_matmul(const Int8Matmul& p, void* stream) {
  return p.m <= 16 ? int8_matmul_small_m(p, stream) : int8_matmul_tiled(p, stream);
}

}  // namespace pykernels::cuda
