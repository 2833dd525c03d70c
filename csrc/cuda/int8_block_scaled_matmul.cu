// int8_block_scaled_matmul: a stage of the int8 tiles is one block of K, whose int32 sums join float32 ones, scaled.
#include "int8_block_scaled_matmul.h"
#include "int8_tile.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kBlock = static_cast<int>(kScaledBlock);

// The float 1.5 * 2^23 as an integer: an int32 sum that starts here is, read as a float, 1.5 * 2^23 plus the sum, as
// long as the sum stays within 2^22. That of 128 products does, by half.
constexpr int32_t kSumOrigin = 0x4b400000;
static_assert(kBlock * 128 * 128 < 1 << 22);
__device__ __forceinline__ float promote(int32_t sum) {
  return __fadd_rn(bits_to_float(static_cast<uint32_t>(sum)), -12582912.0f);
}

// acc += scale * the block's products. Sums are of 16 rows at a time: those of a whole tile would not fit beside acc.
template <typename S>
__device__ __forceinline__ void multiply_block(const unsigned char* stage, int warp_m, int warp_n,
                                               const float (&scale)[S::kFragmentsM][2],
                                               float (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  constexpr int kSteps = kBlock / 32;
  const int lane = threadIdx.x % 32;
  const unsigned char* stage_b = stage + S::kStageBytesA;
  uint32_t b[kSteps][S::kFragmentsN / 2][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int j = 0; j < S::kFragmentsN / 2; ++j) {
      ldmatrix_x4(b[step][j],
                  stage_b + tile_offset_from<kBlock>(warp_n + j * 16, b_lane_row(lane), 2 * step + b_lane_chunk(lane)));
    }
  }
#pragma unroll
  for (int i = 0; i < S::kFragmentsM; ++i) {
    int32_t sums[S::kFragmentsN][4];
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) sums[j][r] = kSumOrigin;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      ldmatrix_x4(a,
                  stage + tile_offset_from<kBlock>(warp_m + i * 16, a_lane_row(lane), 2 * step + a_lane_chunk(lane)));
#pragma unroll
      for (int j = 0; j < S::kFragmentsN; ++j) {
        const uint32_t fragment[2] = {b[step][j / 2][j % 2 * 2], b[step][j / 2][j % 2 * 2 + 1]};
        mma_s8(sums[j], a, fragment);
      }
    }
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) acc[i][j][r] = fmaf(promote(sums[j][r]), scale[i][r / 2], acc[i][j][r]);
    }
  }
}

template <typename S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, S::kM == 64 ? 3 : 1) int8_block_scaled_kernel(Int8BlockScaled p) {
  static_assert(S::kBytesA == kBlock && kBlock % S::kN == 0);
  unsigned char* shared = shared_memory();
  const Tile tile = tile_of(blockIdx.x, (p.M + S::kM - 1) / S::kM, (p.N + S::kN - 1) / S::kN);
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const int64_t first_m = tile.m * S::kM, first_n = tile.n * S::kN;
  const TileOperands operands = {p.a + first_m * p.a_stride, p.a_stride, rows_left<S::kM>(p.M, first_m),
                                 p.b + first_n * p.b_stride, p.b_stride, rows_left<S::kN>(p.N, first_n),
                                 static_cast<int>(p.K)};
  const int blocks = static_cast<int>(p.blocks);
  const int first_row = warp_m + acc_row(lane, 0);
  const float* a_scale = p.a_scale + (first_m + first_row) * p.blocks;
  const float* b_scale = p.b_scale + first_n / kBlock * p.blocks;

  const auto load_scales = [&](int block, float (&scale)[S::kFragmentsM][2]) {
    const float column = b_scale[block];
    const float* row = a_scale + block;
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[i][half] = first_row + i * 16 + half * 8 < operands.rows ? __fmul_rn(*row, column) : 0.0f;
        row += 8 * p.blocks;
      }
    }
  };
  float acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  float scale[S::kFragmentsM][2] = {};
  if (blocks > 0) load_scales(0, scale);
  for_each_stage<S, kAligned>(operands, shared, [&](const unsigned char* stage, int block) {
    float next[S::kFragmentsM][2];
    load_scales(block + 1 < blocks ? block + 1 : block, next);
    multiply_block<S>(stage, warp_m, warp_n, scale, acc);
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) scale[i][half] = next[i][half];
    }
  });

  float* sums = reinterpret_cast<float*>(shared);
  store_fragments<S>(sums, acc, warp_m, warp_n);
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < S::kM * S::kN; index += S::kThreads) {
    const int m = index / S::kN, n = index % S::kN;
    if (m < operands.rows && n < operands.columns) {
      finish(p.epilogue, first_m + m, first_n + n, sums[m * S::kOutStride + n]);
    }
  }
}

template <typename S, bool kAligned>
const char* launch_shape(const Int8BlockScaled& p, void* stream) {
  const int64_t tiles = ceil_div(p.M, S::kM) * ceil_div(p.N, S::kN);
  return launch(int8_block_scaled_kernel<S, kAligned>, tiles, 1, S::kThreads, S::kSharedBytes, stream, p);
}

using Large = Shape<128, 128, 2, 4, kBlock, kBlock, 4>;
using Small = Shape<64, 64, 2, 2, kBlock, kBlock, 4>;  // when large tiles would leave multiprocessors idle
using Few = Shape<16, 32, 1, 2, kBlock, kBlock, 6>;    // for decoding: b read once, by as many blocks as can be

}  // namespace

const char* int8_block_scaled_matmul(const Int8BlockScaled& p, void* stream) {
  const bool fills = ceil_div(p.M, Large::kM) * ceil_div(p.N, Large::kN) >= multiprocessor_count();
  const bool aligned = is_aligned(p.a, 16) && is_aligned(p.b, 16) && (p.a_stride % 16 == 0 || p.M == 1) &&
                       (p.b_stride % 16 == 0 || p.N == 1);
  if (!aligned) return p.M <= Few::kM ? launch_shape<Few, false>(p, stream) : launch_shape<Small, false>(p, stream);
  if (p.M <= Few::kM) return launch_shape<Few, true>(p, stream);
  return fills && p.M > Small::kM ? launch_shape<Large, true>(p, stream) : launch_shape<Small, true>(p, stream);
}

}  // namespace pykernels::cuda
