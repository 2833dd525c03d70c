// int8_grouped_matmul: the tiles of int8_matmul.cu, of whichever expert a block finds its rows to belong to.
#include "group_tile.cuh"
#include "int8_tile.cuh"

namespace pykernels::cuda {
namespace {

template <typename S, bool kAligned>
__global__ void __launch_bounds__(S::kThreads, 2) int8_grouped_matmul_kernel(Int8GroupedMatmul p) {
  unsigned char* shared = shared_memory();
  const Tile tile = tile_of(blockIdx.x, p.row_tiles, (p.n + S::kN - 1) / S::kN);
  const GroupTile group = find_group_tile<S::kM>(p, tile.m);
  if (group.first >= group.end) return;
  const int rows = rows_left<S::kM>(group.end, group.first);
  const int64_t first_n = tile.n * S::kN;
  const int columns = rows_left<S::kN>(p.n, first_n);
  Epilogue e = p.epilogue;
  if (group.expert == p.experts) {
#pragma unroll 1
    for (int index = threadIdx.x; index < S::kM * S::kN; index += S::kThreads) {
      const int64_t m = group.first + index / S::kN, n = first_n + index % S::kN;
      if (index / S::kN >= rows || index % S::kN >= columns) continue;
      if (e.out_dtype == DType::i32) {
        static_cast<int32_t*>(e.out)[m * e.out_stride + n] = 0;
      } else {
        store_float(e.out, e.out_dtype, m * e.out_stride + n, 0.0f);
      }
    }
    return;
  }

  const int warp_m = threadIdx.x / 32 / S::kWarpColumns * S::kWarpM;
  const int warp_n = threadIdx.x / 32 % S::kWarpColumns * S::kWarpN;
  const TileOperands operands = {p.a + group.first * p.a_stride,
                                 p.a_stride,
                                 rows,
                                 p.b + group.expert * p.b_step + first_n * p.b_stride,
                                 p.b_stride,
                                 columns,
                                 static_cast<int>(p.k)};
  int32_t acc[S::kFragmentsM][S::kFragmentsN][4] = {};
  accumulate_tile<S, kAligned>(operands, shared, warp_m, warp_n, acc);

  int32_t* sums = reinterpret_cast<int32_t*>(shared);
  store_fragments<S>(sums, acc, warp_m, warp_n);
  __syncthreads();
  if (e.b_scale != nullptr) e.b_scale += group.expert * p.n;
  if (e.bias != nullptr) {
    e.bias = static_cast<const char*>(e.bias) + group.expert * p.n * (e.bias_dtype == DType::f32 ? 4 : 2);
  }
#pragma unroll 1
  for (int index = threadIdx.x; index < S::kM * S::kN; index += S::kThreads) {
    const int m = index / S::kN, n = index % S::kN;
    if (m < rows && n < columns) finish_int32(e, group.first + m, first_n + n, sums[m * S::kOutStride + n]);
  }
}

template <typename S, bool kAligned>
const char* launch_shape(Int8GroupedMatmul p, void* stream) {
  p.row_tiles = most_row_tiles(p.rows, p.experts, S::kM);
  const int64_t tiles = p.row_tiles * ceil_div(p.n, S::kN);
  return launch(int8_grouped_matmul_kernel<S, kAligned>, tiles, 1, S::kThreads, S::kSharedBytes, stream, p);
}

// By the rows that an expert has on average: what a tile has room for beyond them is multiplied for nothing.
using Large = Shape<128, 128, 2, 4, kTileK, kTileK, 4>;
using Small = Shape<64, 64, 2, 2, kTileK, kTileK, 4>;
using Few = Shape<32, 64, 2, 2, kTileK, kTileK, 4>;

}  // namespace

const char* int8_grouped_matmul(const Int8GroupedMatmul& p, void* stream) {
  const int64_t average = ceil_div(p.rows, p.experts > 0 ? p.experts : 1);
  const bool fills = ceil_div(p.rows, Large::kM) * ceil_div(p.n, Large::kN) >= multiprocessor_count();
  const bool aligned = is_aligned(p.a, 16) && is_aligned(p.b, 16) && (p.a_stride % 16 == 0 || p.rows == 1) &&
                       (p.b_stride % 16 == 0 || p.n == 1) && (p.b_step % 16 == 0 || p.experts == 1);
  if (!aligned) {  // large tiles would spill
    return average <= Few::kM ? launch_shape<Few, false>(p, stream) : launch_shape<Small, false>(p, stream);
  }
  if (average <= Few::kM) return launch_shape<Few, true>(p, stream);
  return fills && average > Small::kM ? launch_shape<Large, true>(p, stream) : launch_shape<Small, true>(p, stream);
}

}  // namespace pykernels::cuda
