// int8_weight_only_linear for many rows: x and the int8 weight through shared memory, the weight made half or bfloat16
// between shared memory and the tensor cores.
#include "half_mma.cuh"
#include "tile.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kStepK = 64;
constexpr int kBytesX = 2 * kStepK;
constexpr int kBytesW = kStepK;

template <typename S>
__device__ __forceinline__ void load_stage(const Int8WeightOnlyLinear& p, unsigned char* shared, Tile tile, int step) {
  unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
  const int k = static_cast<int>(p.k);
  const int64_t m = tile.m * S::kM, n = tile.n * S::kN;
  load_tile<S::kM, kBytesX, S::kThreads, true>(stage, static_cast<const int8_t*>(p.x) + m * 2 * p.k, 2 * p.k,
                                               rows_left<S::kM>(p.m, m), step * kBytesX, 2 * k);
  load_tile<S::kN, kBytesW, S::kThreads, true>(stage + S::kStageBytesA, p.weight + n * p.k, p.k,
                                               rows_left<S::kN>(p.n, n), step * kBytesW, k);
}

// A lane needs, of row n of the weight, bytes 2t, 2t + 1 and 2t + 8, 2t + 9 of the 16 that one mma takes.
template <typename S, typename T>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int warp_m, int warp_n,
                                               float (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kStepK / 16; ++step) {
    uint32_t a[S::kFragmentsM][4];
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
      ldmatrix_x4(a[i],
                  stage + tile_offset_from<kBytesX>(warp_m + i * 16, a_lane_row(lane), 2 * step + a_lane_chunk(lane)));
    }
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
      const unsigned char* weight =
          stage + S::kStageBytesA + tile_offset_from<kBytesW>(warp_n + j * 8, lane / 4, step) + lane % 4 * 2;
      const uint32_t low = *reinterpret_cast<const uint16_t*>(weight);
      const uint32_t high = *reinterpret_cast<const uint16_t*>(weight + 8);
      uint32_t b[2];
      int8_to_pairs(low | high << 16, b, T{});
#pragma unroll
      for (int i = 0; i < S::kFragmentsM; ++i) mma(acc[i][j], a[i], b, T{});
    }
  }
}

// kGrouped: each step of 64 k lies in one group, whose scale its sums take before they join the others.
template <typename S, typename T, bool kGrouped>
__global__ void __launch_bounds__(S::kThreads, 2) weight_only_tiled(Int8WeightOnlyLinear p) {
  unsigned char* shared = shared_memory();
  const Tile tile = tile_of(blockIdx.x, (p.m + S::kM - 1) / S::kM, (p.n + S::kN - 1) / S::kN);
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const int steps = (static_cast<int>(p.k) + kStepK - 1) / kStepK;
  const int64_t groups = kGrouped ? p.k / p.group_size : 1;

  float acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) load_stage<S>(p, shared, tile, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<S::kStages - 2>();
    __syncthreads();  // this step's bytes are everyone's, and the stage refilled below is no longer read
    if (step + S::kStages - 1 < steps) load_stage<S>(p, shared, tile, step + S::kStages - 1);
    cp_async_commit();
    const unsigned char* stage = shared + step % S::kStages * S::kStageBytes;
    if constexpr (kGrouped) {
      float part[S::kFragmentsM][S::kFragmentsN][4] = {};
      multiply_stage<S, T>(stage, warp_m, warp_n, part);
      const float* scale = p.weight_scale + step * kStepK / p.group_size;
#pragma unroll
      for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int64_t n = tile.n * S::kN + warp_n + j * 8 + acc_col(lane, r);
          const float factor = n < p.n ? scale[n * groups] : 0.0f;
#pragma unroll
          for (int i = 0; i < S::kFragmentsM; ++i) {
            acc[i][j][r] = fmaf(part[i][j][r], factor, acc[i][j][r]);
            acc[i][j][r + 2] = fmaf(part[i][j][r + 2], factor, acc[i][j][r + 2]);
          }
        }
      }
    } else {
      multiply_stage<S, T>(stage, warp_m, warp_n, acc);
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  float* sums = reinterpret_cast<float*>(shared);
  store_fragments<S>(sums, acc, warp_m, warp_n);
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < S::kM * S::kN; index += S::kThreads) {
    const int64_t m = tile.m * S::kM + index / S::kN;
    const int64_t n = tile.n * S::kN + index % S::kN;
    if (m < p.m && n < p.n) {
      const float v = sums[index / S::kN * S::kOutStride + index % S::kN];
      finish(p.epilogue, m, n, kGrouped ? v : __fmul_rn(v, p.weight_scale[n]));
    }
  }
}

using Large = Shape<128, 128, 2, 4, kBytesX, kBytesW, 3>;
using Small = Shape<64, 64, 2, 2, kBytesX, kBytesW, 3>;  // groups need twice the registers; few tiles, more blocks

template <typename S, typename T, bool kGrouped>
const char* launch_shape(const Int8WeightOnlyLinear& p, void* stream) {
  const int64_t tiles = ceil_div(p.m, S::kM) * ceil_div(p.n, S::kN);
  return launch(weight_only_tiled<S, T, kGrouped>, tiles, 1, S::kThreads, S::kSharedBytes, stream, p);
}

template <typename T>
const char* launch_typed(const Int8WeightOnlyLinear& p, void* stream) {
  if (p.group_size != p.k) return launch_shape<Small, T, true>(p, stream);
  const bool fills = ceil_div(p.m, Large::kM) * ceil_div(p.n, Large::kN) >= multiprocessor_count();
  return fills && p.m > Small::kM ? launch_shape<Large, T, false>(p, stream) : launch_shape<Small, T, false>(p, stream);
}

}  // namespace

const char* int8_weight_only_linear_tiled(const Int8WeightOnlyLinear& p, void* stream) {
  return p.x_dtype == DType::f16 ? launch_typed<Half>(p, stream) : launch_typed<BFloat16>(p, stream);
}

}  // namespace pykernels::cuda
