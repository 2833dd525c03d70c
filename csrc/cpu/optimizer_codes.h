// State in 8 bits, block by block: _optimizer_codes.py's decode and encode.
#pragma once

#include "optimizer_convert.h"

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

// sign(c) (c / 127)^2 scale; step is scale / 127^2.
template <class S>
inline typename S::F decode_signed(typename S::I code, typename S::F step) {
  const typename S::F c = S::to_float(code);
  return S::mul(S::mul(c, S::abs(c)), step);
}

// (c / 255 scale)^2; step is scale / 255.
template <class S>
inline typename S::F decode_unsigned(typename S::I code, typename S::F step) {
  const typename S::F root = S::mul(S::to_float(code), step);
  return S::mul(root, root);
}

template <class S>
void decode_block(bool is_signed, const void* codes, float scale, int64_t n, float* out) {
  const typename S::F step = S::set1(scale / (is_signed ? kSignedTop : kUnsignedTop));
  for (int64_t k = 0; k < n; k += S::kWidth) {
    const int count = static_cast<int>(std::min<int64_t>(S::kWidth, n - k));
    S::store(out + k, is_signed ? decode_signed<S>(load_8<S>(static_cast<const int8_t*>(codes) + k, count), step)
                                : decode_unsigned<S>(load_8<S>(static_cast<const uint8_t*>(codes) + k, count), step));
  }
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

template <class S>
inline typename S::F dither_float(typename S::I word) {
  return S::mul(S::to_float(S::template shift_right<8>(word)), S::set1(0x1p-24f));
}

// The code of |v|, with the sign of v; inverse is 127^2 / absmax.
template <class S>
inline typename S::I encode_signed(typename S::F v, typename S::F inverse, typename S::F dither) {
  const typename S::F exact = S::sqrt(S::mul(S::abs(v), inverse));
  return S::truncate(S::copy_sign(S::min(S::add(exact, dither), S::set1(127.0f)), v));
}

// The code of a root; at least 1 where it is above 0. inverse is 255 / max.
template <class S>
inline typename S::I encode_unsigned(typename S::F root, typename S::F inverse, typename S::F dither) {
  const typename S::F exact = S::mul(root, inverse);
  const typename S::I code = S::truncate(S::min(S::add(exact, dither), S::set1(255.0f)));
  return S::max(code, S::min(S::bits(exact), S::set1(1)));
}

template <class S>
inline void store_codes(bool is_signed, void* codes, int64_t k, typename S::I code, int n) {
  uint8_t padded[S::kWidth];
  uint8_t* out = n == S::kWidth ? static_cast<uint8_t*>(codes) + k : padded;
  is_signed ? S::store_i8(reinterpret_cast<int8_t*>(out), code) : S::store_u8(out, code);
  if (n < S::kWidth) std::memcpy(static_cast<uint8_t*>(codes) + k, padded, n);
}

// n values, a block, with room for a whole last vector, whose elements beyond n are overwritten.
template <class S>
void encode_block(bool is_signed, float* value, int64_t n, Dither<S> dither, void* codes, float* scale) {
  for (int64_t k = n; k % S::kWidth != 0; ++k) value[k] = 0.0f;
  typename S::I most = S::zero();
  for (int64_t k = 0; k < n; k += S::kWidth) {
    typename S::F v = S::load(value + k);
    if (!is_signed) S::store(value + k, v = S::sqrt(v));
    most = S::max(most, S::abs_bits(v));
  }
  const BlockScale block(S::reduce_max(most), is_signed ? kSignedTop : kUnsignedTop);
  *scale = block.scale;
  if (block.inverse == 0.0f) {
    std::memset(codes, 0, n);
    return;
  }
  const typename S::F inverse = S::set1(block.inverse);
  for (int64_t k = 0; k < n; k += S::kWidth) {
    const typename S::F v = S::load(value + k), d = dither_float<S>(dither.next());
    const int count = static_cast<int>(std::min<int64_t>(S::kWidth, n - k));
    store_codes<S>(is_signed, codes, k, is_signed ? encode_signed<S>(v, inverse, d) : encode_unsigned<S>(v, inverse, d),
                   count);
  }
}

}  // namespace
}  // namespace pykernels::cpu
