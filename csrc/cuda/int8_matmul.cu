// int8_matmul on the sm_80 tensor cores: mma.m16n8k32, cp.async into four shared-memory stages, ldmatrix.
#include "epilogue.cuh"
#include "int8_matmul_layout.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kStages = 4;

// A block of kWarpsM x kWarpsN warps makes a tile of kM x kN.
template <int kM_, int kN_, int kWarpsM, int kWarpsN>
struct Shape {
  static constexpr int kM = kM_;
  static constexpr int kN = kN_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM;
  static constexpr int kWarpN = kN / kWarpsN;
  static constexpr int kWarpColumns = kWarpsN;
  static constexpr int kFragmentsM = kWarpM / 16;
  static constexpr int kFragmentsN = kWarpN / 8;
  static constexpr int kStageBytes = (kM + kN) * kTileK;
  // Sums pass through shared memory on their way out; 8 extra words a row keep the stores of a warp off each other's
  // banks.
  static constexpr int kOutStride = kN + 8;
  static constexpr int kOutBytes = kM * kOutStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kOutBytes ? kStages * kStageBytes : kOutBytes;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && (kM * kTileChunks) % kThreads == 0 &&
                (kN * kTileChunks) % kThreads == 0);
};

// kRows rows of one operand, bytes k to k + 63, into a stage. Beyond the tensor: zeros.
template <int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void load_tile(unsigned char* stage, const int8_t* source, int64_t stride, int64_t first_row,
                                          int64_t rows, int at, int k) {
#pragma unroll
  for (int i = 0; i < kRows * kTileChunks / kThreads; ++i) {
    const int index = threadIdx.x + i * kThreads;
    const int row = index / kTileChunks;
    const int chunk = index % kTileChunks;
    const int from = at + chunk * 16;
    const int left = first_row + row < rows ? k - from : 0;
    // With nothing left to read the address only has to be a valid one.
    const int8_t* p = left > 0 ? source + (first_row + row) * stride : source;
    unsigned char* target = stage + tile_offset(row, chunk);
    if (kAligned) {
      cp_async_16(target, left > 0 ? p + from : p, max(0, min(16, left)));
    } else {
      store16(target, load_row_chunk<false, false>(p, from, left > 0 ? k : from));
    }
  }
}

template <typename S, bool kAligned>
__device__ __forceinline__ void load_stage(const Int8Matmul& p, unsigned char* shared, Tile tile, int step) {
  const int k = static_cast<int>(p.k);
  unsigned char* stage = shared + step % kStages * S::kStageBytes;
  load_tile<S::kM, S::kThreads, kAligned>(stage, p.a, p.a_stride, tile.m * S::kM, p.m, step * kTileK, k);
  load_tile<S::kN, S::kThreads, kAligned>(stage + S::kM * kTileK, p.b, p.b_stride, tile.n * S::kN, p.n, step * kTileK,
                                          k);
}

template <typename S>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int warp_m, int warp_n,
                                               int32_t (&acc)[S::kFragmentsM][S::kFragmentsN][4]) {
  const int lane = threadIdx.x % 32;
  const unsigned char* stage_b = stage + S::kM * kTileK;
#pragma unroll
  for (int chunk = 0; chunk < kTileChunks; chunk += 2) {
    uint32_t a[S::kFragmentsM][4];
    uint32_t b[S::kFragmentsN / 2][4];
#pragma unroll
    for (int i = 0; i < S::kFragmentsM; ++i) {
      ldmatrix_x4(a[i], stage + tile_offset(warp_m + i * 16 + a_lane_row(lane), chunk + a_lane_chunk(lane)));
    }
#pragma unroll
    for (int j = 0; j < S::kFragmentsN / 2; ++j) {
      ldmatrix_x4(b[j], stage_b + tile_offset(warp_n + j * 16 + b_lane_row(lane), chunk + b_lane_chunk(lane)));
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
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const int steps = (static_cast<int>(p.k) + kTileK - 1) / kTileK;

  int32_t acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  // One group a step, empty or not, so that "all but the newest kStages - 2" always names the step about to be used.
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load_stage<S, kAligned>(p, shared, tile, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step's bytes are everyone's, and the stage refilled below is no longer read
    if (step + kStages - 1 < steps) load_stage<S, kAligned>(p, shared, tile, step + kStages - 1);
    cp_async_commit();
    multiply_stage<S>(shared + step % kStages * S::kStageBytes, warp_m, warp_n, acc);
  }
  cp_async_wait<0>();
  __syncthreads();

  int32_t* sums = reinterpret_cast<int32_t*>(shared);
#pragma unroll
  for (int i = 0; i < S::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < S::kFragmentsN; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[(warp_m + i * 16 + acc_row(lane, r)) * S::kOutStride + warp_n + j * 8 + acc_col(lane, r)] = acc[i][j][r];
      }
    }
  }
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

using Large = Shape<128, 128, 2, 4>;
using Small = Shape<64, 64, 2, 2>;  // when large tiles would leave multiprocessors idle

}  // namespace

const char* int8_matmul_tiled(const Int8Matmul& p, void* stream) {
  const bool fills = ceil_div(p.m, Large::kM) * ceil_div(p.n, Large::kN) >= multiprocessor_count();
  return fills && p.m > Small::kM ? launch_shape<Large>(p, stream) : launch_shape<Small>(p, stream);
}

const char* int8_matmul(const Int8Matmul& p, void* stream) {
  return p.m <= 16 ? int8_matmul_small_m(p, stream) : int8_matmul_tiled(p, stream);
}

}  // namespace pykernels::cuda
