// int8_matmul for up to 16 rows of a (decoding): b streams from memory once, straight into mma fragments.
// The sum over k does not mind in which order k comes, so a lane takes 16 consecutive bytes of a row and both operands
// use the same order: no shared memory, no shuffles, 16-byte loads.
#include "epilogue.cuh"
#include "layout.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kRows = 16;
constexpr int kWarps = 4;  // the warps of a block take turns along k
constexpr int kStep = 64;  // bytes of a row that four lanes cover

// kTiles n-tiles of 8 columns to a block.
template <int kTiles, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) int8_matmul_small_m_kernel(Int8Matmul p) {
  // Steps of b that are under way: cp.async keeps them so where the compiler would put a load beside its use. A lane
  // reads back what it copied itself, so that no barrier is needed.
  constexpr int kDepth = kAligned ? 8 / kTiles : 1;
  alignas(16) __shared__ Vec16 ring[kDepth][kTiles][32 * kWarps];
  __shared__ int32_t sums[kWarps][kRows][kTiles * 8];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * kTiles * 8;
  const int64_t row = first_m + lane / 4;
  const int offset = lane % 4 * 16;
  const int k = static_cast<int>(p.k);
  // A row that does not exist has length 0 and reads as zeros.
  const int8_t* a_row[2] = {p.a + row * p.a_stride, p.a + (row + 8) * p.a_stride};
  const int a_length[2] = {row < p.m ? k : 0, row + 8 < p.m ? k : 0};

  int32_t acc[kTiles][4] = {};
  const int steps = (k - warp * kStep + kWarps * kStep - 1) / (kWarps * kStep);
  const auto fetch = [&](int step) {
    const int at = (warp + step * kWarps) * kStep + offset;
    if (step < steps) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int64_t n = first_n + t * 8 + lane / 4;
        const bool exists = n < p.n && at < k;
        cp_async_16(&ring[step % kDepth][t][threadIdx.x], exists ? p.b + n * p.b_stride + at : p.b, exists ? 16 : 0);
      }
    }
    cp_async_commit();  // one group a step, empty or not
  };
  if (kAligned) {
#pragma unroll 1
    for (int step = 0; step < kDepth; ++step) fetch(step);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int at = (warp + step * kWarps) * kStep + offset;
    const Vec16 low = load_row_chunk<kAligned, false>(a_row[0], at, a_length[0]);
    const Vec16 high = load_row_chunk<kAligned, false>(a_row[1], at, a_length[1]);
    Vec16 b[kTiles];
    if (kAligned) cp_async_wait<kDepth - 1>();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int64_t n = first_n + t * 8 + lane / 4;
      b[t] = kAligned ? load16(&ring[step % kDepth][t][threadIdx.x])
                      : load_row_chunk<false, true>(p.b + n * p.b_stride, at, n < p.n ? k : 0);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t a[4] = {low.word[2 * half], high.word[2 * half], low.word[2 * half + 1], high.word[2 * half + 1]};
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint32_t fragment[2] = {b[t].word[2 * half], b[t].word[2 * half + 1]};
        mma_s8(acc[t], a, fragment);
      }
    }
    if (kAligned) fetch(step + kDepth);
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int r = 0; r < 4; ++r) sums[warp][acc_row(lane, r)][t * 8 + acc_col(lane, r)] = acc[t][r];
  }
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * kTiles * 8; index += 32 * kWarps) {
    const int m = index / (kTiles * 8);
    const int n = index % (kTiles * 8);
    if (first_m + m < p.m && first_n + n < p.n) {
      const int32_t sum = sums[0][m][n] + sums[1][m][n] + sums[2][m][n] + sums[3][m][n];
      finish_int32(p.epilogue, first_m + m, first_n + n, sum);
    }
  }
}

__global__ void __launch_bounds__(128)
    int8_row_sum_kernel(const int8_t* b, int64_t stride, int64_t n, int64_t k, int32_t* b_sum) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= n) return;
  int32_t sum = 0;
  for (int64_t i = threadIdx.x % 32; i < k; i += 32) sum += b[row * stride + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) b_sum[row] = sum;
}

template <int kTiles>
const char* launch_tiles(const Int8Matmul& p, void* stream) {
  const bool aligned = p.k % 16 == 0 && is_aligned(p.a, 16) && is_aligned(p.b, 16) &&
                       (p.a_stride % 16 == 0 || p.m == 1) && (p.b_stride % 16 == 0 || p.n == 1);
  const int64_t blocks = ceil_div(p.n, kTiles * 8);
  const int64_t passes = ceil_div(p.m, kRows);
  return aligned ? launch(int8_matmul_small_m_kernel<kTiles, true>, blocks, passes, 32 * kWarps, 0, stream, p)
                 : launch(int8_matmul_small_m_kernel<kTiles, false>, blocks, passes, 32 * kWarps, 0, stream, p);
}

}  // namespace

// Two n-tiles halve the reads of a, which count from several rows on; one keeps a narrow b spread over the chip.
const char* int8_matmul_small_m(const Int8Matmul& p, void* stream) {
  const bool wide = p.m > 4 && ceil_div(p.n, 16) >= 2 * multiprocessor_count();
  return wide ? launch_tiles<2>(p, stream) : launch_tiles<1>(p, stream);
}

const char* int8_row_sum(const int8_t* b, int64_t b_stride, int64_t n, int64_t k, int32_t* b_sum, void* stream) {
  return launch(int8_row_sum_kernel, ceil_div(n, 4), 1, 128, 0, stream, b, b_stride, n, k, b_sum);
}

}  // namespace pykernels::cuda
