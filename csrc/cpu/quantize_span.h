// What every quantisation shares: the absmax of a run of elements, its scale, and the codes of a run under one inverse.
// S is one of the structs of simd_*.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "float_types.h"
#include "philox.h"

namespace pykernels::cpu {
namespace {

// A run whose absmax lies below this has scale 0: its scale would be subnormal and 127 / absmax could overflow.
constexpr float kSmallestAbsmax = 127 * 0x1p-126f;
constexpr uint32_t kInfBits = 0x7f800000u;

struct Scale {
  float scale;
  float inv;  // 0 when all codes are 0
};

// absmax comes as a bit pattern: those of non-negative floats order as integers, and NaN lies above infinity.
inline Scale scale_of_absmax(uint32_t absmax_bits) {
  if (absmax_bits >= kInfBits) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  const float absmax = float_of(absmax_bits);
  if (absmax < kSmallestAbsmax) return {0.0f, 0.0f};
  return {absmax / 127.0f, 127.0f / absmax};
}

// A given scale too small to invert counts as 0.
inline Scale scale_of_given(float scale, uint32_t absmax_bits) {
  if (absmax_bits >= kInfBits) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  return {scale, std::fabs(scale) < 0x1p-126f ? 0.0f : 1.0f / scale};
}

// The two ways a loop body loads: a whole vector, or the n < kWidth elements that are left, and zeros.
template <class S>
struct Whole {
  template <class T>
  auto operator()(const T* p) const {
    return S::load(p);
  }
};

template <class S>
struct Part {
  int n;
  template <class T>
  auto operator()(const T* p) const {
    return S::load_tail(p, n);
  }
};

template <class S>
uint32_t absmax_bits(const float* x, int64_t n) {
  constexpr int W = S::kWidth;
  typename S::I best[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
  int64_t k = 0;
  for (; k + 4 * W <= n; k += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = S::max(best[j], S::abs_bits(S::load(x + k + j * W)));
  }
  for (; k + W <= n; k += W) best[0] = S::max(best[0], S::abs_bits(S::load(x + k)));
  if (k < n) best[1] = S::max(best[1], S::abs_bits(S::load_tail(x + k, static_cast<int>(n - k))));
  return S::reduce_max(S::max(S::max(best[0], best[1]), S::max(best[2], best[3])));
}

// The 16-bit patterns order as the floats do, so only the winner is widened.
template <class S, class T>
uint32_t absmax_bits(const T* x, int64_t n) {
  constexpr int W = 2 * S::kWidth;
  static_assert(sizeof(T) == 2 && sizeof(typename S::H) == W * sizeof(T));
  typename S::H best[4] = {S::zero16(), S::zero16(), S::zero16(), S::zero16()};
  int64_t k = 0;
  for (; k + 4 * W <= n; k += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) best[j] = S::max16(best[j], S::abs16(x + k + j * W));
  }
  for (; k + W <= n; k += W) best[0] = S::max16(best[0], S::abs16(x + k));
  if (k < n) {
    T padded[W] = {};
    std::memcpy(padded, x + k, (n - k) * sizeof(T));
    best[1] = S::max16(best[1], S::abs16(padded));
  }
  const uint32_t winner = S::reduce_max16(S::max16(S::max16(best[0], best[1]), S::max16(best[2], best[3])));
  return bits_of(to_float(T{static_cast<uint16_t>(winner)}));
}

inline void prefetch(const void* p, int bytes) {
  for (int b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
}

// q = round(x * inv). Saturating at +-127 costs a tenth of the time and is only needed under a given scale: an inverse
// that came from the absmax of x leaves |x * inv| < 127.5. next, where given, is fetched into the cache meanwhile.
template <class S, bool Saturate, class T>
void quantize_span(const T* x, int64_t n, float inv, int8_t* q, const T* next = nullptr) {
  constexpr int W = S::kWidth;
  const typename S::F factor = S::set1(inv);
  const auto code = [&](typename S::F v) {
    v = S::mul(v, factor);
    return S::round(Saturate ? S::clamp(v, -127.0f, 127.0f) : v);
  };
  int64_t k = 0;
  for (; k + 4 * W <= n; k += 4 * W) {
    typename S::I line[4];
    if (next != nullptr) prefetch(next + k, 4 * W * sizeof(T));
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) line[j] = code(S::load(x + k + j * W));
    S::store_i8(q + k, line);
  }
  for (; k + W <= n; k += W) S::store_i8(q + k, code(S::load(x + k)));
  if (k < n) {
    const int rest = static_cast<int>(n - k);
    S::store_i8_tail(q + k, code(S::load_tail(x + k, rest)), rest);
  }
}

// The uniform numbers of up to kChunk elements that begin anywhere.
template <class S>
class UniformChunk {
 public:
  static constexpr int kChunk = 256;

  // Returns the number of element first; those of the n - 1 elements after it follow. The counters start at offset.
  const float* fill(int64_t first, int n, PhiloxKey key, uint64_t offset = 0) {
    const uint64_t counter = offset + (static_cast<uint64_t>(first) >> 2);
    const int skip = static_cast<int>(first & 3);
    for (int k = 0; k < skip + n; k += S::kUniforms) S::uniforms(counter + (k >> 2), key, buffer_ + k);
    return buffer_ + skip;
  }

 private:
  alignas(64) float buffer_[kChunk + 2 * S::kUniforms];
};

// q = floor(x * inv + u), saturating at +-127; first is the index of x[0] among the elements of the whole tensor.
// The product and the sum round separately: the library is built with -ffp-contract=off.
template <class S, class T>
void quantize_span_stochastic(const T* x, int64_t n, float inv, int64_t first, PhiloxKey key, int8_t* q) {
  constexpr int W = S::kWidth;
  using Chunk = UniformChunk<S>;
  const typename S::F factor = S::set1(inv);
  const auto code = [&](typename S::F v, typename S::F u) {
    return S::floor(S::clamp(S::add(S::mul(v, factor), u), -127.0f, 127.0f));
  };
  Chunk chunk;
  for (int64_t begin = 0; begin < n; begin += Chunk::kChunk) {
    const int count = static_cast<int>(std::min<int64_t>(Chunk::kChunk, n - begin));
    const float* u = chunk.fill(first + begin, count, key);
    int k = 0;
    for (; k + W <= count; k += W) S::store_i8(q + begin + k, code(S::load(x + begin + k), S::load(u + k)));
    if (k < count) {
      const int rest = count - k;
      S::store_i8_tail(q + begin + k, code(S::load_tail(x + begin + k, rest), S::load_tail(u + k, rest)), rest);
    }
  }
}

}  // namespace
}  // namespace pykernels::cpu
