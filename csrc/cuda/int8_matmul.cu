// int8_matmul on the sm_80 tensor cores, a tile of the result a block.
#include "int8_tile.cuh"

namespace pykernels::cuda {
namespace {

template <typename S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, 2) int8_matmul_kernel(Int8Matmul p) {
  unsigned char* shared = shared_memory();
  const Tile tile = tile_of(blockIdx.x, (p.m + S::kM - 1) / S::kM, (p.n + S::kN - 1) / S::kN);
  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const int64_t first_m = tile.m * S::kM, first_n = tile.n * S::kN;
  const TileOperands operands = {p.a + first_m * p.a_stride, p.a_stride, rows_left<S::kM>(p.m, first_m),
                                 p.b + first_n * p.b_stride, p.b_stride, rows_left<S::kN>(p.n, first_n),
                                 static_cast<int>(p.k)};
  int32_t acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  accumulate_tile<S, kAligned>(operands, shared, warp_m, warp_n, acc);

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
