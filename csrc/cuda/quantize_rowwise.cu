// quantize_rowwise: one warp or one block per row; a row that fits stays in registers, so x is read once.
#include "common.cuh"

namespace pykernels::cuda {
namespace {

constexpr int kWarpRows = 8;          // rows of a block when each warp takes one
constexpr int kVectorsPerThread = 4;  // 64 bytes in flight a thread
constexpr int kMaxThreads = 1024;

struct RowScale {
  float scale;
  float inv;  // 0 writes zeros, also over NaN and infinity
};

// absmax as the bits of a float, so that NaN (the largest) and infinity are seen as such.
__device__ __forceinline__ RowScale row_scale(uint32_t absmax, const QuantizeRowwise& p, int64_t row) {
  if (absmax >= 0x7f800000u) return {bits_to_float(0x7fc00000u), 0.0f};
  if (p.given_scale != nullptr) {
    const float scale = p.given_scale[row * p.given_scale_stride];
    return {scale, fabsf(scale) < 0x1p-126f ? 0.0f : __fdiv_rn(1.0f, scale)};
  }
  const float value = bits_to_float(absmax);
  if (value < 127.0f * 0x1p-126f) return {0.0f, 0.0f};
  return {__fdiv_rn(value, 127.0f), __fdiv_rn(127.0f, value)};
}

template <int kSize>
__device__ __forceinline__ uint32_t absmax_of(const float (&v)[kSize], uint32_t absmax) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) absmax = max(absmax, float_to_bits(v[i]) & 0x7fffffffu);
  return absmax;
}

// Four neighbours whose first has a flat index that is a multiple of 4 share one Philox call.
template <bool kStochastic>
__device__ __forceinline__ uint32_t quantize4(const float* v, float inv, int64_t index, uint64_t seed) {
  int q[4];
  if (kStochastic) {
    const Philox4 random = philox(static_cast<uint64_t>(index) >> 2, 0, seed);
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = quantize_stochastic(v[i], inv, uniform(random.word[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = quantize_nearest(v[i], inv);
  }
  return pack_int8(q[0], q[1], q[2], q[3]);
}

template <bool kStochastic>
__device__ __forceinline__ void store_vector(int8_t* q, const float (&v)[4], float inv, int64_t index, uint64_t seed) {
  store4(q, quantize4<kStochastic>(v, inv, index, seed));
}

template <bool kStochastic>
__device__ __forceinline__ void store_vector(int8_t* q, const float (&v)[8], float inv, int64_t index, uint64_t seed) {
  const uint32_t low = quantize4<kStochastic>(v, inv, index, seed);
  store8(q, low, quantize4<kStochastic>(v + 4, inv, index + 4, seed));
}

// The row fits: kVectors 16-byte vectors a thread. Rows and their strides lie on 16 bytes.
template <typename T, int kVectors, bool kWarpPerRow, bool kStochastic>
__global__ void __launch_bounds__(kWarpPerRow ? 32 * kWarpRows : kMaxThreads)
    quantize_resident(QuantizeRowwise p, int64_t rows) {
  constexpr int kSize = 16 / sizeof(T);
  const int64_t row = kWarpPerRow ? static_cast<int64_t>(blockIdx.x) * kWarpRows + threadIdx.x / 32 : blockIdx.x;
  if (kWarpPerRow && row >= rows) return;  // the whole warp leaves, and no barrier follows
  const int thread = kWarpPerRow ? threadIdx.x % 32 : threadIdx.x;
  const int threads = kWarpPerRow ? 32 : blockDim.x;
  const int64_t vectors = p.K / kSize;
  const char* x = static_cast<const char*>(p.x) + row * p.x_stride * static_cast<int64_t>(sizeof(T));

  Vec16 held[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = thread + static_cast<int64_t>(i) * threads;
    held[i] = at < vectors ? load16_streaming(x + at * 16) : Vec16{{0, 0, 0, 0}};
  }
  uint32_t absmax = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float v[kSize];
    unpack(held[i], v, T{});
    absmax = absmax_of(v, absmax);
  }
  absmax = kWarpPerRow ? warp_max(absmax) : block_max(absmax);
  const RowScale s = row_scale(absmax, p, row);
  if (thread == 0) p.scale[row] = s.scale;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int64_t at = thread + static_cast<int64_t>(i) * threads;
    if (at < vectors) {
      float v[kSize];
      unpack(held[i], v, T{});
      const int64_t index = row * p.K + at * kSize;
      store_vector<kStochastic>(p.q + row * p.q_stride + at * kSize, v, s.inv, index, p.seed);
    }
  }
}

// Any length and any alignment: the row is read twice, the second time mostly from L2.
template <typename T, bool kAligned, bool kStochastic>
__global__ void __launch_bounds__(kMaxThreads) quantize_two_reads(QuantizeRowwise p) {
  constexpr int kSize = 16 / sizeof(T);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const int64_t steps = kAligned ? p.K / kSize : p.K;

  uint32_t absmax = 0;
  for (int64_t i = threadIdx.x; i < steps; i += blockDim.x) {
    if (kAligned) {
      float v[kSize];
      unpack(load16(x + i * kSize), v, T{});
      absmax = absmax_of(v, absmax);
    } else {
      absmax = max(absmax, float_to_bits(to_float(x[i])) & 0x7fffffffu);
    }
  }
  absmax = block_max(absmax);
  const RowScale s = row_scale(absmax, p, row);
  if (threadIdx.x == 0) p.scale[row] = s.scale;
  for (int64_t i = threadIdx.x; i < steps; i += blockDim.x) {
    if (kAligned) {
      float v[kSize];
      unpack(load16(x + i * kSize), v, T{});
      const int64_t index = row * p.K + i * kSize;
      store_vector<kStochastic>(p.q + row * p.q_stride + i * kSize, v, s.inv, index, p.seed);
    } else {
      const int64_t index = row * p.K + i;
      const float v = to_float(x[i]);
      int q;
      if (kStochastic) {
        const Philox4 random = philox(static_cast<uint64_t>(index) >> 2, 0, p.seed);
        const int word = static_cast<int>(index & 3);
        const uint32_t r = word == 0   ? random.word[0]
                           : word == 1 ? random.word[1]
                           : word == 2 ? random.word[2]
                                       : random.word[3];
        q = quantize_stochastic(v, s.inv, uniform(r));
      } else {
        q = quantize_nearest(v, s.inv);
      }
      p.q[row * p.q_stride + i] = static_cast<int8_t>(q);
    }
  }
}

int threads_for(int64_t work) {
  return static_cast<int>(work >= kMaxThreads ? kMaxThreads : ceil_div(work < 1 ? 1 : work, 32) * 32);
}

template <typename T, bool kStochastic>
const char* launch_typed(const QuantizeRowwise& p, int64_t rows, void* stream) {
  constexpr int64_t kSize = 16 / sizeof(T);
  if (p.K % kSize != 0 || p.x_stride % kSize != 0 || !is_aligned(p.x, 16) || !is_aligned(p.q, 8) ||
      p.q_stride % kSize != 0) {
    return launch(quantize_two_reads<T, false, kStochastic>, rows, 1, threads_for(p.K), 0, stream, p);
  }
  const int64_t vectors = p.K / kSize;
  const int64_t blocks = ceil_div(rows, kWarpRows);
  if (vectors <= 32)
    return launch(quantize_resident<T, 1, true, kStochastic>, blocks, 1, 32 * kWarpRows, 0, stream, p, rows);
  if (vectors <= 64)
    return launch(quantize_resident<T, 2, true, kStochastic>, blocks, 1, 32 * kWarpRows, 0, stream, p, rows);
  if (vectors <= 128)
    return launch(quantize_resident<T, 4, true, kStochastic>, blocks, 1, 32 * kWarpRows, 0, stream, p, rows);
  if (vectors <= kVectorsPerThread * kMaxThreads) {
    const int threads = threads_for(ceil_div(vectors, kVectorsPerThread));
    return launch(quantize_resident<T, kVectorsPerThread, false, kStochastic>, rows, 1, threads, 0, stream, p, rows);
  }
  return launch(quantize_two_reads<T, true, kStochastic>, rows, 1, kMaxThreads, 0, stream, p);
}

}  // namespace

const char* quantize_rowwise(const QuantizeRowwise& p, int64_t rows, void* stream) {
  return with_float_type(p.x_dtype, [&](auto type) {
    using T = decltype(type);
    return p.stochastic ? launch_typed<T, true>(p, rows, stream) : launch_typed<T, false>(p, rows, stream);
  });
}

}  // namespace pykernels::cuda
