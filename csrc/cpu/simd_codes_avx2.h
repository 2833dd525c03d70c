// The vectors of simd_random_avx2.h, and two at a time what AdamW with 8-bit state reads and writes, in the order in
// which load2 brings elements of the parameters' type T.
#pragma once

#include "simd_random_avx2.h"

namespace pykernels::cpu {
namespace {

struct Avx2Codes : Avx2Random {
  // Even elements and then odd ones, not one half after the other.
  template <class T>
  static constexpr bool kEvenOdd = std::is_same_v<T, bf16>;
  struct TwoI {
    I a, b;
  };

  // c |c| of each code c.
  template <class T>
  static Two load2_squares(const int8_t* p) {
    constexpr int8_t z = -1;
    const I order = kEvenOdd<T> ? _mm256_setr_epi8(z, 0, z, 1, z, 2, z, 3, z, 4, z, 5, z, 6, z, 7, z, 8, z, 9, z, 10, z,
                                                   11, z, 12, z, 13, z, 14, z, 15)
                                : _mm256_setr_epi8(z, 0, z, 8, z, 1, z, 9, z, 2, z, 10, z, 3, z, 11, z, 4, z, 12, z, 5,
                                                   z, 13, z, 6, z, 14, z, 7, z, 15);
    const I c = _mm256_srai_epi16(_mm256_shuffle_epi8(load_twice(p), order), 8);
    const I square = _mm256_mullo_epi16(c, _mm256_abs_epi16(c));
    return {_mm256_cvtepi32_ps(_mm256_madd_epi16(square, _mm256_set1_epi32(1))),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(square, 16))};
  }
  template <class T>
  static Two load2_codes(const uint8_t* p) {
    const I both = load_twice(p);
    constexpr int k = kEvenOdd<T> ? 2 : 1;
    return {dwords_of<k>(both, 0), dwords_of<k>(both, kEvenOdd<T> ? 1 : 8)};
  }

  // 4 * kWidth codes, two pairs of vectors; 128 is stored as 127, and -128 as -127.
  template <class T>
  static void store4_codes(int8_t* p, const I (&v)[4]) {
    const I packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    store_packed<T>(p, _mm256_max_epi8(packed, _mm256_set1_epi8(-127)));
  }
  // 256 is stored as 255, and 0 as 1 where least, the bits of a float that is not negative, are not 0.
  template <class T>
  static void store4_codes(uint8_t* p, const I (&v)[4], const I (&least)[4]) {
    const I packed = _mm256_packus_epi16(_mm256_packus_epi32(v[0], v[1]), _mm256_packus_epi32(v[2], v[3]));
    const I some = _mm256_packus_epi16(_mm256_packs_epi32(least[0], least[1]), _mm256_packs_epi32(least[2], least[3]));
    store_packed<T>(p, _mm256_max_epu8(packed, _mm256_min_epu8(some, _mm256_set1_epi8(1))));
  }

  // The float32 of 2 * kWidth bfloat16 values and the low halves that split_master keeps.
  static Two load2_split(const uint16_t* high, const uint16_t* low) {
    const I h = _mm256_loadu_si256(reinterpret_cast<const I*>(high));
    const I l = _mm256_loadu_si256(reinterpret_cast<const I*>(low));
    const I even = _mm256_add_epi32(_mm256_slli_epi32(h, 16), _mm256_madd_epi16(l, _mm256_set1_epi32(1)));
    const I odd = _mm256_add_epi32(_mm256_blend_epi16(zero(), h, 0xaa), _mm256_srai_epi32(l, 16));
    return {from_bits(even), from_bits(odd)};
  }
  // The upper and the lower halves of words in the order of bfloat16.
  static void store2_high(uint16_t* p, I a, I b) {
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa));
  }
  static void store2_low(uint16_t* p, I a, I b) {
    _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa));
  }

  static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }

 private:
  static I load_twice(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  // Bytes first, first + k, ... of 16 as floats.
  template <int k>
  static F dwords_of(I both, int first) {
    const auto at = [&](int i) { return first + k * i; };
    const I order = _mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
    const I rest = _mm256_set1_epi32(static_cast<int>(0x80808000));
    return to_float(_mm256_shuffle_epi8(both, _mm256_or_si256(order, rest)));
  }
  template <class T>
  static void store_packed(void* p, I packed) {
    if constexpr (kEvenOdd<T>) {
      const __m128i pairs = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
      packed = _mm256_shuffle_epi8(packed, _mm256_broadcastsi128_si256(pairs));
      packed = _mm256_permute4x64_epi64(packed, 0xd8);
    } else {
      packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    _mm256_storeu_si256(static_cast<I*>(p), packed);
  }
};

}  // namespace
}  // namespace pykernels::cpu
