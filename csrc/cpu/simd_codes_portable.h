// As simd_codes_avx2.h, on the vectors of simd_portable.h: every type takes the same order.
#pragma once

#include "simd_portable.h"

namespace pykernels::cpu {
namespace {

struct PortableCodes : Portable {
  template <class T>
  static constexpr bool kEvenOdd = false;
  struct TwoI {
    I a, b;
  };

  template <class T>
  static Two load2_squares(const int8_t* p) {
    const F a = to_float(load(p)), b = to_float(load(p + kWidth));
    return {a * abs(a), b * abs(b)};
  }
  template <class T>
  static Two load2_codes(const uint8_t* p) {
    return {to_float(load(p)), to_float(load(p + kWidth))};
  }

  template <class T>
  static void store4_codes(int8_t* p, const I (&v)[4]) {
    for (int i = 0; i < 4; ++i) store_i8(p + i * kWidth, max(min(v[i], set1(127)), set1(-127)));
  }
  template <class T>
  static void store4_codes(uint8_t* p, const I (&v)[4], const I (&least)[4]) {
    for (int i = 0; i < 4; ++i) store_u8(p + i * kWidth, min(max(v[i], min(least[i], set1(1))), set1(255)));
  }

  static Two load2_split(const uint16_t* high, const uint16_t* low) {
    const int16_t* rest = reinterpret_cast<const int16_t*>(low);
    return {from_bits((load(high) << 16) + load(rest)), from_bits((load(high + kWidth) << 16) + load(rest + kWidth))};
  }
  static void store2_high(uint16_t* p, I a, I b) {
    store_u16(p, shift_right<16>(a)), store_u16(p + kWidth, shift_right<16>(b));
  }
  static void store2_low(uint16_t* p, I a, I b) { store_u16(p, a & 0xffff), store_u16(p + kWidth, b & 0xffff); }

  static I max_unsigned(I a, I b) { return reinterpret_cast<U>(a) > reinterpret_cast<U>(b) ? a : b; }
};

}  // namespace
}  // namespace pykernels::cpu
