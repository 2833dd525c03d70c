// int8_weight_only_linear: the weight streams as int8 and becomes float in registers; sums are float32.
// Half and bfloat16 x use the tensor cores (int8 is exact in both); float32 x, odd shapes and groups that are no
// multiple of 64 use plain multiply-adds. Both read the weight once for every few rows of x: meant for decoding.
#include "epilogue.cuh"
#include "half_mma.cuh"
#include "layout.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 16;  // rows of x to an mma block
constexpr int kStep = 64;  // k that four lanes cover, 16 each

// As in int8_matmul_small_m.cu, a lane takes 16 consecutive k of a row, in the same order for both operands.
// kGrouped: weight_scale has a column for every group_size of k, a multiple of kStep; else one value a row.
template <typename T, bool kGrouped>
__global__ void __launch_bounds__(32 * kWarps) weight_only_mma(Int8WeightOnlyLinear p) {
  // Steps of the weight that are under way: cp.async keeps them so where the compiler would put a load beside its use.
  // A lane reads back what it copied itself, so that no barrier is needed.
  constexpr int kDepth = 8;
  alignas(16) __shared__ Vec16 ring[kDepth][32 * kWarps];
  __shared__ float sums[kWarps][kRows][8];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t first_m = static_cast<int64_t>(blockIdx.y) * kRows;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * 8;
  const int64_t row = first_m + lane / 4;
  const int64_t n = first_n + lane / 4;
  const int offset = lane % 4 * 16;
  const int k = static_cast<int>(p.k);
  const int weight_length = n < p.n ? k : 0;
  const int length[2] = {row < p.m ? k : 0, row + 8 < p.m ? k : 0};
  const int8_t* weight = p.weight + n * p.k;
  const T* x = static_cast<const T*>(p.x) + row * p.k;
  const int64_t groups = kGrouped ? p.k / p.group_size : 1;

  float acc[4] = {};
  const int steps = (k - warp * kStep + kWarps * kStep - 1) / (kWarps * kStep);
  const auto fetch = [&](int step) {
    const int at = (warp + step * kWarps) * kStep + offset;
    const bool exists = step < steps && at < weight_length;
    if (step < steps) cp_async_16(&ring[step % kDepth][threadIdx.x], exists ? weight + at : p.weight, exists ? 16 : 0);
    cp_async_commit();  // one group a step, empty or not
  };
#pragma unroll 1
  for (int step = 0; step < kDepth; ++step) fetch(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int at = (warp + step * kWarps) * kStep + offset;
    Vec16 rows[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rows[i][j] = at < length[i] ? load16(x + i * 8 * p.k + at + j * 8) : Vec16{{0, 0, 0, 0}};
      }
    }
    cp_async_wait<kDepth - 1>();
    const Vec16 w = load16(&ring[step % kDepth][threadIdx.x]);
    float part[4] = {};
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint32_t b[2];
      int8_to_pairs(w.word[quarter], b, T{});
      const int half = quarter / 2, word = quarter % 2 * 2;
      const uint32_t a[4] = {rows[0][half].word[word], rows[1][half].word[word], rows[0][half].word[word + 1],
                             rows[1][half].word[word + 1]};
      if (kGrouped) {
        mma(part, a, b, T{});
      } else {
        mma(acc, a, b, T{});
      }
    }
    fetch(step + kDepth);
    if (kGrouped && at < k) {
      const int64_t group = at / p.group_size;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t col = first_n + acc_col(lane, r);
        if (col < p.n) acc[r] += part[r] * p.weight_scale[col * groups + group];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) sums[warp][acc_row(lane, r)][acc_col(lane, r)] = acc[r];
  __syncthreads();
  const int m = threadIdx.x / 8, col = threadIdx.x % 8;
  if (first_m + m < p.m && first_n + col < p.n) {
    float v = (sums[0][m][col] + sums[1][m][col]) + (sums[2][m][col] + sums[3][m][col]);
    if (!kGrouped) v = __fmul_rn(v, p.weight_scale[first_n + col]);
    finish(p.epilogue, first_m + m, first_n + col, v);
  }
}
static_assert(kRows * 8 == 32 * kWarps, "one thread an output");

// A warp to a row of the weight, kM rows of x at a time.
template <typename T, int kM, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) weight_only_fma(Int8WeightOnlyLinear p) {
  constexpr int kSize = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t blocks_n = (p.n + kWarps - 1) / kWarps;
  const int64_t n = blockIdx.x % blocks_n * kWarps + threadIdx.x / 32;
  if (n >= p.n) return;  // the whole warp leaves, and no barrier follows
  const int64_t first_m = blockIdx.x / blocks_n * kM;
  const int k = static_cast<int>(p.k);
  const int group_size = static_cast<int>(p.group_size);
  const int8_t* weight = p.weight + n * p.k;
  const float* scale = p.weight_scale + n * (p.k / p.group_size);
  const T* x = static_cast<const T*>(p.x);
  const bool chunk_in_group = group_size % 16 == 0;

  float acc[kM] = {};
  for (int at = lane * 16; at < k; at += 512) {
    const Vec16 w = load_row_chunk<kAligned, true>(weight, at, k);
    float v[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float four[4];
      int8_to_float(w.word[i], four);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int from = min(at + 4 * i + j, k - 1);
        v[4 * i + j] = chunk_in_group ? four[j] : four[j] * scale[from / group_size];
      }
    }
    const float chunk_scale = chunk_in_group ? scale[at / group_size] : 1.0f;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (first_m + m < p.m) {
        const T* x_row = x + (first_m + m) * p.k;
        float part = 0.0f;
        if constexpr (kAligned) {
#pragma unroll
          for (int i = 0; i < 16; i += kSize) {
            float values[kSize];
            unpack(load16(x_row + at + i), values, T{});
#pragma unroll
            for (int j = 0; j < kSize; ++j) part = fmaf(values[j], v[i + j], part);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            if (at + i < k) part = fmaf(to_float(x_row[at + i]), v[i], part);
          }
        }
        acc[m] = fmaf(part, chunk_scale, acc[m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const float sum = warp_sum(acc[m]);
    if (lane == 0 && first_m + m < p.m) finish(p.epilogue, first_m + m, n, sum);
  }
}

template <typename T, bool kAligned>
const char* launch_fma(const Int8WeightOnlyLinear& p, void* stream) {
  const int64_t blocks = ceil_div(p.n, kWarps);
  return p.m == 1 ? launch(weight_only_fma<T, 1, kAligned>, blocks, 1, 32 * kWarps, 0, stream, p)
                  : launch(weight_only_fma<T, 4, kAligned>, blocks * ceil_div(p.m, 4), 1, 32 * kWarps, 0, stream, p);
}

template <typename T>
const char* launch_mma(const Int8WeightOnlyLinear& p, void* stream) {
  const int64_t blocks = ceil_div(p.n, 8), passes = ceil_div(p.m, kRows);
  return p.group_size == p.k ? launch(weight_only_mma<T, false>, blocks, passes, 32 * kWarps, 0, stream, p)
                             : launch(weight_only_mma<T, true>, blocks, passes, 32 * kWarps, 0, stream, p);
}

}  // namespace

const char* int8_weight_only_linear(const Int8WeightOnlyLinear& p, void* stream) {
  const bool aligned = p.k % 16 == 0 && is_aligned(p.x, 16) && is_aligned(p.weight, 16);
  const bool uses_mma = aligned && (p.group_size == p.k || p.group_size % kStep == 0);
  if (uses_mma && p.x_dtype != DType::f32) {
    if (p.m > 2 * kRows) return int8_weight_only_linear_tiled(p, stream);
    return p.x_dtype == DType::f16 ? launch_mma<Half>(p, stream) : launch_mma<BFloat16>(p, stream);
  }
  return with_float_type(p.x_dtype, [&](auto type) {
    using T = decltype(type);
    return aligned ? launch_fma<T, true>(p, stream) : launch_fma<T, false>(p, stream);
  });
}

}  // namespace pykernels::cuda
