// State in 8 bits, block by block: _optimizer_codes.py's decode and encode.
#pragma once

#include "optimizer_convert.h"
#include "optimizer_kernels.h"
#include "optimizer_rules.h"

namespace pykernels::cpu {
namespace {

constexpr float kSignedTop = 127.0f * 127.0f;
constexpr float kUnsignedTop = 255.0f;
constexpr float kTiny = 0x1p-100f;

// n integers of 8 bits, at most a vector.
template <class S, class T>
inline typename S::I load_8(const T* from, int n) {
  if (n == S::kWidth) return S::load(from);
  T padded[S::kWidth] = {};
  std::memcpy(padded, from, n);
  return S::load(padded);
}

// The scale of a block and what its values are multiplied by; an inverse of 0 makes all its codes 0.
struct BlockScale {
  float scale;
  float inverse;

  BlockScale(uint32_t absmax_bits, float top) {
    const float absmax = float_of(absmax_bits);
    const bool finite = absmax_bits < 0x7f800000u;
    inverse = finite && absmax >= kTiny ? top / absmax : 0.0f;
    scale = absmax < kTiny ? 0.0f : absmax;
  }
};

// exact + dither / 2^24, whose product is exact: fused or not is one.
template <class S>
inline typename S::F add_dither(typename S::F exact, typename S::F dither) {
  return S::fma(dither, S::set1(0x1p-24f), exact);
}

// The code of v, at most 128, which is stored as 127; inverse is 127^2 / absmax.
template <class S>
inline typename S::I signed_code(typename S::F v, typename S::F inverse, typename S::F dither) {
  const typename S::F exact = S::sqrt(S::mul(S::abs(v), inverse));
  return S::truncate_as(add_dither<S>(exact, dither), v);
}

template <class S>
inline typename S::I encode_signed(typename S::F v, typename S::F inverse, typename S::F dither) {
  return S::max(S::min(signed_code<S>(v, inverse, dither), S::set1(127)), S::set1(-127));
}

// The code of a root, at least 1 where it is above 0, at most 256, which is stored as 255; inverse is 255 / max.
template <class S>
inline typename S::I encode_unsigned(typename S::F root, typename S::F inverse, typename S::F dither) {
  const typename S::F exact = S::mul(root, inverse);
  return S::max(S::truncate(add_dither<S>(exact, dither)), S::min(S::bits(exact), S::set1(1)));
}

// The states of an algorithm in codes, a block at a time. A step decodes them as it loads; what it stores waits in
// scratch (second moments as their roots) until the block's maximum is known.
template <class S, Algorithm A>
struct CodeStates {
  using F = typename S::F;
  using I = typename S::I;

  const char* codes[kMostSlots];
  float* value[kMostSlots];
  F step[kMostSlots];
  I most[kMostSlots];

  // Block b of the tensor, whose first code is number `at`.
  CodeStates(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t b, int64_t at, float* scratch) {
    for (int j = 0; j < kMostSlots; ++j) {
      most[j] = S::zero();
      if (j >= rule.slots) continue;
      codes[j] = static_cast<const char*>(tensor.state[j]) + at;
      value[j] = scratch + j * optimizer_scratch(rule);
      step[j] = S::set1(tensor.scale[j][b] / (slot_is_signed(A, j) ? kSignedTop : kUnsignedTop));
    }
  }

  template <int slot>
  F load(int64_t k, int n) const {
    if constexpr (slot_is_signed(A, slot)) {
      const F c = S::to_float(load_8<S>(reinterpret_cast<const int8_t*>(codes[slot]) + k, n));
      return S::mul(S::mul(c, S::abs(c)), step[slot]);
    } else {
      const F c = S::to_float(load_8<S>(reinterpret_cast<const uint8_t*>(codes[slot]) + k, n));
      const F root = S::mul(c, step[slot]);
      return S::mul(root, root);
    }
  }

  template <int slot>
  void store(int64_t k, F v, int n) {
    if constexpr (!slot_is_signed(A, slot)) v = S::sqrt(v);
    if (n < S::kWidth) {
      float padded[S::kWidth] = {};
      S::store_tail(padded, v, n);
      v = S::load(padded);
    }
    S::store(value[slot] + k, v);
    most[slot] = S::max(most[slot], S::abs_bits(v));
  }

  template <int slot>
  static I encode(const float* value, int64_t k, F inverse, F dither) {
    const F v = S::load(value + k);
    if constexpr (slot_is_signed(A, slot)) {
      return encode_signed<S>(v, inverse, dither);
    } else {
      return encode_unsigned<S>(v, inverse, dither);
    }
  }

  // Writes codes and scales of the n elements.
  void finish(const OptimizerRule& rule, const OptimizerTensor& tensor, int64_t b, int64_t at, int64_t n,
              Dither<S> dither) const {
    float inverse[kMostSlots] = {};
    char* out[kMostSlots] = {};
    for (int j = 0; j < rule.slots; ++j) {
      const BlockScale block(S::reduce_max(most[j]), slot_is_signed(A, j) ? kSignedTop : kUnsignedTop);
      tensor.scale[j][b] = block.scale;
      inverse[j] = block.inverse;
      out[j] = static_cast<char*>(tensor.state[j]) + at;
    }
    constexpr int kGroup = 4 * S::kWidth;
    int64_t k = 0;
    for (; k + kGroup <= n; k += kGroup) {
      F d[4];
      for (F& each : d) each = dither.next_float();
      group<0>(rule, out, inverse, k, d), group<1>(rule, out, inverse, k, d), group<2>(rule, out, inverse, k, d);
    }
    for (; k < n; k += S::kWidth) {
      const F d = dither.next_float();
      const int rest = static_cast<int>(std::min<int64_t>(S::kWidth, n - k));
      single<0>(rule, out, inverse, k, d, rest), single<1>(rule, out, inverse, k, d, rest);
      single<2>(rule, out, inverse, k, d, rest);
    }
    for (int j = 0; j < rule.slots; ++j)
      if (inverse[j] == 0.0f) std::memset(out[j], 0, n);
  }

 private:
  template <int slot>
  void group(const OptimizerRule& rule, char* const* out, const float* inverse, int64_t k, const F (&d)[4]) const {
    if (slot >= rule.slots) return;
    const F by = S::set1(inverse[slot]);
    I code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code[i] = encode<slot>(value[slot], k + i * S::kWidth, by, d[i]);
    if constexpr (slot_is_signed(A, slot)) {
      S::store_i8(reinterpret_cast<int8_t*>(out[slot]) + k, code);
    } else {
      S::store_u8(reinterpret_cast<uint8_t*>(out[slot]) + k, code);
    }
  }

  template <int slot>
  void single(const OptimizerRule& rule, char* const* out, const float* inverse, int64_t k, F d, int n) const {
    if (slot >= rule.slots) return;
    const I code = encode<slot>(value[slot], k, S::set1(inverse[slot]), d);
    char padded[S::kWidth];
    if constexpr (slot_is_signed(A, slot)) {
      S::store_i8(reinterpret_cast<int8_t*>(padded), code);
    } else {
      S::store_u8(reinterpret_cast<uint8_t*>(padded), S::min(code, S::set1(255)));
    }
    std::memcpy(out[slot] + k, padded, n);
  }
};

}  // namespace
}  // namespace pykernels::cpu
