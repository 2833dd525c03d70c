// As simd_codes_avx2.h, on the vectors of simd_random_avx512.h.
#pragma once

#include "simd_random_avx512.h"

namespace pykernels::cpu {
namespace {

struct Avx512Codes : Avx512Random {
  template <class T>
  static constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
  struct TwoI {
    I a, b;
  };

  template <class T>
  static Two load2_squares(const int8_t* p) {
    if constexpr (!kEvenOdd<T>) return {square(load(p)), square(load(p + kWidth))};
    const I both = load(reinterpret_cast<const uint16_t*>(p));
    return {square(_mm512_srai_epi32(_mm512_slli_epi32(both, 24), 24)),
            square(_mm512_srai_epi32(_mm512_slli_epi32(both, 16), 24))};
  }
  template <class T>
  static Two load2_codes(const uint8_t* p) {
    if constexpr (!kEvenOdd<T>) return {to_float(load(p)), to_float(load(p + kWidth))};
    const I both = load(reinterpret_cast<const uint16_t*>(p));
    return {to_float(_mm512_and_si512(both, set1(255))), to_float(_mm512_srli_epi32(both, 8))};
  }

  template <class T>
  static void store4_codes(int8_t* p, const I (&v)[4]) {
    I code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code[i] = max(min(v[i], set1(127)), set1(-127));
    if constexpr (!kEvenOdd<T>) return store_i8(p, code);
    store_pairs(p, code);
  }
  template <class T>
  static void store4_codes(uint8_t* p, const I (&v)[4], const I (&least)[4]) {
    I code[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) code[i] = min(max(v[i], min(least[i], set1(1))), set1(255));
    if constexpr (!kEvenOdd<T>) return store_u8(p, code);
    store_pairs(p, code);
  }

  static Two load2_split(const uint16_t* high, const uint16_t* low) {
    const I h = _mm512_loadu_si512(high), l = _mm512_loadu_si512(low);
    const I even = _mm512_add_epi32(_mm512_slli_epi32(h, 16), _mm512_srai_epi32(_mm512_slli_epi32(l, 16), 16));
    const I upper = _mm512_and_si512(h, set1(static_cast<int32_t>(0xffff0000)));
    return {from_bits(even), from_bits(_mm512_add_epi32(upper, _mm512_srai_epi32(l, 16)))};
  }
  static void store2_high(uint16_t* p, I a, I b) {
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
  }
  static void store2_low(uint16_t* p, I a, I b) {
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)));
  }

  static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }

 private:
  static F square(I c) { return to_float(_mm512_mullo_epi32(c, _mm512_abs_epi32(c))); }
  // The low bytes of even and odd elements.
  static void store_pairs(void* p, const I (&code)[4]) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const I even = _mm512_and_si512(code[2 * i], set1(255));
      const I both = _mm512_or_si512(even, _mm512_slli_epi32(code[2 * i + 1], 8));
      _mm256_storeu_si256(static_cast<__m256i*>(p) + i, _mm512_cvtepi32_epi16(both));
    }
  }
};

}  // namespace
}  // namespace pykernels::cpu
