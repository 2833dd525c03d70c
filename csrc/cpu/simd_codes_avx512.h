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
    const I c = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const I square = _mm512_mullo_epi16(c, _mm512_abs_epi16(c));
    return {to_float(_mm512_madd_epi16(square, set1(1))), to_float(_mm512_srai_epi32(square, 16))};
  }
  template <class T>
  static Two load2_codes(const uint8_t* p) {
    if constexpr (!kEvenOdd<T>) return {to_float(load(p)), to_float(load(p + kWidth))};
    const I both = load(reinterpret_cast<const uint16_t*>(p));
    return {to_float(_mm512_and_si512(both, set1(255))), to_float(_mm512_srli_epi32(both, 8))};
  }

  template <class T>
  static void store4_codes(int8_t* p, const I (&v)[4]) {
    const I packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    store_packed<T>(p, _mm512_max_epi8(packed, _mm512_set1_epi8(-127)));
  }
  template <class T>
  static void store4_codes(uint8_t* p, const I (&v)[4], const I (&least)[4]) {
    const I packed = _mm512_packus_epi16(_mm512_packus_epi32(v[0], v[1]), _mm512_packus_epi32(v[2], v[3]));
    const I some = _mm512_packus_epi16(_mm512_packs_epi32(least[0], least[1]), _mm512_packs_epi32(least[2], least[3]));
    store_packed<T>(p, _mm512_max_epu8(packed, _mm512_min_epu8(some, _mm512_set1_epi8(1))));
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
  template <class T>
  static void store_packed(void* p, I packed) {
    if constexpr (kEvenOdd<T>) {
      const __m128i pairs = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
      packed = _mm512_shuffle_epi8(packed, _mm512_broadcast_i32x4(pairs));
      packed = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
    } else {
      const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      packed = _mm512_permutexvar_epi32(order, packed);
    }
    _mm512_storeu_si512(p, packed);
  }
};

}  // namespace
}  // namespace pykernels::cpu
