// CUDA's scalar intrinsics on the CPU: each rounded by itself, to nearest even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace pykernels::cuda {

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 v;
  std::memcpy(&v, &bits, 2);
  return static_cast<float>(v);
}
inline uint16_t float_to_half(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline uint16_t float_to_bfloat16(float v) {
  if (std::isnan(v)) return 0x7fff;
  const uint32_t bits = float_to_bits(v);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return out;
}
inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
  const uint16_t low = float_to_half(half_to_float(static_cast<uint16_t>(a)) - half_to_float(static_cast<uint16_t>(b)));
  const uint16_t high = float_to_half(half_to_float(a >> 16) - half_to_float(b >> 16));
  return low | static_cast<uint32_t>(high) << 16;
}
inline uint32_t subtract_bfloat2(uint32_t a, uint32_t b) {
  const uint16_t low = float_to_bfloat16(bits_to_float(a << 16) - bits_to_float(b << 16));
  const uint16_t high = float_to_bfloat16(bits_to_float(a & 0xffff0000u) - bits_to_float(b & 0xffff0000u));
  return low | static_cast<uint32_t>(high) << 16;
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __ll2float_rn(int64_t v) { return static_cast<float>(v); }
inline int saturate(double v) {
  return std::isnan(v) ? 0 : static_cast<int>(std::clamp(v, -2147483648.0, 2147483647.0));
}
inline int __float2int_rn(float v) { return saturate(std::nearbyint(static_cast<double>(v))); }
inline int __float2int_rd(float v) { return saturate(std::floor(static_cast<double>(v))); }

}  // namespace pykernels::cuda
